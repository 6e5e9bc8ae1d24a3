"""X-ray: recording changes nothing, what it says is true, and its page stays small."""

import json
import re
from base64 import b64decode
from pathlib import Path

import pytest
import torch

from scripts.xray import after, limits, page, terminal
from scripts.xray import run as xray_run
from scripts.xray.__main__ import main
from scripts.xray.data import rope, run_data
from scripts.xray.limits import Rows
from scripts.xray.pack import Words, visible
from scripts.xray.record import Recorder
from scripts.xray.switch import Part, switched
from tests.packages import PACKAGES, module
from tests.seeded import qwen3_config, qwen3_moe_config, write_checkpoint

ROOT = Path(__file__).parents[1]
TINY = ROOT / "checkpoints"
PLAIN = {}
SAMPLED = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 3}
PENALISED = {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 5}
SPECULATIVE = {"speculative": True}
SETTINGS = [(package, setting) for package in PACKAGES for setting in (PLAIN, SAMPLED)] + [
    ("qwen3", PENALISED), ("deepseek_v3", SPECULATIVE), ("deepseek_v3", SPECULATIVE | SAMPLED | {"temperature": 3.0})]
NEW = 8

MODELS: dict[tuple, tuple] = {}


def tiny(package: str, dtype: str | None = "float32", engine: bool = True) -> tuple[torch.nn.Module, list[int]]:
    """The embedded model, loaded once for all tests, and the ids of a question."""
    key = package, dtype, engine
    if key not in MODELS:
        folder = TINY / PACKAGES[package]
        model = module(package, "weights").load_model(folder, dtype=dtype, engine=engine)
        tokenizer = module(package, "tokenizer").Tokenizer.from_checkpoint(folder)
        MODELS[key] = model, tokenizer.chat([{"role": "user", "content": "What is 347 + 586?"}])
    return MODELS[key]


def generated(package: str, model: torch.nn.Module, ids: list[int], **settings) -> list[int]:
    return list(module(package, "generate").generate(model, ids, **{"max_new_tokens": NEW} | settings))


def recorded(package: str, model: torch.nn.Module, ids: list[int], rows: Rows | None = None, **settings) -> tuple:
    """(What was recorded, all ids.)"""
    with Recorder(package, model, rows or Rows(model.config, len(ids))) as seen:
        new = generated(package, model, ids, **settings)
    return seen, seen.finish(ids, new, settings.get("stop_ids", ()))


def traces(model: torch.nn.Module) -> list:
    """What a recording or a switch could leave behind."""
    return [(name, sorted(vars(part)), [len(value) for key, value in vars(part).items() if key.endswith("_hooks")],
             getattr(part, "rope_interleave", None)) for name, part in model.named_modules()]


def heads_output(model: torch.nn.Module, work) -> tuple[list[int], list[torch.Tensor]]:
    """What `work` returns, and everything that the head gave meanwhile."""
    logits = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: logits.append(out.clone()))
    try:
        return work(), logits
    finally:
        hook.remove()


# 1 Recording changes nothing

@pytest.mark.parametrize("package,settings,engine,dtype", [
    *((package, settings, True, None) for package, settings in SETTINGS),
    *((package, PLAIN, True, "float32") for package in PACKAGES), ("deepseek_v3", SPECULATIVE, True, "float32"),
    *((package, SAMPLED, False, None) for package in PACKAGES)], ids=str)
