// The view of kvmbook.views.scheduler.SchedulerPanel. The widget carries the whole graph of the VM; `path` is the walk so far.
function render({ model, el }) {
  const { actors, sentences, look, ink, lost: orange } = model.get("words");
  const graphs = {};
  let playing = null;
  let due = false;

  // ---- the graph ----

  function graph() {
    const chosen = model.get("chosen");
    const key = model.get("settings").map(({ name }) => chosen[name]).join(" | ");
    graphs[key] ??= JSON.parse(model.get("states")[key].graph);
    return { key, ...graphs[key] };
  }

  function steps({ edges, labels }, state) {
    const found = [];
    for (let i = 0; i < edges[state].length; i += 2) {
      const [label, who, what] = labels[edges[state][i]];
      found.push({ label, who, what, to: edges[state][i + 1] });
    }
    return found;
  }

  function passed(g) {
    const states = [0];
    for (const label of model.get("path")) {
      const step = steps(g, states.at(-1)).find((other) => other.label === label);
      if (!step) break;  // the settings were changed, and the new path is still under way
      states.push(step.to);
    }
    return states;
  }

  const isLost = (g, state) => g.states[state].at(-2) === 1;
  const distance = (g, state) => g.states[state].at(-1);

  // ---- moves ----

  function stop() {
    clearInterval(playing);
    playing = null;
  }

  function go(path, asked = "", chosen = model.get("chosen")) {
    model.set({ chosen, path, asked });
    model.save_changes();
    drawSoon();
  }

  function drawSoon() {  // once, however many of the settings have changed
    if (due) return;
    due = true;
    queueMicrotask(() => {
      due = false;
      draw();
    });
  }

  function showMe() {
    if (playing !== null) {
      stop();
      drawSoon();
      return;
    }
    go([], "play");
    const next = () => {
      const g = graph(), here = passed(g).at(-1), far = distance(g, here);
      const step = far > 0 && steps(g, here).find(({ to }) => distance(g, to) === far - 1);
      if (step) go([...model.get("path"), step.label], "play");
      if (!step || far === 1) {
        stop();
        drawSoon();
      }
    };
    playing = setInterval(next, 800);
    if (distance(graph(), 0) <= 0) stop();
  }

  const alone = (act) => () => {
    stop();
    act();
  };

  // ---- what never changes ----

  const groups = model.get("settings").map(({ name, options }) =>
    radioGroup(name, options, (option) => alone(() => go([], "", { ...model.get("chosen"), [name]: option }))()));
  const table = element("tbody");
  const history = element("ol");
  const choices = Object.fromEntries(actors.map((who) => [who, element("div", { role: "group", "aria-label": `steps of ${who}` })]));
  const readout = readoutLine();
  const undo = button("Undo", alone(() => go(model.get("path").slice(0, -1))));
  const again = button("Start again", alone(() => go([])));
  const hint = button("Hint", alone(() => go(model.get("path"), "hint")));
  const show = button("Show me", showMe);
  const past = element("div", { class: "kvmbook-history", tabindex: "0", role: "region", "aria-label": "steps so far", ...OWN_KEYS }, history);

  // ---- what does ----

  function drawTable(g, states) {
    const before = states.length > 1 ? g.states[states.at(-2)] : null;
    table.replaceChildren(...g.states[states.at(-1)].slice(0, -2).map((row, i) => {
      const [name, state, said, stale] = g.rows[row];
      const cell = element("td", {}, said);
      const fill = look[state];
      if (fill && fill !== "none") Object.assign(cell.style, { background: fill, color: ink });
      if (stale) cell.style.outline = `3px dashed ${orange}`;
      const was = before !== null && before[i] !== row ? `was: ${g.rows[before[i]][2]}` : "";
      return element("tr", {}, element("th", { scope: "row" }, name), cell, element("td", { class: "kvmbook-was" }, was));
    }));
  }

  function drawChoices(g, state) {
    const focused = el.contains(document.activeElement) ? document.activeElement.dataset.step : undefined;
    const made = new Map();
    for (const who of actors) choices[who].replaceChildren(element("b", {}, who));
    for (const { label, who, what } of steps(g, state)) {
      const step = button(what, alone(() => go([...model.get("path"), label])));
      step.dataset.step = label;
      made.set(label, step);
      choices[who].append(step);
    }
    for (const who of actors) if (choices[who].children.length === 1) choices[who].append(element("span", {}, "(nothing)"));
    if (focused !== undefined) {  // the keyboard stays where it was, or as near as can be
      const who = actors.find((name) => focused.startsWith(`${name} `));
      (made.get(focused) ?? choices[who].querySelector("button") ?? made.values().next().value)?.focus({ preventScroll: true });
    }
  }

  function drawHistory(g, states) {
    const first = states.findIndex((state) => isLost(g, state));
    history.replaceChildren(...model.get("path").map((label, i) =>
      element("li", {}, label, ...(i + 1 === first ? [element("b", {}, " ✕ lost")] : []))));
    past.scrollTop = past.scrollHeight;
    return first;
  }

  function draw() {
    const g = graph(), states = passed(g), here = states.at(-1), asked = model.get("asked");
    model.get("settings").forEach(({ name }, i) => check(groups[i], model.get("chosen")[name]));
    drawTable(g, states);
    drawChoices(g, here);
    const first = drawHistory(g, states);
    const atStart = states.length === 1, leaves = atStart && [undo, again].includes(document.activeElement);
    undo.disabled = again.disabled = atStart;
    hint.disabled = isLost(g, here);
    if (leaves) el.querySelector("[data-step]").focus({ preventScroll: true });  // a button that cannot be pressed drops the keyboard
    show.textContent = playing === null ? "Show me" : "Stop";
    let said = isLost(g, here) ? "lost" : first > 0 ? "covered" : states.length > 1 ? "going" : "start";
    if (asked === "play" && distance(g, 0) < 0) said = "safe";
    const told = [said];
    if (asked === "hint" && !isLost(g, here)) told.push(distance(g, here) < 0 ? "no hint" : "hint");
    const numbers = {
      steps: states.length - 1, lost: Math.max(first, 0), shortest: distance(g, 0), states: g.states.length, distance: distance(g, here),
    };
    const sentence = told.map((name) => sentences[name].replace(/{(\w+)}/g, (_, number) => numbers[number])).join(" ");
    if (readout.textContent !== sentence) readout.textContent = sentence;
    readout.classList.toggle("kvmbook-lost", isLost(g, here));
    el.dataset.steps = states.length - 1;
  }

  const caption = element("caption", {}, "now");
  el.classList.add("kvmbook-panel", "kvmbook-scheduler");
  el.append(
    element("p", { class: "kvmbook-title" }, model.get("title")), element("div", { class: "kvmbook-controls" }, ...groups),
    element("p", { class: "kvmbook-ask" }, "Who moves next?"),
    element("div", { class: "kvmbook-steps" }, ...Object.values(choices)),
    element("div", { class: "kvmbook-commands" }, undo, again, show, hint), readout,
    element("div", { class: "kvmbook-now" }, element("table", {}, caption, table), element("div", {}, element("b", {}, "so far"), past)),
  );
  model.on("change:chosen change:path change:asked", drawSoon);
  draw();
  return () => {
    stop();
    model.off("change:chosen change:path change:asked", drawSoon);
  };
}

export default { render };
