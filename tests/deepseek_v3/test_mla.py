"""Latent attention: two forms, one cache; pairs of neighbours; YaRN where DeepSeek puts it."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepseek_v3 import mla
from deepseek_v3.config import Config, Yarn
from deepseek_v3.engine import parts
from deepseek_v3.engine.fast import fused_sdpa
from deepseek_v3.engine.parts import FusedAttention
from deepseek_v3.engine.sizes import cache_bytes_per_token
from deepseek_v3.generate import new_cache
from deepseek_v3.layers import KVCache, RotaryEmbedding, attention_mask, deinterleave, inverse_frequencies, rotate
from deepseek_v3.mla import Attention, softmax_scale
from deepseek_v3.weights import load_model
from tests.cases import loaded
from tests.packages import force_form
from tests.seeded import DEEPSEEK_V3_CASES, LONG_PROMPT, deepseek_v3_config, write_case

HERE = Path(__file__).parent
PUBLISHED = json.loads((HERE / "published_configs.json").read_text())


def config_of(tmp_path, values: dict) -> Config:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return Config.from_checkpoint(tmp_path)


def by_loops(attention: Attention, x: torch.Tensor, positions: list[int], theta: float) -> torch.Tensor:
    """The paper's equations, token by token and head by head; no YaRN, no query compression. x (T, D)."""
    N, P = attention.qk_nope_head_dim, attention.qk_rope_head_dim
    M, R = attention.v_head_dim, attention.kv_lora_rank
    out = torch.zeros(len(x), attention.o_proj.weight.shape[1])

    def turned(v, position):
        v = v.clone()
        for j in range(P // 2):
            angle = position * theta ** (-2 * j / P)
            a, b, c, s = v[2 * j].clone(), v[2 * j + 1].clone(), math.cos(angle), math.sin(angle)
            v[2 * j], v[2 * j + 1] = a * c - b * s, b * c + a * s
        return v

    def normed(v, w):
        return w * v / (v.square().mean() + 1e-6).sqrt()

    latent, k_rope = [], []
    for t, row in enumerate(x):
        down = attention.kv_a_proj_with_mqa.weight @ row
        latent.append(normed(down[:R], attention.kv_a_layernorm.weight))
        k_rope.append(turned(down[R:], positions[t]))
    up = attention.kv_b_proj.weight.view(-1, N + M, R)
    for t, row in enumerate(x):
        q = (attention.q_proj.weight @ row).view(-1, N + P)
        for h in range(len(q)):
            q_rope = turned(q[h, N:], positions[t])
            scores = torch.stack([(q[h, :N] @ (up[h, :N] @ latent[s]) + q_rope @ k_rope[s]) / math.sqrt(N + P)
                                  for s in range(t + 1)])
            values = torch.stack([up[h, N:] @ latent[s] for s in range(t + 1)])
            out[t, h * M:(h + 1) * M] = scores.softmax(0) @ values
    return out @ attention.o_proj.weight.T


@pytest.mark.parametrize("part", [Attention, FusedAttention])
@pytest.mark.parametrize("absorb", [False, True])
def test_each_form_is_the_papers_equations(tmp_path, part, absorb):
    torch.manual_seed(0)
    config = config_of(tmp_path, deepseek_v3_config(q_lora_rank=None, rope_scaling=None))
    attention, x = part(config, 0), torch.randn(1, 7, 40)
    for weight in attention.parameters():
        weight.data = torch.randn(weight.shape) * (0.3 if weight.ndim == 2 else 1)
    force_form(attention, absorb)
    cos, sin = RotaryEmbedding(config)(torch.arange(7)[None], torch.float32)
    with torch.no_grad():
        out = attention(x, cos, sin, attention_mask(0, 7, None, torch.device("cpu")), None)[0]
        expected = by_loops(attention, x[0], list(range(7)), 10000.0)
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("name", DEEPSEEK_V3_CASES)
def test_absorbed_and_expanded_give_the_same_in_the_lesson_and_in_the_engine(name):
    """One layer at a time, since a rounding may send a token to another expert further up."""
    for dtype, tolerance in ("float32", 1e-5), ("bfloat16", 0.1):
        fast, plain = (loaded("deepseek_v3", name, dtype, engine) for engine in (True, False))
        x = fast.model.embed_tokens(torch.tensor([LONG_PROMPT, LONG_PROMPT[::-1]]))
        cos, sin = fast.model.rotary_emb(torch.arange(100)[None], x.dtype)
        mask = attention_mask(0, 100, None, x.device)
        for layer, rows in itertools.product(range(len(fast.model.layers)), (x, x[:1])):  # a batch and one sequence
            forms = []
            for model, absorb in itertools.product((fast, plain), (False, True)):
                part = model.model.layers[layer]
                force_form(part.self_attn, absorb)
                with torch.inference_mode():
                    forms.append(part.self_attn(part.input_layernorm(rows), cos, sin, mask, None).float())
                force_form(part.self_attn, None)
            assert type(plain.model.layers[layer].self_attn) is Attention
            assert max((out - forms[0]).abs().max() for out in forms) <= tolerance * forms[0].abs().max()


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("name", ["yarn", "moonlight", "wide_values"])
def test_a_cache_gives_what_a_whole_forward_gives(tmp_path, name, engine):
    model = load_model(write_case(tmp_path, "deepseek_v3", name), engine=engine)
    with torch.inference_mode():
        whole = model(torch.tensor([LONG_PROMPT[:40]]))[0]
        alone = model(torch.tensor([LONG_PROMPT[:35]]))[0]
    for absorb, padding in itertools.product((False, True, None), (None, [0, 5], [5])):
        ids = torch.tensor([[0] * n + LONG_PROMPT[:40 - n] for n in padding or [0]])
        for layer in model.model.layers:
            force_form(layer.self_attn, absorb)
        for cuts in ([7, 8, 9, 30], [1, 2, 3], [39]):
            cache = new_cache(model, 40, padding)
            with torch.inference_mode():
                parts = torch.cat([model(ids[:, a:b], cache) for a, b in itertools.pairwise([0, *cuts, 40])], 1)
            for part, n in zip(parts, padding or [0]):
                assert torch.allclose(part[n:], alone if n else whole, atol=1e-4), (absorb, padding, cuts)


def test_the_cache_holds_one_latent_and_one_rotated_key(tmp_path):
    config = config_of(tmp_path, PUBLISHED["DeepSeek-V3"]["config"])
    assert cache_bytes_per_token(config, torch.bfloat16) == 61 * 576 * 2
    expanded = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    assert expanded == 40960 and expanded // 576 == 71
    small = config_of(tmp_path, deepseek_v3_config())
    cache = KVCache([Attention(small, layer) for layer in range(3)], 7, torch.float32)
    (latents,) = cache.tensors
    assert latents.shape == (3, 1, 1, 7, 28) and latents.nbytes == 7 * cache_bytes_per_token(small, torch.float32)
    with pytest.raises(ValueError, match="the cache holds 7 tokens, 8 are needed"):
        cache.write(0, torch.zeros(1, 1, 8, 28))


def test_a_view_of_the_cache_is_handed_out_and_room_is_made(tmp_path):
    config = config_of(tmp_path, deepseek_v3_config())
    cache = KVCache([Attention(config, layer) for layer in range(3)], 4, torch.float32)
    (first,) = cache.write(1, torch.ones(1, 1, 3, 28))
    assert first.shape == (1, 1, 3, 28)
    assert first.untyped_storage().data_ptr() == cache.tensors[0].untyped_storage().data_ptr()
    cache.length = 3
    cache.reserve(9)
    assert cache.capacity == 9 and torch.equal(cache.tensors[0][1, 0, 0, :3], torch.ones(3, 28))
    with pytest.raises(ValueError, match="cannot cut a cache of 3 tokens to 4"):
        cache.truncate(4)


def operations(T: int, S: int, N: int, P: int, M: int, R: int) -> tuple[int, int]:
    return S * R * (N + M) + T * S * (N + P + M), T * R * (N + M) + T * S * (R + P + R)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Moonlight-16B-A3B-Instruct"])
def test_the_form_with_fewer_operations_is_taken(tmp_path, name):
    attention = Attention.__new__(Attention)
    attention.qk_nope_head_dim, attention.qk_rope_head_dim = 128, 64
    attention.v_head_dim, attention.kv_lora_rank = 128, 512
    for T, S in itertools.product((1, 2, 16, 100, 170, 171, 512, 4096), repeat=2):
        if T <= S:
            expanded, absorbed = operations(T, S, 128, 64, 128, 512)
            assert attention.absorbs(T, S) == (absorbed < expanded), (T, S)
    assert attention.absorbs(1, 2) and not attention.absorbs(1, 1) and not attention.absorbs(4096, 4096)


def test_decoding_never_rebuilds_keys_and_values(tmp_path, monkeypatch):
    model = load_model(write_case(tmp_path, "deepseek_v3", "yarn"))
    cache = new_cache(model, 30)
    with torch.inference_mode():
        model(torch.tensor([LONG_PROMPT[:20]]), cache)
        monkeypatch.setattr(Attention, "expanded", None)
        model(torch.tensor([[3]]), cache)


# Rotary pairs

def test_neighbours_turned_as_pairs_are_half_split_pairs_in_another_order():
    """(x0, x1) turned by a, (x2, x3) by b, as the paper has it, and by reordering and Qwen3's `rotate`."""
    x, a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.3, 1.1
    turned = [x[0] * math.cos(a) - x[1] * math.sin(a), x[1] * math.cos(a) + x[0] * math.sin(a),
              x[2] * math.cos(b) - x[3] * math.sin(b), x[3] * math.cos(b) + x[2] * math.sin(b)]
    angle = torch.tensor([a, b])
    assert deinterleave(x).tolist() == [1, 3, 2, 4]
    cos, sin, turned = angle.cos(), angle.sin(), torch.stack(turned)
    assert torch.allclose(rotate(deinterleave(x), cos, sin), deinterleave(turned))
    assert not torch.allclose(rotate(x, cos, sin), turned)


def test_dot_products_of_queries_and_keys_do_not_depend_on_the_order():
    q, k = torch.randn(8), torch.randn(8)
    assert torch.allclose(q @ k, deinterleave(q) @ deinterleave(k), atol=1e-6)


# YaRN

def test_the_published_frequencies(tmp_path):
    """facts: V3 keeps pairs 0-10 and slows 23-31 by 40; Kimi-K2's ramp is one step."""
    config = config_of(tmp_path, PUBLISHED["DeepSeek-V3"]["config"])
    frequency, factor = inverse_frequencies(config)
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    kept, blended, slowed = plain[:11], plain[11:23], plain[23:]
    assert factor == 1.0 and torch.allclose(frequency[:11], kept) and torch.allclose(frequency[23:], slowed / 40)
    assert (frequency[11:23] < blended * 0.999).all() and (frequency[11:23] > blended / 40 * 1.001).all()
    kimi, _ = inverse_frequencies(config_of(tmp_path, PUBLISHED["Kimi-K2-Instruct"]["config"]))
    plain = 50000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(kimi[:20], plain[:20]) and torch.allclose(kimi[20:], plain[20:] / 32)


@pytest.mark.parametrize("name, scale", [("DeepSeek-V3", 0.1352337788608801), ("Kimi-K2-Instruct", 0.1308608),
                                         ("Moonlight-16B-A3B-Instruct", 192**-0.5)])
def test_the_softmax_scale_of_the_published_models(tmp_path, name, scale):
    assert softmax_scale(config_of(tmp_path, PUBLISHED[name]["config"])) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("mscale, all_dim, on_scores", [
    (1.0, 1.0, 1.0), (0.6, 1.3, 1.3), (None, 0.7, 0.7), (0.7, None, None), (None, None, None)])
def test_mscale_is_on_cos_and_sin_as_a_ratio_and_in_the_scale_squared(tmp_path, mscale, all_dim, on_scores):
    def m(times: float) -> float:
        return 0.1 * times * math.log(40) + 1

    given = {"mscale": mscale, "mscale_all_dim": all_dim}
    given = {name: value for name, value in given.items() if value is not None}
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096} | given
    config = config_of(tmp_path, deepseek_v3_config(rope_scaling=yarn))
    expected = m(mscale) / m(all_dim) if mscale and all_dim else m(1)
    assert inverse_frequencies(config)[1] == pytest.approx(expected)
    assert softmax_scale(config) == pytest.approx(20**-0.5 * (m(on_scores) ** 2 if on_scores else 1))
    assert isinstance(config.rope_scaling, Yarn)