def test_tokens_and_logits_are_those_of_a_run_without_it(package, settings, engine, dtype):
    model, ids = tiny(package, dtype, engine)
    before = traces(model)
    new, logits = heads_output(model, lambda: generated(package, model, ids, **settings))
    seen_new, seen_logits = heads_output(model, lambda: recorded(package, model, ids, **settings)[1][len(ids):])
    assert seen_new == new and len(new) == NEW
    assert len(seen_logits) == len(logits) and all(map(torch.equal, seen_logits, logits))
    assert traces(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_is_left_behind_after_an_error_anywhere(package, error):
    model, ids = tiny(package)
    generate = module(package, "generate")
    before, names = traces(model), vars(generate).copy()
    settings = SPECULATIVE if package == "deepseek_v3" else PLAIN
    for place in ("model.layers.2.mlp", "lm_head"):
        hook = model.get_submodule(place).register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
        try:
            with pytest.raises(error), switched(model, [Part("head", 1, 2), Part("wrong rope")]):
                recorded(package, model, ids, **settings)
        finally:
            hook.remove()
        assert traces(model) == before and vars(generate) == names
    with pytest.raises(error), Recorder(package, model, Rows(model.config, len(ids))):
        ids_so_far = generate.generate(model, ids, max_new_tokens=NEW)
        next(ids_so_far)
        raise error
    assert traces(model) == before and vars(generate) == names


# 2 What is recorded is true

@pytest.mark.parametrize("package", PACKAGES)
def test_what_each_row_holds_is_what_the_model_computes_by_itself(package):
    """Against one pass over all tokens without a cache, by the lesson's parts and what they are made of."""
    model, ids = tiny(package, "float32", engine=False)
    seen, ids = recorded(package, model, ids)
    assert list(seen.rows) == list(range(len(ids) - 1)) and seen.error < 1e-5
    found, layers = {}, model.model.layers[:len(seen.layers)]

    def note(*key):
        return lambda _, args, out: found.__setitem__(key, (args, out))

    hooks = [part.register_forward_hook(note(i, what)) for i, layer in enumerate(layers)
             for what, part in [("layer", layer), ("gate", getattr(layer.mlp, "gate", None)),
                                ("norm", layer.post_attention_layernorm)] if part is not None]
    weights = {i: attention_weights(package, layer.self_attn) for i, layer in enumerate(layers)}
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]]))[0]
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(layers):
        del layer.self_attn.sdpa
        for position, row in seen.rows.items():
            close(row.stream[i], found[i, "layer"][1][0, position])
            close(row.between[i], found[i, "norm"][0][0][0, position])
            expected = weights[i][0][0, :, position, :position + 1]
            torch.testing.assert_close(row.attention[i], expected, rtol=0, atol=2e-6)
            if (i, "gate") in found:
                shares, chosen = found[i, "gate"][1]
                assert row.topk_ids[i].tolist() == chosen[position].tolist()
                close(row.weights[i], shares[position].float())
                of_chosen = row.scores[i][chosen[position]]  # of which the weights are made
                close(of_chosen / of_chosen.sum() * shares[position].float().sum(), row.weights[i])
    for position, row in seen.rows.items():
        close(row.stream[-1], model.model.embed_tokens.weight[ids[position]])
        depths = after.lens(model, row)
        assert depths.shape == (2 * len(layers) + 1, model.config.vocab_size)
        close(depths[-1], logits[position])
        again = model.lm_head(model.model.norm(row.stream[len(layers) - 1]))
        close(again, depths[-1])
        if position >= len(ids) - NEW - 1:
            assert torch.equal(row.logits, depths[-1]) and int(row.logits.argmax()) == ids[position + 1]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=3e-5 * float(other.detach().abs().max()))


def attention_weights(package: str, attention: torch.nn.Module) -> list[torch.Tensor]:
    """From now on, the weights (1, H, T, S) of this layer: sdpa on one-hot values, which it adds up by them."""
    found, original = [], attention.sdpa

    def both(q, k, v, mask):
        ones = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)  # (1, K, S, S)
        found.append(original(q, k, ones, mask))
        return original(q, k, v, mask)

    attention.sdpa = both
    return found


@pytest.mark.parametrize("package,settings", SETTINGS, ids=str)
def test_the_recorded_chances_are_those_that_were_drawn_from(package, settings):
    model, ids = tiny(package)
    generate, drawn_from = module(package, "generate"), []
    real = generate.sample

    def sample(logits, temperature=0.0, top_k=None, top_p=None, generator=None, min_p=None):
        if temperature:
            chances, which = generate.top_k_top_p(logits, temperature, top_k, top_p, min_p)
            drawn_from.append(torch.zeros_like(logits[0]).scatter(0, which[0], chances[0] / chances.sum()))
        else:
            drawn_from.append(torch.nn.functional.one_hot(logits[0].argmax(), logits.shape[-1]).float())
        return real(logits, temperature, top_k, top_p, generator, min_p)

    def verify(truth, guess, drafted, generator):
        drawn_from.append(truth)
        return real_verify(truth, guess, drafted, generator)

    def choose(sampler, probabilities):
        drawn_from.append(probabilities)
        return real_choose(sampler, probabilities)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "sample", sample)
        if package == "deepseek_v3":
            speculative = module(package, "speculative")
            real_verify, real_choose = speculative.verify, speculative.choose
            patch.setattr(speculative, "verify", verify)
            patch.setattr(speculative, "choose", choose)
        seen, every = recorded(package, model, ids, **settings)
    sampling = {"temperature": 0.0} | settings
    for position, expected in zip(range(len(ids) - 1, len(every) - 1), drawn_from):
        logits = after.given(generate, seen.rows[position].logits, every[:position + 1], len(ids), sampling)
        torch.testing.assert_close(after.chances(generate, logits, sampling), expected, rtol=1e-5, atol=1e-7)
        assert expected[every[position + 1]] > 0


