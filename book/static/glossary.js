// Shows what a word of the glossary means, in the box that the page carries for it: under the pointer, at the focus, at the
// first tap (the second follows the link). The box stays while the pointer is on it, and closes with Escape.
(() => {
  const LEAVE = 300; // milliseconds in which a pointer may go from the word to its box
  let word = null; // whose box is shown
  let leaving = 0;

  const boxOf = (of) => document.getElementById(`word-${of.dataset.word}`);

  const place = () => {
    const lines = word.getClientRects();
    const [first, last] = [lines[0], lines[lines.length - 1]];
    if (!first || last.bottom < 0 || first.top > innerHeight) return hide();
    const box = boxOf(word);
    const [across, down] = [document.documentElement.clientWidth - box.offsetWidth - 8, box.offsetHeight];
    box.style.left = `${Math.max(8, Math.min(last.left, across))}px`;
    box.style.top = `${last.bottom + down < innerHeight ? last.bottom : Math.max(0, first.top - down)}px`;
  };
  const hide = () => {
    clearTimeout(leaving);
    if (word) boxOf(word).hidden = true;
    word = null;
  };
  const show = (of) => {
    if (word !== of) hide();
    clearTimeout(leaving);
    word = of;
    boxOf(of).hidden = false;
    place();
  };
  const leave = () => {
    clearTimeout(leaving);
    if (word === document.activeElement) return; // the keyboard is there
    leaving = setTimeout(hide, LEAVE);
  };
  const byMouse = (action) => (event) => event.pointerType !== "touch" && action();

  const begin = () => {
    const words = [...document.querySelectorAll("[data-word]")].filter(boxOf);
    for (const each of words) {
      const box = boxOf(each);
      let firstTap = false;
      each.setAttribute("aria-describedby", box.id);
      each.addEventListener("pointerenter", byMouse(() => show(each)));
      each.addEventListener("pointerleave", byMouse(leave));
      each.addEventListener("focus", () => show(each));
      each.addEventListener("blur", leave);
      each.addEventListener("pointerdown", (event) => (firstTap = event.pointerType === "touch" && word !== each));
      each.addEventListener("click", (event) => {
        if (firstTap) event.preventDefault(), show(each);
        firstTap = false;
      });
    }
    for (const box of new Set(words.map(boxOf))) {
      box.addEventListener("pointerenter", () => clearTimeout(leaving));
      box.addEventListener("pointerleave", byMouse(leave));
    }
    document.addEventListener("pointerdown", (event) => {
      if (word && !word.contains(event.target) && !boxOf(word).contains(event.target)) hide();
    });
    addEventListener("keydown", (event) => {
      if (!word || event.key !== "Escape") return;
      hide();
      event.stopPropagation(); // a deck would show all its slides
    }, true);
    for (const moved of ["scroll", "resize"]) addEventListener(moved, () => word && place(), true);
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", begin);
  else begin();
})();