def test_cos_and_sin_over_the_whole_range_of_positions_are_those_of_transformers(tmp_path):
    reference = json.loads((HERE / "reference/small.json").read_text())["rotary"]
    config = config_of(tmp_path, PUBLISHED["DeepSeek-V3"]["config"])
    rotary = RotaryEmbedding(config)
    positions = torch.tensor([reference["positions"]])
    cos, sin = rotary(positions, torch.float32)
    # An angle of 163,839 is known to 0.01 in float32: the frequencies must agree to the last bit.
    assert max(reference["positions"]) == 163839
    assert torch.allclose(cos[0, 0], torch.tensor(reference["cos"]), atol=1e-6)
    assert torch.allclose(sin[0, 0], torch.tensor(reference["sin"]), atol=1e-6)


def test_norms_on_latents_have_their_own_epsilon(tmp_path):
    config = config_of(tmp_path, deepseek_v3_config(rms_norm_eps=1e-2))
    attention = Attention(config, 0)
    assert attention.kv_a_layernorm.eps == attention.q_a_layernorm.eps == mla.LATENT_EPS == 1e-6


@pytest.mark.parametrize("M", [5, 12, 20])
@pytest.mark.parametrize("first, T", [(0, 150), (140, 1), (0, 1)])
def test_values_may_be_narrower_or_wider_than_keys(M, first, T):
    generator, shapes = torch.Generator().manual_seed(0), ((T, 12), (first + T, 12), (first + T, M))
    q, k, v = (torch.randn(2, 3, *shape, generator=generator) for shape in shapes)
    mask = attention_mask(first, T, None, q.device)
    assert torch.allclose(fused_sdpa(q, k, v, mask, 0.3), sdpa(q, k, v, mask, 0.3), atol=1e-5)


