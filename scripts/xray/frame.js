"use strict";
// The frame: one recorded run as numbers, the strip of its tokens, and what is chosen. The panels follow in inside.js
// and outcome.js.
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
const starts = steps.reduce((all, p) => [...all, all[all.length - 1] + p + 1], [0]);

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
const headBytes = M && unpack(M.heads, Uint8Array), expertBytes = M && unpack(M.experts, Uint8Array);
const withoutHead = (l, h, r) => M ? shareOf(headBytes[(l * A.H + h) * steps.length + r]) : null;
const withoutExpert = (at, e, r) => M && X ? shareOf(expertBytes[(at * X.E + e) * steps.length + r]) : null;

const word = (i, of = run) => words[of.tokens[i]];
const row = (t, of = run) => of.steps.indexOf(t - 1);                    // the step in which token t was written
const written = r => run.lens.written[r][2 * L];                         // the chance that the model gave it

// ---- what is chosen -----------------------------------------------------------------------------------------------

const state = { t: hardest(), layer: 0, head: 0, expert: null, show: "attention", other: runs.length > 1 ? 1 : 0 };

// The token of the answer that came up latest: the step where there is most to see.
function hardest() {
  let best = steps.length ? steps[steps.length - 1] + 1 : 0, least = Infinity;
  steps.forEach((p, r) => {
    if (p + 1 < P || run.control.includes(tokens[p + 1]) || !word(p + 1).trim()) return;
    const sure = run.lens.written[r].reduce((a, b) => a + b, 0);
    if (sure < least) { least = sure; best = p + 1; }
  });
  return best;
}

// The head that looks hardest at a token that is neither the first nor the last.
function sharpest(r) {
  let most = 0;
  for (let l = 0; l < L; l++) for (let h = 0; h < A.H; h++)
    for (const [k, x] of strongest(l, h, r)) if (k > 0 && k < steps[r] && x > most) {
      most = x; state.layer = l; state.head = h;
    }
}

// ---- elements and colours -----------------------------------------------------------------------------------------

function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {}))
    if (key === "style") Object.assign(node.style, value);
    else if (key in node && key !== "list") node[key] = value; else node.setAttribute(key, value);
  fill(node, ...children);
  return node;
}
// The children of a node anew, without those that are null.
const fill = (node, ...children) => node.replaceChildren(...children.flat(2).filter(x => x != null));

function percent(x) {
  if (x >= 0.995) return x === 1 ? "100 %" : "> 99 %";
  return x >= 0.095 ? Math.round(100 * x) + " %" : x >= 0.0005 ? (100 * x).toFixed(1) + " %" : "< 0.1 %";
}
const seen = text => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·") || "(nothing)";
const T = text => el("span", { className: "t" }, seen(text));
const quiet = text => el("p", { className: "quiet" }, text);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const mix = (a, b, x) => {
  const p = a.split(",").map(Number), q = b.split(",").map(Number);
  return p.map((v, i) => Math.round(v + (q[i] - v) * x));
};
const ramp = x => mix(css("--ramp0"), css("--ramp1"), x);
const signed = x => mix(css("--ramp0"), css(x < 0 ? "--low" : "--high"), Math.min(1, Math.abs(x)));
const rgb = c => `rgb(${c.join(",")})`;
const inkOn = c => 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] > 140 ? "#16191d" : "#fff";

// A picture of cells: value(row, column) -> [r, g, b], or null for none; `size` in pixels of the page.
function heat(canvas, columns, rows, value, size) {
  canvas.width = Math.max(1, columns); canvas.height = Math.max(1, rows);
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
    const c = value(y, x);
    image.data.set(c ? [c[0], c[1], c[2], 255] : [0, 0, 0, 0], 4 * (y * columns + x));
  }
  context.putImageData(image, 0, 0);
  if (size) { canvas.style.width = size[0] + "px"; canvas.style.height = size[1] + "px"; }
  return canvas;
}
function legend(low, high, colour) {
  const canvas = heat(el("canvas", { ariaHidden: "true" }), 60, 1, (y, x) => colour(x / 59), [120, 10]);
  return el("div", { className: "legend" }, low, canvas, high);
}
function bars(entries) {                                     // [{name, value, ghost, out, mark, note}]
  return el("div", { className: "bars" }, entries.map(e => [
    el("span", {}, e.plain ? e.name : T(e.name), e.mark ? " " + e.mark : ""),
    el("div", { className: "track" + (e.out ? " out" : "") },
      el("div", { className: "fill", style: { width: 100 * Math.min(1, e.value) + "%" } }),
      e.ghost == null ? null : el("div", { className: "ghost", style: { width: 100 * e.ghost + "%" } })),
    el("span", { className: "number" }, e.note ?? percent(e.value))]));
}

// Arrow keys inside a grid that is one Tab stop: move(down, right) changes the state, then the chosen cell is focused.
function arrows(grid, move) {
  grid.onkeydown = event => {
    const d = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0],
                Home: [0, -Infinity], End: [0, Infinity] }[event.key];
    if (!d) return;
    event.preventDefault();
    const id = grid.dataset.id;
    move(...d);
    document.querySelector(`[data-id="${id}"] [tabindex="0"]`)?.focus();
  };
  return grid;
}
const within = (x, least, most) => Math.max(least, Math.min(most, x));

// ---- the strip of tokens ------------------------------------------------------------------------------------------

