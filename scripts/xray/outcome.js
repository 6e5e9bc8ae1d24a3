// Panels of what comes of it: the choice, drafts, cost; and how all of it was recorded.

// ---- the choice ---------------------------------------------------------------------------------------------------

const G = run.choice, logits = unpack(G.logits, Float32Array), SHOWN = 8;
const recordedSettings = { temperature: meta.sampling.temperature || 0, top_k: meta.sampling.top_k || 0,
  top_p: meta.sampling.top_p || 1, min_p: meta.sampling.min_p || 0 };
let setting = { ...recordedSettings };

// The chances of the likeliest tokens at other settings, as generate.py computes them: all that the page has logits of,
// and last the written token's. Of the rest it has a histogram: [mean of the logits, how many].
function whatIf(r, { temperature, top_k, top_p, min_p }) {
  const kept = Array.from(logits.subarray(r * G.kept, (r + 1) * G.kept)), step = G.steps[r];
  const own = step.place < G.kept ? step.place : -1;                     // where the written token is among them
  if (!temperature) return [...kept.map((_, i) => i ? 0 : 1), own === 0 ? 1 : 0];
  const weigh = x => Math.exp((x - kept[0]) / temperature), size = top_k || Infinity;
  let room = Math.max(0, size - kept.length), tail = 0;
  for (const [mean, many] of step.rest) { tail += Math.min(room, many) * weigh(mean); room -= Math.min(room, many); }
  const some = kept.map((x, i) => i < size ? weigh(x) : 0), all = sum(some) + tail;
  let before = 0, chosen = 0;
  const chances = some.map(weight => {
    const x = weight / all, stays = x > 0 && before < top_p && x >= min_p * some[0] / all;
    before += x;
    if (stays) chosen += x;
    return stays ? x : 0;
  });
  const written = weigh(step.written[1]) / all, tailStays = before < top_p && written >= min_p * some[0] / all;
  if (before < top_p && !min_p) chosen += tail / all;
  chances.push(own >= 0 ? chances[own] : tailStays && step.place < size ? written : 0);
  return chances.map(x => x / chosen);
}

// Bars of the likeliest tokens and the written one: chance(i) to be drawn, plain(i) that of the model.
function choiceBars(step, chance, plain, last, label) {
  const entry = (id, place, x, ghost, isWritten) => ({ name: words[id], value: x, ghost, cut: x === 0,
    mark: isWritten ? `← written${place < SHOWN ? "" : ", place " + place}` : "",
    note: x === 0 ? "cut off" : percent(x) });
  const list = step.ids.slice(0, SHOWN).map((id, i) => entry(id, i, chance(i), plain(i), id === step.written[0]))
    .filter((e, i) => e.value >= 0.0005 || e.mark || e.value === 0 && (e.ghost ?? 0) >= 0.0005);
  if (step.place >= SHOWN) list.push(entry(step.written[0], step.place, ...last, true));
  const rest = 1 - sum(list.map(e => e.value));
  if (rest >= 0.0005) list.push({ plain: true, name: "all others", value: rest });
  return bars(list, label);
}

function slider(name, label, least, most, step, show, changed) {
  const out = el("output", {}, show(setting[name])), input = el("input", { type: "range", min: least,
    max: Math.max(most, recordedSettings[name]), step, ariaLabel: label });
  input.value = setting[name];
  input.oninput = () => { setting[name] = +input.value; out.textContent = show(setting[name]); changed(); };
  return el("label", {}, label, input, out);
}

