// Panels of single parts: the rotary embedding, the experts and the cache.

// ---- positions ----------------------------------------------------------------------------------------------------

const O = run.rope, angle = (pair, position) => O.frequencies[pair] * position;
const slowed = pair => O.plain[pair] / O.frequencies[pair];              // by YaRN, so many times

// Two hands of one pair: where the query stands, and dashed where the key stands.
function dial(pair, query, key) {
  const radians = position => (angle(pair, position) % (2 * Math.PI)).toFixed(2);
  const turn = 2 * Math.PI / O.frequencies[pair];
  const tokens = turn < 100 ? turn.toFixed(1) : count(Math.round(turn)), marked = slowed(pair) > 1.001;
  const node = svg("svg", { viewBox: "-23 -22 46 66", width: 64, role: "img", "aria-label": `pair ${pair}: `
    + `${radians(query)} radians at token ${query}, ${radians(key)} at token ${key}; once round in ${tokens} tokens`
    + (marked ? `; YaRN turns it ${slowed(pair).toFixed(1)} times as slowly` : "") });
  const hand = (position, look) => svg("line", { x1: 0, y1: 0, x2: 18 * Math.sin(angle(pair, position)),
    y2: -18 * Math.cos(angle(pair, position)), class: look });
  node.append(svg("circle", { r: 20 }), hand(key, "key-hand"), hand(query, "query-hand"),
    svg("text", { y: 31 }, `pair ${pair}${marked ? " ✻" : ""}`), svg("text", { y: 41, class: "turn" }, tokens));
  return node;
}

panel("rope", "Positions: hands of clocks", "Attention alone would not notice the order of tokens. So queries and keys "
  + "are turned: their values go in pairs, and each pair turns like a hand, by its own angle a token. What counts is "
  + "the difference of two hands.", "computed from the model's own angles", (body, r) => {
  const query = steps[r], [[key]] = strongest(state.layer, state.head, r, 1), pairs = O.frequencies.length;
  const every = Math.ceil(pairs / 16), shown = range(pairs).filter(j => j % every === 0);
  const columns = Math.min(n, 512), px = Math.max(1, Math.floor(Math.min(1000, body.clientWidth - 10) / columns));
  const canvas = heat(el("canvas", { role: "img", ariaLabel: "Cosine of the angle: a row for each pair, pair 0 on top, "
    + "a column for each token" }), columns, pairs, (j, x) => ramp((1 + Math.cos(angle(j, x))) / 2),
    [columns * px, pairs * 6]);
  const hand = look => { const node = svg("svg", { viewBox: "0 0 26 10", width: 26, "aria-hidden": "true" });
    node.append(svg("line", { x1: 2, y1: 5, x2: 24, y2: 5, class: look })); return node; };
  fill(body, el("p", { className: "hands" }, hand("query-hand"), ` token ${query} `, T(word(query)),
    ", which is being read; ", hand("key-hand"), ` token ${key} `, T(word(key)), `, ${query - key} back, where layer `
    + `${state.layer}, head ${state.head} looks most. Under each clock: after how many tokens it is round once.`),
    el("div", { className: "dials" }, shown.map(j => dial(j, query, key))),
    O.yarn ? quiet(`✻ turned more slowly by YaRN, up to ${O.yarn} times, for contexts longer than in training.`) : null,
    h3(`All ${pairs} pairs, ${columns < n ? `the first ${columns}` : "all"} tokens`),
    el("div", { className: "scroll" }, canvas), legend("the hand points down", "up", ramp));
});

// ---- experts ------------------------------------------------------------------------------------------------------

const scores = X?.scores ? unpack(X.scores, Uint16Array) : null;
const score = (at, r, e) => scores ? scores[(at * steps.length + r) * X.E + e] / 65535 : null;
const weightOf = (of, at, r, e) => of.experts.chosen[at][r].find(([id]) => id === e)?.[1];
// The chosen layer, or the nearest one that has experts.
const expertLayer = () => X.layers.includes(state.layer) ? state.layer
  : X.layers.reduce((a, b) => Math.abs(b - state.layer) < Math.abs(a - state.layer) ? b : a);
