// Panels of the layers: what each would say, and where its heads look.

const layerName = depth => depth === 0 ? "embedding" : `layer ${depth - 1}`;

// ---- layer by layer -----------------------------------------------------------------------------------------------

// The table of what each layer would have said, around step r of a run; in `run` itself cells can be chosen.
function lensTable(of, r, size) {
  const from = within(r - Math.floor(size / 2) + 1, 0, Math.max(0, of.steps.length - size)), own = of === run;
  const columns = range(Math.min(size, of.steps.length)).map(i => from + i);
  const cell = (depth, c) => {
    const [id, chance] = of.lens.top[c][depth][0], colour = lit(chance), now = c === r;
    const every = of.lens.top[c][depth].map(([i, x]) => `${seen(words[i])} ${percent(x)}`).join(", ");
    const props = { style: { background: rgb(colour), color: inkOn(colour) }, title: `after ${layerName(depth)}: `
      + `${every}; ${seen(word(of.steps[c] + 1, of))}, which came, ${percent(of.lens.written[c][2 * depth])}` };
    const layer = depth ? depth - 1 : state.layer, chosen = own && now && depth === state.layer + 1;
    return el("td", { className: now ? "now" : "" }, own ? el("button", { ...props, tabIndex: chosen ? 0 : -1,
      className: chosen ? "chosen" : "", onclick: () => choose({ t: of.steps[c] + 1, layer }) }, seen(words[id]))
      : el("span", props, seen(words[id])));
  };
  const line = (name, text) => el("tr", {}, el("th", { scope: "row" }, name), columns.map(c => el("td", {}, text(c))));
  const table = el("table", { className: "lens" }, el("thead", {}, line("it reads", c => seen(word(of.steps[c], of)))),
    el("tbody", {}, range(of.L + 1).map(depth => el("tr", {}, el("th", { scope: "row" }, layerName(depth)
      + (depth === of.L ? " says" : "")), columns.map(c => cell(depth, c))))),
    el("tfoot", {}, line("then came", c => seen(word(of.steps[c] + 1, of)))));
  return own ? arrows(table, "lens", (down, right) => right
    ? choose({ t: steps[within(r + right, 0, steps.length - 1)] + 1 })
    : choose({ layer: within(state.layer + down, 0, L - 1) })) : table;
}

// The written token's chance at every depth, between attention and MLP too.
function rise(of, r) {
  const chances = of.lens.written[r], t = of.steps[r] + 1;
  const bar = x => el("td", {}, el("div", { className: "little" }, el("div", { className: "fill",
    style: { width: 100 * x + "%" } })), el("span", {}, percent(x)));
  return el("table", { className: "rise" }, el("thead", {}, el("tr", {}, el("th", {}, "chance of ", T(word(t, of))),
    el("td", {}, "after attention"), el("td", {}, of.experts ? "after the MLP or experts" : "after the MLP"))),
    el("tbody", {}, el("tr", {}, el("th", { scope: "row" }, "embedding"), el("td", {}), bar(chances[0])),
      range(of.L).map(l => el("tr", {}, el("th", { scope: "row" }, "layer " + l), bar(chances[2 * l + 1]),
        bar(chances[2 * l + 2])))));
}

// The likeliest after one depth; what came is marked, and added where it is not among them.
function likeliest(of, r, depth) {
  const came = of.tokens[of.steps[r] + 1], chance = of.lens.written[r][2 * depth];
  const list = of.lens.top[r][depth].filter(([id, x]) => x >= 0.0005 || id === came);
  const entries = list.map(([id, x]) => ({ name: words[id], value: x, mark: id === came ? "← came" : "" }));
  if (list.every(([id]) => id !== came)) entries.push({ name: words[came], value: chance, mark: "← came" });
  return bars(entries, `the likeliest tokens after ${layerName(depth)}`);
}

panel("lens", "Layer by layer: what it would say", "Every layer adds to a vector. Here the model's own last step (norm "
  + "and head) is applied after each layer: the logit lens. Early layers were never trained to answer, so their words "
  + "may be odd. The stronger the colour, the surer.", "computed afterwards from the recorded vectors", (body, r) => {
  const of = besideRun(), size = of ? 5 : 10, at = of && otherStep(of, r);
  const one = (run, r) => el("div", {}, of ? h3(run.title) : null, el("div", { className: "scroll" },
    lensTable(run, r, size)), of ? [h3("The chance of what came, by layer"), rise(run, r)] : null);
  const l = state.layer;
  fill(body, el("div", { className: of ? "two" : "lens-and-rise" }, one(run, r), of ? one(of, at) : rise(run, r)),
    legend("unsure", "sure", lit),
    of ? null : el("div", { className: "two" }, l < L - 1 ? el("div", {}, h3(`After layer ${l} it would have said`),
      likeliest(run, r, l + 1)) : null, el("div", {}, h3(`After layer ${L - 1}, the last, it said`),
      likeliest(run, r, L))));
});