panel("choice", "The choice: from scores to one token", "The head gives every token a score; scores become chances. "
  + (recordedSettings.temperature ? "The likeliest is not always taken: one is drawn."
    : "This run always took the likeliest (temperature 0). The likeliest is not always taken: one may be drawn."),
  "recorded in the run", (body, r) => {
  const step = G.steps[r], own = Array.from(logits.subarray(r * G.kept, r * G.kept + step.ids.length));
  const model = x => Math.exp(x - step.all), greedy = step.drawn && !recordedSettings.temperature;
  const drawn = greedy || !step.drawn;                                   // then the model's chances are all there is
  const recorded = choiceBars(step, i => drawn ? model(own[i]) : step.chances[i], i => drawn ? null : model(own[i]),
    drawn ? [model(step.written[1]), null] : [step.written[2], model(step.written[1])], "as it was");
  recorded.id = "as-it-was";
  const told = !step.drawn ? [later(), " This token is the prompt's: nothing was drawn. These are the chances that the "
    + "model gave."] : greedy ? ["The chances that the model gave. The likeliest was taken: its chance to be written "
    + "was 100 %."] : [`Bar: the chance to be drawn; ${count(step.possible)} of ${count(meta.vocabulary)} tokens had `
    + "one. Line: the model's own, at temperature 1, before anything was cut off. Hatched: cut off."];
  const holder = el("div", { id: "what-if" }), draw = () => {
    const chances = whatIf(r, setting);
    fill(holder, choiceBars(step, i => chances[i], () => null, [chances[G.kept], null], "what if"));
  };
  const reset = el("button", { className: "plain", onclick: () => { setting = { ...recordedSettings }; choose({}); } },
    "As recorded");
  const sliders = el("div", { className: "sliders" },
    slider("temperature", "temperature", 0, 2, 0.05, v => v ? v.toFixed(2) : "0, greedy", draw),
    slider("top_k", "top-k", 0, 50, 1, v => v || "off", draw),
    slider("top_p", "top-p", 0.05, 1, 0.01, v => v === 1 ? "off" : v.toFixed(2), draw),
    slider("min_p", "min-p", 0, 0.5, 0.01, v => v ? v.toFixed(2) : "off", draw), reset);
  sliders.dataset.id = "sliders";
  draw();
  fill(body, el("div", { className: "two" }, el("div", {}, h3("As it was"), quiet(...told), recorded),
    el("div", {}, h3("What if? ", later()), sliders, holder)));
});

// ---- drafts -------------------------------------------------------------------------------------------------------

if (run.drafts.length) panel("drafts", "Drafts: two tokens for one step",
  "A small extra layer guesses one token further. The model checks the guess together with the next token: a right one "
  + "comes for free, a wrong one is thrown away. The text stays one that the model would have written.",
  "recorded in the run", (body, r) => {
  const right = run.drafts.filter(d => d.token === d.drafted).length, now = run.drafts.find(d => d.at === state.t);
  const passes = run.passes.answer + 1;
  const one = d => el("button", { className: "draft" + (d === now ? " chosen" : ""), onclick: () => choose({ t: d.at }),
    title: `token ${d.at}: the draft layer gave it ${percent(d.guess)}, the model ${percent(d.truth)}` },
    T(word(d.at - 1)), " ", d.token === d.drafted ? el("span", { className: "yes" }, "✓ ", seen(words[d.drafted]))
      : [el("span", { className: "no" }, "✗ ", el("s", {}, seen(words[d.drafted]))), " → ", T(words[d.token])]);
  const list = el("div", { className: "drafts" }, run.drafts.map(one));
  list.dataset.id = "drafts";
  fill(body, el("p", {}, `${right} of ${run.drafts.length} guesses were right: ${n - P} tokens in ${passes} steps, `
    + `${((n - P) / passes).toFixed(2)} a step.`), list, now ? el("p", {}, `Token ${now.at}: to the guess `,
      T(words[now.drafted]), ` the draft layer gave ${percent(now.guess)}, the model ${percent(now.truth)}. `,
      now.token === now.drafted ? "It was kept." : ["It was refused; the model wrote ", T(words[now.token]), "."])
      : quiet("Before each guess stands the token that it follows. Choose one for its chances."));
});

// ---- cost ---------------------------------------------------------------------------------------------------------

// Parts of a whole, the largest first.
function shares(title, entries, show) {
  const total = sum(entries.map(e => e[1])), some = entries.filter(e => e[1] > 0).sort((a, b) => b[1] - a[1]);
  return el("div", {}, h3(`${title}: ${show(total)}`), bars(some.map(([name, x]) => ({ plain: true, name,
    value: x / total, note: show(x) }))));
}

