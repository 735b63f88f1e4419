// Starts the deck. Arrow keys go on and back, but inside a panel they are the panel's: Tab enters one, Esc leaves it.
Reveal.initialize({
  width: 1280, height: 720, margin: 0, minScale: 0.1, maxScale: 4, center: false,
  controls: true, progress: true, hash: true, slideNumber: "c/t", transition: "none",
  backgroundTransition: "none", plugins: [RevealNotes],
});

{
  const slides = document.querySelector(".slides");
  const panelOf = (target) => target.closest(".jupyter-widgets");

  slides.addEventListener("keydown", (event) => {
    if (!panelOf(event.target)) return;
    if (event.key === "PageDown" || event.key === "PageUp") {  // what a presenter's remote control sends
      event.preventDefault();
      event.key === "PageDown" ? Reveal.next() : Reveal.prev();
    } else if (event.key === "Escape") {
      event.target.blur();
    }
    event.stopPropagation();
  });

  Reveal.on("ready", () => document.querySelector(".reveal .controls").setAttribute("role", "presentation"));
  Reveal.on("slidechanged", () => {
    document.activeElement.blur();
    document.dispatchEvent(new PointerEvent("pointerdown"));  // as a click elsewhere: what a word means is shown no longer
  });

  // After a click with the mouse the keys steer the deck again, unless there is something to type.
  slides.addEventListener("click", (event) => {
    const panel = panelOf(event.target), focused = document.activeElement;
    const typing = focused.matches("input:not([type=radio], [type=range], [type=checkbox]), textarea");
    if (event.detail > 0 && panel?.contains(focused) && !typing) focused.blur();
  });
}