def sdpa(q, k, v, mask, scale) -> torch.Tensor:
    """The reference implementation, which is a method and wants nothing of its object except the scale."""
    return Attention.sdpa(SimpleNamespace(scale=scale), q, k, v, mask)


def fused_attention(scale: float) -> FusedAttention:
    """One without weights."""
    part = FusedAttention.__new__(FusedAttention)
    torch.nn.Module.__init__(part)
    part.scale = scale
    return part


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("B, T, padding", [(1, 1, None), (1, 5, None), (1, 1, [3]), (1, 5, [3]),
                                           (2, 1, None), (2, 1, [0, 3]), (2, 5, [0, 3])])
def test_attention_on_latents_is_the_reference_implementation(B, T, padding, dtype, tolerance):
    """One key head for all queries, and the values are the front of the keys, where they lie in the cache."""
    generator = torch.Generator().manual_seed(0)
    q, latents = (torch.randn(B, *shape, generator=generator).to(dtype) for shape in ((3, T, 20), (1, 11, 20)))
    mask = attention_mask(11 - T, T, None if padding is None else torch.tensor(padding)[:, None], q.device)
    expected = sdpa(q, latents, latents[..., :14], mask, 0.3).float()
    out = fused_attention(0.3).sdpa(q, latents, latents[..., :14], mask)
    assert out.shape == (B, 3, T, 14)
    assert (out.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("device, form", [("mps", "reference"), ("cpu", "fused"), ("cuda", "fused")])
def test_which_form_is_used_where(monkeypatch, device, form):
    monkeypatch.setattr(parts, "fused_sdpa", lambda *_: "fused")
    monkeypatch.setattr(Attention, "sdpa", lambda *_: "reference")
    q = type("OnAnotherDevice", (), {"device": torch.device(device), "shape": (2, 3, 1, 4), "__len__": lambda _: 2})()
    assert fused_attention(0.3).sdpa(q, torch.zeros(2, 3, 5, 4), None, None) == form
