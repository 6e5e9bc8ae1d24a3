"""The building blocks against their definitions; and the engine's matmuls, which are one file in all packages."""

import itertools
import math

import pytest
import torch

from qwen3.config import Config, Yarn
from qwen3.engine import fast
from qwen3.engine.fast import matmul
from qwen3.engine.quantized import dequantize
from qwen3.engine.sizes import cache_bytes_per_token
from qwen3.layers import Attention, KVCache, RMSNorm, RotaryEmbedding, inverse_frequencies, rotate

CONFIG = Config(vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4)
LAYERS = [Attention(CONFIG, layer) for layer in range(2)]


def config(**changes) -> Config:
    return Config(**{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | changes)


def test_rmsnorm_by_hand():
    norm = RMSNorm(4, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0, 1.0, 1.0])
    # mean of squares (1 + 1 + 25 + 9) / 4 = 9, root 3
    assert torch.allclose(norm(torch.tensor([1.0, -1.0, 5.0, 3.0])), torch.tensor([1 / 3, -2 / 3, 5 / 3, 1.0]))


def test_rmsnorm_squares_in_float32():
    norm = RMSNorm(4, eps=1e-6).half()
    assert torch.equal(norm(torch.full((4,), 1000.0).half()), torch.ones(4).half())  # 1000^2 is no float16


def test_rmsnorm_rounds_before_the_weight():
    norm = RMSNorm(64, eps=1e-6).bfloat16()
    norm.weight.data = torch.linspace(0.5, 2, 64).bfloat16()
    x = torch.linspace(-3, 3, 64).bfloat16()
    normed = (x.float() * (x.float().square().mean() + 1e-6).rsqrt()).bfloat16()
    late = (normed.float() * norm.weight.float()).bfloat16()
    never = (x.float() * (x.float().square().mean() + 1e-6).rsqrt() * norm.weight.float()).bfloat16()
    assert torch.equal(norm(x), late) and not torch.equal(late, never)


@pytest.mark.parametrize("position", [0, 1, 63, 5000, 40959])
def test_rope_has_the_angles_of_the_paper(position):
    cos, sin = RotaryEmbedding(config(rope_theta=1e6))(torch.tensor([[position]]), torch.float32)
    for j in range(4):
        angle = position * 1e6 ** (-2 * j / 8)
        # float32 holds an angle of 40959 to within 0.002
        assert float(cos[0, 0, 0, j]) == pytest.approx(math.cos(angle), abs=1e-6 + angle * 1e-7)
        assert float(sin[0, 0, 0, j]) == pytest.approx(math.sin(angle), abs=1e-6 + angle * 1e-7)


def test_angles_of_rope_are_never_rounded():
    """Their cosines are. As a bfloat16, position 30,001 would be 29,952."""
    rope = RotaryEmbedding(CONFIG)
    cos, _ = rope(torch.tensor([[30_001]]), torch.bfloat16)
    assert rope.inv_freq.dtype == torch.float32 and cos.dtype == torch.bfloat16
    assert torch.equal(cos[0, 0, 0], torch.cos(30_001 * inverse_frequencies(CONFIG)[0]).bfloat16())


def test_rotation_turns_value_j_with_value_j_plus_half():
    x = torch.tensor([1.0, 10.0, 2.0, 20.0]).view(1, 1, 1, 4)  # pairs (1, 2) and (10, 20)
    cos, sin = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])  # a quarter turn, and none
    assert torch.equal(rotate(x, cos, sin).flatten(), torch.tensor([-2.0, 10.0, 1.0, 20.0]))


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.double), torch.randn(1, 1, 1, 8, dtype=torch.double)
    rope = RotaryEmbedding(CONFIG)

    def score(m: int, n: int) -> float:
        def at(position: int) -> tuple[torch.Tensor, torch.Tensor]:
            return rope(torch.tensor([[position]]), torch.double)

        return float((rotate(q, *at(m)) * rotate(k, *at(n))).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_yarn_keeps_fast_pairs_and_slows_slow_ones_by_the_factor():
    plain, one = inverse_frequencies(config(head_dim=128, rope_theta=1e6))
    slowed, scale = inverse_frequencies(config(head_dim=128, rope_theta=1e6, rope_scaling=Yarn(4.0, 32768)))
    assert one == 1 and scale == pytest.approx(0.1 * math.log(4) + 1)
    assert torch.allclose(slowed[:20], plain[:20]) and torch.allclose(slowed[-20:], plain[-20:] / 4)
    ratio = slowed / plain
    assert (ratio.diff() <= 1e-6).all()


def test_the_cache_hands_out_views_and_is_cut_back():
    cache = KVCache(LAYERS, 8, torch.float32)
    new = torch.randn(1, 2, 3, 8)
    keys, values = cache.write(1, new, new + 1)
    assert keys.data_ptr() == cache.tensors[0][1].data_ptr()
    assert torch.equal(keys, new) and torch.equal(values, new + 1)
    assert cache.length == 0  # the model moves on when all layers have written
    cache.length = 3
    cache.truncate(2)
    keys, _ = cache.write(1, new[:, :, :1] * 5, new[:, :, :1])
    assert torch.equal(keys, torch.cat([new[:, :, :2], new[:, :, :1] * 5], 2))
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="cannot cut a cache of 2 tokens"):
            cache.truncate(wrong)


