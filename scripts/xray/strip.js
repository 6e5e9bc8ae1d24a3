// The tokens at the top, and what is chosen: four numbers, which also stand in the URL behind #.

const state = { t: hardest(), layer: 0, head: 0, expert: null };         // with an expert, the strip shows its tokens
let other = runs.length > 1 ? 1 : 0;                                     // the run that stands beside this one

// The token of the answer that came up latest: the step where there is most to see.
function hardest() {
  let best = steps.length ? steps[steps.length - 1] + 1 : 0, least = Infinity;
  steps.forEach((p, r) => {
    if (p + 1 < P || run.control.includes(tokens[p + 1]) || !word(p + 1).trim()) return;
    const sure = sum(run.lens.written[r]);
    if (sure < least) { least = sure; best = p + 1; }
  });
  return best;
}

// The head without which the token would be much less likely; where there is none, or nobody computed it, the one that
// looks hardest at a token that is neither the first nor the last.
function chooseHead(r) {
  let least = M ? M.whole[r] - 0.1 : -1, most = 0;
  for (let l = 0; l < L; l++) for (let h = 0; h < A.H; h++) if (M && withoutHead(l, h, r) < least) {
    least = withoutHead(l, h, r); state.layer = l; state.head = h; most = 1;
  }
  for (let l = 0; l < L; l++) for (let h = 0; h < A.H; h++)
    for (const [k, x] of strongest(l, h, r)) if (k > 0 && k < steps[r] && x > most) {
      most = x; state.layer = l; state.head = h;
    }
}

// ---- the strip ----------------------------------------------------------------------------------------------------

const page = document.getElementById("page"), panels = [];
const strip = el("div", { id: "tokens", role: "listbox",
  ariaLabel: "Tokens of prompt and answer; arrow keys choose one" });
const story = el("p", { id: "story", ariaLive: "polite" });

function chip(i) {
  const special = run.control.includes(tokens[i]), known = rowOf(i) >= 0;
  const button = el("button", { className: "token" + (special ? " special" : "") + (i >= P ? " answer" : "")
    + (known ? "" : " unknown"), role: "option", tabIndex: -1, title: `token ${i}, id ${tokens[i]}`
    + (special ? ", a special token" : "") + (known ? "" : ": how it came about was not recorded") });
  const text = seen(word(i)), lead = text.match(/^[·⏎⇥]*/)[0];
  if (lead) button.append(el("span", { className: "space" }, lead));
  button.append(text.slice(lead.length));
  button.onclick = () => choose({ t: i });
  return button;
}

// Of a long text only the beginning and what is around the recorded steps is shown; the rest is folded.
const chips = [], folds = [];
function layOut() {
  const first = steps.length ? steps[0] - 40 : 0, last = steps.length ? steps[steps.length - 1] + 20 : n;
  const shown = i => n <= 300 || i < 12 || i >= first && i <= last || i >= n - 4;
  for (let i = 0; i < n;) {
    let end = i;
    while (end < n && !shown(end)) end++;
    if (end - i > 20) {
      const fold = { from: i, to: end, button: el("button", { className: "fold" }) };
      fold.button.onclick = () => unfold(fold);
      folds.push(fold);
      strip.append(fold.button);
    } else strip.append(...add({ from: i, to: end = Math.max(end, i + 1) }));
    i = end;
  }
}
// The tokens of a stretch, each line of text on a line of its own.
function add({ from, to }) {
  return range(to - from).flatMap(k => {
    chips[from + k] = chip(from + k);
    return /\n$/.test(word(from + k)) ? [chips[from + k], el("br")] : [chips[from + k]];
  });
}
function unfold(fold) {
  folds.splice(folds.indexOf(fold), 1);
  fold.button.replaceWith(...add(fold));
  showStrip(rowOf(state.t));
  chips[fold.from].focus();
}
arrows(strip, "strip", (down, right) => moveBy(down || right));

// To the next recorded step, or the one before; Infinity for the last.
function moveBy(d) {
  choose({ t: steps[within(rowOf(state.t) + d, 0, steps.length - 1)] + 1 });
}

const expertIsShown = () => state.expert !== null && X.layers.includes(state.layer);

// How dark token i is lit in step r: where the chosen head looked, or what weight the chosen expert had.
function light(i, r) {
  if (!expertIsShown()) return i < state.t ? share(state.layer, state.head, r, i) || 0 : 0;
  const at = steps.indexOf(i);
  const found = at >= 0 && X.chosen[X.layers.indexOf(state.layer)][at].find(([e]) => e === state.expert);
  return found ? Math.min(1, found[1]) : 0;
}

// What is chosen, in words.
function tell(r) {
  const t = state.t, [best, chance] = run.lens.top[r][L][0], own = percent(written(r));
  const lights = el("span", { className: "quiet" }, expertIsShown()
    ? ` Shaded: tokens that layer ${state.layer} sent to expert ${state.expert}.`
    : ` Shaded: where layer ${state.layer}, head ${state.head} looked.`);
  if (t >= P) return [`Token ${t}: to write `, T(word(t)), ` (the model gave it ${own}) it had read ${t} tokens, the `
    + "last of them ", T(word(t - 1)), ".", lights];
  return [`Token ${t} is the prompt's: `, T(word(t)), `, to which the model gave ${own}. It would have written `,
          T(words[best]), ` here (${percent(chance)}).`, lights];
}

