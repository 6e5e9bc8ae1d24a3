// Panels of what comes of it: what is kept, chosen, guessed, compared and spent; and how it was recorded.

// ---- the cache ----------------------------------------------------------------------------------------------------

const C = run.cache, latent = C.data ? unpack(C.data, Int8Array) : null;
const bytesText = x => x >= 1e9 ? (x / 1e9).toFixed(2) + " GB" : x >= 1e6 ? (x / 1e6).toFixed(2) + " MB"
  : (x / 1e3).toFixed(1) + " kB";

function latentPicture(body) {
  const at = within(C.layers.indexOf(state.layer), 0, C.layers.length - 1), width = C.R + C.P;
  const px = Math.max(2, Math.min(9, Math.floor((body.clientWidth - 20) / width)));
  const canvas = heat(el("canvas", { role: "img", ariaLabel: `The cache of layer ${C.layers[at]}: a row for each `
    + `token, `
    + `${C.R} latent values and ${C.P} rotated ones` }), width + 1, C.tokens, (y, x) => x === C.R ? null
    : signed(latent[(at * C.tokens + y) * width + x - (x > C.R)] / 127), [(width + 1) * px, C.tokens * Math.min(px,
    7)]);
  return el("details", {}, el("summary", {}, `The numbers themselves: layer ${C.layers[at]}, tokens ${C.first} to `
    + `${C.first + C.tokens - 1}`), el("div", { className: "scroll" }, canvas),
    quiet("Left of the gap the latent, right of it the values that turn with the position: their first columns "
      + "turn fast "
      + "(stripes), their last hardly. Each column by its largest value."));
}

panel("cache", latent ? "The cache: one short vector a token" : "The cache: keys and values of the tokens so far",
  "Later tokens look at earlier ones again and again, so what they look at is kept. Keys and values of all "
  + `${A.H} heads would be ${C.every_head} numbers a token and layer; this model keeps ${C.numbers}`
  + (latent ? `: a latent of ${C.R}, of which every head makes its own keys and values, and ${C.P} that know the `
  + `position.`
    : A.K < A.H ? `, since ${A.H / A.K} heads share one set.` : "."), (body, r) => {
  fill(body, bars([{ plain: true, name: "all heads", value: 1, note: String(C.every_head) },
    { plain: true, name: "kept", value: C.numbers / C.every_head, note: String(C.numbers) }]),
    el("p", {}, `In all layers ${bytesText(C.bytes)} a token: ${bytesText(C.bytes * (steps[r] + 1))} here, `
      + `${bytesText(C.bytes * (n - 1))} at the end.`),
    ...(latent ? [C.forms == null ? null : quiet("The model computes with the latents themselves, or with keys and "
      + "values "
      + `made of them, whichever is less work. Both gave the same, to ${C.forms.toExponential(0)} of the largest `
      + `value.`),
      latentPicture(body)] : []));
});

// ---- the choice ---------------------------------------------------------------------------------------------------

const G = run.choice, logits = unpack(G.logits, Float32Array);
const recordedSettings = { temperature: meta.sampling.temperature || 0, top_k: meta.sampling.top_k || 0,
  top_p: meta.sampling.top_p || 1, min_p: meta.sampling.min_p || 0 };
const setting = { ...recordedSettings };

// The chances of the likeliest tokens at other settings, as generate.py computes them; the rest from its histogram.
function whatIf(r, { temperature, top_k, top_p, min_p }) {
  const kept = Array.from(logits.subarray(r * G.kept, (r + 1) * G.kept)), t = Math.max(temperature, 1e-6);
  const weigh = x => Math.exp((x - kept[0]) / t), size = top_k ? Math.min(top_k, kept.length) : kept.length;
  const tail = top_k && top_k <= kept.length ? 0 : G.steps[r].rest.reduce((sum, [mean, count]) =>
    sum + count * weigh(mean), 0);
  const some = kept.slice(0, size).map(weigh), all = some.reduce((a, b) => a + b, 0) + tail;
  let before = 0, chosen = 0;
  const chances = kept.map((_, i) => {
    const x = i < size ? some[i] / all : 0, ok = before < top_p && x >= min_p * some[0] / all;
    before += x;
    if (ok) chosen += x;
    return ok ? x : 0;
  });
  if (before < top_p && tail) chosen += tail / all;
  return chances.map(x => x / chosen);
}

