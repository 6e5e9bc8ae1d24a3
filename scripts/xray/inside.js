// Panels of what happens inside the layers. Each has its title, its words, and draw(body, r) for the chosen step r.

// ---- layer by layer -----------------------------------------------------------------------------------------------

const layerName = depth => depth === 0 ? "embedding" : `layer ${depth - 1}`;

// The table of what each layer would have said, around step r of a run.
function lensTable(of, r, pick) {
  const from = Math.max(0, Math.min(r - 4, of.steps.length - 10));
  const columns = of.steps.slice(from, from + 10).map((_, i) => from + i);
  const cell = (depth, c) => {
    const [id, chance] = of.lens.top[c][depth][0], colour = ramp(Math.sqrt(chance));
    const every = of.lens.top[c][depth].map(([i, x]) => `${seen(words[i])} ${percent(x)}`).join(", ");
    const own = of.steps[c] + 1 === of.tokens.length ? "" : `; ${seen(word(of.steps[c] + 1, of))}, which came, `
      + percent(of.lens.written[c][2 * depth]);
    const props = { style: { background: rgb(colour), color: inkOn(colour) },
      title: `after ${layerName(depth)}: ${every}${own}` };
    if (!pick) return el("td", { className: c === r ? "now" : "" }, el("span", props, seen(words[id])));
    return el("td", { className: c === r ? "now" : "" }, el("button", { ...props,
      tabIndex: c === r && depth === of.L ? 0 : -1, onclick: () => choose({ t: of.steps[c] + 1 }) }, seen(words[id])));
  };
  const head = el("thead", {}, el("tr", {}, el("th", { scope: "row" }, "reads"),
    columns.map(c => el("td", {}, seen(word(of.steps[c], of))))));
  const lines = Array.from({ length: of.L + 1 }, (_, depth) => el("tr", {},
    el("th", { scope: "row" }, layerName(depth) + (depth === of.L ? " → says" : "")),
    columns.map(c => cell(depth, c))));
  const table = el("table", { className: "lens" }, head, el("tbody", {}, lines));
  if (pick) {
    table.dataset.id = "lens";
    arrows(table, (down, right) => moveBy(right || down));
  }
  return table;
}

// The written token's chance at every depth, between attention and MLP too.
function rise(of, r) {
  const chances = of.lens.written[r];
  return bars(chances.map((x, i) => ({ plain: true, value: x,
    name: i === 0 ? "embedding" : `${i % 2 ? "attention" : of.experts?.layers.includes(i / 2 - 1) ? "experts" : "MLP"} `
      + Math.floor((i - 1) / 2) })));
}

panel("lens", "Layer by layer: what it would say", "Every layer adds to a vector of numbers. Here the model's own last "
  + "step (norm and head) is applied after each layer: which token would come out if the model ended there? It is the "
  + "logit lens; early layers were never trained to answer, so their words may be odd. Darker is surer.", (body, r) => {
  const t = state.t, box = el("div", { className: "scroll" }, lensTable(run, r, true));
  fill(body, box, legend("unsure", "sure", ramp),
    el("h3", {}, "The chance of ", T(word(t)), ", which came, after each part"), rise(run, r), beside(r, "lens"));
  const now = body.querySelector(".now");
  if (now) box.scrollLeft = now.offsetLeft - box.clientWidth / 2;
});

// ---- attention ----------------------------------------------------------------------------------------------------

const headSentence = (l, h, r) => {
  const [[k, x]] = strongest(l, h, r, 1), off = withoutHead(l, h, r);
  return `layer ${l}, head ${h}: looks most at ${seen(word(k))}, ${percent(x)}`
    + (off === null ? "" : `; without it ${seen(word(state.t))} would have ${percent(off)}`);
};
const pickHead = (layer, head) => choose({ show: "attention", layer, head });