// ---- attention ----------------------------------------------------------------------------------------------------

const headSentence = (l, h, r) => {
  const [[k, x]] = strongest(l, h, r, 1), off = withoutHead(l, h, r);
  return `layer ${l}, head ${h}: looks most at ${seen(word(k))} (token ${k}), ${percent(x)}`
    + (off === null ? "" : `; without it ${seen(word(state.t))} would have ${percent(off)}`);
};
const pickHead = (layer, head) => choose({ layer, head, expert: null });
const moveHead = (down, right) => pickHead(within(state.layer + down, 0, L - 1),
  within(state.head + right, 0, A.H - 1));

// One strip a head: the tokens from first to last, coloured where it looked. Heads that share keys and values are near.
function headGrid(r) {
  const S = steps[r] + 1, length = Math.min(S, 80), group = A.H / A.K;
  const gap = h => group > 1 && h && h % group === 0 ? "10px" : "0";
  const grid = el("div", { role: "group", ariaLabel: "Heads by layer; arrow keys choose one", className: "heads",
    style: { gridTemplateColumns: `auto repeat(${A.H}, minmax(0, 1fr))` } }, el("span"));
  for (let h = 0; h < A.H; h++) grid.append(el("span", { className: "label", style: { marginLeft: gap(h) } },
    A.H > 8 ? String(h) : "head " + h));
  for (let l = 0; l < L; l++) {
    grid.append(el("span", { className: "label row" }, "layer " + l));
    for (let h = 0; h < A.H; h++) {
      const on = l === state.layer && h === state.head, looked = new Float32Array(length);
      for (const [k, x] of A.whole ? range(S).map(k => [k, share(l, h, r, k)]) : strongest(l, h, r))
        looked[Math.floor(k * length / S)] += x;                    // of a long text, neighbours together
      const canvas = heat(el("canvas", { ariaHidden: "true" }), length, 1, (y, x) => lit(looked[x]));
      const sentence = headSentence(l, h, r);
      const off = withoutHead(l, h, r), matters = off !== null && off < M.whole[r] - 0.1;
      grid.append(el("button", { className: "cell" + (matters ? " matters" : ""),
        tabIndex: on ? 0 : -1, ariaPressed: String(on), title: sentence, ariaLabel: sentence,
        style: { marginLeft: gap(h) }, onclick: () => pickHead(l, h) }, canvas));
    }
  }
  return arrows(grid, "heads", moveHead);
}

// From 200 heads on, one picture: a cell a head, coloured where it is sharp; arrow keys and clicks choose.
function headMap(r) {
  return cells("heads", A.H, L, state.head, state.layer, (l, h) => lit(strongest(l, h, r, 1)[0][1]),
    `Heads by layer; chosen: ${headSentence(state.layer, state.head, r)}`, pickHead, moveHead);
}

// A picture of rows by columns with one Tab stop and a frame around what is chosen.
function cells(id, columns, rows, column, row, colour, label, pick, move) {
  const px = within(Math.floor(560 / columns), 4, 16), py = within(Math.floor(440 / rows), 4, 16);
  const canvas = heat(el("canvas", { role: "img", tabIndex: 0, ariaLabel: label, title: label }), columns, rows, colour,
    [columns * px, rows * py]);
  canvas.onclick = event => {
    const box = canvas.getBoundingClientRect();
    pick(within(Math.floor((event.clientY - box.top) / py), 0, rows - 1),
      within(Math.floor((event.clientX - box.left) / px), 0, columns - 1));
  };
  const frame = el("div", { className: "frame now", style: { left: column * px - 2 + "px", top: row * py - 2 + "px",
    width: px + 4 + "px", height: py + 4 + "px" } });
  return arrows(el("div", { className: "scroll" }, el("div", { className: "map" }, canvas, frame)), id, move);
}

