"use strict";
// What all panels use: the recorded numbers, and the elements and colours that they are shown with. Panels follow in
// layers.js, parts.js and outcome.js; strip.js has the tokens and what is chosen, compare.js the other runs.
// All text goes in by textContent; nothing is fetched. Layers, heads, experts and tokens count from 0.

const data = JSON.parse(document.getElementById("data").textContent);
const { meta, words, runs } = data, run = runs[0];
const { tokens, steps, prompt: P, L } = run, n = tokens.length;
const A = run.attention, X = run.experts, M = run.matters;

// ---- numbers out of base64 ----------------------------------------------------------------------------------------

const unpack = (text, Type) => new Type(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const shareOf = byte => (byte / 255) ** 2;                               // shares stand as bytes of their roots
const weights = unpack(A.data, Uint8Array);
const places = A.whole ? null : unpack(A.places, A.wide ? Uint32Array : Uint16Array);
const starts = [0];                                                      // where the keys of each step begin
for (const position of steps) starts.push(starts[starts.length - 1] + position + 1);

// How much a head looked at token k in step r; of a long text only the strongest are known, and others are null.
function share(layer, head, r, k) {
  if (A.whole) return shareOf(weights[(layer * A.H + head) * starts[steps.length] + starts[r] + k]);
  const found = strongest(layer, head, r).find(([place]) => place === k);
  return found ? found[1] : null;
}

// The tokens that a head looked at most, [[token, share], …], the most first.
function strongest(layer, head, r, count = A.strongest) {
  if (A.whole) {
    const every = Array.from({ length: steps[r] + 1 }, (_, k) => [k, share(layer, head, r, k)]);
    return every.sort((a, b) => b[1] - a[1]).slice(0, count);
  }
  const at = ((layer * A.H + head) * steps.length + r) * A.strongest;
  const found = Array.from({ length: A.strongest }, (_, i) => [places[at + i], shareOf(weights[at + i])]);
  return found.filter(([, x]) => x > 0).slice(0, count);
}

// The chance of the written token with this head (expert) off in step r; null where that was not computed.
const headOff = M && unpack(M.heads, Uint16Array), expertOff = M && unpack(M.experts, Uint16Array);
const chanceOf = number => (number / 65535) ** 2;                       // the same in two bytes, to be compared
const withoutHead = (l, h, r) => M ? chanceOf(headOff[(l * A.H + h) * steps.length + r]) : null;
const withoutExpert = (l, e, r) =>
  M && X ? chanceOf(expertOff[(X.layers.indexOf(l) * X.E + e) * steps.length + r]) : null;

const word = (i, of = run) => words[of.tokens[i]];
const rowOf = (t, of = run) => t - 1 - of.steps[0] in of.steps ? t - 1 - of.steps[0] : -1;  // the step that wrote t
const written = (r, of = run) => of.lens.written[r][2 * of.L];          // the chance that the model gave it
const within = (x, least, most) => Math.max(least, Math.min(most, x));
const range = count => Array.from({ length: count }, (_, i) => i);
const sum = numbers => numbers.reduce((a, b) => a + b, 0);

// ---- numbers and tokens as text -----------------------------------------------------------------------------------

// As people say it: few digits, and never 100 % or 0 % of what is only nearly that.
function percent(x) {
  if (x >= 0.995) return x === 1 ? "100\u00a0%" : ">\u00a099\u00a0%";
  return x >= 0.095 ? Math.round(100 * x) + "\u00a0%" : x >= 0.0005 ? (100 * x).toFixed(1) + "\u00a0%"
    : "<\u00a00.1\u00a0%";
}
const count = number => number.toLocaleString("en");
const bytesText = x => x >= 1e9 ? (x / 1e9).toFixed(2) + " GB" : x >= 1e6 ? (x / 1e6).toFixed(2) + " MB"
  : x >= 1e3 ? (x / 1e3).toFixed(1) + " kB" : Math.round(x) + " bytes";
const seen = text => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·") || "(nothing)";

// ---- elements -----------------------------------------------------------------------------------------------------

function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {}))
    if (key === "style") Object.assign(node.style, value);
    else if (key in node) node[key] = value; else node.setAttribute(key, value);
  fill(node, ...children);
  return node;
}
// The children of a node anew, without those that are null.
const fill = (node, ...children) => node.replaceChildren(...children.flat(3).filter(x => x != null));
const T = text => el("span", { className: "t" }, seen(text));
const quiet = (...text) => el("p", { className: "quiet" }, ...text);
const h3 = (...text) => el("h3", {}, ...text);

// Bars that can be read without seeing them: a name, a bar, and a number as text.
// [{name, plain, value, mark, ghost, cut, note}]: `ghost` is a second value, a line; `cut` is hatched.
function bars(entries, label) {
  return el("div", { className: "bars", role: "list", ariaLabel: label || "" }, entries.map(e =>
    el("div", { className: "bar" + (e.cut ? " cut" : ""), role: "listitem" },
      el("span", { className: "name" }, e.plain ? e.name : T(e.name), e.mark ? " " + e.mark : ""),
      el("div", { className: "track", ariaHidden: "true" },
        el("div", { className: "fill", style: { width: 100 * within(e.value, 0, 1) + "%" } }),
        e.ghost == null ? null : el("div", { className: "ghost",
          style: { left: 100 * within(e.ghost, 0, 1) + "%" } })),
      el("span", { className: "number" }, e.note ?? percent(e.value)))));
}

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

// ---- colours ------------------------------------------------------------------------------------------------------

// Those of the page's style, read once for each theme: a picture asks for them at every pixel.
const colours = {};
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const three = name => style.getPropertyValue(name).split(",").map(Number);
  for (const name of ["ramp0", "ramp1", "low", "high", "pick-rgb"]) colours[name] = three("--" + name);
  colours.steps = range(256).map(i => mix(colours.ramp0, colours.ramp1, i / 255));
}
const mix = (a, b, x) => a.map((value, i) => Math.round(value + (b[i] - value) * x));
const ramp = x => colours.steps[Math.round(255 * within(x, 0, 1))];
const lit = share => ramp(Math.sqrt(share));                             // small shares are to be seen, too
const signed = x => mix(colours.ramp0, x < 0 ? colours.low : colours.high, Math.min(1, Math.abs(x)));
const rgb = colour => `rgb(${colour.join(",")})`;
const css = name => `var(--${name})`;

// Black or white on a colour, whichever can be read better; that is always a contrast of 4.5 or more.
function inkOn(colour) {
  const [r, g, b] = colour.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

// A picture of cells: value(row, column) -> [r, g, b], or null for none; `size` in pixels of the page.
function heat(canvas, columns, rows, value, size) {
  canvas.width = Math.max(1, columns); canvas.height = Math.max(1, rows);
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
    const c = value(y, x);
    if (c) image.data.set([c[0], c[1], c[2], 255], 4 * (y * columns + x));
  }
  context.putImageData(image, 0, 0);
  if (size) Object.assign(canvas.style, { width: size[0] + "px", height: size[1] + "px" });
  return canvas;
}
function legend(low, high, colour) {
  const canvas = heat(el("canvas", { ariaHidden: "true" }), 60, 1, (y, x) => colour(x / 59), [120, 10]);
  return el("div", { className: "legend" }, low, canvas, high);
}

// Arrow keys inside a grid that is one Tab stop: move(down, right) changes the state; `choose` keeps the focus.
function arrows(grid, id, move) {
  grid.dataset.id = id;
  grid.onkeydown = event => {
    const d = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0],
                Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    if (!d || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(...d);
  };
  return grid;
}
