"""Logits and greedy tokens against transformers, on checkpoints of odd shapes (scripts/make_reference.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen3 import layers
from qwen3.generate import generate
from qwen3.weights import load_model
from tests.seeded import LONG_PROMPT, PROMPT, QWEN3_CASES, qwen3_config, write_checkpoint

REFERENCE = Path(__file__).parent / "reference"
LOGITS = load_file(REFERENCE / "logits.safetensors")
SMALL = json.loads((REFERENCE / "small.json").read_text())
TOKENS = SMALL["cases"]
PROMPTS = {"short": PROMPT, "long": LONG_PROMPT}
CASES = [(name, length) for name in QWEN3_CASES for length in PROMPTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cases")
    return {name: write_checkpoint(root / name, qwen3_config(**changes)) for name, changes in QWEN3_CASES.items()}


def logits_of(folder: Path, dtype: str, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(folder, dtype=dtype)(torch.tensor([prompt]))[0, -len(PROMPT):].float()


@pytest.mark.parametrize("name, length", CASES)
def test_float32_logits_are_those_of_transformers(folders, name, length):
    expected = LOGITS[f"{name}.{length}.float32"]
    assert (logits_of(folders[name], "float32", PROMPTS[length]) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name, length", CASES)
def test_bfloat16_logits_are_as_close_to_the_truth_as_those_of_transformers(folders, name, length):
    """Two bfloat16 programs round differently, so both are measured against float32."""
    truth, theirs = LOGITS[f"{name}.{length}.float32"], LOGITS[f"{name}.{length}.bfloat16"].float()
    ours = logits_of(folders[name], "bfloat16", PROMPTS[length])
    assert (ours - truth).square().mean().sqrt() <= 1.25 * (theirs - truth).square().mean().sqrt()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, length", CASES)
def test_greedy_tokens_are_those_of_transformers(folders, name, length, dtype):
    tokens = TOKENS[name][f"{length}.{dtype}"]["tokens"]
    if tokens is None:
        pytest.skip("the two best logits come within rounding of each other")
    assert list(generate(load_model(folders[name], dtype=dtype), PROMPTS[length], max_new_tokens=len(tokens))) == tokens


def test_the_reference_has_tokens_to_compare():
    given = [entry["tokens"] for case in TOKENS.values() for entry in case.values()]
    assert sum(tokens is not None for tokens in given) >= 0.7 * len(given)


def test_the_newer_config_gives_the_same_model(folders, tmp_path):
    changed = write_checkpoint(tmp_path, qwen3_config(**QWEN3_CASES["yarn"]))
    (changed / "config.json").write_text(json.dumps(SMALL["config_of_transformers"]))
    ids = torch.tensor([PROMPT])
    assert torch.equal(load_model(changed)(ids), load_model(folders["yarn"])(ids))


def test_the_wrong_pairing_of_rope_is_noticed(folders, monkeypatch):
    def interleaved(x, cos, sin):
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)

    monkeypatch.setattr(layers, "rotate", interleaved)
    expected = LOGITS["grouped.short.float32"]
    logits = load_model(folders["grouped"])(torch.tensor([PROMPT]))[0]
    assert (logits - expected).abs().max() > 0.1 * expected.abs().max()


def test_a_forward_without_cache_is_causal(folders):
    model = load_model(folders["grouped"])
    ids = torch.tensor([PROMPT, PROMPT[:6] + [1] * 6])
    logits = model(ids)
    assert torch.equal(logits[0, :6], logits[1, :6])
    assert not torch.equal(logits[0, 6], logits[1, 6])


@pytest.mark.parametrize("name", ["grouped", "one_key_head_untied"])
def test_gradients_reach_every_parameter_and_are_right(folders, name):
    model = load_model(folders[name]).double()
    ids = torch.tensor([PROMPT])

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])

    loss().backward()
    for weight in model.parameters():
        assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0
    # One number checked by moving it: the norms compute in float32, which bounds how exact that can be.
    weight = model.model.layers[1].self_attn.k_proj.weight
    with torch.no_grad():
        weight[3, 5] += 0.01
        above = loss()
        weight[3, 5] -= 0.02
        below = loss()
    assert float(above - below) / 0.02 == pytest.approx(float(weight.grad[3, 5]), rel=1e-2)


def test_gradients_work_after_generating(folders):
    """Tables made while generating are made without gradients and must not stop a later training step."""
    model = load_model(folders["grouped"])
    list(generate(model, PROMPT, max_new_tokens=2))
    model(torch.tensor([PROMPT])).sum().backward()


def test_last_only_projects_one_position(folders):
    model = load_model(folders["grouped"])
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    assert torch.allclose(model(ids, last_only=True), model(ids)[:, -1:], atol=1e-5)