const pickExpert = (layer, expert) => choose({ layer, expert });
const moveExpert = (down, right) => pickExpert(X.layers[within(X.layers.indexOf(expertLayer()) + down, 0,
  X.layers.length - 1)], within((state.expert ?? 0) + right, 0, X.E - 1));

const isOff = (of, layer, e) => of.off.includes(`layer${layer}.expert${e}`);
function expertSentence(of, at, r, e) {
  const weight = weightOf(of, at, r, e), layer = of.experts.layers[at];
  const work = weight === undefined ? "not chosen" : "weight " + weight.toFixed(2);
  const text = `layer ${layer}, expert ${e}: ${work}`;
  if (of !== run) return text + (isOff(of, layer, e) ? ", switched off: it counts nothing" : "");
  const s = score(at, r, e), off = weight === undefined ? null : withoutExpert(layer, e, r);
  return text + (s === null ? "" : `, score ${s.toFixed(2)}` + (X.bias ? `, with its bias `
    + (s + X.bias[at][e]).toFixed(2) : "")) + (off === null ? "" : `; without it ${seen(word(state.t))} would have `
    + percent(off));
}

// Layers by experts of a run in one step; a filled square was chosen. Many experts are one picture.
const manyExperts = experts => experts.E * experts.layers.length > 300;
const expertColumns = experts => ({ gridTemplateColumns: `auto repeat(${experts.E}, minmax(0, 44px))` });
function expertGrid(of, r) {
  const { experts } = of, own = of === run;
  const on = (at, e) => own && experts.layers[at] === expertLayer() && e === state.expert;
  if (manyExperts(experts))
    return cells(own ? "experts" : "experts-beside", experts.E, experts.layers.length, own ? state.expert ?? 0 : -9,
      own ? X.layers.indexOf(expertLayer()) : -9, (at, e) => lit(Math.min(1, weightOf(of, at, r, e) || 0)),
      own ? "Experts by layer; chosen: " + expertSentence(of, X.layers.indexOf(expertLayer()), r, state.expert ?? 0)
        : "Experts by layer", (at, e) => own && pickExpert(X.layers[at], e), own ? moveExpert : () => {});
  const grid = el("div", { role: "group", ariaLabel: "Experts by layer" + (own ? "; arrow keys choose one" : ""),
    className: "experts", style: expertColumns(experts) });
  grid.append(el("span"), ...range(experts.E).map(e => el("span", { className: "label" },
    experts.E <= 16 || e % 4 === 0 ? String(e) : "")));
  experts.layers.forEach((layer, at) => grid.append(el("span", { className: "label row" }, "layer " + layer),
    ...range(experts.E).map(e => {
      const weight = weightOf(of, at, r, e), text = expertSentence(of, at, r, e), chosen = on(at, e);
      const square = weight === undefined ? null : [el("span", { className: "square", style: {
        height: 100 * Math.min(1, weight) + "%" } }), experts.E <= 16 ? el("span", { className: "weight" },
        isOff(of, layer, e) ? "off" : weight.toFixed(2)) : null];
      const first = state.expert === null && layer === expertLayer() && e === 0;
      return el(own ? "button" : "span", { className: "cell" + (weight === undefined ? "" : " works")
        + (isOff(of, layer, e) ? " off" : ""), title: text, ariaLabel: text,
        ...(own ? { tabIndex: chosen || first ? 0 : -1, ariaPressed: String(chosen),
          onclick: () => pickExpert(layer, e) } : { role: "img" }) }, square);
    })));
  return own ? arrows(grid, "experts", moveExpert) : grid;
}

