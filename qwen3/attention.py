"""3b. Attention: the rule of who sees whom, the definition, the fast way to the same, and the layer around them.

    x ─┬─ q_proj ─ norm ─ RoPE ──> q (B, H, T, N) ───────────────┐
       ├─ k_proj ─ norm ─ RoPE ──> k (B, K, T, N) ─┐             ├─ softmax(q k^T · scale) v ── o_proj
       └─ v_proj ────────────────> v (B, K, T, N) ─┴─ KV cache ──┘
                                                      (B, K, S, N)

What is particular to Qwen3: the norm on every query and key head before the rotation (QK-Norm). The alphabet of
dimensions is in layers.py.

Papers: GQA (arXiv:2305.13245), QK-Norm (arXiv:2302.05442), Qwen3 (arXiv:2505.09388).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .layers import KVCache, Linear, RMSNorm, rotate


def attention_mask(first: int, T: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each of T queries sees, True where it does: (T, S), or (B, 1, T, S) with padding.

    The one rule: the query in slot p sees the keys in slots <= p that are not padding. None stands for
    "all of them", which is so for a single query without padding.
    """
    if T == 1 and padding is None:
        return None
    query, key = torch.arange(first, first + T, device=device)[:, None], torch.arange(first + T, device=device)
    mask = key <= query  # (T, S)
    if padding is not None:
        # A query that is itself padding sees itself: a softmax over nothing is NaN, and NaN spreads.
        mask = mask & (key >= padding[:, :, None]) | (key == query)  # (B, T, S)
        mask = mask[:, None]
    return mask


def attention_written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale) v; q (B, H, T, N), k and v (B, K, S, N) -> (B, H, T, N). The definition.

    Grouped queries (arXiv:2305.13245, section 2.2): query head h reads key/value head h // G.

        H = 6, K = 2:    q0 q1 q2   q3 q4 q5
                          └──┼──┘    └──┼──┘
                            k0         k1
    """
    B, H, T, N = q.shape
    q = q.view(B, k.shape[1], H // k.shape[1], T, N)  # (B, K, G, T, N)
    scores = torch.einsum("bkgtn,bksn->bkgts", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~(mask if mask.ndim == 2 else mask[:, None]), -torch.inf)
    weights = scores.float().softmax(-1).to(q.dtype)
    return torch.einsum("bkgts,bksn->bkgtn", weights, v).flatten(1, 2)  # (B, H, T, N)


def attention_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same by PyTorch's fused kernel: no (T, S) scores in memory, K and V never repeated."""
    (B, H, T, N), (K, S) = q.shape, k.shape[1:3]
    if T == 1:  # the queries of one key head as rows of one product, so that its keys and values are read once
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, N), k, v, mask, scale=scale).reshape(B, H, 1, -1)
    # A whole prompt at once: the kernel that knows the triangle skips the half that a mask would only hide.
    causal = mask is not None and mask.ndim == 2 and T == S
    mask = None if causal else mask
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The fast way where it can be trusted: Apple's has leaked future tokens and returned NaN, by version of PyTorch."""
    return (attention_written_out if q.device.type == "mps" else attention_fused)(q, k, v, mask, scale)


class Attention(nn.Module):
    """Grouped-query attention with QK-Norm and RoPE (Qwen3, arXiv:2505.09388, section 2). (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, N = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, N
        self.q_proj = Linear(D, config.num_attention_heads * N)
        self.k_proj = Linear(D, config.num_key_value_heads * N)
        self.v_proj = Linear(D, config.num_key_value_heads * N)
        self.o_proj = Linear(config.num_attention_heads * N, D)
        self.q_norm = RMSNorm(N, config.rms_norm_eps)  # one weight for all heads
        self.k_norm = RMSNorm(N, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, N)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, N)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, N)
        # The norm before the rotation: it keeps q·k from growing, and a rotation keeps its length.
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)  # (B, H, T, N)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)  # (B, K, T, N)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)  # (B, K, S, N)
        out = attend(q, k, v, mask, self.head_dim ** -0.5)  # (B, H, T, N)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)
