"""X-ray's page in a real browser: what is shown is what was recorded, and anyone can reach it.

Without Playwright (`uv run --group browser pytest`) or without Chromium these tests skip. LLM_BROWSER=required, which
CI sets, makes that a failure.
"""

import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.xray import after, page
from scripts.xray.__main__ import main
from scripts.xray.lessons import SECTIONS, lessons
from scripts.xray.switch import Part, switched
from tests.packages import PACKAGES, module
from tests.test_xray import attention_weights, data_of, large, tiny  # noqa: F401 large is a fixture

ROOT = Path(__file__).parents[1]
BROWSERS = "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = "</script><img src=x onerror=hacked=1>{{script}}<!-- \u202e {{data}} <b>bold</b> <|im_end|> &lt;"
SAMPLED = {"temperature": 1.5, "top_k": 40, "top_p": 0.95}
QUESTION = "What is 347 + 586?"
FLAGS = {"qwen3": ["--without", "layer0.head4", "--wrong-rope"], "qwen3_moe": ["--against", "What is RoPE?"],
         "deepseek_v3": ["--speculative", "-t", "1.5", "-k", "40", "--top-p", "0.95", "--seed", "3"]}


def missing(what: str) -> None:
    if os.environ.get("LLM_BROWSER") == "required":
        pytest.fail(f"{what}, and LLM_BROWSER=required")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing("no Playwright: uv run --group browser pytest")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing("no Chromium: apt-get install chromium-headless-shell")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


def opened(browser, path: Path, size: dict = WIDE, theme: str = "light", behind: str = ""):
    """The page in a window of its own, which notes all that it should not do."""
    window = browser.new_context(viewport=size, color_scheme=theme, offline=True).new_page()
    window.set_default_timeout(5000)
    window.noted = []
    window.on("request", lambda request: window.noted.append(request.url))
    for event in ("console", "pageerror", "dialog"):
        window.on(event, lambda said: window.noted.append(str(getattr(said, "text", said))))
    window.add_init_script("addEventListener('securitypolicyviolation', event => console.log(event.violatedDirective))")
    window.goto(path.as_uri() + behind)
    return window


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """package -> its page, made once; and what it should show, computed anew by one pass without a cache."""
    kept = {}

    def make(package: str) -> SimpleNamespace:
        if package not in kept:
            path = tmp_path_factory.mktemp("xray") / f"{package}.html"
            assert main(["-m", PACKAGES[package], "-p", QUESTION, "-n", "12", "--dtype", "float32", *FLAGS[package],
                         "-o", str(path)]) == 0
            kept[package] = SimpleNamespace(path=path, package=package, **truth(package, data_of(path)))
        return kept[package]

    return make


@pytest.fixture(scope="module")
def windows(browser, made):
    """package -> (its page in a window, which all tests of it share, and what it should show)."""
    kept = {}

    def window(package: str):
        if package not in kept:
            kept[package] = opened(browser, made(package).path)
        return kept[package], made(package)

    yield window
    for one in kept.values():
        one.context.close()


def truth(package: str, told: dict) -> dict:
    model, _ = tiny(package, "float32", engine=False)
    run, config, found = told["runs"][0], model.config, {}
    layers = model.model.layers[:config.num_hidden_layers]
    hooks = [part.register_forward_hook(lambda _, __, out, key=(name, i): found.__setitem__(key, out))
             for i, layer in enumerate(layers) for name, part in (("layer", layer), ("gate", getattr(
                 layer.mlp, "gate", None))) if part is not None]
    weights = [attention_weights(package, layer.self_attn) for layer in layers]
    ids = torch.tensor([run["tokens"][:-1]])
    with torch.inference_mode():
        logits = model(ids)[0]
        depths = [model.lm_head(model.model.norm(x))[0].float().softmax(-1) for x in (
            model.model.embed_tokens(ids), *(found["layer", i] for i in range(len(layers))))]
    for hook in hooks:
        hook.remove()
    for layer in layers:
        del layer.self_attn.sdpa
    return {"told": told, "run": run, "ids": run["tokens"], "prompt": run["prompt"], "logits": logits, "depths": depths,
            "weights": torch.stack([one[0][0] for one in weights]), "model": model,  # (L, H, T, S)
            "gates": {i: found["gate", i] for i in range(len(layers)) if ("gate", i) in found},
            "words": {int(id): seen(text) for id, text in told["words"].items()}}