// One strip a head: the tokens from first to last, dark where it looked.
function headGrid(r) {
  const S = steps[r] + 1, group = A.H / A.K;
  const grid = el("div", { role: "grid", ariaLabel: "Heads by layer", className: "heads", style: {
    display: "grid", gap: "3px", alignItems: "center", gridTemplateColumns: `auto repeat(${A.H}, minmax(0, 1fr))` } });
  grid.dataset.id = "heads";
  grid.append(el("span"));
  for (let h = 0; h < A.H; h++) {
    const line = css(h % (2 * group) < group ? "--bar" : "--quiet");
    grid.append(el("span", { className: "quiet", style: { textAlign: "center", fontSize: "11px",
      borderBottom: group > 1 ? `2px solid ${line}` : "" } }, A.H > 16 ? String(h) : "head " + h));
  }
  for (let l = 0; l < L; l++) {
    grid.append(el("span", { className: "quiet", style: { fontSize: "11px", paddingRight: "4px" } }, "layer " + l));
    for (let h = 0; h < A.H; h++) {
      const on = l === state.layer && h === state.head, looked = new Map(A.whole ? [] : strongest(l, h, r));
      const canvas = heat(el("canvas", { ariaHidden: "true" }), S, 1,
        (y, k) => ramp(Math.sqrt(A.whole ? share(l, h, r, k) : looked.get(k) || 0)));
      Object.assign(canvas.style, { width: "100%", height: "26px" });
      const border = on ? `3px solid ${css("--pick")}` : `1px solid ${css("--line")}`;
      const sentence = headSentence(l, h, r);
      grid.append(el("button", { className: "cell", tabIndex: on ? 0 : -1, ariaPressed: on, ariaLabel: sentence,
        title: sentence, style: { padding: 0, border, background: "none", borderRadius: "4px" },
        onclick: () => pickHead(l, h) }, canvas));
    }
  }
  return arrows(grid, (down, right) => pickHead(within(state.layer + down, 0, L - 1),
    within(state.head + right, 0, A.H - 1)));
}

// From 200 heads on, one picture: a cell a head, dark where it is sharp; arrow keys and clicks choose.
function headMap(r) {
  const px = Math.max(6, Math.floor(560 / A.H));
  const canvas = heat(el("canvas", { role: "img", tabIndex: 0,
    ariaLabel: `Heads by layer; chosen: ${headSentence(state.layer, state.head, r)}` }), A.H, L, (l, h) =>
    l === state.layer && h === state.head ? css("--pick-rgb").split(",").map(Number)
      : ramp(Math.sqrt(strongest(l, h, r, 1)[0][1])), [A.H * px, L * px]);
  canvas.onclick = event => {
    const box = canvas.getBoundingClientRect();
    pickHead(within(Math.floor((event.clientY - box.top) / px), 0, L - 1),
      within(Math.floor((event.clientX - box.left) / px), 0, A.H - 1));
  };
  const holder = el("div", { className: "scroll" }, canvas);
  holder.dataset.id = "heads";
  return arrows(holder, (down, right) => pickHead(within(state.layer + down, 0, L - 1),
    within(state.head + right, 0, A.H - 1)));
}

// The whole of one head: a row for each token that was read, a column for each that it could look at.
function triangle(r, width) {
  const { layer: l, head: h } = state, px = Math.max(2, Math.floor(Math.min(460, width - 8) / n));
  const canvas = heat(el("canvas", { role: "img", ariaLabel: `Layer ${l}, head ${h}: one row for each token read, `
    + "one column for each token looked at" }), n, steps.length,
    (y, k) => k > steps[y] ? null : ramp(Math.sqrt(share(l, h, y, k))), [n * px, steps.length * px]);
  canvas.onclick = event => {
    const y = Math.floor((event.clientY - canvas.getBoundingClientRect().top) / px);
    choose({ t: steps[within(y, 0, steps.length - 1)] + 1 });
  };
  const line = el("div", { style: { position: "absolute", left: 0, top: r * px - 1 + "px", width: n * px + "px",
    height: px + 2 + "px", border: `2px solid ${css("--pick")}`, pointerEvents: "none" } });
  return el("div", { className: "scroll", style: { position: "relative" } }, canvas, line);
}

// The heads without which this token would have had the least chance.
function headsThatMatter(r) {
  if (!M) return null;
  const every = [];
  for (let l = 0; l < L; l++) for (let h = 0; h < A.H; h++) every.push([withoutHead(l, h, r), l, h]);
  every.sort((a, b) => a[0] - b[0]);
  const list = bars(every.slice(0, 5).map(([x, l, h]) => ({ plain: true, value: x,
    name: el("button", { className: "plain", onclick: () => pickHead(l, h) }, `layer ${l}, head ${h}`) })));
  return el("div", {}, el("h3", {}, "Without one head, ", T(word(state.t)), ` would have had, instead of `,
    percent(M.whole[r])), quiet("Each head was switched off in turn, everything before this token left as it is."),
      list);
}

