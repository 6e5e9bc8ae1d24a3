"""Published outputs of downloaded checkpoints. All slow."""

from pathlib import Path

import pytest
import torch

from qwen3.generate import generate
from qwen3.model import Model
from qwen3.tokenizer import Tokenizer
from qwen3.weights import load_model

pytestmark = pytest.mark.slow
CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"


def downloaded(name: str, dtype: str) -> tuple[Model, Tokenizer]:
    if not ((CHECKPOINTS / name / "config.json").exists() and any((CHECKPOINTS / name).glob("*.safetensors"))):
        pytest.skip(f"needs the published checkpoint: bash scripts/download_qwen3.sh {name}")
    return load_model(CHECKPOINTS / name, dtype=dtype), Tokenizer.from_checkpoint(CHECKPOINTS / name)


# Left as published: transformers' own tests (0.6B-Base, float32), and greedy tokens that others made with transformers.
MEANS = [-1.3789, 1.3029, 3.8262, 3.4637, 2.8796, 1.8357, 2.1290, 2.1814]
FIRST_LOGITS = [4.6905, 4.9243, 4.7101, 3.2052, 2.2683, 1.6576, 3.6529, 3.98, 3.2605, 2.6475]
CONDIMENT = [16, 15, 15, 4, 14396, 11, 650, 1489, 402, 20394, 11, 323, 650, 329, 360, 465, 657, 13, 1084, 374]


def test_0_6b_base_has_the_published_logits():
    model, _ = downloaded("Qwen3-0.6B-Base", "float32")
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338]]))[0]
    assert torch.allclose(logits.mean(-1), torch.tensor(MEANS), atol=1e-3)
    assert torch.allclose(logits[0, :10], torch.tensor(FIRST_LOGITS), atol=1e-3)


def test_0_6b_base_continues_as_published():
    model, tokenizer = downloaded("Qwen3-0.6B-Base", "float32")
    prompt = tokenizer.encode("My favourite condiment is ")
    assert prompt == [5050, 18696, 9756, 3819, 374, 220]
    assert list(generate(model, prompt, max_new_tokens=20)) == CONDIMENT


def test_0_6b_base_continues_a_long_prompt_as_published():
    model, _ = downloaded("Qwen3-0.6B-Base", "float32")
    assert list(generate(model, [1] + [306, 338] * 2048, max_new_tokens=4))[-2:] == [198, 198]


def test_0_6b_continues_as_published():
    model, tokenizer = downloaded("Qwen3-0.6B", "float32")
    assert list(generate(model, tokenizer.encode("LifeAI is"), max_new_tokens=4)) == [264, 5339, 429, 5707]


def test_0_6b_answers_as_published():
    model, tokenizer = downloaded("Qwen3-0.6B", "float32")
    prompt = tokenizer.chat([{"role": "user", "content": "Reply with one short word: hello."}], thinking=False)
    assert list(generate(model, prompt, max_new_tokens=2)) == [14990, 151645]
