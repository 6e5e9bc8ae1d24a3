"""The building blocks of a layer: RMSNorm, RotaryEmbedding, Attention and its KVCache, MLP.

One alphabet of dimensions, for every shape note and einsum:

    B batch      T new tokens     S all tokens so far, cached and new     D hidden size     V vocabulary
    H query heads     K key/value heads     G = H/K queries that share a key     N head size     F feed-forward size

Papers: RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864), GQA (arXiv:2305.13245), QK-Norm (arXiv:2302.05442),
SwiGLU (arXiv:2002.05202), Qwen3 (arXiv:2505.09388).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .engine.yarn import yarn


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps) over the last axis (arXiv:1910.07467, eq. 4). Shape unchanged."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In float32, since squares overflow float16 and sums lose bits in bfloat16; back to the type of x
        # before the weight, since the checkpoints were trained with that rounding.
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def new_weight(*shape: int) -> nn.Parameter:
    """N(0, 0.02). Skipped on the meta device, where normal_() imports PyTorch's compiler (1 s)."""
    weight = torch.empty(shape)
    return nn.Parameter(weight if weight.is_meta else weight.normal_(std=0.02))


class Linear(nn.Module):
    """y = x W^T with W (out, in), no bias: (…, in) -> (…, out)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = new_weight(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) itself, for parts that need more than x W^T. A layer that stores fewer bits computes it."""
        return self.weight


def inverse_frequencies(config: Config) -> tuple[Tensor, float]:
    """How fast each pair turns: theta^(-2j/N) radians a token, (N/2,) float32; and a factor on cos and sin, here 1.

    "Inverse" is the field's word: these are frequencies, 1 / (tokens per radian).
    """
    N = config.head_dim
    # On the CPU even if the model is built on the meta device: these numbers stand in no checkpoint.
    period = config.rope_theta ** (torch.arange(0, N, 2, dtype=torch.float32, device="cpu") / N)  # tokens per radian
    if config.rope_scaling:  # stretched to longer contexts; Qwen's own checkpoints do not ask for it
        return yarn(period, config.rope_theta, config.rope_scaling)
    return 1 / period, 1.0


