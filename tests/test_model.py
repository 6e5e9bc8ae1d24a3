"""Logits and greedy tokens against transformers, on checkpoints of odd shapes (scripts/make_reference.py)."""

import copy
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cases import case_folder, loaded
from tests.packages import PACKAGES, module, runs_engine
from tests.seeded import CASES, LONG_PROMPT, PROMPT, write_case

HERE = Path(__file__).parent
LOGITS = {package: load_file(HERE / package / "reference/logits.safetensors") for package in PACKAGES}
SMALL = {package: json.loads((HERE / package / "reference/small.json").read_text()) for package in PACKAGES}
PROMPTS = {"short": PROMPT, "long": LONG_PROMPT}
EVERY = [(package, name, length) for package in PACKAGES for name in CASES[package] for length in PROMPTS]
PLAIN = {"qwen3": "grouped", "qwen3_moe": "two_of_eight", "deepseek_v3": "yarn"}


def load(package: str, folder: Path, engine: bool = True) -> torch.nn.Module:
    """One of its own, for a test that changes it or the code."""
    return module(package, "weights").load_model(folder, engine=engine)


def logits_of(package: str, name: str, dtype: str, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return loaded(package, name, dtype)(torch.tensor([prompt]))[0, -len(PROMPT):].float()


@pytest.mark.parametrize("package, name, length", EVERY)
def test_float32_logits_are_those_of_transformers(package, name, length):
    expected = LOGITS[package][f"{name}.{length}.float32"]
    ours = logits_of(package, name, "float32", PROMPTS[length])
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("package, name", [(package, name) for package in PACKAGES for name in CASES[package]])
def test_the_lesson_alone_gives_the_same_logits_and_the_tokens_of_the_engine(package, name):
    """Whole prompts, prompts of which a cache holds the beginning, and a batch."""
    generate = module(package, "generate")
    plain, fast = loaded(package, name, engine=False), loaded(package, name, "float32")
    assert not runs_engine(plain) and runs_engine(fast)
    request = dict(max_new_tokens=4)
    for length, prompt in PROMPTS.items():
        expected = LOGITS[package][f"{name}.{length}.float32"]
        with torch.inference_mode():
            logits = plain(torch.tensor([prompt]))[0, -len(PROMPT):]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        tokens, cache = list(generate.generate(fast, prompt, **request)), generate.new_cache(plain, 0)
        list(generate.generate(plain, prompt[:9], max_new_tokens=1, cache=cache))
        assert list(generate.generate(plain, prompt, **request)) == tokens
        assert list(generate.generate(plain, prompt, cache=cache, **request)) == tokens
    prompts = [PROMPT, [4], LONG_PROMPT[:40]]
    assert generate.generate_batch(plain, prompts, **request) == generate.generate_batch(fast, prompts, **request)


@pytest.mark.parametrize("package, name, length", [every for every in EVERY if every[0] != "deepseek_v3"])
def test_bfloat16_logits_are_as_close_to_the_truth_as_those_of_transformers(package, name, length):
    """Two bfloat16 programs round differently, so both are measured against float32."""
    ours, theirs = bfloat16_errors(package, name, length)
    assert ours.square().mean() <= 1.25**2 * theirs.square().mean()


def bfloat16_errors(package: str, name: str, length: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(Ours, those of transformers), logit by logit."""
    truth, theirs = LOGITS[package][f"{name}.{length}.float32"], LOGITS[package][f"{name}.{length}.bfloat16"].float()
    return logits_of(package, name, "bfloat16", PROMPTS[length]) - truth, theirs - truth


def test_bfloat16_logits_of_all_cases_together_are_as_close_where_rounding_moves_tokens_to_other_experts():
    """Experts chosen by groups: one rounding may send a token elsewhere, and a single case says little."""
    package = "deepseek_v3"
    every = [bfloat16_errors(package, name, length) for name in CASES[package] for length in PROMPTS]
    ours, theirs = (torch.cat([pair[i] for pair in every]) for i in range(2))
    assert ours.square().mean() <= 1.1**2 * theirs.square().mean()
    assert ours.abs().median() <= 1.1 * theirs.abs().median()


@pytest.mark.parametrize("package, name, length, dtype", [
    (*case, dtype) for case in EVERY for dtype in ("float32", "bfloat16") if dtype == "float32" or case[0] == "qwen3"])
def test_greedy_tokens_are_those_of_transformers(package, name, length, dtype):
    tokens = SMALL[package]["cases"][name][f"{length}.{dtype}"]  # up to where two logits come within rounding
    model = loaded(package, name, dtype)
    assert list(module(package, "generate").generate(model, PROMPTS[length], max_new_tokens=len(tokens))) == tokens


@pytest.mark.parametrize("package, share", [("qwen3_moe", 0.9), ("deepseek_v3", 0.8)])
def test_greedy_tokens_in_bfloat16_of_all_cases_together_are_those_of_transformers(package, share):
    """One rounding may send a token to other experts. On another processor transformers departs from itself."""
    same = all_ = 0
    for name, length in itertools.product(CASES[package], PROMPTS):
        tokens = SMALL[package]["cases"][name][f"{length}.bfloat16"]
        model = loaded(package, name, "bfloat16")
        ours = module(package, "generate").generate(model, PROMPTS[length], max_new_tokens=len(tokens))
        same += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, tokens)))
        all_ += len(tokens)
    assert all_ > 50 and same >= share * all_


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_tokens_to_compare(package):
    for dtype, enough in (("float32", 15), ("bfloat16", 4)):
        given = [len(case[f"{length}.{dtype}"]) for case in SMALL[package]["cases"].values() for length in PROMPTS]
        assert sum(given) >= enough * len(given)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_newer_config_gives_the_same_model(tmp_path, package):
    changed = write_case(tmp_path, package, "yarn")
    (changed / "config.json").write_text(json.dumps(SMALL[package]["config_of_transformers"]))
    ids = torch.tensor([PROMPT])
    assert torch.equal(load(package, changed)(ids), loaded(package, "yarn", "float32")(ids))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wrong_pairing_of_rope_is_noticed(monkeypatch, package):
    def interleaved(x, cos, sin):
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)

    if package == "deepseek_v3":
        monkeypatch.setattr(module(package, "mla"), "deinterleave", lambda x: x)  # half-split, as Qwen3
    else:
        monkeypatch.setattr(module(package, "layers"), "rotate", interleaved)
    expected = LOGITS[package][f"{PLAIN[package]}.short.float32"]
    logits = load(package, case_folder(package, PLAIN[package]))(torch.tensor([PROMPT]))[0]
    assert (logits - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_forward_without_cache_is_causal(package):
    model = loaded(package, PLAIN[package], "float32")
    ids = torch.tensor([PROMPT, PROMPT[:6] + [1] * 6])
    logits = model(ids)
    assert torch.allclose(logits[0, :6], logits[1, :6], atol=1e-5)
    assert not torch.allclose(logits[0, 6], logits[1, 6], atol=1e-2)


@pytest.mark.parametrize("package, name", [
    ("qwen3", "grouped"), ("qwen3", "one_key_head_untied"), ("qwen3_moe", "two_of_eight"),
    ("qwen3_moe", "shared_expert"), ("deepseek_v3", "yarn"), ("deepseek_v3", "moonlight")])
def test_gradients_reach_every_parameter_and_are_right(package, name):
    model = load(package, case_folder(package, name)).double()
    ids = torch.tensor([PROMPT, PROMPT[::-1]])

    def loss() -> torch.Tensor:
        first = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        if not getattr(model.config, "num_nextn_predict_layers", 0):
            return first
        second = model.mtp(ids[:, 1:], model.model(ids)[:, :-1])
        return first + torch.nn.functional.cross_entropy(second[:, :-1].flatten(0, 1), ids[:, 2:].flatten())

    loss().backward()
    for weight in model.parameters():
        assert weight.grad is None or weight.grad.isfinite().all()
    # An expert that no token chose has nothing to learn; all else has.
    idle = [name for name, weight in model.named_parameters()
            if weight.requires_grad and (weight.grad is None or not weight.grad.any())]
    assert all(".experts." in name for name in idle) and len(idle) < 0.2 * len(list(model.parameters()))
    # One number checked by moving it: the norms compute in float32, which bounds how exact that can be.
    attention = model.model.layers[1].self_attn
    weight = (attention.kv_a_proj_with_mqa if package == "deepseek_v3" else attention.k_proj).weight
    with torch.no_grad():
        weight[3, 5] += 0.01
        above = loss()
        weight[3, 5] -= 0.02
        below = loss()
    assert float(above - below) / 0.02 == pytest.approx(float(weight.grad[3, 5]), rel=1e-2)


@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("name", [name for name, changes in CASES["deepseek_v3"].items()
                                  if changes.get("num_nextn_predict_layers", 1)])
def test_logits_of_the_second_token_are_those_of_the_reference_put_together(name, length):
    """transformers' own layers, joined by scripts/make_reference.py; the released order of embedding and state."""
    expected = LOGITS["deepseek_v3"][f"{name}.{length}.float32.second"]
    model, ids = loaded("deepseek_v3", name, "float32"), torch.tensor([PROMPTS[length]])
    with torch.inference_mode():
        logits = model.mtp(ids[:, 1:], model.model(ids)[:, :-1])
    assert logits.shape == (1, len(PROMPTS[length]) - 1, 131)
    assert (logits[0, -len(PROMPT):] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("package", PACKAGES)
def test_gradients_work_after_generating(package):
    """What is made while generating is made without gradients and must not stop a later training step."""
    model = load(package, case_folder(package, PLAIN[package]))
    list(module(package, "generate").generate(model, PROMPT, max_new_tokens=2))
    model(torch.tensor([PROMPT])).sum().backward()


TIED = {"qwen3": "grouped", "qwen3_moe": "three_not_normalised", "deepseek_v3": "half_split"}


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_tied_head_stays_one_matrix_with_the_embedding(package, engine):
    model = load(package, case_folder(package, TIED[package]), engine)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    for other in (model, again, pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double(), again.half()):
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert "lm_head.weight" in other.state_dict() and "lm_head.weight" not in dict(other.named_parameters())


@pytest.mark.parametrize("package", PACKAGES)
def test_last_only_projects_one_position(package):
    model = loaded(package, PLAIN[package], "float32")
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    assert torch.allclose(model(ids, last_only=True), model(ids)[:, -1:], atol=1e-5)
