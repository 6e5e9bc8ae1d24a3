"""Attention: the mask's rule, the reference implementation, and the fused one."""

import copy
import math

import pytest
import torch

from qwen3.config import Config
from qwen3.engine import parts
from qwen3.engine.parts import FusedAttention
from qwen3.layers import Attention, attention_mask
from qwen3.model import Model
from tests.packages import with_engine

CONFIG = Config(vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4)


@pytest.mark.parametrize("first, T, padding", [(0, 1, None), (0, 5, None), (3, 4, None), (6, 1, None),
                                               (0, 5, [0, 2, 4]), (4, 3, [0, 1, 3]), (5, 1, [0, 5, 2])])
def test_the_mask_is_the_rule(first, T, padding):
    mask = attention_mask(first, T, torch.tensor(padding)[:, None] if padding else None, torch.device("cpu"))
    for row, pad in enumerate(padding or [0]):
        for t in range(T):
            for slot in range(first + T):
                p = first + t
                sees = slot <= p and slot >= pad or (slot == p and p < pad)
                got = bool(mask[t, slot] if mask.ndim == 2 else mask[row, 0, t, slot])
                assert got == sees, (row, p, slot)


def attention_by_loops(q, k, v, mask):
    """Every head, query and key one by one."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            group = h // (q.shape[1] // k.shape[1])
            for t in range(q.shape[2]):
                seen = [s for s in range(k.shape[2]) if (mask[t, s] if mask.ndim == 2 else mask[b, 0, t, s])]
                scores = [float(q[b, h, t] @ k[b, group, s]) / math.sqrt(q.shape[3]) for s in seen]
                total = sum(math.exp(score - max(scores)) for score in scores)
                for s, score in zip(seen, scores):
                    out[b, h, t] += math.exp(score - max(scores)) / total * v[b, group, s]
    return out


@pytest.mark.parametrize("first, T, padding", [
    (0, 6, None), (4, 3, None), (5, 1, None), (0, 5, [0, 3]), (4, 1, [0, 2])])
def test_every_form_of_attention_is_the_definition(first, T, padding):
    q, k, v, mask = queries_keys_values(first, T, padding)
    slow = attention_by_loops(q, k, v, mask)
    for form in (Attention, FusedAttention):
        assert torch.allclose(form(CONFIG, 0).sdpa(q, k, v, mask), slow, atol=1e-5), form.__name__


def queries_keys_values(first, T, padding):
    generator = torch.Generator().manual_seed(1)
    B, S = len(padding or [0]), first + T
    q = torch.randn(B, 6, T, 8, generator=generator)
    k, v = (torch.randn(B, 2, S, 8, generator=generator) for _ in "kv")
    return q, k, v, attention_mask(first, T, torch.tensor(padding)[:, None] if padding else None, torch.device("cpu"))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_model_with_reference_attention_gives_the_same_logits(dtype, tolerance):
    torch.manual_seed(0)
    model, ids = Model(CONFIG).to(dtype), torch.randint(50, (2, 20))
    fast = with_engine("qwen3", copy.deepcopy(model))(ids).float()
    assert (model(ids).float() - fast).abs().max() <= tolerance * fast.abs().max()


@pytest.mark.parametrize("T", [1, 3])
def test_keys_and_values_are_never_repeated(monkeypatch, T):
    for form, owner, name in ((Model(CONFIG), Attention, "sdpa"),
                              (with_engine("qwen3", Model(CONFIG)), parts, "fused_sdpa")):
        shapes, sdpa = [], getattr(owner, name)

        def spy(*arguments, sdpa=sdpa):
            shapes.append([tensor.shape[1] for tensor in arguments if isinstance(tensor, torch.Tensor)][:3])
            return sdpa(*arguments)

        monkeypatch.setattr(owner, name, spy)
        form(torch.tensor([[1, 2, 3][:T]]))
        assert shapes == [[6, 2, 2]] * 2


@pytest.mark.parametrize("device, form", [("mps", "reference"), ("cpu", "fused"), ("cuda", "fused")])
def test_which_form_is_used_where(monkeypatch, device, form):
    monkeypatch.setattr(Attention, "sdpa", lambda *_: "reference")
    monkeypatch.setattr(parts, "fused_sdpa", lambda *_: "fused")
    q = type("OnAnotherDevice", (), {"device": torch.device(device)})()
    assert FusedAttention(CONFIG, 0).sdpa(q, None, None, None) == form
