// The view of kvmbook.views.Panel: radio groups, a figure, a sentence. It works from the states that the widget carries;
// one that is not there yet is asked of Python by setting `chosen`.
function render({ model, el }) {
  const settings = model.get("settings");
  const groups = settings.map(({ name, options }) => radioGroup(name, options, (option) => {
    model.set("chosen", { ...model.get("chosen"), [name]: option });
    model.save_changes();
    draw();
  }));
  const figure = element("div", { class: "kvmbook-figure" });
  const readout = readoutLine();

  function draw() {
    const chosen = settings.map(({ name }) => model.get("chosen")[name]);
    groups.forEach((group, i) => check(group, chosen[i]));
    const state = model.get("states")[figure.dataset.state = chosen.join(" | ")];
    figure.innerHTML = state ? state.svg : "";
    readout.textContent = state ? state.readout : "computing: this needs a running kernel";
  }

  el.classList.add("kvmbook-panel");
  el.append(element("p", { class: "kvmbook-title" }, model.get("title")), element("div", { class: "kvmbook-controls" }, ...groups), figure, readout);
  model.on("change:chosen change:states", draw);
  draw();
  return () => model.off("change:chosen change:states", draw);
}

export default { render };