@pytest.mark.parametrize("package", PACKAGES)
def test_the_rotary_clocks_stand_where_the_page_says(package):
    model, ids = tiny(package)
    seen, _ = recorded(package, model, ids)
    told = rope(seen, model.config)
    assert told["error"] < 1e-5 and len(told["frequencies"]) == len(seen.rows[0].turns[0])
    slowed = [plain / fast for plain, fast in zip(told["plain"], told["frequencies"])]
    assert (max(slowed) > 2) == bool(told["yarn"]) and min(slowed) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_strongest_keys_are_the_largest_weights_of_all(package, monkeypatch):
    model, ids = tiny(package)
    whole, every = recorded(package, model, ids)
    start = len(ids) + 2
    monkeypatch.setattr(limits, "WHOLE", start ** 2 * whole.wanted.heads)  # ends between two tokens of the answer
    seen, same = recorded(package, model, ids)
    assert same == every and not seen.wanted.whole and list(seen.rows) == list(range(len(ids) - 1, len(every) - 1))
    for position, row in seen.rows.items():
        expected = whole.rows[position].attention
        torch.testing.assert_close(row.shares, expected.topk(limits.STRONGEST).values)
        torch.testing.assert_close(row.shares, expected.gather(-1, row.places))
        kept = [part for part in vars(row).values() if isinstance(part, torch.Tensor)]
        assert all(part.untyped_storage().nbytes() <= 2 * part.nbytes for part in kept)  # none holds a larger one
    monkeypatch.setattr(limits, "WHOLE", 0)
    asked, _ = recorded(package, model, ids, Rows(model.config, len(ids), asked=(3, 6)))
    assert list(asked.rows) == [2, 3, 4, 5] and asked.rows[2].attention is None
    torch.testing.assert_close(asked.rows[5].shares[:, :, 0], whole.rows[5].attention.amax(-1))
    assert asked.rows[2].places.shape[-1] == 3  # no more than there are


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "strongest"])
@pytest.mark.parametrize("package,settings", [("qwen3", SAMPLED), ("qwen3_moe", PLAIN), ("deepseek_v3", SPECULATIVE)],
                         ids=str)
def test_the_pages_numbers_are_those_of_the_recording(package, settings, whole, monkeypatch):
    """Read as the page reads them, at every layer, head, expert and token."""
    model, ids = tiny(package)
    monkeypatch.setattr(limits, "WHOLE", 10**9 if whole else 0)
    seen, every = recorded(package, model, ids, **settings)
    tokenizer = module(package, "tokenizer").Tokenizer.from_checkpoint(TINY / PACKAGES[package])
    words, generate = Words(tokenizer), module(package, "generate")
    told = json.loads(page.as_json(run_data(seen, generate, words, every, len(ids), settings, full=True)))
    steps, kept = told["steps"], told["attention"]
    assert told["tokens"] == every and steps == list(seen.rows) and kept["whole"] == whole
    assert "".join(words.table[id] for id in every) == "".join(visible(tokenizer.bytes_of[id]) for id in every)
    L, H, sizes = told["L"], kept["H"], [position + 1 for position in steps]
    shares = (unpacked(kept["data"], torch.uint8) / 255).square()
    places = None if whole else unpacked(kept["places"], torch.uint16).long().view(L, H, len(steps), -1)
    matters = {what: (unpacked(told["matters"][what], torch.uint16).float() / 65535).square()
               for what in ("heads", "experts")}
    for r, (position, row) in enumerate(seen.rows.items()):
        for layer in range(L):
            for head in range(H):
                if whole:
                    start = (layer * H + head) * sum(sizes) + sum(sizes[:r])
                    found, expected = shares[start:start + sizes[r]], row.attention[layer][head]
                else:
                    found = shares.view_as(places)[layer, head, r]
                    expected = row.shares[layer, head]
                    assert places[layer, head, r].tolist() == row.places[layer, head].tolist()
                torch.testing.assert_close(found, expected, rtol=0, atol=0.005)
        depths = after.lens(model, row)
        chances = depths.softmax(-1)
        for depth, top in enumerate(told["lens"]["top"][r]):
            assert top[0][0] == int(depths[2 * depth].argmax())
            assert all(chance == pytest.approx(float(chances[2 * depth, id]), abs=1e-4) for id, chance in top)
        assert told["lens"]["written"][r] == pytest.approx(chances[:, every[position + 1]].tolist(), abs=2e-5)
        check_choice(told["choice"], r, depths[-1], every[position + 1], settings if position + 1 >= len(ids) else {
            "temperature": 1.0}, generate)
        if told["experts"]:
            for at, layer in enumerate(told["experts"]["layers"]):
                assert [expert for expert, _ in told["experts"]["chosen"][at][r]] == row.topk_ids[layer].tolist()
                assert [weight for _, weight in told["experts"]["chosen"][at][r]] == pytest.approx(
                    row.weights[layer].tolist(), abs=1e-4)
                scores = unpacked(told["experts"]["scores"], torch.uint16).view(-1, len(steps), told["experts"]["E"])
                torch.testing.assert_close(scores[at, r].float() / 65535, row.scores[layer], rtol=0, atol=1e-5)
    off = after.matters(model, generate, every, steps)
    torch.testing.assert_close(matters["heads"], off["heads"].flatten(), rtol=0, atol=1e-4)
    torch.testing.assert_close(matters["experts"], off["experts"].flatten(), rtol=0, atol=1e-4)
    assert len(told["drafts"]) == len(seen.drafts) and (package != "deepseek_v3" or told["drafts"])