panel("attention", "Attention: where it looks", `Each of the ${L} layers has ${A.H} heads, each of which takes from `
  + `earlier tokens what it needs${A.K < A.H ? `; ${A.H / A.K} heads share one set of keys and values` : ""}. A head `
  + "reads what an earlier token has gathered, not only its word; so a blank may carry a digit. Where it looks is no "
  + "full explanation of what it writes. Choose a head to light up the text above.", (body, r) => {
  const { layer: l, head: h } = state, best = strongest(l, h, r, 5);
  const list = best.map(([k, x]) => ({ name: word(k), value: x, mark: `(${k}; ${steps[r] - k} back)` }));
  if (!A.whole) {
    const others = steps[r] + 1 - A.strongest, rest = 1 - strongest(l, h, r).reduce((sum, [, x]) => sum + x, 0);
    if (others > 0) list.push({ plain: true, name: `other ${others.toLocaleString("en")}`, value: Math.max(0, rest) });
  }
  fill(body, el("div", { className: "two" },
    el("div", {}, L * A.H < 200 ? headGrid(r) : headMap(r), legend("0 %", "100 %", x => ramp(Math.sqrt(x))),
      el("h3", {}, `Layer ${l}, head ${h}: from `, T(word(steps[r])), " it looks at"), bars(list), headsThatMatter(r)),
    A.whole ? el("div", {}, el("h3", {}, `The whole of layer ${l}, head ${h}`),
      quiet("A row for each token that was read, a column for each that it could look at: never a later one. "
        + "Click a row."), triangle(r, body.clientWidth)) : null));
});

// ---- positions ----------------------------------------------------------------------------------------------------

const O = run.rope, angle = (pair, position) => O.frequencies[pair] * position;

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}
function dial(pair, query, key) {
  const turns = position => (angle(pair, position) % (2 * Math.PI)).toFixed(2);
  const slowed = O.plain[pair] / O.frequencies[pair];
  const node = svg("svg", { viewBox: "-22 -22 44 54", width: 62, role: "img", "aria-label": `pair ${pair}: `
    + `${turns(query)} radians at token ${query}, ${turns(key)} at token ${key}`
    + (slowed > 1.001 ? `; YaRN turns it ${slowed.toFixed(1)} times as slowly` : "") });
  const hand = (position, colour, width, dashes) => svg("line", { x1: 0, y1: 0, x2: 18 * Math.sin(angle(pair,
    position)),
    y2: -18 * Math.cos(angle(pair, position)), stroke: colour, "stroke-width": width, "stroke-linecap": "round",
    "stroke-dasharray": dashes });
  node.append(svg("circle", { r: 20, fill: css("--paper"), stroke: css("--line") }),
    hand(key, css("--bar"), 2, "3 3"), hand(query, css("--pick"), 3, "none"),
    svg("text", { y: 31, "text-anchor": "middle", "font-size": 9, fill: css("--quiet") },
      `pair ${pair}${slowed > 1.001 ? " ✻" : ""}`));
  return node;
}

panel("rope", "Positions: hands of clocks", "Attention compares tokens and would not notice their order. So every "
  + "query "
  + "and key is turned: its values go in pairs, and each pair turns like the hand of a clock, by its own angle for "
  + "each "
  + "token. Two tokens are compared by the difference of their hands: how far they are apart.", (body, r) => {
  const query = steps[r], [[key]] = strongest(state.layer, state.head, r, 1), pairs = O.frequencies.length;
  const every = Math.ceil(pairs / 16), shown = Array.from({ length: pairs }, (_, j) => j).filter(j => j % every === 0);
  const columns = Math.min(n, 512), px = Math.max(1, Math.floor(Math.min(720, body.clientWidth - 10) / columns));
  const canvas = heat(el("canvas", { role: "img", ariaLabel: "Cosine of the angle: a row for each pair, "
    + "a column for each token" }), columns, pairs, (j, x) => signed(Math.cos(angle(j, x))), [columns * px, pairs * 6]);
  const mark = colour => el("span", { className: "key", style: { background: css(colour) } });
  fill(body, el("p", {}, mark("--pick"), `token ${query} `, T(word(query)), ", which is being read",
    mark("--bar"),
    `token ${key} `, T(word(key)), `, where layer ${state.layer}, head ${state.head} looks most: ${query - key} back`),
    el("div", { style: { display: "flex", flexWrap: "wrap" } }, shown.map(j => dial(j, query, key))),
    O.yarn ? quiet(`✻ slowed by YaRN, up to ${O.yarn} times, for contexts longer than those of training.`) : null,
    el("h3", {}, `All pairs at ${columns < n ? "the first " + columns : "all"} positions: cosine of the angle`),
    el("div", { className: "scroll" }, canvas));
});

// ---- experts ------------------------------------------------------------------------------------------------------

const scores = X?.scores ? unpack(X.scores, Uint16Array) : null;
const score = (at, r, e) => scores ? scores[(at * steps.length + r) * X.E + e] / 65535 : null;