// How often each expert worked in a whole run: a row for each layer.
function loadPicture(of) {
  const { experts } = of, most = Math.max(...experts.loads.flat()), px = within(Math.floor(560 / experts.E), 4, 16);
  const colour = (at, e) => ramp(experts.loads[at][e] / most), many = tokensOf(experts);
  const picture = manyExperts(experts) ? el("div", { className: "scroll" }, heat(el("canvas", { role: "img",
    ariaLabel: "How often each expert was chosen, by layer" }), experts.E, experts.layers.length, colour,
    [experts.E * px, experts.layers.length * px])) : el("div", { className: "experts", role: "group",
    ariaLabel: "How often each expert was chosen", style: expertColumns(experts) }, experts.layers.map((layer, at) => [
    el("span", { className: "label row" }, "layer " + layer), range(experts.E).map(e => el("span", { role: "img",
      className: "cell load", style: { background: rgb(colour(at, e)) }, title: `layer ${layer}, expert ${e}: `
        + `${experts.loads[at][e]} of ${many} tokens`, ariaLabel: `layer ${layer}, expert ${e}: `
        + `${experts.loads[at][e]} of ${many} tokens` }))]));
  return [picture, legend("never", `${most} of ${many} tokens`, ramp)];
}
const tokensOf = experts => sum(experts.loads[0]) / experts.A;

// The router of one layer: scores of its experts, and which of them were chosen.
function router(r) {
  const layer = expertLayer(), at = X.layers.indexOf(layer);
  const value = e => score(at, r, e) ?? weightOf(run, at, r, e) ?? 0, bias = e => X.bias ? X.bias[at][e] : 0;
  const weight = e => weightOf(run, at, r, e);
  let some = range(X.E).filter(e => scores || weight(e) !== undefined);
  if (X.E > 16) some = some.sort((a, b) => value(b) + bias(b) - value(a) - bias(a)).slice(0, X.A + 4);
  const group = e => X.groups > 1 ? ` (group ${Math.floor(e / (X.E / X.groups))})` : "";
  const list = bars(some.map(e => ({ plain: true, name: "expert " + e + group(e), value: value(e),
    ghost: X.bias && scores ? value(e) + bias(e) : null, mark: weight(e) === undefined ? "" : "✓",
    note: value(e).toFixed(2) + (weight(e) === undefined ? "" : ` → weight ${weight(e).toFixed(2)}`) })),
    `scores of the router of layer ${layer}`);
  return el("div", {}, h3(`The router of layer ${layer}, reading `, T(word(steps[r]))), quiet((scores
    ? "Bar: the score. ✓: chosen, and the weight that its score became." : "✓: chosen; the bar is the weight.")
    + (X.bias ? " Line: score and bias together, by which experts are chosen; the weight knows no bias." : "")
    + (X.groups > 1 ? ` Only the best ${X.best_groups} of ${X.groups} groups are chosen from.` : "")), list);
}

// Experts that work more in one run than in the other: what do they specialise in?
function specialists(of) {
  const every = X.layers.flatMap((layer, at) => range(X.E).map(e => [X.loads[at][e] / tokensOf(X),
    of.experts.loads[at][e] / tokensOf(of.experts), layer, e]));
  const apart = ([a, b]) => Math.abs(a - b), most = every.filter(one => apart(one) >= 0.02);
  most.sort((one, two) => apart(two) - apart(one));
  return el("div", {}, h3("Where both runs differ most"), most.length ? null : quiet("Nowhere: each expert worked on "
    + "the same share of the tokens, to 2 %."), el("ul", {}, most.slice(0, 4).map(([a, b, layer, e]) =>
    el("li", {}, `Layer ${layer}, expert ${e}: it worked on ${percent(a)} of this run's tokens, on ${percent(b)} of `
      + "the other's."))));
}