panel("cost", "What it cost", "Each token of the answer reads the weights once more; the prompt's tokens share one "
  + "reading. That is why an answer takes longer a token, and why its speed follows the bytes of the weights.",
  "recorded in the run", body => {
  if (body.childNodes.length) return;                                    // the same for every token
  const ms = x => x < 0.01 ? (1000 * x).toFixed(1) + " ms" : Math.round(1000 * x) + " ms", { cost } = run;
  const time = phase => cost.seconds.filter(s => s[1] === phase).map(s => [s[0], s[2]]);
  fill(body, el("div", { className: "two" },
    shares(`Time for the prompt's ${count(P)} tokens`, time("prompt"), ms),
    shares(`Time for the answer's ${count(n - P)} tokens`, time("answer"), ms),
    shares("Weights that one token reads", cost.weights.map(w => [w[0], w[2]]), bytesText),
    shares("Weights in all", cost.weights.map(w => [w[0], w[1]]), bytesText)));
});

// ---- how it was recorded ------------------------------------------------------------------------------------------

function leftOut() {
  const all = n - 1, kept = steps.length;
  const rows = kept === all ? "All tokens but the first can be chosen." : `Of ${count(all)} tokens ${count(kept)} can `
    + `be chosen, ${steps[0] + 1} to ${steps[kept - 1] + 1}; what the others did was left out.`;
  return rows + (A.whole ? "" : ` Of each head the ${A.strongest} tokens that it looked at most are kept.`)
    + (X && !scores ? " Of the routers only the chosen experts are kept, not the scores of all." : "")
    + (M ? "" : " What single parts matter was not computed.");
}
panel("recorded", "How this was recorded", "The model computed what it always computes, and wrote what it would have "
  + "written without the recording. This page loads nothing and sends nothing. It holds the question and the answer as "
  + "text.", "recorded in the run", body => {
  const own = Math.round(1000 * run.cost.own), all = Math.round(1000 * sum(Object.values(run.cost.total)));
  fill(body, el("p", {}, "Made by ", el("code", { className: "wrap" }, meta.command)), el("ul", {},
    el("li", {}, `PyTorch ${meta.torch}, ${meta.device}, ${meta.dtype}` + (meta.plain ? ", the code of the lesson alone"
      : "") + (meta.seed == null ? "." : `, seed ${meta.seed}.`)),
    el("li", {}, "Recorded in the run: tokens, what each layer adds, where heads look, routers, logits, drafts, times. "
      + `Recording took ${own} ms beside the ${all} ms of the run, and is in none of the times above.`),
    el("li", {}, "Computed afterwards, by the same model: what each layer would say, what each part matters, and what "
      + "if."),
    el("li", {}, "The attention kernel shows no weights, so they were computed again from the same queries and keys, "
      + `while it ran. What they give differs from its result by at most ${(100 * A.error).toPrecision(2)} % of the `
      + `largest value: rounding in ${meta.dtype}.`), el("li", {}, leftOut())));
});

// ---- begin --------------------------------------------------------------------------------------------------------

// Beside a run with a part off: that part, and the first token that is another one, or, if both wrote the same, the one
// that came closest to being another. Else the hardest token.
function chooseOpening() {
  const of = other ? runs[other] : run, falls = r => written(r) - of.forced[r];
  if (of.off.length) {
    const apart = parting(of), most = range(steps.length).filter(r => steps[r] + 1 >= P)
      .reduce((a, b) => falls(b) > falls(a) ? b : a, Math.max(0, rowOf(P)));
    state.t = rowOf(apart) >= 0 ? apart : steps[most] + 1;
  }
  chooseHead(rowOf(state.t));
  const part = /^layer(\d+)\.(head|expert)(\d+)$/.exec(of.off[0]);
  if (part) { state.layer = +part[1]; state[part[2]] = +part[3]; }
}

function start() {
  if (!steps.length) {
    document.querySelectorAll("section, nav, header button").forEach(node => node.remove());
    return fill(story, "The answer has no token: nothing was recorded.");
  }
  chooseOpening();
  readAddress();
  showContents();
  showTheme();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  addEventListener("hashchange", () => { readAddress(); choose({}); });
  // The strip stays on top: what is jumped to should not end up under it.
  const top = document.getElementById("strip"), room = () => {
    root.style.scrollPaddingTop = top.offsetHeight + 8 + "px"; };
  new ResizeObserver(room).observe(top);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; choose({}); } });
}
start();
