// The view of kvmbook.views.quiz.Quiz: options, and a button that reveals the answer.
function render({ model, el }) {
  const answer = model.get("answer"), because = model.get("because");
  let chosen = model.get("predicted");
  const options = radioGroup(model.get("asked"), model.get("options"), (option) => {
    chosen = option;
    predict("");  // what was revealed is not about this option
  });
  const reveal = button("Reveal", () => predict(chosen));
  const readout = readoutLine();

  function predict(option) {
    model.set("predicted", option);
    model.save_changes();
    draw();
  }

  function draw() {
    const predicted = model.get("predicted");
    if (predicted) check(options, chosen = predicted);
    reveal.disabled = !chosen;
    readout.say(predicted ? sentence(predicted) : "");
  }

  function sentence(predicted) {
    const verdict = predicted === answer ? "Right. The" : `Not what the model says. You said "${predicted}"; the`;
    return `${verdict} answer is "${answer}". ${because}`;
  }

  readout.reserve(model.get("options").map(sentence));

  el.classList.add("kvmbook-panel", "kvmbook-quiz");
  el.append(options, reveal, readout.el, element("p", { class: "kvmbook-paper" }, `The answer is "${answer}". ${because}`));
  model.on("change:predicted", draw);
  draw();
  return () => model.off("change:predicted", draw);
}

export default { render };
