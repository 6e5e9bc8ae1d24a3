// The runs that this one is compared with: another question, or the same one with a part switched off.

const besideRun = () => other && runs[other].steps.length ? runs[other] : null;

// The other run's step that belongs to step r: the same place in the text, or in the answer; or its nearest.
function otherStep(of, r) {
  const wanted = of.off.length ? steps[r] : steps[r] - P + of.prompt;
  return within(wanted - of.steps[0], 0, of.steps.length - 1);
}

// The answer's tokens of either run that are no part of what both have in common, the longest common subsequence.
function changes(of) {
  const mine = tokens.slice(P), theirs = of.tokens.slice(of.prompt), a = mine.length, b = theirs.length;
  if (a * b > 4e6) return null;
  const common = range(a + 1).map(() => new Uint16Array(b + 1)), kept = [new Set(), new Set()];
  for (let i = a - 1; i >= 0; i--) for (let j = b - 1; j >= 0; j--)
    common[i][j] = mine[i] === theirs[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  for (let i = 0, j = 0; i < a && j < b;) {
    if (mine[i] === theirs[j]) { kept[0].add(i++); kept[1].add(j++); }
    else if (common[i + 1][j] >= common[i][j + 1]) i++; else j++;
  }
  return kept;
}

// An answer as text; what the other one has not is marked, by more than its colour.
function answer(of, kept) {
  const lines = el("p", { className: "answer" });
  of.tokens.slice(of.prompt).forEach((id, i) => {
    const text = seen(words[id]);
    lines.append(!kept || kept.has(i) ? text.replace(/·/g, " ") : el("mark", { title: "differs" }, text));
    if (/\n$/.test(words[id])) lines.append(el("br"));
  });
  return lines.childNodes.length ? lines : quiet("(nothing)");
}

// The first token that is another one in another run.
const parting = of => range(Math.max(n, of.tokens.length)).find(i => tokens[i] !== of.tokens[i]);

// What was done to the other run, in words.
function difference(of, r) {
  if (!of.off.length) return quiet("The same model, asked something else; its step stands beside this one's at the "
    + "same place of the answer.");
  const apart = parting(of);
  const at = (run, i) => i < run.tokens.length ? T(word(i, run)) : "nothing more";
  const what = of.off[0] === "wrong rope"
    ? [el("strong", {}, "Made wrong: the rotary embedding. "), "It turned pairs of other values, in all layers, while "
      + "prompt and answer were read. "]
    : [el("strong", {}, `Switched off: ${of.off.join(", ")}. `), "What it gives counted as zero while prompt and "
      + "answer were read; all else was as it is. "];
  const first = apart === undefined ? "The run wrote the same."
    : ["The run wrote the same up to token ", `${apart - 1}; then `, at(of, apart), " in place of ", at(run, apart),
      "."];
  return [el("p", {}, what, first),
    el("p", {}, later(), " If the text had been the same up to here, ", T(word(state.t)), ` would have had `,
      el("strong", {}, percent(of.forced[r])), ` in place of ${percent(written(r))}.`)];
}
// At the very top: what else this page shows.
if (runs.length > 1) document.getElementById("strip").before(el("p", { id: "banner" }, el("strong", {}, "Compared: "),
  "the run as it is, beside ", runs.slice(1).map((of, i) => [i ? ", " : "", of.off.length ? el("strong", {}, of.title)
    : [" the question ", T(of.title)]]), "."));

const later = () => el("span", { className: "source computed" }, "computed afterwards");

if (runs.length > 1) panel("compared", "Compared with other runs", "The same model once more. Both answers stand here; "
  + "what the layers would say, and the experts, stand side by side in their panels.",
  "recorded in the runs", (body, r) => {
  const pick = el("select", { ariaLabel: "the run that is shown beside this one", onchange: event => {
    other = +event.target.value;
    choose({});
  } }, runs.slice(1).map((of, i) => el("option", { value: i + 1, selected: i + 1 === other }, of.title)));
  const holder = el("p", {}, "Beside this run: ", pick), of = runs[other], kept = of.off.length ? changes(of) : null;
  holder.dataset.id = "runs";
  fill(body, holder, difference(of, r), el("div", { className: "two" }, [run, of].map((one, i) => el("div", {},
    h3(one.title), quiet(`“${one.question}”`), answer(one, kept && kept[i])))),
    kept && kept[0].size < n - P ? quiet("Framed: tokens that the other answer does not have at this place.") : null);
}, false);