function showStrip(r) {
  const t = state.t, looked = A.whole || expertIsShown() ? null : new Map(strongest(state.layer, state.head, r));
  const shade = i => looked ? looked.get(i) || 0 : light(i, r);
  chips.forEach((button, i) => {
    const x = shade(i), colour = lit(x), now = i === t;
    button.ariaSelected = String(now);
    button.tabIndex = now ? 0 : -1;
    button.classList.toggle("chosen", now);
    button.classList.toggle("future", i > t);
    button.classList.toggle("read", i === t - 1);
    button.classList.toggle("lit", x > 0.0005 && !now);
    button.style.background = x > 0.0005 && !now ? rgb(colour) : "";
    button.style.color = x > 0.0005 && !now ? inkOn(colour) : "";
  });
  for (const { from, to, button } of folds) {
    const looks = sum(range(to - from).map(i => shade(from + i)));
    button.textContent = `… ${count(to - from)} tokens` + (expertIsShown() ? "" : `: ${looked ? "at least " : ""}`
      + percent(looks));
    button.title = `tokens ${from} to ${to - 1}; press to unfold them`;
  }
  fill(story, tell(r));
  const top = chips[t].offsetTop;
  if (top < strip.scrollTop + 30 || top > strip.scrollTop + strip.clientHeight - 40)
    strip.scrollTop = top - strip.clientHeight / 2;
}

// ---- choosing -----------------------------------------------------------------------------------------------------

// Change the state and draw everything anew. What had the focus has it again, though its element is another one.
function choose(change) {
  Object.assign(state, change);
  if (rowOf(state.t) < 0) state.t = within(state.t, steps[0] + 1, steps[steps.length - 1] + 1);
  const folded = folds.find(fold => fold.from <= state.t && state.t < fold.to);
  if (folded) unfold(folded);
  const focus = document.activeElement, holder = focus?.closest("[data-id]");
  const place = holder && [...holder.querySelectorAll("button, canvas, select, input")].indexOf(focus);
  const r = rowOf(state.t);
  showStrip(r);
  panels.forEach(draw => draw(r));
  const again = holder && document.querySelector(`[data-id="${holder.dataset.id}"]`);
  (again?.querySelector('[tabindex="0"]') ?? again?.querySelectorAll("button, canvas, select, input")[place])
    ?.focus({ preventScroll: holder !== strip });
  try {
    history.replaceState(null, "", `#t=${state.t}&layer=${state.layer}&head=${state.head}`
      + (state.expert === null ? "" : `&expert=${state.expert}`));
  } catch { /* some browsers allow a file no state, or not so often */ }
}

// A panel: its title, at most 45 words, where the lesson tells more, and whether its numbers are of the run itself.
function panel(id, title, lead, source, draw, numbered = true) {
  const body = el("div"), lesson = meta.lessons[id];
  const heading = el("h2", { id: id + "-title", tabIndex: -1 }, (numbered ? sections.length + 1 + " · " : "") + title);
  const section = el("section", { id, "aria-labelledby": heading.id }, el("div", { className: "head" }, heading,
    el("span", { className: "source " + source.split(" ")[0] }, source)),
    el("p", { className: "lead" }, lead), body, lesson ? el("p", { className: "lesson" }, "Read on: ",
      el("code", {}, lesson[0]), ` “${lesson[1]}”; `, el("code", {}, lesson[2])) : null);
  page.append(section);
  if (numbered) sections.push([title.split(":")[0], section, heading]);
  panels.push(r => {
    const before = [...body.querySelectorAll(".scroll")].map(box => box.scrollLeft);
    draw(body, r);
    body.querySelectorAll(".scroll").forEach((box, i) => { box.scrollLeft = before[i] || 0; });
    const now = body.querySelector(".now"), box = now?.closest(".scroll");
    if (box && (now.offsetLeft < box.scrollLeft + 90 || now.offsetLeft + 80 > box.scrollLeft + box.clientWidth))
      box.scrollLeft = now.offsetLeft - box.clientWidth / 2;
  });
}
const sections = [];

// What stands behind # becomes the state; what is not there or makes no sense stays.
function readAddress() {
  const chosen = new URLSearchParams(location.hash.slice(1));
  const number = key => /^\d{1,9}$/.test(chosen.get(key)) ? +chosen.get(key) : null;
  state.t = within(number("t") ?? state.t, 1, n - 1);
  state.layer = within(number("layer") ?? state.layer, 0, L - 1);
  state.head = within(number("head") ?? state.head, 0, A.H - 1);
  if (location.hash) state.expert = X && number("expert") !== null ? within(number("expert"), 0, X.E - 1) : null;
}

// ---- the top of the page ------------------------------------------------------------------------------------------

const root = document.documentElement;
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark"
  : matchMedia("(prefers-color-scheme: dark)").matches;
const theme = el("button", { className: "plain", onclick: () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
} });
function showTheme() {
  theme.textContent = isDark() ? "Light colours" : "Dark colours";
  readColours();
  choose({});
}

const contents = el("nav", { ariaLabel: "Panels" });
function showContents() {
  fill(contents, sections.map(([title, section, heading]) => el("button", { className: "plain", onclick: () => {
    section.scrollIntoView();
    heading.focus({ preventScroll: true });
  } }, title)));
}

page.append(
  el("header", {}, el("h1", {}, "X-ray of one answer"), el("span", { className: "quiet" },
    `${meta.model}, ${count(meta.parameters)} parameters, ${meta.dtype}`), theme),
  el("p", { className: "lead" }, "A language model writes one token after the other. Choose a token to see how the "
    + "model came to write it. What is marked “recorded” was noted while this answer was written; what is marked "
    + "“computed” was worked out from it afterwards, by the same model."),
  contents, el("div", { id: "strip" }, strip, story));
layOut();
