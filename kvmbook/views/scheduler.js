const LEFT_OUT = [/#[^\n]*/, /^[ \t\r]*[0-9]+\.?[ \t]/, /\([^\n]*\)[ \t\r]*$/, /^[ \t\r]+/, /[ \t\r]+$/];  // of a line that is written
const fill = (said, values) => said.replace(/{(\w+)}/g, (_, name) => values[name]);

// The view of kvmbook.views.scheduler.SchedulerPanel. The widget carries the whole graph of the VM; `path` is the walk so far,
// `moment` the place on it that is shown (-1: its end).
function render({ model, el }) {
  const { actors, sentences, look, ink, written } = model.get("words");
  const settings = model.get("settings");
  const graphs = {};
  const drawSoon = soon(() => draw());
  let playing = null, mine = 0;  // steps that "Show me" has shown

  // ---- the graph ----

  function graphAt(key) {
    return (graphs[key] ??= { key, ...JSON.parse(model.get("states")[key].graph) });
  }

  function graph(chosen = model.get("chosen")) {
    return graphAt(settings.map(({ name }) => chosen[name]).join(" | "));
  }

  function steps({ edges, labels }, state) {
    const found = [];
    for (let i = 0; i < edges[state].length; i += 2) {
      const [label, who, what] = labels[edges[state][i]];
      found.push({ label, who, what, to: edges[state][i + 1] });
    }
    return found;
  }

  function passed(g, path) {
    const states = [0];
    for (const label of path) {
      const step = steps(g, states.at(-1)).find((other) => other.label === label);
      if (!step) break;  // the settings were changed, and the new path is still under way
      states.push(step.to);
    }
    return states;
  }

  const isLost = (g, state) => g.states[state].at(-2) === 1;
  const firstLost = (g, states) => states.findIndex((state) => isLost(g, state));
  const distance = (g, state) => g.states[state].at(-1);

  // ---- moves ----

  // What is shown of the path: all of it, or what lies before a moment of it.
  function shown() {
    const path = model.get("path"), moment = model.get("moment");
    return moment < 0 ? path : path.slice(0, moment);
  }

  function stop() {
    clearInterval(playing);
    playing = null;
  }

  function go(path, asked = "", { chosen = model.get("chosen"), moment = -1, said = "" } = {}) {
    wrong.textContent = said;
    model.set({ chosen, path, asked, moment });
    model.save_changes();
    drawSoon();
  }

  function showMe() {
    if (playing !== null) {
      stop();
      drawSoon();
      return;
    }
    go([], "play");
    mine = 0;
    const next = () => {
      const g = graph(), here = passed(g, model.get("path")).at(-1), far = distance(g, here);
      const step = far > 0 && steps(g, here).find(({ to }) => distance(g, to) === far - 1);
      if (step) go([...model.get("path"), step.label], "play");
      mine += 1;
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

  // Other settings: the run so far is kept, as far as it is possible under them. A step that is not possible is replaced by the
  // only one that its actor can do: flush_if_owed by flush_always. SchedulerPanel._kept says the same.
  function choose(chosen) {
    const old = model.get("path"), g = graph(chosen), path = [];
    let here = 0;
    for (const label of old) {
      const can = steps(g, here), same = can.filter(({ who }) => who === beside.get(label).who);
      const step = can.find((other) => other.label === label) ?? (same.length === 1 ? same[0] : undefined);
      if (!step) break;
      path.push(step.label);
      here = step.to;
    }
    const said = path.length < old.length ? fill(written.kept, { step: path.length + 1, line: old[path.length] }) : "";
    go(path, "", { chosen, said });
  }

  // ---- a run that the reader writes; kvmbook.views.scheduler.meant and SchedulerPanel.write say the same ----

  // The steps that a line may mean: each of its words begins a word of the step, in order, parts of names being words; of
  // these, the ones with the fewest words left over.
  function meant(line, possible) {
    const words = line.toLowerCase().split(/[ _\t]+/);
    const left = possible.map((label) => {
      const named = label.toLowerCase().split(/[ _]/);
      let next = 0;
      for (const word of words) {
        while (next < named.length && !named[next].startsWith(word)) next += 1;
        if (next++ >= named.length) return Infinity;
      }
      return named.length - words.length;
    });
    const least = Math.min(...left);
    return least === Infinity ? [] : possible.filter((_, i) => left[i] === least);
  }

  function write(text) {
    const g = graph(), path = [];
    let here = 0, mistake = "";
    for (const one of text.split(/[;\n]/)) {
      const line = LEFT_OUT.reduce((left, none) => left.replace(none, ""), one);
      if (!line) continue;
      const can = steps(g, here), fits = meant(line, can.map(({ label }) => label));
      if (fits.length !== 1) {
        const names = (fits.length ? fits : can.map(({ label }) => label)).join("; ");
        mistake = fill(written[fits.length ? "many" : "none"], { step: path.length + 1, line, names });
        break;
      }
      path.push(fits[0]);
      here = can.find(({ label }) => label === fits[0]).to;
    }
    go(path, "", { said: mistake || `${fill(written.done, { step: path.length })} ${verdict(g, passed(g, path))}` });
  }

  // ---- what never changes ----

  const groups = settings.map(({ name, options }) =>
    radioGroup(name, options, (option) => alone(() => choose({ ...model.get("chosen"), [name]: option }))()));
  const table = element("tbody");
  const history = element("ol");
  const choices = Object.fromEntries(actors.map((who) => [who, element("div", { role: "group", "aria-label": `steps of ${who}` }, element("b", {}, who))]));
  const readout = readoutLine();
  const undo = button("Undo", alone(() => go(shown().slice(0, -1))));
  const again = button("Start again", alone(() => go([])));
  const hint = button("Hint", alone(() => go(model.get("path"), "hint", { moment: model.get("moment") })));
  const show = button("Show me", showMe);
  const past = element("div", { class: "kvmbook-history", tabindex: "0", role: "region", "aria-label": "steps so far", ...OWN_KEYS }, history);
  const moments = stepper(() => model.get("path").length, () => model.get("moment"), (moment) => {
    stop();
    model.set("moment", moment);
    model.save_changes();
    drawSoon();
  }, (now, last) => (now === last ? "now" : now ? `after step ${now} of ${last}` : "the start"));
  const text = element("textarea", { rows: "3", spellcheck: "false", placeholder: "vCPU0 reads page 0\nhost ages\nuser enables", ...OWN_KEYS });
  const wrong = element("p", { class: "kvmbook-wrong", role: "alert" });
  const writing = element("div", { class: "kvmbook-writing" },
    element("label", {}, element("b", {}, "Or write a run"), " one step a line. A word may end early, and what is clear may be left out: “v r”, “host ages”, “swap”.", text),
    button("Run it", alone(() => write(text.value))), button("Copy the run so far", () => { text.value = model.get("path").join("\n"); }), wrong);

  // Each step of an actor has a place of its own, and shares it only with steps that are never possible beside it.
  const all = settings.map(({ options }) => options).reduce((keys, options) => keys.flatMap((key) => options.map((option) => [...key, option])), [[]])
    .map((key) => graphAt(key.join(" | ")));
  const beside = new Map();  // label: the steps of the same actor that are possible beside it somewhere
  const place = {};
  for (const g of all) {
    for (let state = 0; state < g.states.length; state += 1) {
      for (const { label, who, what } of steps(g, state)) {
        if (!beside.has(label)) beside.set(label, { who, what, others: new Set() });
        for (const other of steps(g, state)) if (other.who === who && other.label !== label) beside.get(label).others.add(other.label);
      }
    }
  }
  for (const [label, { who, what, others }] of beside) {
    const taken = new Set([...others].map((other) => place[other]?.slot));
    const slots = [...choices[who].querySelectorAll(".kvmbook-slot")];
    let slot = slots.find((one) => !taken.has(one));
    if (!slot) choices[who].append(slot = element("div", { class: "kvmbook-slot" }, element("span", { class: "kvmbook-room", "aria-hidden": "true" })));
    place[label] = { slot };
    const room = slot.firstChild;
    if ((room.dataset.room ?? "").length < what.length) room.dataset.room = what;
  }

  // What a row may say at most: it keeps that height.
  const longest = {};
  for (const g of all) for (const [name, , said] of g.rows) if ((longest[name] ?? "").length < said.length) longest[name] = said;

  // ---- what does ----

  function drawTable(g, states) {
    const before = states.length > 1 ? g.states[states.at(-2)] : null;
    table.replaceChildren(...g.states[states.at(-1)].slice(0, -2).map((row, i) => {
      const [name, state, said, stale] = g.rows[row];
      const was = before !== null && before[i] !== row ? `was: ${g.rows[before[i]][2]}` : "";
      const line = element("div", { class: "kvmbook-line" }, element("span", { class: "kvmbook-said" }, said), element("i", { title: was }, was));
      const room = element("div", { class: "kvmbook-room", "data-room": longest[name], "aria-hidden": "true" });
      const cell = element("td", {}, element("div", { class: "kvmbook-cell" }, line, room));
      const fill = look[state];
      if (fill && fill !== "none") Object.assign(cell.style, { background: fill, color: ink });
      cell.classList.toggle("kvmbook-stale", stale);
      return element("tr", {}, element("th", { scope: "row" }, name), cell);
    }));
  }

  function drawChoices(g, state) {
    const held = el.contains(document.activeElement) ? document.activeElement.closest(".kvmbook-slot") : null;
    for (const slot of el.querySelectorAll(".kvmbook-slot")) slot.querySelector("button")?.remove();
    for (const { label, what } of steps(g, state)) {
      const step = button(what, alone(() => go([...shown(), label])));
      step.dataset.step = label;
      place[label].slot.append(step);
    }
    if (held) (held.querySelector("button") ?? held.parentElement.querySelector("button") ?? el.querySelector("[data-step]"))?.focus({ preventScroll: true });
  }

  function drawHistory(g, states) {
    const first = firstLost(g, states);
    history.replaceChildren(...model.get("path").map((label, i) =>
      element("li", i >= states.length - 1 ? { class: "kvmbook-later" } : {}, label, ...(i + 1 === first ? [element("b", {}, " ✕ lost")] : []))));
    past.scrollTop = past.scrollHeight * (states.length / (model.get("path").length + 1)) - past.clientHeight / 2;
  }

  // What is to be said of the states that a run has passed.
  function verdict(g, states, asked = "") {
    const here = states.at(-1), first = firstLost(g, states);
    let said = isLost(g, here) ? "lost" : first > 0 ? "covered" : states.length > 1 ? "going" : "start";
    if (asked === "play" && distance(g, 0) < 0) said = "safe";
    const told = [said];
    if (asked === "hint" && !isLost(g, here)) told.push(distance(g, here) < 0 ? "no hint" : "hint");
    const numbers = {
      steps: states.length - 1, lost: Math.max(first, 0), shortest: distance(g, 0), states: g.states.length, distance: distance(g, here),
    };
    return told.map((name) => fill(sentences[name], numbers)).join(" ");
  }

  function draw() {
    const g = graph(), states = passed(g, shown()), here = states.at(-1), asked = model.get("asked"), held = document.activeElement;
    settings.forEach(({ name }, i) => check(groups[i], model.get("chosen")[name]));
    drawTable(g, states);
    drawChoices(g, here);
    drawHistory(g, states);
    moments.draw();
    if (playing !== null && model.get("path").length !== mine) stop();  // somebody has gone elsewhere
    undo.disabled = states.length === 1;
    again.disabled = model.get("path").length === 0;
    const leaves = [undo, again].some((one) => one.disabled && one === held);
    hint.disabled = isLost(g, here);
    if (leaves) el.querySelector("[data-step]").focus({ preventScroll: true });  // a button that cannot be pressed drops the keyboard
    show.textContent = playing === null ? "Show me" : "Stop";
    readout.say(verdict(g, states, asked));
    readout.el.classList.toggle("kvmbook-lost", isLost(g, here));
    el.dataset.steps = states.length - 1;
  }

  const paper = element("div", { class: "kvmbook-paper" });
  paper.innerHTML = model.get("paper");
  readout.reserve(Object.values(sentences));
  el.classList.add("kvmbook-panel", "kvmbook-scheduler");
  el.append(
    element("p", { class: "kvmbook-title" }, model.get("title")), paper, element("div", { class: "kvmbook-controls" }, ...groups),
    element("p", { class: "kvmbook-ask" }, "Who moves next?"),
    element("div", { class: "kvmbook-steps" }, ...Object.values(choices)),
    element("div", { class: "kvmbook-commands" }, undo, again, show, hint), readout.el, moments.el,
    element("div", { class: "kvmbook-now" }, element("table", {}, element("caption", {}, "now"), table), element("div", {}, element("b", {}, "so far"), past)),
    writing,
  );
  model.on("change:chosen change:path change:asked change:moment", drawSoon);
  draw();
  return () => {
    stop();
    moments.stop();
    model.off("change:chosen change:path change:asked change:moment", drawSoon);
  };
}

export default { render };
