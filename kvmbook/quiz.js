// The view of kvmbook.quiz.Quiz: options, and a button that reveals the answer.
let count = 0;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function render({ model, el }) {
  const group = `kvmbook-quiz-${count++}-${Math.random().toString(36).slice(2)}`;
  const answer = model.get("answer"), because = model.get("because");
  const fieldset = element("fieldset", {}, element("legend", {}, model.get("asked")));
  const readout = element("p", { class: "kvmbook-readout", role: "status", "aria-live": "polite" });
  // JupyterLab would take some keys for itself, but for the attribute.
  const reveal = element("button", { type: "button", "data-lm-suppress-shortcuts": "true" }, "Reveal");
  for (const option of model.get("options")) {
    const input = element("input", { type: "radio", name: group, value: option, "data-lm-suppress-shortcuts": "true" });
    input.addEventListener("change", () => { reveal.disabled = false; });
    fieldset.append(element("label", {}, input, element("span", {}, option)));
  }
  reveal.addEventListener("click", () => {
    model.set("predicted", fieldset.querySelector("input:checked").value);
    model.save_changes();
    draw();
  });

  function draw() {
    const predicted = model.get("predicted");
    for (const input of fieldset.querySelectorAll("input")) if (input.value === predicted) input.checked = true;
    reveal.disabled = !fieldset.querySelector("input:checked");
    const verdict = predicted === answer ? "Yes: " : `You said: ${predicted}. The model says: `;
    readout.textContent = predicted ? `${verdict}${answer}. ${because}` : "";
  }

  el.classList.add("kvmbook-panel", "kvmbook-quiz");
  el.append(fieldset, reveal, readout, element("p", { class: "kvmbook-paper" }, `Answer: ${answer}. ${because}`));
  model.on("change:predicted", draw);
  draw();
  return () => model.off("change:predicted", draw);
}

export default { render };
