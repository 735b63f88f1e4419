// The view of kvmbook.views.Panel, and of Again, the same panel further down. It works from the states that the widget
// carries; one that is not there yet is asked of Python by setting `chosen`.
const OPENED = (globalThis.kvmbookOpened ??= new Map());  // title: names of settings, for as long as the page is open

async function render({ model, el }) {
  const shown = await modelOf(model, "panel");
  return renderPanel({ model: shown ?? model, el, opens: model.get("opens") ?? [] });
}

function renderPanel({ model, el, opens }) {
  const settings = model.get("settings"), title = model.get("title");
  const groups = settings.map(({ name, options }) => radioGroup(name, options, (option) => {
    model.set({ chosen: { ...model.get("chosen"), [name]: option }, moment: -1 });
    model.save_changes();
    draw();
  }));
  const sheet = element("div", { class: "kvmbook-sheet" });
  const figure = element("div", { class: "kvmbook-figure" }, sheet);
  const readout = readoutLine();
  const all = button("Show all controls", () => {
    const first = groups.find((group) => group.hidden);
    open(settings.map(({ name }) => name));
    (first.querySelector(":checked") ?? first.querySelector("input")).focus();  // the button is gone
  });

  const key = () => settings.map(({ name }) => model.get("chosen")[name]).join(" | ");
  const state = () => model.get("states")[key()];

  // ---- controls: those that the text has come to, and those that were used elsewhere ----

  function remember(names) {
    if (!OPENED.has(title)) OPENED.set(title, new Set());
    names.forEach((name) => OPENED.get(title).add(name));
  }

  function open(names) {
    remember(names);
    globalThis.dispatchEvent(new CustomEvent("kvmbook-opened"));
  }

  function drawControls() {
    remember(settings.filter(({ name, options }) => model.get("chosen")[name] !== options[0]).map(({ name }) => name));
    const hidden = settings.map(({ name }) => model.get("locked").includes(name) && !opens.includes(name)
      && !OPENED.get(title).has(name));
    groups.forEach((group, i) => { group.hidden = hidden[i]; });
    all.hidden = !hidden.includes(true);
  }

  // ---- moments ----

  const steps = stepper(() => (state()?.moments ?? []).length, () => model.get("moment"), (moment) => {
    model.set("moment", moment);
    model.save_changes();
    draw();
  }, (now, last) => {
    if (now === last) return "the whole run";
    if (state().moments[0] !== "At the start.") return `moment ${now + 1} of ${last}`;
    return now ? `step ${now} of ${last - 1}` : "the start";
  });

  function draw() {
    const now = state();
    if (figure.dataset.state !== key() || !sheet.firstChild) {
      sheet.innerHTML = now ? now.svg : "";
      figure.dataset.state = key();
      fit(figure);
    }
    groups.forEach((group, i) => check(group, model.get("chosen")[settings[i].name]));
    drawControls();
    const moment = steps.draw();
    light(figure, moment);
    readout.say(!now ? "computing: this needs a running kernel" : moment < 0 ? now.readout : now.moments[moment]);
  }

  // ---- room: the panel is as high as the highest state that it carries ----

  function reserve() {
    const carried = Object.values(model.get("states"));
    readout.reserve(carried.flatMap((one) => [one.readout, ...(one.moments ?? [])]));
    keepHeight(figure, carried.map((one) => one.svg));
    steps.el.hidden = !carried.some((one) => one.moments?.length);
  }

  el.classList.add("kvmbook-panel");
  el.append(element("p", { class: "kvmbook-title" }, title), element("div", { class: "kvmbook-controls" }, ...groups, all), steps.el, readout.el, figure);
  const drawAll = () => { reserve(); draw(); };
  const watched = new ResizeObserver(() => requestAnimationFrame(() => fit(figure)));
  watched.observe(figure);
  model.on("change:states", drawAll);
  model.on("change:chosen change:moment", draw);
  globalThis.addEventListener("kvmbook-opened", drawControls);
  drawAll();
  return () => {
    steps.stop();
    watched.disconnect();
    globalThis.removeEventListener("kvmbook-opened", drawControls);
    model.off("change:states", drawAll);
    model.off("change:chosen change:moment", draw);
  };
}

export default { render };
