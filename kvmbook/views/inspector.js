// The view of kvmbook.views.inspector.SpteInspector. It knows no rule about SPTEs: it looks bits up in the tables that Python made.

// ---- looking up (also run by the tests, without a browser) ----

export function decide({ bits, at, says }, spte, patterns) {
  let pattern = 0;
  bits.forEach((bit, number) => { pattern += Number((spte >> BigInt(bit)) & 1n) << number; });
  return says[patterns.indexOf(at[pattern])];
}

// What the inspector says of a word: its state, each helper's answer, and the sentences.
export function reading(table, patterns, word, steps) {
  const spte = BigInt(`0x${word}`), special = table.special[word];
  const sentences = special ? special.sentences : table.sentences.map((one) => decide(one, spte, patterns));
  const answers = special ? special.helpers
    : Object.fromEntries(Object.entries(table.helpers).map(([name, one]) => [name, decide(one, spte, patterns)]));
  const [key, before] = steps.at(-1) ?? ["", ""];
  const done = key ? [decide(table.operations[key], BigInt(`0x${before}`), patterns)[1]] : [];
  const [, low, width] = table.fields.find(([, , , kind]) => kind === "address");
  const frame = `0x${BigInt.asUintN(width, spte >> BigInt(low)).toString(16)}`;
  const verdict = sentences.slice(0, table.verdicts).find(Boolean);  // no KVM makes the word: no more to say
  const readout = [...done, ...(verdict ? [verdict] : sentences)].filter(Boolean).map((said) => said.replaceAll("{pfn}", frame)).join(" ");
  return { state: decide(table.state, spte, patterns), answers, readout };
}

export const hex = (spte) => BigInt.asUintN(64, spte).toString(16).padStart(16, "0");

export function pressed(table, patterns, word, key) {
  const spte = BigInt(`0x${word}`);
  return hex(spte ^ BigInt(`0x${decide(table.operations[key], spte, patterns)[0]}`));
}

// Sixteen digits, or null if that is no word.
export function parsed(said) {
  const digits = said.replace(/[\s_]/g, "").toLowerCase().replace(/^0x/, "");
  return /^[0-9a-f]{1,16}$/.test(digits) ? digits.padStart(16, "0") : null;
}

// ---- showing ----

function bitButton(bit, flip) {
  const made = element("button", { type: "button", class: "kvmbook-bit", tabindex: "-1", ...OWN_KEYS },
    element("small", {}, String(bit)), element("b"), element("i"));
  made.addEventListener("click", flip);
  return made;
}

// Arrow keys move among the bits: left and right by one, up and down to what is drawn above and below.
function target(bits, here, key) {
  if (key === "ArrowLeft") return bits[here + 1];
  if (key === "ArrowRight") return bits[here - 1];
  if (key === "Home") return bits[63];
  if (key === "End") return bits[0];
  if (key !== "ArrowUp" && key !== "ArrowDown") return undefined;
  const from = bits[here].getBoundingClientRect(), sign = key === "ArrowUp" ? -1 : 1;
  let best, nearest = Infinity;
  for (const other of bits) {
    const at = other.getBoundingClientRect(), down = sign * (at.top - from.top);
    const far = down * 1000 + Math.abs(at.left - from.left);
    if (down > from.height / 2 && far < nearest) [best, nearest] = [other, far];
  }
  return best;
}

