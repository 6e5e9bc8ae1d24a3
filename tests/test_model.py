"""Logits and greedy tokens against transformers, on checkpoints of odd shapes (scripts/make_reference.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.packages import PACKAGES, module
from tests.seeded import CASES, LONG_PROMPT, PROMPT, write_case

HERE = Path(__file__).parent
LOGITS = {package: load_file(HERE / package / "reference/logits.safetensors") for package in PACKAGES}
SMALL = {package: json.loads((HERE / package / "reference/small.json").read_text()) for package in PACKAGES}
PROMPTS = {"short": PROMPT, "long": LONG_PROMPT}
EVERY = [(package, name, length) for package in PACKAGES for name in CASES[package] for length in PROMPTS]
PLAIN = {"qwen3": "grouped", "qwen3_moe": "two_of_eight"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, dict[str, Path]]:
    root = tmp_path_factory.mktemp("cases")
    return {package: {name: write_case(root / package / name, package, name) for name in CASES[package]} for package in PACKAGES}


def load(package: str, folder: Path, dtype: str | None = None) -> torch.nn.Module:
    return module(package, "weights").load_model(folder, dtype=dtype)


def logits_of(package: str, folder: Path, dtype: str, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return load(package, folder, dtype)(torch.tensor([prompt]))[0, -len(PROMPT):].float()


@pytest.mark.parametrize("package, name, length", EVERY)
def test_float32_logits_are_those_of_transformers(folders, package, name, length):
    expected = LOGITS[package][f"{name}.{length}.float32"]
    ours = logits_of(package, folders[package][name], "float32", PROMPTS[length])
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("package, name, length", EVERY)
def test_bfloat16_logits_are_as_close_to_the_truth_as_those_of_transformers(folders, package, name, length):
    """Two bfloat16 programs round differently, so both are measured against float32."""
    truth, theirs = LOGITS[package][f"{name}.{length}.float32"], LOGITS[package][f"{name}.{length}.bfloat16"].float()
    ours = logits_of(package, folders[package][name], "bfloat16", PROMPTS[length])
    assert (ours - truth).square().mean().sqrt() <= 1.25 * (theirs - truth).square().mean().sqrt()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("package, name, length", EVERY)
def test_greedy_tokens_are_those_of_transformers(folders, package, name, length, dtype):
    tokens = SMALL[package]["cases"][name][f"{length}.{dtype}"]  # up to where two logits come within rounding
    model = load(package, folders[package][name], dtype)
    assert list(module(package, "generate").generate(model, PROMPTS[length], max_new_tokens=len(tokens))) == tokens


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_tokens_to_compare(package):
    for dtype, enough in (("float32", 15), ("bfloat16", 4)):
        given = [len(case[f"{length}.{dtype}"]) for case in SMALL[package]["cases"].values() for length in PROMPTS]
        assert sum(given) >= enough * len(given)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_newer_config_gives_the_same_model(folders, tmp_path, package):
    changed = write_case(tmp_path, package, "yarn")
    (changed / "config.json").write_text(json.dumps(SMALL[package]["config_of_transformers"]))
    ids = torch.tensor([PROMPT])
    assert torch.equal(load(package, changed)(ids), load(package, folders[package]["yarn"])(ids))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wrong_pairing_of_rope_is_noticed(folders, monkeypatch, package):
    def interleaved(x, cos, sin):
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)

    monkeypatch.setattr(module(package, "layers"), "rotate", interleaved)
    expected = LOGITS[package][f"{PLAIN[package]}.short.float32"]
    logits = load(package, folders[package][PLAIN[package]])(torch.tensor([PROMPT]))[0]
    assert (logits - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_forward_without_cache_is_causal(folders, package):
    model = load(package, folders[package][PLAIN[package]])
    ids = torch.tensor([PROMPT, PROMPT[:6] + [1] * 6])
    logits = model(ids)
    assert torch.allclose(logits[0, :6], logits[1, :6], atol=1e-5)
    assert not torch.allclose(logits[0, 6], logits[1, 6], atol=1e-2)


@pytest.mark.parametrize("package, name", [("qwen3", "grouped"), ("qwen3", "one_key_head_untied"), ("qwen3_moe", "two_of_eight"),
                                           ("qwen3_moe", "shared_expert")])
def test_gradients_reach_every_parameter_and_are_right(folders, package, name):
    model = load(package, folders[package][name]).double()
    ids = torch.tensor([PROMPT, PROMPT[::-1]])

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    for weight in model.parameters():
        assert weight.grad is None or weight.grad.isfinite().all()
    # An expert that no token chose has nothing to learn; all else has.
    idle = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert all(".experts." in name for name in idle) and len(idle) < 0.2 * len(list(model.parameters()))
    # One number checked by moving it: the norms compute in float32, which bounds how exact that can be.
    weight = model.model.layers[1].self_attn.k_proj.weight
    with torch.no_grad():
        weight[3, 5] += 0.01
        above = loss()
        weight[3, 5] -= 0.02
        below = loss()
    assert float(above - below) / 0.02 == pytest.approx(float(weight.grad[3, 5]), rel=1e-2)


@pytest.mark.parametrize("package", PACKAGES)
def test_gradients_work_after_generating(folders, package):
    """Tables made while generating are made without gradients and must not stop a later training step."""
    model = load(package, folders[package][PLAIN[package]])
    list(module(package, "generate").generate(model, PROMPT, max_new_tokens=2))
    model(torch.tensor([PROMPT])).sum().backward()


@pytest.mark.parametrize("package", PACKAGES)
def test_last_only_projects_one_position(folders, package):
    model = load(package, folders[package][PLAIN[package]])
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    assert torch.allclose(model(ids, last_only=True), model(ids)[:, -1:], atol=1e-5)
