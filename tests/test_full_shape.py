"""Full published shapes with seeded weights, against transformers. Slow."""

import json
from pathlib import Path

import pytest
import torch

from tests.packages import PACKAGES, force_form, module
from tests.seeded import FAR, FULL, write_checkpoint

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=PACKAGES)
def full_shape(request, tmp_path_factory) -> tuple[str, Path]:
    """Qwen3-0.6B whole; a pair of layers of Qwen3-30B-A3B; a dense and a sparse layer of DeepSeek-V3's width."""
    folder = tmp_path_factory.mktemp("full")
    yield request.param, write_checkpoint(folder, FULL[request.param][0], torch.bfloat16, std=0.04)
    (folder / "model.safetensors").unlink()  # gigabytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_shapes_give_the_tokens_and_logits_of_transformers(full_shape, dtype):
    package, folder = full_shape
    reference = json.loads((HERE / package / "reference/full.json").read_text())[dtype]
    model, prompt = module(package, "weights").load_model(folder, dtype=dtype), reference["prompt"]
    tokens = list(module(package, "generate").generate(model, prompt, max_new_tokens=len(reference["tokens"])))
    assert tokens == reference["tokens"] and len(tokens) >= {"float32": 6, "bfloat16": 1}[dtype]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]), last_only=True)[0, 0].float()
    expected = torch.tensor(reference["logits"])
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]  # sums of thousands in another order
    assert torch.allclose(logits[reference["best"]], expected, rtol=0, atol=float(tolerance * expected.abs().max()))


def test_latent_attention_at_positions_beyond_the_original_context(full_shape):
    """Every position of the prompt, expanded and absorbed, whole and from the cache; 163,839 is the last there is."""
    package, folder = full_shape
    if package != "deepseek_v3":
        pytest.skip("only deepseek_v3 has latents")
    reference = json.loads((HERE / package / "reference/full.json").read_text())["far"]
    model = module(package, "weights").load_model(folder, dtype="float32")
    ids, expected = torch.tensor([reference["prompt"]]), torch.tensor(reference["logits"])
    rotary, far = model.model.rotary_emb, torch.tensor(FAR)
    model.model.rotary_emb = lambda positions, dtype: rotary(far[positions], dtype)
    for absorb in (False, True):
        for layer in model.model.layers:
            force_form(layer.self_attn, absorb)
        cache = module(package, "generate").new_cache(model, len(FAR))
        with torch.inference_mode():
            whole = model(ids)[0]
            parts = torch.cat([model(ids[:, :7], cache), model(ids[:, 7:8], cache), model(ids[:, 8:], cache)], 1)[0]
        for logits in (whole, parts):
            assert (logits[:, ::64] - expected).abs().max() <= 1e-4 * expected.abs().max()
