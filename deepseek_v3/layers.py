"""The building blocks of a layer: RMSNorm, RotaryEmbedding, the KV cache, MLP. Attention itself is in mla.py.

New against Qwen3: rotated pairs are neighbours, and the cache keeps one short vector of each token for all heads
together, instead of keys and values for each.

One alphabet of dimensions, for every shape note and einsum:

    B batch      T new tokens     S all tokens so far, cached and new     D hidden size     V vocabulary
    H heads      R latent rank (kv_lora_rank)     N head size without position (qk_nope_head_dim)
    P rotary part of a head (qk_rope_head_dim)    M size of a value (v_head_dim)     F feed-forward size

Papers: RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864), SwiGLU (arXiv:2002.05202), latent attention (DeepSeek-V2,
arXiv:2405.04434, section 2.1), DeepSeek-V3 (arXiv:2412.19437).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .yarn import yarn


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
    """How fast each pair turns: theta^(-2j/P) radians a token, (P/2,) float32; and a factor on cos and sin.

    "Inverse" is the field's word: these are frequencies, 1 / (tokens per radian).
    """
    P = config.qk_rope_head_dim
    # On the CPU even if the model is built on the meta device: these numbers stand in no checkpoint.
    period = config.rope_theta ** (torch.arange(0, P, 2, dtype=torch.float32, device="cpu") / P)  # tokens per radian
    if config.rope_scaling:  # stretched to longer contexts, as in all of DeepSeek's: yarn.py
        return yarn(period, config.rope_theta, config.rope_scaling)
    return 1 / period, 1.0


class RotaryEmbedding:
    """RoPE's cosines and sines by position (arXiv:2104.09864, section 3.2.2).

    Pair j of P values turns by the angle position * theta^(-2j/P). DeepSeek and the paper pair neighbours
    ("interleaved"), Qwen3 pairs value j with value j + P/2 ("half-split"):

        interleaved   0 1  2 3  4 5  6 7        half-split   0 1 2 3 | 4 5 6 7
                      └─┘  └─┘  └─┘  └─┘                     └───────┘ (0,4)
                     (0,1) (2,3) ...                           └───────┘ (1,5) ...

    Weights trained with one are wrong with the other, and nothing crashes: the text just gets bad.
    """

    def __init__(self, config: Config):
        self.inv_freq, self.scale = inverse_frequencies(config)  # no buffer: .to(bfloat16) would round it

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B or 1, T) -> cos and sin (B or 1, 1, T, P/2), ready to multiply all heads."""
        angles = positions[:, None, :, None] * self.inv_freq.to(positions.device)  # float32
        # bfloat16 resolves an angle near 30,000 only to 128 radians, so the conversion comes last.
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x1, x2) by its angle: (x1 cos - x2 sin, x2 cos + x1 sin). x (B, heads, T, P)."""
    x1, x2 = x.chunk(2, dim=-1)  # half-split: the first P/2 values and the last
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def deinterleave(x: Tensor) -> Tensor:
    """(…, P) in the order 0 2 4 … 1 3 5 …: what were neighbours is then a half-split pair, and `rotate` turns it.

    Queries and keys are reordered alike, so their dot products, which are all that is used of them, stay the same.
    """
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


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
    """What attention keeps of all tokens so far, for every layer: one latent (R + P) of each, for all heads together.

    Slots are written in place and handed out as views. Rows of a batch end at the same slot: a shorter
    prompt starts later, after `padding[b]` slots that no query sees. `padding` None is a single row.

        slot        0 1 2 3 4 5          position of a token in its own text = slot - padding
        row 0       a b c d e →
        row 1       · · · x y →          padding[1] = 3
    """

    def __init__(self, attentions: Sequence[nn.Module], capacity: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu", padding: list[int] | None = None):
        L, B = len(attentions), len(padding or [0])
        # One tensor here, for the latents; every kind of attention says what it wants to keep.
        self.tensors = [torch.empty(L, B, heads, capacity, size, dtype=dtype, device=device)
                        for heads, size in attentions[0].cached]
        self.padding = torch.tensor(padding, device=device)[:, None] if padding and any(padding) else None  # (B, 1)
        self.length = 0  # slots in use; the model moves it on when all layers have written
        self.drafts: KVCache | None = None  # that of the draft layer, see speculative.py

    @property
    def capacity(self) -> int:
        return self.tensors[0].shape[3]

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Put new latents (B, 1, T, R + P) after the last token; return all of the layer's, (B, 1, S, R + P).

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
        if self.drafts is not None:  # its slot t knows the token at t+1
            self.drafts.length = min(self.drafts.length, max(length - 1, 0))

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