const page = document.getElementById("page");
const strip = el("div", { id: "tokens", role: "listbox",
  ariaLabel: "Tokens of prompt and answer. Arrow keys choose one." });
const story = el("p", { id: "story", ariaLive: "polite" });
const panels = [];

function chip(i) {
  const kind = (run.control.includes(tokens[i]) ? " control" : "") + (i >= P ? " answer" : "");
  const button = el("button", { className: "token" + kind, role: "option", tabIndex: -1,
    title: `token ${i}, id ${tokens[i]}` + (row(i) < 0 ? ", not recorded" : "") });
  const text = word(i), lead = text.match(/^[ \n\t]*/)[0];
  if (lead) button.append(el("span", { className: "space" }, seen(lead)));
  button.append(text.slice(lead.length).replace(/\n/g, "⏎").replace(/\t/g, "⇥"));
  button.onclick = () => choose({ t: i });
  return button;
}
const chips = tokens.map((_, i) => chip(i));
chips.forEach((button, i) => {
  strip.append(button);
  if (/\n$/.test(word(i))) strip.append(el("br"));
});
strip.dataset.id = "strip";
arrows(strip, (down, right) => moveBy(down || right));

function moveBy(d) {
  const r = within((Number.isFinite(d) ? row(state.t) : 0) + (d === Infinity ? steps.length : d), 0, steps.length - 1);
  choose({ t: steps[r === -Infinity ? 0 : r] + 1 });
}

// How dark token i is lit in step r: where the chosen head looked, or what the chosen expert got.
function light(i, r) {
  if (state.show === "expert" && state.expert) {
    const at = steps.indexOf(i), [layer, e] = state.expert;
    const found = at >= 0 && X.chosen[layer][at].find(([id]) => id === e);
    return found ? Math.min(1, found[1]) : 0;
  }
  return i < state.t ? share(state.layer, state.head, r, i) || 0 : 0;
}

function tell(r) {
  const t = state.t, top = run.lens.top[r][L][0], own = percent(written(r));
  if (t >= P) return ["To write ", T(word(t)), ` (${own}) the model had read ${t} tokens, the last of them `,
                      T(word(t - 1)), "."];
  return ["The prompt says ", T(word(t)), ". The model would have written ", T(words[top[0]]),
          ` here (${percent(top[1])}); what the prompt says it gave ${own}.`];
}

function choose(change) {
  Object.assign(state, change);
  if (row(state.t) < 0)                                      // no step was recorded there: the nearest that was
    state.t = steps.map(p => p + 1).sort((a, b) => Math.abs(a - state.t) - Math.abs(b - state.t))[0];
  const r = row(state.t), t = state.t;
  chips.forEach((button, i) => {
    button.setAttribute("aria-selected", i === t); button.setAttribute("aria-current", i === t);
    button.tabIndex = i === t ? 0 : -1;
    button.classList.toggle("future", i > t); button.classList.toggle("read", i === t - 1);
    const x = light(i, r), colour = ramp(Math.sqrt(x));
    button.style.background = x > 0.0005 ? rgb(colour) : "";
    button.style.color = x > 0.0005 ? inkOn(colour) : "";
  });
  story.replaceChildren(...tell(r));
  const top = chips[t].offsetTop;
  if (top < strip.scrollTop + 30 || top > strip.scrollTop + strip.clientHeight - 40)
    strip.scrollTop = top - strip.clientHeight / 2;
  panels.forEach(draw => draw(r));
  history.replaceState(null, "", `#t=${t}&layer=${state.layer}&head=${state.head}`
    + (state.expert ? `&expert=${state.expert.join(".")}` : ""));
}

function panel(id, title, lead, draw) {
  const body = el("div");
  page.append(el("section", { id, ariaLabelledby: id + "-title" },
    el("h2", { id: id + "-title" }, `${panels.length + 1} · ${title}`), quiet(lead), body));
  panels.push(r => draw(body, r));
}

function start() {
  if (!steps.length) return story.append("The answer has no token: nothing was recorded.");
  sharpest(row(state.t));
  const chosen = new URLSearchParams(location.hash.slice(1));
  for (const key of ["t", "layer", "head"]) if (/^\d+$/.test(chosen.get(key))) state[key] = +chosen.get(key);
  const expert = /^(\d+)\.(\d+)$/.exec(chosen.get("expert"));
  if (expert && X && +expert[1] < X.layers.length && +expert[2] < X.E)
    Object.assign(state, { expert: [+expert[1], +expert[2]], show: "expert" });
  state.t = within(state.t, 1, n - 1);
  state.layer = within(state.layer, 0, L - 1);
  state.head = within(state.head, 0, A.H - 1);
  choose({});
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => choose({}));
  addEventListener("resize", () => choose({}));
}

function changeTheme() {
  const root = document.documentElement, now = root.dataset.theme;
  const dark = now ? now === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  choose({});
}

page.append(
  el("header", {}, el("h1", {}, "X-ray of one answer"),
    el("span", { className: "quiet" },
      `${meta.model}, ${meta.parameters.toLocaleString("en")} parameters, ${meta.dtype}`),
    el("button", { className: "plain", onclick: changeTheme }, "light / dark")),
  el("p", {}, "A language model writes one token after the other. Choose a token to see how the model came to "
    + "write it. Every number was recorded while this answer was written."),
  el("div", { id: "strip" }, strip, story));
