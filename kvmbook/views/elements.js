// What every view is built of; kvmbook.views puts it before each view's own script.
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };  // JupyterLab would take some keys for itself

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function button(said, act) {
  const made = element("button", { type: "button", ...OWN_KEYS }, said);
  made.addEventListener("click", act);
  return made;
}

// A fieldset of radio buttons; choose(option) is called when the reader has chosen one.
function radioGroup(legend, options, choose) {
  const group = `kvmbook-${Math.random().toString(36).slice(2)}`;
  const fieldset = element("fieldset", {}, element("legend", {}, legend));
  for (const option of options) {
    const input = element("input", { type: "radio", name: group, value: option, ...OWN_KEYS });
    input.addEventListener("change", () => choose(option));
    fieldset.append(element("label", {}, input, element("span", {}, option)));
  }
  return fieldset;
}

// Mark an option as chosen; none if it is none of them.
function check(fieldset, option) {
  for (const input of fieldset.querySelectorAll("input")) input.checked = input.value === option;
}

const readoutLine = () => element("p", { class: "kvmbook-readout", role: "status", "aria-live": "polite" });