class RotaryEmbedding:
    """RoPE's cosines and sines by position (arXiv:2104.09864, section 3.2.2).

    Pair j of a head of N values turns by the angle position * theta^(-2j/N). Qwen3 pairs value j with value
    j + N/2 ("half-split"); the paper and DeepSeek pair neighbours ("interleaved"):

        half-split   0 1 2 3 | 4 5 6 7        interleaved   0 1  2 3  4 5  6 7
                     └───────┘ (0,4)                        └─┘  └─┘  └─┘  └─┘
                       └───────┘ (1,5) ...                 (0,1) (2,3) ...

    Weights trained with one are wrong with the other, and nothing crashes: the text just gets bad.
    """

    def __init__(self, config: Config):
        self.inv_freq, self.scale = inverse_frequencies(config)  # no buffer: .to(bfloat16) would round it

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B or 1, T) -> cos and sin (B or 1, 1, T, N/2), ready to multiply all heads."""
        angles = positions[:, None, :, None] * self.inv_freq.to(positions.device)  # float32
        # bfloat16 resolves an angle near 30,000 only to 128 radians, so the conversion comes last.
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x1, x2) by its angle: (x1 cos - x2 sin, x2 cos + x1 sin). x (B, heads, T, N)."""
    x1, x2 = x.chunk(2, dim=-1)  # half-split: the first N/2 values and the last
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with QK-Norm and RoPE (Qwen3, arXiv:2505.09388, section 2). (B, T, D) -> (B, T, D).

        x ─┬─ q_proj ─ norm ─ RoPE ──> q (B, H, T, N) ───────────────┐
           ├─ k_proj ─ norm ─ RoPE ──> k (B, K, T, N) ─┐             ├─ softmax(q k^T · scale) v ── o_proj
           └─ v_proj ────────────────> v (B, K, T, N) ─┴─ KV cache ──┘
                                                          (B, K, S, N)
    """

    def __init__(self, config: Config, layer_idx: int):
        super().__init__()
        D, H, K, N = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer_idx, self.head_dim, self.scale = layer_idx, N, N ** -0.5
        self.cached = [(K, N), (K, N)]  # heads and sizes of what the cache keeps of each token: a key and a value
        self.q_proj = Linear(D, H * N)  # H*N need not be D
        self.k_proj = Linear(D, K * N)
        self.v_proj = Linear(D, K * N)
        self.o_proj = Linear(H * N, D)
        self.q_norm = RMSNorm(N, config.rms_norm_eps)  # one weight for all heads
        self.k_norm = RMSNorm(N, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: "KVCache | None") -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, N)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, N)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, N)
        # QK-Norm keeps q·k from growing in training. It comes before the rotation: its weight differs within a pair,
        # so the other order would give other numbers.
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)  # (B, H, T, N)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)  # (B, K, T, N)
        if cache is not None:
            k, v = cache.write(self.layer_idx, k, v)  # (B, K, S, N)
        out = self.sdpa(q, k, v, mask)  # (B, H, T, N)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """softmax(q k^T * scale) v; q (B, H, T, N), k and v (B, K, S, N) -> (B, H, T, N).

        Grouped queries (arXiv:2305.13245, section 2.2): query head h reads key/value head h // G.

            H = 6, K = 2:    q0 q1 q2   q3 q4 q5
                              └──┼──┘    └──┼──┘
                                k0         k1
        """
        q = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, T, N)
        scores = torch.einsum("bkgtn,bksn->bkgts", q, k) * self.scale
        scores = scores.masked_fill(~mask[..., None, :, :], -torch.inf)  # the same mask for all heads
        weights = scores.float().softmax(-1).to(q.dtype)
        return torch.einsum("bkgts,bksn->bkgtn", weights, v).flatten(1, 2)  # (B, H, T, N)


def attention_mask(first: int, T: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each of T queries sees, True where it does: (T, S), or (B, 1, T, S) with padding.

    The one rule: the query in slot p sees the keys in slots <= p that are not padding.
    """
    query, key = torch.arange(first, first + T, device=device)[:, None], torch.arange(first + T, device=device)
    mask = key <= query  # (T, S)
    if padding is not None:
        mask = mask & (key >= padding[:, :, None])  # (B, T, S)
        # A query that is itself padding sees itself: a softmax over nothing is NaN, and NaN spreads.
        mask = (mask | (key == query))[:, None]  # (B, 1, T, S)
    return mask


class KVCache:
    """What attention keeps of all tokens so far, for every layer: keys and values, so that none is computed twice.

    Slots are written in place and handed out as views. Rows of a batch end at the same slot: a shorter
    prompt starts later, after `padding[b]` slots that no query sees. `padding` None is a single row.

        slot        0 1 2 3 4 5          position of a token in its own text = slot - padding
        row 0       a b c d e →
        row 1       · · · x y →          padding[1] = 3
    """

    def __init__(self, attentions: Sequence[Attention], capacity: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu", padding: list[int] | None = None):
        L, B = len(attentions), len(padding or [0])
        # Two tensors here, for keys and for values; every kind of attention says what it wants to keep.
        self.tensors = [torch.empty(L, B, heads, capacity, size, dtype=dtype, device=device)
                        for heads, size in attentions[0].cached]
        self.padding = torch.tensor(padding, device=device)[:, None] if padding and any(padding) else None  # (B, 1)
        self.length = 0  # slots in use; the model moves it on when all layers have written

    @property
    def capacity(self) -> int:
        return self.tensors[0].shape[3]

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Put new keys and values (B, K, T, N) after the last token; return all of the layer's, (B, K, S, N).

        Raises ValueError beyond the capacity.
        """
        end = self.length + new[0].shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed")
        for tensor, part in zip(self.tensors, new):
            tensor[layer, :, :, self.length:end] = part
        return [tensor[layer, :, :, :end] for tensor in self.tensors]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises ValueError where there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens, keeping what is there."""
        if capacity > self.capacity:
            larger = [old.new_empty(*old.shape[:3], capacity, old.shape[4]) for old in self.tensors]
            for old, new in zip(self.tensors, larger):
                new[:, :, :, :self.length] = old[:, :, :, :self.length]
            self.tensors = larger  # only now: Ctrl-C may come at any moment


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202, eq. 6). (B, T, D) -> (B, T, F) -> (B, T, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