def test_the_cache_grows_and_refuses_to_overflow():
    cache = KVCache(LAYERS, 2, torch.float32)
    new = torch.randn(1, 2, 2, 8)
    cache.write(0, new, new)
    cache.length = 2
    with pytest.raises(ValueError, match="the cache holds 2 tokens, 3 are needed"):
        cache.write(0, new[:, :, :1], new[:, :, :1])
    cache.reserve(5)
    assert cache.capacity == 5 and torch.equal(cache.tensors[0][0, :, :, :2], new)
    cache.reserve(3)
    assert cache.capacity == 5


def test_the_cache_has_the_size_of_the_formula():
    keys, values = KVCache(LAYERS, 10, torch.bfloat16).tensors
    assert keys.nbytes + values.nbytes == 2 * 2 * 2 * 8 * 2 * 10  # 2 · layers · K · N · bytes · tokens
    assert cache_bytes_per_token(CONFIG, torch.bfloat16) == 2 * 2 * 2 * 8 * 2


def test_dequantisation_multiplies_each_block_by_its_scale():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 300, generator=generator).to(torch.float8_e4m3fn)  # ragged: neither side is whole blocks
    scale = torch.rand(2, 3, generator=generator)
    got = dequantize(weight, scale, torch.float32)
    for row, column in [(0, 0), (127, 127), (128, 127), (127, 128), (199, 299), (199, 255), (130, 256)]:
        assert float(got[row, column]) == float(weight[row, column].float() * scale[row // 128, column // 128])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (), (3,), (2, 1)])
def test_a_matmul_of_one_row_is_the_matmul(dtype, tolerance, rows):
    x = torch.randn(*rows, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    W = torch.randn(70, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = (x.double() @ W.double().T)
    assert matmul(x, W).shape == expected.shape and matmul(x, W).dtype == dtype
    assert (matmul(x, W) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("heads, rows", [((), (2, 20)), ((), (15,)), ((3,), (3, 16))])
def test_a_matmul_of_many_rows_is_the_matmul(monkeypatch, dtype, digits, slow, heads, rows):
    """Whatever this processor is; with an `out` of more than one piece, and the last piece cut short."""
    monkeypatch.setattr(fast, "SLOW_IN_16_BITS", slow)
    x = torch.randn(*rows, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    W = torch.randn(*heads, 1100, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ W.double().mT
    assert matmul(x, W).shape == expected.shape and matmul(x, W).dtype == dtype
    # One rounding, and the sums' own: float32 ones of 300 numbers of about 1.
    assert ((matmul(x, W) - expected).abs() <= expected.abs() / 2 ** digits + 1e-4).all()


def test_matmuls_in_float32_are_for_many_rows_of_16_bits(monkeypatch):
    called = []
    monkeypatch.setattr(fast, "matmul_in_float32", lambda x, W: called.append(x.shape) or x @ W.mT)
    for slow in (True, False):
        monkeypatch.setattr(fast, "SLOW_IN_16_BITS", slow)
        for rows, dtype in itertools.product((1, 15, 16), (torch.float32, torch.bfloat16)):
            matmul(torch.ones(rows, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype))
        matmul(torch.ones(3, 15, 8).half(), torch.ones(3, 4, 8).half())  # 15 rows for each matrix
    assert called == [(16, 8)]
