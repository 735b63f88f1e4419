// What every view is built of; kvmbook.views puts it before each view's own script.
const OWN_KEYS = { "data-lm-suppress-shortcuts": "true" };  // JupyterLab would take some keys for itself
const NARROW = 560;  // pixels: below, pictures take their narrow form

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
    fieldset.append(element("label", {}, input, element("span", { "data-said": option }, option)));
  }
  return fieldset;
}

// Mark an option as chosen; none if it is none of them.
function check(fieldset, option) {
  for (const input of fieldset.querySelectorAll("input")) input.checked = input.value === option;
}

// The widget that a widget refers to; undefined if it refers to none.
async function modelOf(model, name) {
  const named = /^IPY_MODEL_(.*)/.exec(model.get(name));
  return named ? model.widget_manager.get_model(named[1]) : undefined;
}

// The sentence under a view. It keeps the height of the longest that it has been told of.
function readoutLine() {
  const said = element("span", { role: "status", "aria-live": "polite" });
  const longest = element("span", { class: "kvmbook-room", "aria-hidden": "true" });
  const el = element("p", { class: "kvmbook-readout" }, said, longest);
  return {
    el,
    say(sentence) { if (said.textContent !== sentence) said.textContent = sentence; },
    reserve(sentences) { longest.dataset.room = sentences.reduce((a, b) => (b.length > a.length ? b : a), ""); },
  };
}

// A function that has ``draw`` called once, soon, however often it is called itself.
function soon(draw) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    queueMicrotask(() => {
      due = false;
      draw();
    });
  };
}

// ---- pictures ----

// The size of a picture's wide or narrow form.
function sizeOf(svg, narrow) {
  const found = (narrow && /data-narrow="(\S+) (\S+)"[^>]*role/.exec(svg)) || /viewBox="0 0 (\S+) (\S+)"/.exec(svg);
  return found ? [Number(found[1]), Number(found[2])] : [1, 0];
}

// Room for the highest of these pictures, in both forms.
function keepHeight(figure, drawn) {
  const pictures = drawn.filter(Boolean);
  for (const form of ["wide", "narrow"]) {
    const ratios = pictures.map((svg) => sizeOf(svg, form === "narrow")).map(([width, height]) => height / width);
    figure.style.setProperty(`--kvmbook-${form}`, Math.max(0, ...ratios) ? `1 / ${Math.max(...ratios)}` : "auto");
  }
}

// Give the picture the form that there is room for.
function fit(figure) {
  const svg = figure.querySelector("svg");
  if (!figure.clientWidth || !svg?.hasAttribute("viewBox")) return;  // not in the page now: it keeps its form
  const narrow = figure.clientWidth < NARROW && svg.dataset.narrow !== undefined;
  if (svg.dataset.wide === undefined) svg.dataset.wide = svg.getAttribute("viewBox").slice(4);
  figure.classList.toggle("kvmbook-stacked", narrow);
  svg.setAttribute("viewBox", `0 0 ${narrow ? svg.dataset.narrow : svg.dataset.wide}`);
  for (const part of svg.querySelectorAll("g[data-narrow]")) {
    part.dataset.wide ??= /\((.*)\)/.exec(part.getAttribute("transform"))[1];
    part.setAttribute("transform", `translate(${narrow ? part.dataset.narrow : part.dataset.wide})`);
  }
  for (const part of svg.querySelectorAll(".kvmbook-narrow")) part.style.display = narrow ? "inline" : "none";
  for (const part of svg.querySelectorAll(".kvmbook-wide")) part.style.display = narrow ? "none" : "inline";
  const scrolls = figure.scrollWidth > figure.clientWidth;  // then the keyboard must be able to
  for (const [name, value] of Object.entries({ tabindex: "0", role: "group", "aria-label": "picture, wider than its place" })) {
    scrolls ? figure.setAttribute(name, value) : figure.removeAttribute(name);
  }
}

// Light one moment of the run that a picture tells: what was before is faded, what comes is not there yet. -1: all of it.
function light(figure, moment) {
  figure.classList.toggle("kvmbook-stepping", moment >= 0);
  for (const part of figure.querySelectorAll("[data-moment]")) {
    const at = Number(part.dataset.moment);
    part.classList.toggle("kvmbook-past", moment >= 0 && at < moment);
    part.classList.toggle("kvmbook-coming", moment >= 0 && at > moment);
  }
}

// Buttons and a slider for the moments of a run: 0 to count() - 1, and behind them -1, the whole run. It plays until somebody
// else goes to another moment.
function stepper(count, get, set, words) {
  let playing = null, mine = null;
  const slider = element("input", { type: "range", min: "0", "aria-label": "moment of the run", ...OWN_KEYS });
  const said = element("span", { class: "kvmbook-moment" });
  const at = () => (get() < 0 || get() >= count() ? count() : get());
  const go = (to) => {
    mine = to >= count() ? -1 : Math.max(to, 0);
    set(mine);
  };
  const alone = (to) => () => {
    const wanted = to();  // before anything is drawn anew
    stop();
    go(wanted);
  };
  const back = button("◀", alone(() => Math.max(at() - 1, 0))), on = button("▶", alone(() => (at() === count() ? 0 : at() + 1)));
  const play = button("Play", () => {
    if (playing !== null) return stop();
    go(at() >= count() - 1 ? 0 : at());
    playing = setInterval(() => {
      const last = at() >= count() - 1;
      go(at() + 1);
      if (last) stop();
    }, 1200);
    draw();
  });
  back.setAttribute("aria-label", "one moment back");
  on.setAttribute("aria-label", "one moment on");
  slider.addEventListener("input", alone(() => Number(slider.value)));
  const el = element("div", { class: "kvmbook-stepper", role: "group", "aria-label": "step through the run" }, play, back, slider, on, said);

  function stop() {
    clearInterval(playing);
    playing = null;
    draw();
  }

  function draw() {
    const now = at(), last = count();
    if (playing !== null && get() !== mine) {
      clearInterval(playing);
      playing = null;
    }
    slider.max = last;
    slider.value = now;
    slider.setAttribute("aria-valuetext", words(now, last));
    said.textContent = words(now, last);
    play.textContent = playing === null ? "Play" : "Stop";
    back.setAttribute("aria-disabled", now === 0);  // a button that is disabled drops the keyboard
    back.disabled = on.disabled = play.disabled = slider.disabled = last === 0;
    return now === last ? -1 : now;
  }

  return { el, draw, stop };
}