// Layers by experts of one run in step r; a filled square was chosen, its size is the weight.
function expertGrid(of, r, pick) {
  const experts = of.experts, size = Math.max(8, Math.min(44, Math.floor(560 / experts.E) - 3));
  const grid = el("div", { role: "grid", ariaLabel: "Experts by layer", className: "scroll", style: { display: "grid",
    gridTemplateColumns: `64px repeat(${experts.E}, ${size}px)`, gap: "3px", alignItems: "center" } });
  grid.append(el("span"));
  for (let e = 0; e < experts.E; e++) grid.append(el("span", { className: "quiet", style: { fontSize: "11px",
    textAlign: "center" } }, experts.E <= 16 || e % 8 === 0 ? String(e) : ""));
  experts.layers.forEach((l, at) => {
    grid.append(el("span", { className: "quiet", style: { fontSize: "11px" } }, "layer " + l));
    for (let e = 0; e < experts.E; e++) {
      const found = experts.chosen[at][r].find(([id]) => id === e), s = of === run ? score(at, r, e) : null;
      const [layer, number] = state.expert || [0, 0], on = pick && layer === at && number === e;
      const lit = state.show === "expert" && state.expert && on, off = of === run ? withoutExpert(at, e, r) : null;
      const sentence = `layer ${l}, expert ${e}: ${found ? "weight " + found[1].toFixed(2) : "not chosen"}`
        + (s === null ? "" : `, score ${s.toFixed(2)}` + (experts.bias ? `, with its bias ${(s + experts.bias[at][e])
          .toFixed(2)}` : "")) + (off === null || !found ? "" : `; without it ${seen(word(state.t))} would have `
          + percent(off));
      const side = found ? Math.max(5, Math.round(Math.sqrt(Math.min(1, found[1])) * (size - 2))) : 0;
      const square = found ? el("span", { style: { width: side + "px", height: Math.min(side, 26) + "px",
        background: css("--bar"), borderRadius: "2px", color: css("--paper"), fontSize: "10px",
        lineHeight: Math.min(side, 26) + "px", overflow: "hidden" } }, side > 20 ? found[1].toFixed(1) : "") : "";
      const props = { className: "cell", ariaLabel: sentence, title: sentence, style: { width: size + "px", padding: 0,
        height: Math.max(14, Math.min(size, 30)) + "px", display: "grid", placeItems: "center", borderRadius: "3px",
        background: rgb(ramp((s || 0) * 0.25)), border: lit ? `3px solid ${css("--pick")}`
          : `1px solid ${css("--line")}` } };
      if (pick) Object.assign(props, { tabIndex: on ? 0 : -1, ariaPressed: !!lit, onclick: () => pickExpert(at, e) });
      grid.append(el(pick ? "button" : "span", props, square));
    }
  });
  if (!pick) return grid;
  grid.dataset.id = "experts";
  return arrows(grid, (down, right) => pickExpert(within((state.expert?.[0] ?? 0) + down, 0, X.layers.length - 1),
    within((state.expert?.[1] ?? 0) + right, 0, X.E - 1)));
}
const pickExpert = (at, e) => choose({ show: "expert", expert: [at, e] });

function loadPicture(experts) {
  const most = Math.max(...experts.loads.flat()), size = Math.max(8, Math.min(44, Math.floor(560 / experts.E) - 3));
  const tokens = experts.loads[0].reduce((a, b) => a + b, 0) / experts.A;
  const canvas = heat(el("canvas", { role: "img", ariaLabel: "How often each expert was chosen: "
    + experts.layers.map((l, at) => `layer ${l}: ${experts.loads[at].join(", ")}`).slice(0, 8).join("; ") }),
    experts.E, experts.layers.length, (at, e) => ramp(experts.loads[at][e] / most),
    [experts.E * (size + 3) - 3, experts.layers.length * 16]);
  return el("div", {}, el("div", { className: "scroll", style: { paddingLeft: "67px" } }, canvas),
    legend("never", `${most} of ${tokens} tokens`, ramp));
}

if (X) panel("experts", "Experts: who works on it", `In place of one large MLP there are ${X.E} small ones a `
  + `layer, the `
  + `experts. A router sends each token to ${X.A} of them${X.shared ? `, and ${X.shared} more sees every token` : ""}. `
  + "Choose an expert to see in the text above which tokens it got.", (body, r) => {
  const groups = X.groups > 1 ? ` Of ${X.groups} groups of experts, only the best ${X.best_groups} are chosen from.`
    : "";
  fill(body, el("div", { className: "scroll" }, expertGrid(run, r, true)),
    quiet("A filled square: chosen, its size the weight." + (scores ? " Shading behind it: the router's score." : "")
      + (X.bias ? " A bias is added to the score where experts are chosen, and nowhere else." : "") + groups),
    el("h3", {}, "In the whole run"), loadPicture(X), beside(r, "experts"));
});