// The whole of one head: a row for each token that was read, a column for each that it could look at.
function triangle(r, width) {
  const { layer: l, head: h } = state, S = steps[steps.length - 1] + 1;
  const px = within(Math.floor(Math.min(480, width - 8) / S), 2, 16);
  const canvas = heat(el("canvas", { id: "triangle", role: "img", ariaLabel: `Layer ${l}, head ${h}: one row for each `
    + "token read, one column for each token looked at" }), S, steps.length,
    (y, k) => k > steps[y] ? null : lit(share(l, h, y, k)), [S * px, steps.length * px]);
  canvas.onclick = event => {
    const y = Math.floor((event.clientY - canvas.getBoundingClientRect().top) / px);
    choose({ t: steps[within(y, 0, steps.length - 1)] + 1 });
  };
  const line = el("div", { className: "frame", style: { left: "-2px", top: r * px - 2 + "px", height: px + 4 + "px",
    width: S * px + 4 + "px" } });
  return el("div", { className: "scroll" }, el("div", { className: "map" }, canvas, line));
}

// How the written token's chance falls without a head (an expert): of the chosen one in words, then those that matter
// most as bars. every: [[chance, name, pick], …], chosen: its name and chance.
function whatMatters(r, kind, every, chosen) {
  if (!M) return quiet(`What each ${kind} matters was not computed: for a model or text of this size it takes long.`);
  const whole = M.whole[r], most = every.filter(([x]) => x < whole - 0.01).sort((a, b) => a[0] - b[0]);
  const list = bars(most.slice(0, 5).map(([x, name, pick]) => ({ plain: true, value: x, ghost: whole,
    name: el("button", { className: "plain", onclick: pick }, "without " + name) })), `chance without one ${kind}`);
  list.dataset.id = `matters-${kind}s`;
  const change = x => x < whole - 0.01 ? `falls from ${percent(whole)} to ` : x > whole + 0.01
    ? `rises from ${percent(whole)} to ` : "hardly changes: ";
  return el("div", { id: `matters-${kind}` }, h3(`What ${kind === "head" ? "a" : "an"} ${kind} matters `, later()),
    chosen ? el("p", {}, `Switch ${chosen[1]} off and the chance of `, T(word(state.t)), " "
      + `${change(chosen[0])}${percent(chosen[0])}.`) : null,
    quiet(`The same text was read again with one ${kind} off at a time. `, most.length
      ? ["The chance of ", T(word(state.t)), " fell most without these; the line is the chance with all."]
      : ["No single one makes ", T(word(state.t)), " less likely by more than 1 %."]), list);
}

panel("attention", "Attention: where it looks", `Each of the ${L} layers has ${A.H} heads`
  + `${A.K < A.H ? `; ${A.H / A.K} share one set of keys and values` : ""}. A head reads what an earlier token has `
  + "gathered, not only its word; so a blank may carry a digit. Where it looks is no full explanation of what it "
  + "writes.", "recorded in the run", (body, r) => {
  const { layer: l, head: h } = state, every = [];
  const list = strongest(l, h, r, 5).filter(([, x]) => x >= 0.0005)
    .map(([k, x]) => ({ name: word(k), value: x, mark: `token ${k}, ${steps[r] - k} back` }));
  const left = steps[r] + 1 - list.length, rest = 1 - sum(list.map(entry => entry.value));
  if (left > 0 && rest >= 0.0005) list.push({ plain: true, value: rest, name: `${count(left)} others` });
  if (M) for (let l = 0; l < L; l++) for (let h = 0; h < A.H; h++)
    every.push([withoutHead(l, h, r), `layer ${l}, head ${h}`, () => pickHead(l, h)]);
  const chosen = [h3(`Layer ${l}, head ${h}: reading `, T(word(steps[r])), " it looks at"),
    bars(list, "where it looks"), whatMatters(r, "head", every, [withoutHead(l, h, r), `layer ${l}, head ${h}`])];
  fill(body, el("div", { className: "two" },
    el("div", {}, L * A.H < 200 ? headGrid(r) : headMap(r),
      quiet(L * A.H < 200 ? "A strip for each head: the tokens from the first to the one being read, coloured where it "
        + "looked. Choose one to shade the text above." + (M ? " ◆: without it, what came is at least 10 % less "
        + "likely." : "") : "A column for each head, a row for each layer; coloured by what it gave one token "
        + "at most."),
      legend("0 %", "100 %", lit), A.whole ? chosen : null),
    el("div", {}, A.whole ? [
      h3(`The whole of layer ${l}, head ${h}`), quiet("A row for each token that was read, a column for each that it "
        + "could look at: never a later one."), triangle(r, body.clientWidth)] : chosen)));
});