if (X) panel("experts", "Experts: who works on it", `In place of one large MLP there are ${X.E} small ones, the `
  + `experts. A router sends each token to ${X.A} of them${X.shared ? `; ${X.shared} more sees every token` : ""}. `
  + "Choose an expert to shade the tokens above that it got.", "recorded in the run", (body, r) => {
  const of = besideRun()?.experts ? besideRun() : null, every = [];
  if (M) X.layers.forEach((layer, at) => range(X.E).forEach(e => every.push([withoutExpert(layer, e, r),
    `layer ${layer}, expert ${e}`, () => pickExpert(layer, e)])));
  const chosen = state.expert === null ? null : [withoutExpert(expertLayer(), state.expert, r),
    `layer ${expertLayer()}, expert ${state.expert}`];
  const one = (of, r) => el("div", {}, h3(...besideRun() ? [of.title, ", reading "] : ["Reading "],
    T(word(of.steps[r], of))), expertGrid(of, r), h3("In its whole run"), loadPicture(of));
  fill(body, el("div", { className: "two" }, one(run, r), of ? one(of, otherStep(of, r)) : router(r)),
    quiet("Filled: chosen, as high as its weight."), el("div", { className: "two" }, of ? router(r) : null,
      of ? specialists(of) : null, whatMatters(r, "expert", every, chosen)));
});

// ---- the cache ----------------------------------------------------------------------------------------------------

const C = run.cache, latent = C.data ? unpack(C.data, Int8Array) : null;

function latentPicture(body) {
  const at = within(C.layers.indexOf(state.layer), 0, C.layers.length - 1), width = C.R + C.P;
  const px = within(Math.floor((body.clientWidth - 20) / width), 2, 9);
  const canvas = heat(el("canvas", { role: "img", ariaLabel: `The cache of layer ${C.layers[at]}: a row for each `
    + `token, ${C.R} latent values and ${C.P} rotated ones` }), width + 1, C.tokens, (y, x) => x === C.R ? null
    : signed(latent[(at * C.tokens + y) * width + x - (x > C.R)] / 127),
    [(width + 1) * px, C.tokens * Math.min(px, 7)]);
  const open = body.querySelector("details")?.open ?? false;
  return el("details", { open }, el("summary", {}, `The numbers themselves: layer ${C.layers[at]}, tokens `
    + `${C.first} to ${C.first + C.tokens - 1}`), el("div", { className: "scroll" }, canvas),
    quiet("Left of the gap the latent, right of it the values that turn with the position: their first columns turn "
      + "fast (stripes), their last hardly. Each column by its largest value."));
}

panel("cache", latent ? "The cache: one short vector a token" : "The cache: keys and values so far",
  "Later tokens look at earlier ones again, so what they look at is kept. Keys and values of all heads would be "
  + `${C.every_head} numbers a token and layer; ${C.numbers} are kept`
  + (latent ? `: a latent of ${C.R} for all heads, and ${C.P} that know the position.`
    : A.K < A.H ? `, since ${A.H / A.K} heads share one set.` : "."), "recorded in the run", (body, r) => {
  const most = C.bytes * (n - 1), now = C.bytes * (steps[r] + 1);
  fill(body, el("div", { className: "two" }, el("div", {}, h3("Numbers of one token in one layer"), bars([
    { plain: true, name: "keys and values of all heads", value: 1, note: String(C.every_head) },
    { plain: true, name: "kept", value: C.numbers / C.every_head, note: String(C.numbers) }])),
    el("div", {}, h3(`It grows by ${bytesText(C.bytes)} a token, in all ${L} layers`), bars([
      { plain: true, name: "having read token " + steps[r], value: now / most, note: bytesText(now) },
      { plain: true, name: "at the end", value: 1, note: bytesText(most) }]))),
    latent ? [C.forms == null ? null : quiet("The model computes with the latents themselves, or with keys and values "
      + `made of them, whichever is less work. Both gave the same, to ${C.forms.toExponential(0)} of the largest `
      + "value."), latentPicture(body)] : null);
});