def seen(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "(nothing)"


def is_about(text: str, value: float, slack: float = 0.01) -> bool:
    """Does a percentage as the page writes it say this value? Roots in a byte are half a per cent off at worst."""
    number = float(re.search(r"[\d.]+", text)[0]) / 100
    if "<" in text:
        return value < number + slack
    return value > number - slack if ">" in text else abs(value - number) <= slack


def labels(window, selector: str) -> list[str]:
    return window.eval_on_selector_all(selector, "all => all.map(one => one.getAttribute('aria-label'))")


def bars(window, selector: str) -> list[tuple[str, str, float]]:
    """(name, number, how far it is filled) of each bar."""
    return [tuple(one) for one in window.eval_on_selector_all(f"{selector} .bar", """all => all.map(bar => [
        bar.querySelector('.name').textContent, bar.querySelector('.number').textContent,
        bar.querySelector('.fill').getBoundingClientRect().width
            / bar.querySelector('.track').getBoundingClientRect().width])""")]


def choose(window, **change) -> None:
    window.evaluate("change => choose({ expert: null, ...change })", change)


def some_tokens(made, count: int, seed: int = 1) -> list[int]:
    return random.Random(seed).sample(range(1, len(made.ids)), count)


# 7 Nothing but the file

@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_is_loaded_and_nothing_goes_wrong(package, windows):
    window, made = windows(package)
    for t in some_tokens(made, 4):
        choose(window, t=t, layer=t % 5, head=t % 6)
    assert [note for note in window.noted if not note.startswith(made.path.as_uri())] == []


def test_what_is_put_into_it_by_force_is_refused(browser, made):
    window = opened(browser, made("qwen3").path)
    window.evaluate("""() => {
        for (const [tag, what] of [["script", { textContent: "hacked = 1" }], ["img", { src: "file:///x.png" }],
                                   ["style", { textContent: "body { color: red }" }]])
            document.body.append(Object.assign(document.createElement(tag), what));
        fetch("http://127.0.0.1:9/x").catch(() => {});
    }""")
    window.wait_for_timeout(100)
    noted = " ".join(window.noted)
    for what in ("script-src", "img-src", "style-src", "connect-src"):
        assert what in noted
    assert window.evaluate("typeof hacked") == "undefined"
    window.context.close()


# 8 What is shown is what was recorded

def check_attention(window, made, tokens: list[int]) -> None:
    for t in tokens:
        layer, head = t % 5, (t * 5 + 1) % 6
        choose(window, t=t, layer=layer, head=head)
        told = [re.match(r"layer (\d+), head (\d+): looks most at (.+) \(token (\d+)\), ([^;]+)", label).groups()
                for label in labels(window, "#attention .heads .cell")]
        assert len(told) == made.weights.shape[0] * made.weights.shape[1]
        for l, h, text, k, number in told:
            looked = made.weights[int(l), int(h), t - 1, :t]
            assert looked[int(k)] > looked.max() - 0.01 and is_about(number, float(looked[int(k)])), (t, l, h, number)
            assert text == made.words[made.ids[int(k)]]
        looked = made.weights[layer, head, t - 1, :t]
        best = bars(window, "#attention [aria-label='where it looks']")
        for name, number, filled in best:
            if match := re.search(r"token (\d+), (\d+) back", name):
                assert int(match[1]) + int(match[2]) == t - 1 and is_about(number, float(looked[int(match[1])]))
                assert filled == pytest.approx(float(looked[int(match[1])]), abs=0.02)


def check_triangle(window, made, heads: list[tuple[int, int]]) -> None:
    """Pixels read back: in each row the strongest is where the head looked most, and nothing is above the diagonal."""
    for layer, head in heads:
        choose(window, t=len(made.ids) - 1, layer=layer, head=head)
        rows = window.evaluate("""() => { const c = document.getElementById("triangle");
            const image = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            return Array.from({ length: c.height }, (_, y) => Array.from({ length: c.width }, (_, x) =>
                image[4 * (y * c.width + x) + 3] ? image[4 * (y * c.width + x)] : null)); }""")
        assert len(rows) == len(rows[0]) == len(made.ids) - 1
        for y, row in enumerate(rows):
            looked = made.weights[layer, head, y, :y + 1]
            assert None not in row[:y + 1] and set(row[y + 1:]) <= {None}
            darkest = min(range(y + 1), key=row.__getitem__)
            assert looked[darkest] > looked.max() - 0.01, (layer, head, y)
            expected = 246 + (8 - 246) * looked.sqrt()  # red, of the two colours of the ramp
            torch.testing.assert_close(torch.tensor(row[:y + 1]).float(), expected, rtol=0, atol=3)


@pytest.mark.parametrize("package", PACKAGES)
def test_heads_are_shown_as_they_looked(package, windows):
    window, made = windows(package)
    check_attention(window, made, some_tokens(made, 7))


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_head_matters_is_what_the_model_does_without_it(package, windows):
    window, made = windows(package)
    for t, layer, head in zip(some_tokens(made, 3, seed=2), (0, 2, 4), (4, 1, 5)):
        choose(window, t=t, layer=layer, head=head)
        with torch.inference_mode(), switched(made.model, [Part("head", layer, head)]):
            off = float(made.model(torch.tensor([made.ids[:-1]]))[0, t - 1].softmax(-1)[made.ids[t]])
        label = window.get_attribute("#attention .cell[aria-pressed=true]", "aria-label")
        assert is_about(label.rpartition("would have ")[2], off)
        sentence = window.text_content("#matters-head p")
        whole = float(made.logits[t - 1].softmax(-1)[made.ids[t]])
        change = re.search(r"falls|rises|hardly changes", sentence)[0]
        assert abs(off - whole) < 0.02 or change == ("falls" if off < whole else "rises")
        assert is_about(re.split(r"to |: ", sentence)[-1], off)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_layers_say_what_norm_and_head_make_of_them(package, windows):
    window, made = windows(package)
    for t in some_tokens(made, 3, seed=3):
        choose(window, t=t)
        cells = window.eval_on_selector_all("#lens .now > *", "all => all.map(one => [one.textContent, one.title])")
        cells = cells[:len(made.depths)]  # of this run; others may follow
        for depth, (text, title) in enumerate(cells):
            chances = made.depths[depth][t - 1]
            top = chances.topk(2)
            if top.values[0] - top.values[1] > 1e-3:
                assert text == made.words[int(top.indices[0])]
            assert is_about(title.rpartition("which came, ")[2], float(chances[made.ids[t]]))
        rise = window.eval_on_selector_all("#lens .rise tbody tr", "all => all.map(one => one.lastChild.textContent)")
        for depth, number in enumerate(rise[:len(made.depths)]):
            assert is_about(number, float(made.depths[depth][t - 1, made.ids[t]]))


@pytest.mark.parametrize("package", ["qwen3_moe", "deepseek_v3"])
def test_experts_are_shown_as_they_were_chosen(package, windows):
    window, made = windows(package)
    for t in some_tokens(made, 5, seed=4):
        choose(window, t=t, layer=3)
        told = [re.match(r"layer (\d+), expert (\d+): (?:weight ([\d.]+)|not chosen), score ([\d.]+)", label).groups()
                for label in labels(window, "[data-id=experts] .cell")]
        assert len(told) == 8 * len(made.gates)
        for layer, expert, weight, _ in told:
            weights, chosen = made.gates[int(layer)]
            found = dict(zip(chosen[t - 1].tolist(), weights[t - 1].tolist()))
            assert (weight is not None) == (int(expert) in found)
            assert weight is None or float(weight) == pytest.approx(found[int(expert)], abs=0.006)
    loads = labels(window, "#experts .two > div:first-child .load")
    for label in loads:
        layer, expert, times = map(int, re.match(r"layer (\d+), expert (\d+): (\d+)", label).groups())
        # While drafting, one token more may have been read than the answer has.
        assert times - int((made.gates[layer][1] == expert).sum()) in ((0, 1) if made.run["drafts"] else (0,))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_choice_is_shown_with_its_chances(package, windows):
    window, made = windows(package)
    generate = module(package, "generate")
    for t in [made.prompt, len(made.ids) - 1, *some_tokens(made, 3, seed=5)]:
        choose(window, t=t)
        sampling = SAMPLED if package == "deepseek_v3" and t >= made.prompt else {"temperature": 1.0}
        chances = after.chances(generate, made.logits[t - 1], sampling)
        shown = bars(window, "#as-it-was")
        assert sum("← written" in name for name, _, _ in shown) == 1
        ids = {text: id for id, text in made.words.items()}
        for name, number, filled in shown:
            text = re.sub(r" ← written.*", "", name)
            if name != "all others" and number != "cut off":
                assert is_about(number, float(chances[ids[text]])), (t, name, number)
                assert filled == pytest.approx(float(chances[ids[text]]), abs=0.02)
            assert ("← written" not in name) or ids[text] == made.ids[t]


def test_drafts_are_shown_kept_or_refused(windows):
    window, made = windows("deepseek_v3")
    chips, drafts = window.query_selector_all(".draft"), made.run["drafts"]
    assert len(chips) == len(drafts) > 1
    for chip, draft in zip(chips, drafts):
        kept = draft["drafted"] == made.ids[draft["at"]]
        assert (("✓" in chip.text_content()), ("✗" in chip.text_content())) == (kept, not kept)
        assert made.words[made.ids[draft["at"] - 1]] in chip.text_content()
    at = drafts[0]["at"]
    choose(window, t=at)
    chances = after.chances(module("deepseek_v3", "generate"), made.logits[at - 1], SAMPLED)
    sentence = window.text_content("#drafts .drafts + p")
    assert is_about(re.search(r"the model ([^.]*%)", sentence)[1], float(chances[drafts[0]["drafted"]]))


@pytest.mark.parametrize("package", PACKAGES)
def test_times_and_bytes_add_up(package, windows):
    window, made = windows(package)
    groups = window.eval_on_selector_all("#cost .two > div", """all => all.map(group => [
        group.querySelector("h3").textContent, [...group.querySelectorAll(".number")].map(one => one.textContent)])""")

    def number(text: str) -> float:
        value, unit = re.search(r"([\d.,]+) (ms|bytes|kB|MB)", text).groups()
        return float(value.replace(",", "")) * {"ms": 1, "bytes": 1, "kB": 1e3, "MB": 1e6}[unit]

    assert len(groups) == 4
    for title, parts in groups:
        assert sum(map(number, parts)) == pytest.approx(number(title.rpartition(": ")[2]), rel=0.02, abs=3)
    assert number(groups[3][0]) == pytest.approx(sum(w.nbytes for w in made.model.parameters()), rel=0.01)


def test_runs_that_are_compared_say_what_was_switched_off(browser, made):
    made = made("qwen3")
    window = opened(browser, made.path)
    opening, other = window.evaluate("({ ...state })"), made.told["runs"][1]["tokens"]
    apart = next((t for t, (one, two) in enumerate(zip(made.ids, other)) if one != two), None)
    assert (opening["layer"], opening["head"]) == (0, 4) and (apart is None or opening["t"] == apart)
    choose(window, t=len(made.ids) - 2)
    assert "without layer0.head4" in window.text_content("#banner") and "wrong" in window.text_content("#banner")
    for number, (part, said) in enumerate([(Part("head", 0, 4), "Switched off: layer0.head4."),
                                           (Part("wrong rope"), "Made wrong: the rotary embedding.")], start=1):
        window.select_option("#compared select", str(number))
        text = window.text_content("#compared")
        other, t = made.told["runs"][number], len(made.ids) - 2
        assert said in text and window.evaluate("document.activeElement.tagName") in ("BODY", "SELECT")
        with torch.inference_mode(), switched(made.model, [part]):
            off = float(made.model(torch.tensor([made.ids[:-1]]))[0, t - 1].softmax(-1)[made.ids[t]])
        assert is_about(re.search(r"would have had (.*?) in place", text)[1], off)
        new = {made.words[id] for id in other["tokens"][other["prompt"]:]} - {made.words[id] for id in made.ids}
        marked = window.eval_on_selector_all("#compared div:last-child mark", "all => all.map(one => one.textContent)")
        assert new <= set(marked) and (marked or other["tokens"] == made.ids[:len(other["tokens"])])
        assert window.locator("#lens .lens").count() == 2
    window.context.close()


def test_two_questions_stand_side_by_side(windows):
    window, made = windows("qwen3_moe")
    assert "What·is·RoPE?" in window.text_content("#banner") and window.locator("#lens .lens").count() == 2
    grids = window.locator("#experts .experts[aria-label^='Experts by layer']")
    left, right = grids.nth(0).bounding_box(), grids.nth(1).bounding_box()
    assert abs(left["y"] - right["y"]) < 2 and left["x"] + left["width"] <= right["x"]


# 9 Pixels

@pytest.mark.parametrize("package", PACKAGES)
def test_the_picture_of_a_head_is_what_it_looked_at(package, windows):
    window, made = windows(package)
    check_triangle(window, made, [(0, 4), (3, 1), (4, 5)])


MUTATIONS = {
    "heads swapped": ("(layer * A.H + head) * starts", "(layer * A.H + (head ^ 1)) * starts"),
    "next layer": ("(layer * A.H + head) * starts", "((layer + 1) % L * A.H + head) * starts"),
    "a position further": ("starts[r] + k]", "starts[r] + (k + 1) % (steps[r] + 1)]"),
    "no mask": ("k > steps[y] ? null : lit(share(l, h, y, k))", "lit(share(l, h, y, k))"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_page_is_noticed(mutation, browser, made, tmp_path, monkeypatch):
    """Mistakes that look right: at least one of the two checks above has to fail."""
    one, changed = made("qwen3"), 0
    shutil.copytree(page.HERE, tmp_path / "xray", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in (tmp_path / "xray").glob("*.js"):
        text = path.read_text("utf-8")
        changed += text.count(MUTATIONS[mutation][0])
        path.write_text(text.replace(*MUTATIONS[mutation]), "utf-8")
    assert changed == 1
    monkeypatch.setattr(page, "HERE", tmp_path / "xray")
    (tmp_path / "wrong.html").write_text(page.page(one.told), "utf-8")
    window = opened(browser, tmp_path / "wrong.html")
    noticed = []
    for check, what in ((check_attention, some_tokens(one, 7)), (check_triangle, [(0, 4), (3, 1), (4, 5)])):
        try:
            check(window, one, what)
        except AssertionError:
            noticed.append(check.__name__)
    window.context.close()
    assert noticed == (["check_triangle"] if mutation == "no mask" else ["check_attention", "check_triangle"])


# 10 Hostile text

def test_a_hostile_prompt_is_shown_as_text(browser, tmp_path):
    path = tmp_path / "hostile.html"
    assert main(["-m", "Qwen3-Tiny", "-p", HOSTILE, "-n", "2", "--no-thinking", "-o", str(path)]) == 0
    window = opened(browser, path)
    choose(window, t=30)
    assert window.evaluate("typeof hacked") == "undefined" and window.locator("img, b").count() == 0
    assert [note for note in window.noted if not note.startswith(path.as_uri())] == []
    strip = window.text_content("#tokens")
    assert all(seen(part) in strip for part in HOSTILE.split("\u202e")) and "\u202e" not in strip
    assert "⟨U+202E⟩" in window.text_content("#recorded code") and "\u202e" not in window.text_content("main")
    alike = window.eval_on_selector_all(".token.special", "all => all.map(one => one.textContent)")
    assert alike.count("<|im_end|>") == window.evaluate("tokens.slice(0, P).filter(id => run.control.includes(id)"
                                                        " && words[id] === '<|im_end|>').length")
    window.context.close()


# 11 Keyboard and words

@pytest.mark.parametrize("package", ["deepseek_v3", *(pytest.param(package, marks=pytest.mark.slow) for package in (
    "qwen3", "qwen3_moe"))])
def test_the_keyboard_alone_reaches_everything(package, browser, made):
    one = made(package)
    window = opened(browser, one.path, behind="#t=20&layer=2&head=2")
    stops = []
    for _ in range(70):
        window.keyboard.press("Tab")
        stops.append(window.evaluate("document.activeElement.closest('[data-id]')?.dataset.id ?? ''"))
        if "sliders" in stops:
            break
    grids = ["strip", "lens", "heads", *(["experts"] if package != "qwen3" else [])]
    assert [stop for stop in stops if stop in grids] == grids  # each once, in this order
    for grid in grids:
        choose(window, t=20, layer=2, head=2)
        before = window.evaluate("({ ...state })")
        window.focus(f"[data-id={grid}] [tabindex='0']")
        for key in ("ArrowRight", "ArrowDown", "End"):
            window.keyboard.press(key)
            assert window.evaluate("document.activeElement.closest('[data-id]')?.dataset.id") == grid
        now = window.evaluate("({ ...state })")
        changed = {key for key in now if now[key] != before[key]}
        assert changed == {"strip": {"t"}, "lens": {"t", "layer"}, "heads": {"head", "layer"},
                           "experts": {"expert", "layer"}}[grid]
        assert window.evaluate("location.hash").startswith(f"#t={now['t']}&layer={now['layer']}&head={now['head']}")
    window.context.close()


def test_all_is_said_in_words_too(windows):
    window, made = windows("deepseek_v3")
    choose(window, t=made.prompt + 3, layer=2, head=1)
    snapshot = window.locator("main").aria_snapshot()
    for text in ("layer 2, head 1: looks most at", "layer 2, expert 0:", "pair 0:", "table", "← written",
                 f"Token {made.prompt + 3}: to write", "Layer 2, head 1: one row for each token read",
                 "Tokens of prompt and answer"):
        assert text in snapshot, text
    assert window.get_attribute("#story", "aria-live") == "polite"
    for section in window.query_selector_all("section"):
        assert len(section.query_selector(".lead").text_content().split()) <= 45
        assert section.query_selector(".source").text_content().split()[0] in ("recorded", "computed")
    told = {one.get_attribute("id"): one.text_content() for one in window.query_selector_all("section")}
    for panel, (readme, title, file) in lessons("deepseek_v3").items():
        assert f"Read on: {readme} “{title}”; {file}" in told[panel]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_panel_names_a_section_and_a_file_that_are_there(package):
    headings = re.findall(r"^## \d+\. (.+)$", (ROOT / package / "README.md").read_text("utf-8"), re.M)
    for panel, (readme, title, file) in lessons(package).items():
        assert title in headings and (ROOT / file).is_file() and (ROOT / readme).is_file(), (panel, title)
    assert set(SECTIONS) == set(PACKAGES)


# 12 Sizes and colours

CONTRAST = """() => {
  const three = text => (text.match(/[\\d.]+/g) || []).map(Number), bright = rgb => {
    const [r, g, b] = rgb.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const under = node => {
    for (let one = node.previousElementSibling?.className === "square" ? node.previousElementSibling : node; one;
         one = one.parentElement) {
      const [r, g, b, a = 1] = three(getComputedStyle(one).backgroundColor);
      if (a > 0) return [r, g, b];
    }
    return [255, 255, 255]; };
  const found = [];
  for (const node of document.querySelectorAll("main *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), svg = node.namespaceURI.endsWith("svg");
    const ink = bright(three(svg ? style.fill : style.color)), paper = bright(under(node));
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5 || style.opacity !== "1") found.push([node.className, node.textContent.slice(0, 20), contrast]);
  }
  return found;
}"""


def test_it_fits_a_phone_and_can_be_read(browser, made):
    check_look(browser, made("deepseek_v3").path, PHONE, "light")


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_of_them_fit_and_can_be_read(package, size, theme, browser, made):
    check_look(browser, made(package).path, size, theme)


def check_look(browser, path: Path, size: dict, theme: str) -> None:
    window = opened(browser, path, size, theme)
    for change in ({}, {"t": 15, "layer": 4, "head": 0}):
        choose(window, **change)
        assert window.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert window.evaluate(CONTRAST) == []
        box, now = (window.locator(one).first.bounding_box() for one in ("#lens .scroll", "#lens .now"))
        assert box["x"] <= now["x"] and now["x"] + now["width"] <= box["x"] + box["width"] + 1
        chosen, strip = (window.locator(one).bounding_box() for one in (".token.chosen", "#tokens"))
        assert strip["y"] - 2 <= chosen["y"] and chosen["y"] + chosen["height"] <= strip["y"] + strip["height"] + 2
    for name in ("Attention", "The choice", "Layer by layer"):  # where one jumps to is not under the strip
        window.click(f"nav button:text-is('{name}')")
        heading, strip = (window.locator(one).bounding_box() for one in (f"h2:has-text('{name}')", "#strip"))
        assert heading["y"] >= strip["y"] + strip["height"]
    before = window.evaluate("getComputedStyle(document.body).backgroundColor")
    window.click("header button")
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert window.evaluate(CONTRAST) == []
    window.context.close()


# 13 What if

@pytest.mark.parametrize("package", PACKAGES)
def test_what_if_computes_as_the_sampler_does(package, windows):
    window, made = windows(package)
    generate = module(package, "generate")
    for t in [made.prompt, *some_tokens(made, 2, seed=6)]:
        for settings, slack in (({"temperature": 0.7, "top_k": 20, "top_p": 0.9}, 1e-4), (SAMPLED, 1e-4),
                                ({"temperature": 1.0, "min_p": 0.02, "top_k": 100}, 1e-4), ({"temperature": 0}, 1e-4),
                                ({"temperature": 1.0, "top_p": 0.5}, 2e-3), ({"temperature": 2.0}, 5e-3)):
            full = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0} | settings
            found = torch.tensor(window.evaluate("([r, all]) => whatIf(r, all)", [t - 1, full]), dtype=torch.float32)
            chances = after.chances(generate, made.logits[t - 1], settings)
            expected = chances[made.logits[t - 1].argsort(descending=True)[:len(found) - 1]]
            torch.testing.assert_close(found[:-1], expected, rtol=0, atol=slack)
            assert float(found[-1]) == pytest.approx(float(chances[made.ids[t]]), abs=slack)


def test_the_sliders_change_what_is_shown(windows):
    window, made = windows("qwen3")
    choose(window, t=made.prompt + 1)
    before = bars(window, "#what-if")
    window.locator("#choice input").first.evaluate("one => { one.value = 2; one.dispatchEvent(new Event('input')); }")
    assert bars(window, "#what-if") != before and "2.00" in window.text_content("#choice .sliders")
    window.click("#choice button")
    assert bars(window, "#what-if") == before


# 14 Links, and speed

def test_a_link_restores_what_was_chosen(browser, made):
    one = made("qwen3_moe")
    window = opened(browser, one.path, behind="#t=17&layer=3&head=2&expert=5")
    assert window.evaluate("({ ...state })") == {"t": 17, "layer": 3, "head": 2, "expert": 5}
    assert window.text_content("#story").startswith("Token 17 ") and "sent to expert 5" in window.text_content("#story")
    window.evaluate("location.hash = '#t=9&layer=1&head=4'")
    window.wait_for_function("state.t === 9")
    assert window.get_attribute("#attention .cell[aria-pressed=true]", "aria-label").startswith("layer 1, head 4")
    for wrong in ("#t=99999&layer=99&head=99&expert=99", "#t=-1&layer=x&head=&expert=1e9", "#nothing"):
        window.evaluate("wrong => { location.hash = wrong; }", wrong)
        window.wait_for_timeout(30)
    assert [note for note in window.noted if "html" not in note] == []
    took = window.evaluate("""() => Math.min(...[3, 9, 15, 21, 27].map(t => { const begin = performance.now();
        choose({ t }); return performance.now() - begin; }))""")
    assert took < 150
    window.context.close()


@pytest.mark.slow
def test_a_long_prompt_is_folded_and_can_be_unfolded(browser, tmp_path):
    path, text = tmp_path / "long.html", " ".join(f"The cat number {i} sees a dog." for i in range(120))
    assert main(["-m", "Qwen3-MoE-Tiny", "-p", text, "-n", "8", "-o", str(path)]) == 0
    window = opened(browser, path, PHONE)
    assert window.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    fold = window.locator(".fold")
    folded, shown = window.evaluate("[folds[0].to - folds[0].from, chips.filter(Boolean).length]")
    assert fold.count() == 1 and re.match(rf"… {folded:,} tokens: (at least|<) .*%", fold.text_content())
    assert shown + folded == window.evaluate("n") and folded > 1000
    r, looked = window.evaluate("""() => { const r = rowOf(state.t), { from, to } = folds[0];
        return [r, strongest(state.layer, state.head, r).filter(([k]) => from <= k && k < to).map(([, x]) => x)]; }""")
    assert is_about(fold.text_content().rpartition(":")[2], sum(looked))
    fold.click()
    assert window.locator(".token").count() == window.evaluate("n") and fold.count() == 0
    assert "can be chosen" in window.text_content("#recorded")
    window.context.close()


@pytest.mark.slow
def test_a_large_model_is_one_picture_with_a_cursor(browser, large, tmp_path):
    path = tmp_path / "x.html"
    folder = large("wide", num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=4, head_dim=8,
                   hidden_size=32, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=8)
    assert main(["-m", str(folder), "-p", " ".join(map(str, range(120))), "-n", "12", "-o", str(path)]) == 0
    window = opened(browser, path)
    assert window.locator("main *").count() < 4000
    for grid, key, change in (("heads", "ArrowRight", "head"), ("experts", "ArrowDown", "layer")):
        before = window.evaluate("({ ...state })")
        window.focus(f"[data-id={grid}] [tabindex='0']")
        window.keyboard.press(key)
        assert window.evaluate(f"state.{change}") == before[change] + 1
    state = window.evaluate("({ ...state })")
    assert (f"layer {state['layer']}, head {state['head']}: looks most at"
            in window.get_attribute("[data-id=heads] canvas", "aria-label"))
    took = window.evaluate("""() => Math.min(...[0, 1, 2, 3, 4].map(head => { const begin = performance.now();
        choose({ head, expert: null }); return performance.now() - begin; }))""")
    assert took < 150
    window.context.close()