def check_choice(told: dict, r: int, logits: torch.Tensor, written: int, settings: dict, generate) -> None:
    step, drawing = told["steps"][r], after.chances(generate, logits, settings)
    best = logits.sort(descending=True).values
    kept = unpacked(told["logits"], torch.float32).view(-1, told["kept"])[r]
    assert torch.equal(kept, best[:told["kept"]])
    assert step["all"] == pytest.approx(float(logits.logsumexp(-1)), abs=1e-4)
    assert step["chances"] == pytest.approx(drawing[step["ids"]].tolist(), abs=1e-6)
    assert step["written"][0] == written and step["written"][2] == pytest.approx(float(drawing[written]), abs=1e-6)
    assert float(best[step["place"]]) == float(logits[written])
    rest = torch.tensor(step["rest"])
    assert int(rest[:, 1].sum()) == len(logits) - told["kept"]
    for temperature in (0.5, 1.0, 2.0):  # what the page makes of it, if another temperature had been chosen
        some = ((kept - kept[0]) / temperature).exp().sum()
        some += (rest[:, 1] * ((rest[:, 0] - kept[0]) / temperature).exp()).sum()
        assert float(1 / some) == pytest.approx(float((logits / temperature).softmax(-1).max()), abs=1e-3)


# 3 Drafting

@pytest.mark.parametrize("new", [23, 24])  # after one of them a draft is read that nobody needs
def test_a_speculative_run_is_recorded_like_the_plain_one(new):
    model, ids = tiny("deepseek_v3")
    plain, every = recorded("deepseek_v3", model, ids, max_new_tokens=new)
    drafting, same = recorded("deepseek_v3", model, ids, max_new_tokens=new, speculative=True)
    assert same == every and list(drafting.rows) == list(plain.rows)
    assert drafting.passes["answer"] < plain.passes["answer"]
    for position, row in plain.rows.items():
        other = drafting.rows[position]
        assert other.token == row.token
        for layer in range(-1, len(plain.layers)):
            close(other.stream[layer], row.stream[layer])
        torch.testing.assert_close(other.attention, row.attention, rtol=0, atol=1e-5)
        assert torch.equal(other.topk_ids.sort().values, row.topk_ids.sort().values)
    read = len(every) - 1  # the last token is never read
    for layer, load in plain.loads.items():
        assert int(load.sum()) == read * model.config.num_experts_per_tok
        assert torch.equal(drafting.loads[layer], load)
    for draft in drafting.drafts:
        assert draft["token"] == every[draft["at"]] and (draft["truth"] > 0) == (draft["token"] == draft["drafted"])


def test_the_token_that_ends_the_answer_is_part_of_the_recording():
    model, ids = tiny("qwen3")
    new = generated("qwen3", model, ids)
    stop = {next(id for id in new[3:] if id not in new[:3])}
    seen, every = recorded("qwen3", model, ids, stop_ids=stop)
    assert set(every[-1:]) == stop and every[:-1] == ids + new[:new.index(*stop)]
    assert list(seen.rows)[-1] == len(every) - 2


# 4 Names

@pytest.mark.parametrize("package,owner,name", [
    *((package, "generate", "sample") for package in PACKAGES),
    *(("deepseek_v3", "speculative", name) for name in ("choose", "verify", "draft")),
    *((package, "layer", "sdpa") for package in PACKAGES)])