panel("choice", "The choice: from scores to one token", "The head gives every token a score; scores become chances. "
  + (recordedSettings.temperature ? "The likeliest is not always taken: one is drawn."
    : "This run always took the likeliest (temperature 0)."), (body, r) => {
  const step = G.steps[r], own = Array.from(logits.subarray(r * G.kept, r * G.kept + step.ids.length));
  const isWritten = i => step.ids[i] === step.written[0];
  const recorded = step.ids.slice(0, 8).map((id, i) => ({ name: words[id], value: step.chances[i],
    ghost: Math.exp(own[i] - step.all), out: step.chances[i] === 0, mark: isWritten(i) ? "← written" : "" }));
  if (step.place >= 8) recorded.push({ name: words[step.written[0]], value: step.written[2],
    ghost: Math.exp(step.written[1] - step.all), mark: `← written, place ${step.place}` });
  const list = el("div"), draw = () => {
    const chances = whatIf(r, setting);
    list.replaceChildren(bars(step.ids.slice(0, 8).map((id, i) => ({ name: words[id], value: chances[i],
      out: chances[i] === 0, mark: isWritten(i) ? "← written" : "" }))));
  };
  const slider = (name, label, max, step, show) => {
    const out = el("output", {}, show(setting[name]));
    const input = el("input", { type: "range", min: name === "top_p" ? 0.05 : 0, max, step, value: setting[name] });
    input.oninput = () => { setting[name] = +input.value; out.textContent = show(setting[name]); draw(); };
    return el("label", {}, label, input, out);
  };
  draw();
  const told = step.drawn ? `${step.possible.toLocaleString("en")} of ${meta.vocabulary.toLocaleString("en")} tokens `
    + "could be drawn." : "A token of the prompt: nothing was drawn, these are the model's chances.";
  fill(body, el("h3", {}, "As it was"), bars(recorded), quiet(told
    + " Black mark: the chance at temperature 1, "
    + "before anything was cut off. Hatched: cut off."), el("h3", {}, "What if?"), el("div", { className: "sliders" },
    slider("temperature", "temperature", 2, 0.05, v => v ? v.toFixed(2) : "0 (greedy)"),
    slider("top_k", "top-k", 40, 1, v => v || "off"),
    slider("top_p", "top-p", 1, 0.05, v => v === 1 ? "off" : v.toFixed(2))), list);
});

// ---- drafts -------------------------------------------------------------------------------------------------------

if (run.drafts.length) panel("drafts", "Drafts: two tokens for one step",
  "A small extra layer guesses one token further. "
  + "The model checks the guess together with the next token; a right guess comes for nothing, a wrong one is "
  + "thrown away. "
  + "The text stays the one that the model would have written.", body => {
  const right = run.drafts.filter(d => d.token === d.drafted).length;
  const one = d => el("button", { className: "step", onclick: () => choose({ t: d.at }),
    title: `token ${d.at}: the draft layer gave it ${percent(d.guess)}, the model ${percent(d.truth)}` },
    T(word(d.at - 1)), " ", d.token === d.drafted ? el("span", { className: "yes" }, "✓ ", seen(words[d.drafted]))
      : [el("span", { className: "no" }, "✗ ", seen(words[d.drafted])), " → ", T(words[d.token])]);
  fill(body, el("p", {}, `${right} of ${run.drafts.length} guesses were right: ${n - P} tokens in `
    + `${run.passes.answer + 1} steps.`), el("div", { className: "drafts" }, run.drafts.map(one)));
});

// ---- compared with ------------------------------------------------------------------------------------------------

// The other run's step that belongs to step r: the same token of the answer, or its last one.
function otherStep(of, r) {
  const wanted = of.off.length ? steps[r] : steps[r] - P + of.prompt;
  return of.steps.reduce((best, p, i) => Math.abs(p - wanted) < Math.abs(of.steps[best] - wanted) ? i : best, 0);
}
function beside(r, what) {
  const of = runs[state.other];
  if (!state.other || !of.steps.length || what === "experts" && !of.experts) return null;
  const at = otherStep(of, r), place = of.steps[at] + 1;
  return el("div", {}, el("h3", {}, `Beside it: ${of.title}, token ${place} `, T(word(place, of))),
    el("div", { className: "scroll" }, what === "lens" ? lensTable(of, at, false) : expertGrid(of, at, false)),
    what === "experts" ? [quiet("In that whole run"), loadPicture(of.experts)] : null);
}
const firstDifference = of => of.tokens.findIndex((id, i) => id !== tokens[i]);

