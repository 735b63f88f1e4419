// The view of kvmbook.views.guess: an empty chart, the reader's guess, and a button that draws what the model says over it.
const SVG = "http://www.w3.org/2000/svg";
const LOST = "var(--kvmbook-lost, #b34700)";

function mark(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const commas = (number) => String(number).replace(/\B(?=(\d{3})+$)/g, ",");
const within = (value, least, most) => Math.min(Math.max(value, least), most);

function render({ model, el }) {
  const hand = model.get("names") ? shape(model) : number(model);
  const why = model.get("why"), charts = model.get("charts");
  const chart = element("div", { class: "kvmbook-chart" });
  const show = button("Show what the model says", () => tell(true));
  const again = button("Guess again", () => tell(false));
  const readout = readoutLine(), sentence = (guessed) => `${hand.verdict(guessed)} ${why}`;
  let form = "";

  function tell(told) {
    model.set("told", told);
    if (!told) model.set("guessed", model.get("truth").map(() => -1));
    model.save_changes();
    told ? again.focus() : hand.focus();
  }

  // Draw the chart in the form that there is room for.
  function place() {
    const now = chart.clientWidth && chart.clientWidth < NARROW ? "narrow" : "wide";
    if (now === form || (form && !chart.clientWidth)) return;
    const held = chart.contains(document.activeElement);
    chart.innerHTML = charts[form = now];
    const svg = chart.firstElementChild;
    svg.setAttribute("role", "group");
    svg.style.maxWidth = `${1.25 * svg.viewBox.baseVal.width}px`;
    const [x, y, width, height] = svg.querySelector("[data-plot]").dataset.plot.split(" ").map(Number);
    hand.place(svg, { x, y, width, height });
    draw();
    if (held) hand.focus();
  }

  function draw() {
    const guessed = model.get("guessed"), told = model.get("told");
    el.classList.toggle("kvmbook-told", told);
    hand.draw(guessed, told);
    show.disabled = told || guessed.includes(-1);
    again.disabled = !told && guessed.every((value) => value < 0);
    readout.say(told ? sentence(guessed) : "");
  }

  readout.reserve(hand.extremes.map((guessed) => `${sentence(guessed)} 00`));
  el.classList.add("kvmbook-panel", "kvmbook-guess");
  const paper = element("p", { class: "kvmbook-paper" }, `The model says ${model.get("truth").map(commas).join(", ")}. ${why}`);
  const asked = element("p", { class: "kvmbook-asked" }, model.get("title"));
  el.append(asked, ...hand.controls(() => show.click()), chart, hand.hint, element("div", { class: "kvmbook-tell" }, show, again), readout.el, paper);
  const watch = new ResizeObserver(() => requestAnimationFrame(place));
  watch.observe(chart);
  place();
  model.on("change:guessed change:told", draw);
  return () => {
    watch.disconnect();
    model.off("change:guessed change:told", draw);
  };
}

// What the hand has done, in words, for the eye: who listens hears the points themselves.
function hintLine(longest) {
  const line = readoutLine();
  line.el.className = "kvmbook-hint";
  line.el.firstChild.setAttribute("aria-live", "off");
  line.reserve(longest);
  return line;
}

// ---- a shape: drawn by pointer, or point by point with the keyboard ----

function shape(model) {
  const truth = model.get("truth"), top = model.get("top"), names = model.get("names"), counted = model.get("counted");
  const last = truth.length - 1, page = Math.max(1, Math.round(top / 8)), slack = Math.floor(top / 20);
  const how = "Drag across the chart, or use the arrow keys.";
  const words = (name, value, done) => `${name[0].toUpperCase()}${name.slice(1)}: ${commas(value)} ${counted}. ${done} of ${truth.length} points guessed.`;
  const hint = hintLine([how, ...names.map((name) => words(name, top, truth.length))]);
  let svg, plot, points, guessLine, at = 0, from = null, told = false;

  const guessed = () => model.get("guessed");
  const x = (number) => plot.x + (plot.width * number) / last;
  const y = (value) => plot.y + plot.height * (1 - value / top);
  const said = (value) => (value < 0 ? "no guess yet" : `${commas(value)} ${counted}`);

  function put(number, value) {
    at = number;
    model.set("guessed", guessed().map((old, here) => (here === number ? within(Math.round(value), 0, top) : old)));
  }

  function place(now, where) {
    [svg, plot] = [now, where];
    const line = (values, attributes) => mark("polyline", { points: values.join(" "), fill: "none", "stroke-width": 2, ...attributes });
    const trueLine = line(truth.map((value, here) => [x(here), y(value)]), { stroke: LOST });
    const trueMarks = truth.map((value, here) => mark("circle", { cx: x(here), cy: y(value), r: 6, fill: LOST }));
    guessLine = line([], { stroke: "currentColor", "stroke-dasharray": "6 4", "aria-hidden": "true" });
    points = truth.map((_, here) => {
      const column = { x: x(here) - 11, y: plot.y - 11, width: 22, height: plot.height + 22, rx: 4 };
      const box = mark("rect", { width: 12, height: 12, fill: "none", stroke: "currentColor", "stroke-width": 2 });
      const point = mark("g", {
        role: "slider", "aria-orientation": "vertical", "aria-label": `${counted} ${names[here]}`, "aria-valuemin": 0, "aria-valuemax": top, ...OWN_KEYS,
      }, mark("rect", { class: "kvmbook-ring", fill: "none", ...column }), box);
      point.addEventListener("keydown", (event) => press(event, here));
      return point;
    });
    svg.append(guessLine, mark("g", { class: "kvmbook-truth", "aria-hidden": "true" }, trueLine, ...trueMarks), ...points);
    svg.addEventListener("pointerdown", begin);
    svg.addEventListener("pointermove", go);
    for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, stop);
  }

  function draw(values, isTold) {
    told = isTold;
    svg.classList.toggle("kvmbook-drawing", !told);
    guessLine.setAttribute("points", values.map((value, here) => (value < 0 ? "" : `${x(here)},${y(value)}`)).join(" "));
    points.forEach((point, here) => {
      const value = values[here], box = point.lastChild;
      point.setAttribute("tabindex", here === at ? 0 : -1);
      point.setAttribute("aria-valuenow", Math.max(value, 0));
      point.setAttribute("aria-valuetext", told ? `you said ${said(value)}, the model says ${commas(truth[here])}` : said(value));
      point.setAttribute("aria-disabled", told);
      box.setAttribute("visibility", value < 0 ? "hidden" : "inherit");
      box.setAttribute("x", x(here) - 6);
      box.setAttribute("y", y(Math.max(value, 0)) - 6);
    });
    const done = values.filter((value) => value >= 0).length;
    hint.say(values[at] < 0 ? how : words(names[at], values[at], done));
  }

  // ---- by pointer: what it passes over takes its height ----

  function spot(event) {
    const seen = svg.getBoundingClientRect(), { width, height } = svg.viewBox.baseVal;
    const right = ((event.clientX - seen.left) * width) / seen.width, down = ((event.clientY - seen.top) * height) / seen.height;
    return {
      number: within(Math.round(((right - plot.x) / plot.width) * last), 0, last),
      value: within(Math.round(top * (1 - (down - plot.y) / plot.height)), 0, top),
    };
  }

  function begin(event) {
    if (told || event.button !== 0) return;
    event.preventDefault();
    svg.setPointerCapture(event.pointerId);
    from = spot(event);
    put(from.number, from.value);
  }

  function go(event) {
    if (!from) return;
    const to = spot(event), steps = to.number - from.number;
    for (let step = Math.sign(steps); step !== steps; step += Math.sign(steps)) {
      put(from.number + step, from.value + ((to.value - from.value) * step) / steps);
    }
    put(to.number, to.value);
    from = to;
  }

  function stop() {
    if (!from) return;
    from = null;
    model.save_changes();
    points[at].focus({ preventScroll: true });
  }

  // ---- by keyboard ----

  function press(event, here) {
    const old = guessed()[here], now = Math.max(old, 0);
    const values = { ArrowUp: now + 1, ArrowDown: now - 1, PageUp: now + page, PageDown: now - page, Home: 0, End: top };
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (!(event.key in values || event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.key in steps) {
      at = within(here + steps[event.key], 0, last);
      if (!told && old >= 0 && guessed()[at] < 0) put(at, old);  // the line goes on
      draw(guessed(), told);
      points[at].focus();
    } else if (!told) put(here, values[event.key]);
    model.save_changes();
  }

  function verdict(values) {
    const off = values.map((value, here) => Math.abs(value - truth[here]));
    const right = off.filter((distance) => distance <= slack).length, near = slack ? `, give or take ${slack},` : "";
    if (right === truth.length) return `Right${near} at all ${right} points.`;
    const worst = off.indexOf(Math.max(...off));
    const furthest = `Furthest off ${names[worst]}: the model says ${commas(truth[worst])}, you said ${commas(values[worst])}.`;
    return `Right${near} at ${right} of ${truth.length} points. ${furthest}`;
  }

  return {
    place, draw, verdict, hint: hint.el,
    controls: () => [],
    focus: () => {
      at = 0;
      draw(guessed(), told);
      points[0].focus();
    },
    extremes: truth.flatMap((_, here) => [0, top].map((far) => truth.map((value, other) => (other === here ? far : value)))),
  };
}

// ---- a number: typed, and shown on a logarithmic scale ----

function number(model) {
  const [truth] = model.get("truth"), top = model.get("top");
  const rule = `A guess is a whole number, 1 .. ${commas(top)}.`;
  const hint = hintLine([rule]);
  const field = element("input", { type: "text", inputmode: "numeric", autocomplete: "off", size: 10, ...OWN_KEYS });
  let plot, width, mine;

  // The number that is typed; -1 if it is none.
  function typed() {
    const digits = field.value.replace(/[\s,_]/g, ""), value = Number(digits);
    return /^\d+$/.test(digits) && value >= 1 && value <= top ? value : -1;
  }

  field.addEventListener("input", () => {
    hint.say(field.value.trim() && typed() < 0 ? rule : "");
    model.set("guessed", [typed()]);
    model.save_changes();
  });

  const x = (value) => plot.x + (plot.width * Math.log10(value)) / Math.log10(top);

  // A mark on the scale, and its words at a height; the words stay inside the picture.
  function label(made, words, value, y) {
    const half = words.length * 4.2;
    made.setAttribute("x", within(x(value), half, width - half));
    made.setAttribute("y", y);
    made.textContent = words;
  }

  function place(svg, where) {
    plot = where;
    width = svg.viewBox.baseVal.width;
    const words = mark("text", { fill: LOST, "font-weight": "bold" });
    label(words, `the model: ${commas(truth)}`, truth, plot.y + 54);
    mine = mark("g", {}, mark("rect", { y: plot.y - 8, width: 16, height: 16, fill: "none", stroke: "currentColor", "stroke-width": 2 }), mark("text"));
    svg.append(mark("g", { class: "kvmbook-truth" }, mark("circle", { cx: x(truth), cy: plot.y, r: 6, fill: LOST }), words), mine);
  }

  function draw([value], told) {
    mine.setAttribute("visibility", value < 0 ? "hidden" : "inherit");
    field.readOnly = told;
    if (typed() !== value) field.value = value < 0 ? "" : commas(value);
    if (value < 0) return;
    mine.firstChild.setAttribute("x", x(value) - 8);
    label(mine.lastChild, `your guess: ${commas(value)}`, value, plot.y - 20);
  }

  function times(big, small) {
    const tenths = Math.floor((20 * big + small) / (2 * small));
    return tenths < 100 ? `${Math.floor(tenths / 10)}.${tenths % 10}` : commas(Math.floor((2 * big + small) / (2 * small)));
  }

  function verdict([said]) {
    if (said === truth) return `Right: it is ${commas(truth)}.`;
    const big = Math.max(said, truth), small = Math.min(said, truth);
    const both = `he model says ${commas(truth)}, you said ${commas(said)}`;
    if (4 * big <= 5 * small) return `Close: t${both}.`;
    return `T${both}: too ${said > truth ? "many" : "few"}, by a factor of ${times(big, small)}.`;
  }

  function controls(show) {
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();  // it would press the button that has the focus then
      show();
    });
    return [element("label", { class: "kvmbook-typing" }, "Your guess:", field)];
  }

  return { place, draw, verdict, controls, hint: hint.el, focus: () => field.focus(), extremes: [[1], [top]] };
}

export default { render };