def test_a_renamed_function_is_noticed(package, owner, name, monkeypatch):
    model, ids = tiny(package)
    before = traces(model)
    if owner == "layer":
        owners = [kind for kind in type(model.model.layers[0].self_attn).__mro__ if name in vars(kind)]
    else:
        owners = [module(package, owner)]
    for one in owners:  # it is called by another name now
        monkeypatch.delattr(one, name)
    with pytest.raises(AttributeError, match=f"listens to {name} of .*renamed"):
        recorded(package, model, ids)
    assert traces(model) == before


def test_a_function_that_is_there_and_no_longer_called_is_noticed(monkeypatch):
    model, ids = tiny("qwen3")
    generate, attention = module("qwen3", "generate"), type(model.model.layers[0].self_attn)
    real = generate.sample
    monkeypatch.setattr(generate, "drawn", real, raising=False)
    monkeypatch.setattr(generate.Sampler, "__call__", lambda self, logits: real(logits))
    with pytest.raises(RuntimeError, match="heard nothing of the choice"):
        recorded("qwen3", model, ids)
    monkeypatch.undo()
    real = attention.sdpa
    monkeypatch.setattr(attention, "forward", lambda self, x, cos, sin, mask, cache: x)
    with pytest.raises(RuntimeError, match="heard nothing of sdpa of layer 0"):
        recorded("qwen3", model, ids)


# 5 Size

