// The view of kvmbook.panels.Panel: radio groups, a figure, a sentence. It works from the states that the widget carries;
// one that is not there yet is asked of Python by setting `chosen`.
let count = 0;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function render({ model, el }) {
  const group = `kvmbook-panel-${count++}-${Math.random().toString(36).slice(2)}`;
  const settings = model.get("settings");
  const figure = element("div", { class: "kvmbook-figure" });
  const readout = element("p", { class: "kvmbook-readout", role: "status", "aria-live": "polite" });
  const controls = element("div", { class: "kvmbook-controls" });

  for (const { name, options } of settings) {
    const fieldset = element("fieldset", {}, element("legend", {}, name));
    for (const option of options) {
      // JupyterLab would take the arrow keys for itself, but for the last attribute.
      const input = element("input", {
        type: "radio", name: `${group}-${name}`, value: option, "data-lm-suppress-shortcuts": "true",
      });
      input.addEventListener("change", () => {
        model.set("chosen", { ...model.get("chosen"), [name]: option });
        model.save_changes();
        draw();
      });
      fieldset.append(element("label", {}, input, element("span", {}, option)));
    }
    controls.append(fieldset);
  }

  function draw() {
    const chosen = model.get("chosen");
    for (const input of controls.querySelectorAll("input")) {
      const name = input.closest("fieldset").querySelector("legend").textContent;
      input.checked = chosen[name] === input.value;
    }
    const key = settings.map(({ name }) => chosen[name]).join(" | ");
    const state = model.get("states")[key];
    figure.dataset.state = key;
    if (state) {
      figure.innerHTML = state.svg;
      readout.textContent = state.readout;
    } else {
      figure.replaceChildren();
      readout.textContent = "computing: this needs a running kernel";
    }
  }

  el.classList.add("kvmbook-panel");
  el.append(element("p", { class: "kvmbook-title" }, model.get("title")), controls, figure, readout);
  model.on("change:chosen", draw);
  model.on("change:states", draw);
  draw();
  return () => {
    model.off("change:chosen", draw);
    model.off("change:states", draw);
  };
}

export default { render };
