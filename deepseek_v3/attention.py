"""3b. Attention: the rule of who sees whom, the definition, and the fast way to the same.

As in Qwen3, but that values may be narrower than keys. What makes queries, keys and values is new, and in mla.py; the
alphabet of dimensions is in layers.py.

Paper: Vaswani et al. 2017 (arXiv:1706.03762, eq. 1).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    (B, H, T, N), (K, S), M = q.shape, k.shape[1:3], v.shape[-1]
    v = F.pad(v, (0, max(0, N - M)))  # the kernels want values as wide as keys; zeros behind them change nothing
    if T == 1:  # the queries of one key head as rows of one product, so that its keys and values are read once
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, N), k, v, mask, scale=scale).reshape(B, H, 1, -1)[..., :M]
    # A whole prompt at once: the kernel that knows the triangle skips the half that a mask would only hide.
    causal = mask is not None and mask.ndim == 2 and T == S
    mask = None if causal else mask
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)[..., :M]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The fast way where it can be trusted: Apple's has leaked future tokens and returned NaN, by version of PyTorch."""
    return (attention_written_out if q.device.type == "mps" else attention_fused)(q, k, v, mask, scale)