@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a random model and a tokenizer: many layers, heads and experts, all of them narrow."""
    def write(name: str, **config) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((TINY / PACKAGES["qwen3"] / file).read_bytes())
        vocabulary = json.loads((TINY / PACKAGES["qwen3"] / "config.json").read_text())["vocab_size"]
        make = qwen3_moe_config if "num_experts" in config else qwen3_config
        return write_checkpoint(folder, make(vocab_size=vocabulary, max_position_embeddings=4096, **config), std=0.2)
    return write


def check_budget(folder: Path, out: Path, tokens: int, new: int, capsys) -> dict:
    text = " ".join(str(number) for number in range(10 ** 4))[:tokens]
    assert main(["-m", str(folder), "-p", text, "-n", str(new), "-o", str(out)]) == 0
    capsys.readouterr()
    assert out.stat().st_size < limits.PAGE
    return data_of(out)


def data_of(path: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1])


def unpacked(text: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(b64decode(text)), dtype=dtype) if text else torch.zeros(0, dtype=dtype)


def test_a_long_prompt_keeps_the_strongest_keys_of_the_answers_rows(large, tmp_path, capsys):
    folder = large("many", num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4, head_dim=8,
                   num_experts=12, num_experts_per_tok=3)
    told = check_budget(folder, tmp_path / "page.html", 400, 6, capsys)["runs"][0]
    kept, L, H = told["attention"], told["L"], told["attention"]["H"]
    assert told["prompt"] > 150 and told["steps"] == list(range(told["prompt"] - 1, len(told["tokens"]) - 1))
    assert not told["whole"] and not kept["whole"]
    places = unpacked(kept["places"], torch.uint16).view(L, H, len(told["steps"]), 8)
    shares = unpacked(kept["data"], torch.uint8).view_as(places)
    for r, position in enumerate(told["steps"]):
        assert (places[:, :, r].int() <= position).all()
        assert (shares[:, :, r].float() / 255).square().sum(-1).max() < 1.05


@pytest.mark.slow
def test_a_page_stays_small_whatever_the_model_and_the_prompt(large, tmp_path, capsys):
    folder = large("huge", num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=8,
                   hidden_size=32, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=8)
    told = check_budget(folder, tmp_path / "page.html", 3000, 40, capsys)["runs"][0]
    assert told["prompt"] >= 2048 and len(told["steps"]) >= 32


def test_rows_are_dropped_where_the_estimate_was_too_low(tmp_path, capsys, monkeypatch):
    out, small = tmp_path / "x.html", 90_000
    flags = ["-m", "Qwen3-Tiny", "-p", "What is 347 + 586?", "-n", "8", "-o", str(out)]
    assert main(flags) == 0
    whole = data_of(out)["runs"][0]["steps"]
    monkeypatch.setattr(after, "SWEEP_TOKENS", 0)
    monkeypatch.setattr(xray_run, "PAGE", small)
    assert main(flags) == 0
    kept = data_of(out)["runs"][0]["steps"]
    assert len(page.as_json(data_of(out))) < small and 0 < len(kept) < len(whole) and kept == whole[:len(kept)]
    monkeypatch.setattr(xray_run, "PAGE", 1000)
    assert main(flags) == 2 and "ask a shorter question" in capsys.readouterr().err


def test_what_is_kept_follows_the_answer():
    class Large:
        num_hidden_layers, num_attention_heads, vocab_size, hidden_size = 48, 32, 151936, 2048

    rows = Rows(Large, prompt=20, end_of_thought=7)
    rows.begin(0, 20)
    assert rows.whole and 0 in rows and 30 < rows.most < 50
    rows.begin(20, 100)
    assert not rows.whole and 18 not in rows and 19 in rows and 19 + rows.most not in rows
    rows.drawn(100, 7)
    rows.drawn(110, 7)
    assert 99 not in rows and 100 in rows and 100 + rows.most not in rows
    asked = Rows(Large, prompt=20, asked=(5, 9), end_of_thought=7)
    assert [position for position in range(30) if position in asked] == [4, 5, 6, 7, 8]


# 6 The page's sources

def test_the_page_invents_nothing_and_loads_nothing():
    for path in (ROOT / "scripts/xray").iterdir():
        if path.suffix in (".js", ".css", ".html"):
            text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
            for word in ("Math.random", "innerHTML", "outerHTML", "insertAdjacent", "document.write", "http", "fetch(",
                         "XMLHttp", "import(", "eval(", "url("):
                assert word not in text, (path.name, word)
            assert max(map(len, text.splitlines()), default=0) <= 120, path.name


def test_a_hostile_prompt_stays_text(tmp_path, capsys):
    hostile = "</script><img src=x onerror=alert(1)>{{script}}<!-- \u202e {{data}} \u2028 <|im_end|> \x07"
    out = tmp_path / "page.html"
    assert main(["-m", "Qwen3-Tiny", "-p", hostile, "-n", "2", "--no-thinking", "-o", str(out)]) == 0
    text = out.read_text("utf-8")
    assert text.count("<script") == 2 and "<img" not in text and "<!--" not in text and "\u202e" not in text
    assert text.count("default-src 'none'") == 1 and "\x07" not in text and "\u2028" not in text
    told = data_of(out)
    asked = "".join(told["words"][str(id)] for id in told["runs"][0]["tokens"])
    assert "</script><img src=x onerror=alert(1)>{{script}}<!--" in asked and "<|im_end|>" in asked
    assert "⟨U+202E⟩" in told["meta"]["command"] and "⟨U+202E⟩" in told["runs"][0]["question"]
    assert visible("a\u200b\u00a0\ufeffb\n\t ") == "a⟨U+200B⟩⟨U+00A0⟩⟨U+FEFF⟩b\n\t "
    assert visible(b"\xe2\x96") == "⟨E2 96⟩"


# Switched off

@pytest.mark.parametrize("engine", [True, False], ids=["engine", "plain"])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_head_off_is_its_columns_of_the_output_matrix_at_zero(package, engine):
    model, ids = tiny(package, "float32", engine)
    before, tokens = traces(model), torch.tensor([ids])
    with torch.inference_mode():
        whole = model(tokens)
        with switched(model, [Part("head", 3, 2)]):
            off = model(tokens)
        weight = model.model.layers[3].self_attn.o_proj.weight
        kept, width = weight.clone(), weight.shape[1] // model.config.num_attention_heads
        weight[:, 2 * width:3 * width] = 0
        expected = model(tokens)
        weight.copy_(kept)
        again = model(tokens)
    assert torch.equal(off, expected) and torch.equal(again, whole) and not torch.equal(off, whole)
    assert traces(model) == before


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "plain"])
@pytest.mark.parametrize("package", ["qwen3_moe", "deepseek_v3"])
def test_an_expert_off_is_its_last_matrix_at_zero(package, engine):
    model, ids = tiny(package, "float32", engine)
    seen, _ = recorded(package, model, ids, max_new_tokens=1)
    busiest = int(seen.loads[4].argmax())
    with torch.inference_mode():
        tokens = torch.tensor([ids])
        whole = model(tokens)
        with switched(model, [Part("expert", 4, busiest)]):
            off = model(tokens)
        weight = model.model.layers[4].mlp.experts[busiest].down_proj.weight
        kept = weight.clone()
        weight.zero_()
        expected = model(tokens)
        weight.copy_(kept)
        again = model(tokens)
    torch.testing.assert_close(off, expected, rtol=0, atol=1e-5)
    assert torch.equal(again, whole) and not torch.equal(off, whole)


@pytest.mark.parametrize("package", PACKAGES)
def test_wrong_rope_turns_neighbours_where_the_model_turns_halves(package):
    """Scores from queries and keys that are rotated by hand, pair by pair."""
    model, ids = tiny(package, "float32", engine=False)
    config, attention = model.config, model.model.layers[0].self_attn
    before, kept = traces(model), {}
    original = attention.sdpa
    turned = config.qk_rope_head_dim if package == "deepseek_v3" else config.head_dim

    def weights(how: str) -> torch.Tensor:
        def look(q, k, v, mask):
            kept[how] = q[..., -turned:], k[..., -turned:]
            return original(q, k, v, mask)
        attention.sdpa = look
        with torch.inference_mode():
            model(torch.tensor([ids]))
        del attention.sdpa
        return torch.einsum("bhtn,bhsn->bhts", kept[how][0][:, :1], kept[how][1][:, :1])[0, 0]

    right = weights("right")
    with switched(model, [Part("wrong rope")]):
        wrong = weights("wrong")
    # Turned back by the right pairs, then forward by the others: what was asked for, computed from the right run.
    angles = torch.arange(len(ids))[:, None] * model.model.rotary_emb.inv_freq
    halves = [by_pairs(x[0, 0], -angles, neighbours=False) for x in kept["right"]]  # in the order of halves
    if package == "deepseek_v3":  # whose pairs are neighbours: the order of its weights comes back first
        halves = [torch.stack(x.chunk(2, -1), -1).flatten(-2) for x in halves]
    query, key = (by_pairs(x, angles, neighbours=package != "deepseek_v3") for x in halves)
    torch.testing.assert_close(wrong, query @ key.T, rtol=1e-4, atol=1e-3)
    assert (wrong - right).abs().max() > 0.1 and traces(model) == before
    torch.testing.assert_close(weights("again"), right)


def by_pairs(x: torch.Tensor, angles: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """x (T, N) with each pair turned: (0, 1), (2, 3), … or (0, N/2), (1, N/2 + 1), …"""
    out, N = x.clone(), x.shape[1]
    for j in range(N // 2):
        a, b = (2 * j, 2 * j + 1) if neighbours else (j, j + N // 2)
        cos, sin = angles[:, j].cos(), angles[:, j].sin()
        out[:, a], out[:, b] = x[:, a] * cos - x[:, b] * sin, x[:, b] * cos + x[:, a] * sin
    return out


@pytest.mark.parametrize("text,said", [
    ("layer3", "expected parts like"), ("layer3.head", "expected parts like"), ("head2", "expected parts like"),
    ("layer-1.head2", "expected parts like"), ("layer9.head0", "the layers 0 to 4"),
    ("layer0.head6", "the heads 0 to 5"),
    ("layer0.expert1", "layer 0 has no experts"), ("layer1.expert8", "the experts 0 to 7")])
def test_a_part_that_is_not_there_is_refused(text, said, capsys):
    assert main(["-m", "DeepSeek-V3-Tiny", "-p", "Hi", "--without", text]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == "" and len(captured.err) < 300


def test_what_each_part_matters_is_what_switching_it_off_does():
    model, ids = tiny("deepseek_v3")
    generate = module("deepseek_v3", "generate")
    every = ids + generated("deepseek_v3", model, ids)
    rows = list(range(len(ids) - 1, len(every) - 1))
    found = after.matters(model, generate, every, rows)
    L, H, E = 5, 6, 8
    assert found["heads"].shape == (L, H, NEW) and found["experts"].shape == (L - 1, E, NEW)
    with torch.inference_mode():
        whole = model(torch.tensor([every[:-1]]))[0].softmax(-1)
        with switched(model, [Part("head", 1, 3)]):
            head = model(torch.tensor([every[:-1]]))[0].softmax(-1)
        with switched(model, [Part("expert", 2, 5)]):
            expert = model(torch.tensor([every[:-1]]))[0].softmax(-1)
    for r, row in enumerate(rows):
        for told, chances in ((found["whole"][r], whole), (found["heads"][1, 3, r], head),
                              (found["experts"][1, 5, r], expert)):
            assert float(told) == pytest.approx(float(chances[row, every[row + 1]]), abs=1e-4)


# The command

@pytest.mark.parametrize("package", PACKAGES)
def test_the_command_prints_the_answer_and_writes_a_page(package, tmp_path, capsys):
    name, out = PACKAGES[package], tmp_path / "sum.html"
    flags = ["-m", name, "-p", "What is 347 + 586?", "-n", "6", "--no-thinking"]
    assert module(package, "main").main(flags) == 0
    answer = capsys.readouterr().out
    more = ["--against", "What is RoPE?", "--without", "layer1.head3,layer2.head0", "--without", "layer0.head0",
            "--wrong-rope"] + (["--speculative"] if package == "deepseek_v3" else [])
    assert main([*flags, *more, "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == answer and "holds the question and the answer" in captured.err
    told = data_of(out)
    assert [run["off"] for run in told["runs"]] == [[], ["layer1.head3", "layer2.head0"], ["layer0.head0"],
                                                    ["wrong rope"], []]
    first, *others = told["runs"]
    assert str(tmp_path) not in out.read_text() and told["meta"]["command"].endswith("-o sum.html")
    assert first["answer"] == answer.strip() and len(first["attention"]["data"]) > 1000
    assert (first["experts"] is None) == (package == "qwen3") and bool(first["drafts"]) == (package == "deepseek_v3")
    assert all(len(run["forced"]) == len(first["steps"]) for run in others if run["off"])
    assert others[-1]["question"] == "What is RoPE?" and len(others[-1]["lens"]["top"]) == len(others[-1]["steps"])
    for phase, total in first["cost"]["total"].items():
        parts = sum(spent for _, where, spent in first["cost"]["seconds"] if where == phase)
        assert parts == pytest.approx(total, rel=0.01, abs=1e-4)
    written = sum(size for _, size, _ in first["cost"]["weights"])
    model, _ = tiny(package, None)
    assert written == sum(weight.nbytes for weight in model.parameters())


def test_without_a_page_it_reports_to_the_terminal(capsys):
    assert main(["-m", "Qwen3-Tiny", "-p", "What is 347 + 586?", "-n", "8"]) == 0
    shown = capsys.readouterr().err
    assert "embedding  │" in shown and "layer 4    │" in shown and "← written" in shown and "looked then" in shown


def test_the_terminal_keeps_to_its_width(tmp_path, capsys):
    out = tmp_path / "x.html"
    assert main(["-m", "Qwen3-Tiny", "-p", "What is 347 + 586?", "-n", "20", "-o", str(out)]) == 0
    told = data_of(out)
    told["words"] = {int(id): text for id, text in told["words"].items()}
    for width in (80, 100, 200):
        assert max(map(len, terminal.report(told, width).splitlines())) <= width


def test_ctrl_c_leaves_with_130_and_no_page(tmp_path, capsys, monkeypatch):
    def stop(self, token):
        raise KeyboardInterrupt
    monkeypatch.setattr(Recorder, "on_draw", stop)
    assert main(["-m", "Qwen3-Tiny", "-p", "Hi", "-o", str(tmp_path / "x.html")]) == 130
    assert list(tmp_path.iterdir()) == [] and "Traceback" not in capsys.readouterr().err


def test_a_page_that_is_interrupted_leaves_the_earlier_one(tmp_path, monkeypatch):
    out = tmp_path / "x.html"
    page.write(out, f"{page.MARK} first")
    monkeypatch.setattr(page.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        page.write(out, f"{page.MARK} second")
    assert out.read_text() == f"{page.MARK} first" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("flags,said", [
    (["-n", "0"], "-n 1 or more"), (["--compile"], "cannot be listened to"), (["--chat"], "of one answer"),
    (["--temperature", "x"], "invalid float"),
    (["--no-such-flag"], "unrecognized arguments"), (["--steps", "9-3"], "no range"), (["--steps", "0"], "no range"),
    (["--steps", "5000-5001"], "at most"), (["--steps", "1-1500"], "choose fewer"), (["-m", "nowhere"], "nowhere"),
    (["-m", "DeepSeek-V3-Tiny", "--show-experts"], "leave it out"), (["--speculative"], "unrecognized"),
    (["-o", "nowhere/x.html"], "no folder"), (["-o", "."], "is a folder")])
def test_what_makes_no_sense_is_refused_with_one_sentence(flags, said, capsys):
    try:
        code = main(["-m", "Qwen3-Tiny", *([] if "--chat" in flags else ["-p", "Hi"]), *flags])
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    assert code == 2 and said in captured.err and captured.out == "" and "Traceback" not in captured.err
    assert len(captured.err.splitlines()[-1]) < 300


def test_only_an_xray_is_replaced(tmp_path, capsys):
    other, mine = tmp_path / "letter.html", tmp_path / "mine.html"
    other.write_text("<html>dear</html>")
    flags = ["-m", "Qwen3-Tiny", "-p", "Hi", "-n", "2", "-o"]
    assert main([*flags, str(other)]) == 2 and other.read_text() == "<html>dear</html>"
    assert "is no X-ray" in capsys.readouterr().err
    assert main([*flags, str(mine)]) == main([*flags, str(mine)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.html", "mine.html"]