if (runs.length > 1) panel("compared", "Compared with other runs", "The same model once more: with a part switched "
  + "off, or "
  + "asked something else. The lens and the experts above show the chosen run beside this one.", (body, r) => {
  const pick = el("select", { ariaLabel: "the run that is shown beside this one",
    onchange: event => choose({ other: +event.target.value }) }, runs.slice(1).map((of, i) =>
    el("option", { value: i + 1, selected: i + 1 === state.other }, of.title)));
  const of = runs[state.other], apart = firstDifference(of), story = [];
  if (of.off.length) {
    story.push(el("p", {}, el("strong", {}, `Switched off: ${of.off.join(", ")}. `), of.off[0] === "wrong rope"
      ? "The rotary embedding turned pairs of other values, in all layers, from the first token on."
      : "What it gives counted as zero, in the prompt too; all else is as it was."),
      el("p", {}, apart < 0 ? "It wrote the same." : el("span", {}, `It wrote the same up to token ${apart - 1}; then `,
        T(word(apart, of)), " in place of ", apart < n ? T(word(apart)) : "the end", ".")),
      el("p", {}, "In this step alone, with all before it as it was, ", T(word(state.t)), ` would have had `,
        `${percent(of.forced[r])} in place of ${percent(written(r))}.`));
  }
  fill(body, el("p", {}, "Beside this run: ", pick), ...story,
    el("div", { className: "two" }, [run, of].map(one => el("div", {}, el("h3", {}, one.title),
      quiet(one.question), el("p", { className: "answer-text" }, one.answer || "(nothing)")))));
});

// ---- cost ---------------------------------------------------------------------------------------------------------

const palette = ["#0b5394", "#9a3d00", "#006b54", "#6a3d9a", "#7a5c00", "#8b1a4b", "#44505c", "#256d7b"];
function stack(title, entries, show) {
  const total = entries.reduce((sum, e) => sum + e[1], 0), some = entries.filter(e => e[1] > 0);
  some.sort((a, b) => b[1] - a[1]);
  return [el("h3", {}, `${title}: ${show(total)}`), el("div", { className: "stack", role: "img",
    ariaLabel: some.map(e => `${e[0]} ${percent(e[1] / total)}`).join(", ") }, some.map((e, i) => el("div", {
    style: { width: 100 * e[1] / total + "%", background: palette[i % palette.length] },
    title: `${e[0]}: ${show(e[1])}` }, `${e[0]} ${percent(e[1] / total)}`)))];
}

panel("cost", "What it cost", "Each token of the answer reads the weights once more; the prompt's tokens share one "
  + "reading.",
  body => {
  if (body.childNodes.length) return;
  const ms = x => (1000 * x).toFixed(0) + " ms", cost = run.cost;
  const time = phase => cost.seconds.filter(s => s[1] === phase).map(s => [s[0], s[2]]);
  fill(body, ...stack(`Time for the prompt's ${P} tokens`, time("prompt"), ms),
    ...stack(`Time for the answer's ${n - P} tokens`, time("answer"), ms),
    ...stack("Weights that one token reads", cost.weights.map(w => [w[0], w[2]]), bytesText),
    ...stack("Weights in all", cost.weights.map(w => [w[0], w[1]]), bytesText));
});

// ---- how it was recorded ------------------------------------------------------------------------------------------

function leftOut() {
  if (run.whole && steps.length === n - 1) return "Nothing was left out.";
  const some = `Of ${n - 1} tokens that were chosen or read, ${steps.length} are shown: those from `
    + `${steps[0] + 1} to ${steps[steps.length - 1] + 1}.`;
  return some + (A.whole ? "" : ` Of each head the ${A.strongest} tokens that it looked at most are kept, the `
    + `others as `
    + "one number.") + (X && !scores ? " Of the routers the chosen experts are kept, not the scores of the others."
    : "");
}
panel("recorded", "How this was recorded", "", body => {
  const own = Math.round(1000 * run.cost.own), all = Math.round(1000 * (run.cost.total.prompt
    + (run.cost.total.answer || 0)));
  fill(body, el("p", {}, "Made by ", el("code", { className: "wrap" }, meta.command), "."),
    quiet(`PyTorch ${meta.torch}, ${meta.device}, ${meta.dtype}`
      + (meta.plain ? ", the code of the lesson alone" : "") + (meta.seed == null ? "." : `, seed ${meta.seed}.`)),
    quiet("The model computed what it always computes, and wrote what it would have written. "
      + `Recording took ${own} ms more than the ${all} ms of the run, and is in none of the times above.`),
    quiet("The attention kernel shows no weights, so they were computed again from the same queries and keys; what "
      + "they "
      + `give differs from the kernel's result by at most ${(100 * A.error).toPrecision(2)} % of the largest value, `
      + `which is rounding in ${meta.dtype}.`), quiet(leftOut()),
    quiet("This page holds the question and the answer. It loads nothing and sends nothing."));
});

start();
