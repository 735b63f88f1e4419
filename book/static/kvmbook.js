// Opens what is folded, in the function map, for whoever comes for something in it: by a link, by a search of the book, to print.
// Marks what a search looked for also in names, which have places to break and so are no one text for Sphinx.
(() => {
  const folds = () => [...document.querySelectorAll("details.kvmbook-fold")];
  const sought = localStorage.getItem("sphinx_highlight_terms") ?? new URL(location).searchParams.get("highlight") ?? "";
  const words = sought.toLowerCase().split(/\s+/).filter(Boolean);

  const openTarget = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = target?.closest("details.kvmbook-fold") ?? target?.querySelector(":scope > details.kvmbook-fold");
    if (!fold) return;
    fold.open = true;
    target.scrollIntoView();
  };
  const markNames = () => {
    for (const name of document.querySelectorAll("article code:has(wbr)")) {
      if (words.some((word) => name.textContent.toLowerCase().includes(word))) name.classList.add("highlighted");
    }
  };
  addEventListener("load", () => {
    markNames();
    for (const fold of folds()) if (words.length && fold.querySelector(".highlighted")) fold.open = true;
    openTarget();
  });
  addEventListener("hashchange", openTarget);
  addEventListener("beforeprint", () => folds().forEach((fold) => (fold.open = true)));
})();