function render({ model, el }) {
  const group = `kvmbook-${Math.random().toString(36).slice(2)}`;
  const { bad, undo: most, patterns, operations, order, look: looks, kinds, ink, changed: orange } = model.get("words");
  const leaves = model.get("leaves"), tables = model.get("tables");
  const inOrder = (given) => order.filter((name) => name in given);
  const table = (format = model.get("format")) => tables[leaves[format].table];
  const drawSoon = soon(() => draw());

  function go({ key = "", word = model.get("word"), format = model.get("format") }) {
    const before = [key, model.get("word"), model.get("format")];
    if (!key && word === before[1] && format === before[2]) return;
    save({ word, format, steps: [...model.get("steps"), before].slice(-most) });
  }

  function save(traits) {
    model.set(traits);
    model.save_changes();
    drawSoon();
  }

  function takeBack() {
    const steps = model.get("steps");
    if (!steps.length) return;
    const [, word, format] = steps.at(-1);
    save({ word, format, steps: steps.slice(0, -1) });
  }

  // ---- what never changes ----

  const formats = radioGroup("format", inOrder(leaves), (format) => go({ format }));

  const bits = Array.from({ length: 64 }, (_, bit) =>
    bitButton(bit, () => go({ word: hex(BigInt(`0x${model.get("word")}`) ^ (1n << BigInt(bit))) })));
  bits[0].tabIndex = 0;
  const bytes = Array.from({ length: 8 }, (_, n) => element("div", { role: "group", "aria-label": `bits ${63 - 8 * n} to ${56 - 8 * n}` },
    ...bits.slice(56 - 8 * n, 64 - 8 * n).reverse()));
  const grid = element("div", { class: "kvmbook-bits", role: "group", "aria-label": "the word, bit by bit: arrow keys move, space flips" }, ...bytes);
  grid.addEventListener("focusin", ({ target: bit }) => {
    for (const other of bits) other.tabIndex = other === bit ? 0 : -1;
  });
  grid.addEventListener("keydown", (event) => {
    const next = target(bits, bits.indexOf(event.target), event.key);
    if (!next) return;
    event.preventDefault();
    next.focus();
  });

  const legend = element("p", { class: "kvmbook-legend" });
  for (const [fill, said] of [kinds.hardware, kinds.KVM]) {
    const sample = element("span", { class: "kvmbook-sample" });
    sample.style.background = fill;
    legend.append(element("span", {}, sample, ` ${said}`));
  }
  const sample = element("span", { class: "kvmbook-sample" });
  Object.assign(sample.style, { borderColor: orange, borderWidth: "3px" });
  legend.append(element("span", {}, sample, " ▲ flipped by the last step"),
    element("span", {}, element("span", { class: "kvmbook-sample kvmbook-looked" }), " the helper looks at it"));

  const field = element("input", { type: "text", spellcheck: "false", autocomplete: "off", id: `${group}-hex`, ...OWN_KEYS });
  const wrong = element("span", { class: "kvmbook-wrong", role: "alert", id: `${group}-wrong` });
  field.setAttribute("aria-describedby", wrong.id);
  const complain = (said) => {
    wrong.textContent = said;
    field.setAttribute("aria-invalid", said ? "true" : "false");
  };
  function enter() {
    const word = parsed(field.value);
    complain(word === null ? bad : "");
    if (word === null) return;
    if (word === model.get("word")) field.value = word;
    go({ word });
  }
  field.addEventListener("change", enter);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") enter();
    if (event.key === "Escape") {
      field.value = model.get("word");
      complain("");
    }
  });
  const chip = element("span", { class: "kvmbook-chip" });
  const line = element("div", { class: "kvmbook-word" }, element("label", { for: field.id }, "word, hexadecimal"), field, chip, wrong);

  const making = element("div", { class: "kvmbook-commands", role: "group", "aria-label": "make it" });
  const doing = element("div", { class: "kvmbook-commands", role: "group", "aria-label": "do this to it" }, element("b", {}, "do:"));
  for (const key of inOrder(operations)) {
    doing.append(button(operations[key], () => go({ key, word: pressed(table(), patterns, model.get("word"), key) })));
  }
  const back = button("Undo", takeBack);
  doing.append(back);
  const readout = readoutLine();
  const helpers = element("ul", { class: "kvmbook-helpers", "aria-label": "what the helpers answer" });
  for (const helper of inOrder(table().helpers)) {
    const row = element("li", { tabindex: "0", "data-helper": helper, ...OWN_KEYS }, element("code", {}, helper), element("span"));
    for (const event of ["pointerenter", "focus"]) row.addEventListener(event, () => look(helper));
    for (const event of ["pointerleave", "blur"]) row.addEventListener(event, () => look(null));
    helpers.append(row);
  }

  // ---- what does ----

  function drawBits(word, names, fields) {
    const last = model.get("steps").at(-1);
    const now = BigInt(`0x${word}`), flipped = last ? now ^ BigInt(`0x${last[1]}`) : 0n;
    for (const [short, low, width, kind] of fields) {
      for (let bit = low; bit < low + width; bit++) {
        const on = Boolean((now >> BigInt(bit)) & 1n), flips = Boolean((flipped >> BigInt(bit)) & 1n), made = bits[bit];
        const [number, value, name] = made.children;
        number.textContent = flips ? `▲${bit}` : bit;
        value.textContent = on ? "1" : "0";
        name.textContent = bit === low + width - 1 ? short : "";
        const fill = on && kinds[kind][0] !== "none" ? kinds[kind][0] : "transparent";
        Object.assign(made.style, { background: fill, color: fill === "transparent" ? "inherit" : ink });
        made.classList.toggle("kvmbook-free", kind === "free");
        made.classList.toggle("kvmbook-flipped", flips);
        made.setAttribute("aria-pressed", String(on));
        made.setAttribute("aria-label", `bit ${bit}, ${names[bit]}`);
      }
    }
  }

  function drawMaking(format) {
    if (making.dataset.format === format) return;
    making.dataset.format = format;
    const { words } = leaves[format];
    making.replaceChildren(element("b", {}, "make it:"),
      ...inOrder(words).map((state) => button(state, () => go({ word: words[state] }))));
  }

  function drawHelpers(answers) {
    for (const row of helpers.children) {
      const { helper } = row.dataset, answer = answers[helper], said = row.children[1];
      said.textContent = ({ yes: "✓ ", no: "✕ ", "not asked": "– " }[answer] ?? "") + answer;
      row.classList.toggle("kvmbook-no", ["no", "not asked", "none"].includes(answer));
      row.setAttribute("aria-label", `${helper}: ${answer}; depends on bits ${table().helpers[helper].bits.join(", ") || "0 to 63"}`);
    }
  }

  function look(helper) {  // frame the bits on which a helper's answer depends, or none
    const on = helper ? table().helpers[helper].bits : [];
    bits.forEach((made, bit) => made.classList.toggle("kvmbook-looked", on.includes(bit)));
  }

  function draw() {
    const format = model.get("format"), word = model.get("word"), { names, fields } = table();
    const { state, answers, readout: said } = reading(table(), patterns, word, model.get("steps"));
    check(formats, format);
    drawBits(word, names, fields);
    drawMaking(format);
    if (el.dataset.word !== word) {
      field.value = word;
      complain("");
    }
    chip.textContent = state;
    const fill = looks[state] === "none" ? "transparent" : looks[state];
    Object.assign(chip.style, { background: fill, color: fill === "transparent" ? "inherit" : ink });
    readout.say(said);
    drawHelpers(answers);
    back.disabled = !model.get("steps").length;
    el.dataset.word = word;
  }

  el.classList.add("kvmbook-panel", "kvmbook-inspector");
  el.append(
    element("p", { class: "kvmbook-title" }, model.get("title")),
    element("div", { class: "kvmbook-controls" }, formats), grid, legend, line, making, doing, readout.el, helpers,
  );
  model.on("change:word change:format change:steps", drawSoon);
  draw();
  return () => model.off("change:word change:format change:steps", drawSoon);
}

export default { render };
