"""3. The building blocks: RMSNorm, rotary position embedding, the key/value cache, attention, SwiGLU.

One alphabet of dimensions, for every shape note and einsum:

    B batch      T new tokens     S all tokens so far, cached and new     D hidden size     V vocabulary
    H query heads     K key/value heads     G = H/K queries that share a key     N head size     F MLP size

What is particular to Qwen3 among models of its kind: an RMSNorm on every query and key head before the
rotation (QK-Norm), no biases anywhere, and a head size N of its own (H*N need not be D).

Papers: RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864), YaRN (arXiv:2309.00071), GQA
(arXiv:2305.13245), QK-Norm (arXiv:2302.05442), SwiGLU (arXiv:2002.05202).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3.config import Qwen3Config, Yarn


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
    """Normal numbers of standard deviation 0.02. On the meta device none: there it would take 0.7 ms a weight for nothing."""
    weight = torch.empty(shape)
    return nn.Parameter(weight if weight.is_meta else weight.normal_(std=0.02))


class Linear(nn.Module):
    """y = x W^T with W (out, in), no bias. W may be FP8 with one scale for each block of weights."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = new_weight(out_features, in_features)
        self.register_parameter("weight_scale_inv", None)  # an FP8 checkpoint has scales to put here

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(x.dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), ready to multiply."""
        return self.weight if self.weight_scale_inv is None else dequantize(self.weight, self.weight_scale_inv, dtype)


def dequantize(weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype, block: int = 128) -> Tensor:
    """FP8 (O, I) and scales (ceil(O/block), ceil(I/block)) -> weights (O, I).

    Multiplied, whatever the name says: the file stores the inverse of the scale that was divided by
    (DeepSeek-V3, arXiv:2412.19437, section 3.3). In float32, then rounded once.
    """
    rows, columns = weight.shape
    scale = weight_scale_inv.float().repeat_interleave(block, 0)[:rows]  # the last block may be cut short
    scale = scale.repeat_interleave(block, 1)[:, :columns]  # (O, I)
    return (weight.float() * scale).to(dtype)


class RotaryEmbedding:
    """RoPE's cosines and sines by position (arXiv:2104.09864, section 3.2.2); with YaRN where the config says so.

    Pair j of a head of N values turns by the angle position * theta^(-2j/N). Qwen3 pairs value j with value
    j + N/2 ("half-split"); the paper and DeepSeek pair neighbours ("interleaved"):

        half-split   0 1 2 3 | 4 5 6 7        interleaved   0 1  2 3  4 5  6 7
                     └───────┘ (0,4)                        └─┘  └─┘  └─┘  └─┘
                       └───────┘ (1,5) ...                 (0,1) (2,3) ...

    Weights trained with one are wrong with the other, and nothing crashes: the text just gets bad.
    """

    def __init__(self, config: Qwen3Config):
        self.config = config
        self.cos = self.sin = torch.empty(0, config.head_dim // 2)

    def __call__(self, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B or 1, T), all below `length` -> cos and sin (B or 1, 1, T, N/2), ready to multiply all heads."""
        if length > len(self.cos) or self.cos.device != positions.device:
            self.grow(max(256, 2 ** math.ceil(math.log2(length))), positions.device)
        # The tables stay float32 and are rounded here: rounding an angle of 30,000 first would lose the position.
        return self.cos[positions][:, None].to(dtype), self.sin[positions][:, None].to(dtype)

    @torch.inference_mode(False)  # else tables made while generating could never be trained through
    def grow(self, length: int, device: torch.device) -> None:
        frequency, scale = inverse_frequencies(self.config)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency  # (length, N/2)
        self.cos, self.sin = (angle.cos() * scale).to(device), (angle.sin() * scale).to(device)


def inverse_frequencies(config: Qwen3Config) -> tuple[Tensor, float]:
    """(theta_j, (N/2,) float32; the factor on cos and sin). Without YaRN theta^(-2j/N) and 1."""
    N, theta, yarn = config.head_dim, config.rope_theta, config.rope_scaling
    period = theta ** (torch.arange(0, N, 2, dtype=torch.float32) / N)  # tokens per radian
    if yarn is None:
        return 1 / period, 1.0

    # Pairs that turn often within the trained length keep their speed, slow ones are slowed by `factor`,
    # those between are blended (arXiv:2309.00071, eq. 17-20).
    def pair_that_turns(times: float) -> float:
        return N * math.log(yarn.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, N - 1)
    high += 0.001 if low == high else 0  # a step instead of a ramp, not a division by zero
    ramp = ((torch.arange(N // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    frequency = 1 / (yarn.factor * period) * (1 - keep) + 1 / period * keep  # in transformers' order, to the last bit

    if yarn.attention_factor is not None:
        return frequency, yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return frequency, mscale(yarn, yarn.mscale) / mscale(yarn, yarn.mscale_all_dim)
    return frequency, mscale(yarn, 1.0)


def mscale(yarn: Yarn, m: float) -> float:
    """YaRN's factor on queries and on keys, so squared in the scores (arXiv:2309.00071, eq. 22)."""
    return 0.1 * m * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x1, x2) by its angle: (x1 cos - x2 sin, x2 cos + x1 sin). x (B, heads, T, N)."""
    x1, x2 = x.chunk(2, dim=-1)  # half-split: the first N/2 values and the last
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class KVCache:
    """Keys and values of all tokens so far, for every layer; two tensors (layers, B, K, capacity, N).

    Slots are written in place and handed out as views. Rows of a batch end at the same slot: a shorter
    prompt starts later, after `padding[b]` slots that nobody looks at.

        slot        0 1 2 3 4 5          position of a token in its own text = slot - padding
        row 0       a b c d e →
        row 1       · · · x y →          padding[1] = 3
    """

    def __init__(self, config: Qwen3Config, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu",
                 padding: list[int] | None = None):
        shape = (config.num_hidden_layers, len(padding or [0]), config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.padding = torch.tensor(padding, device=device)[:, None] if padding and any(padding) else None  # (B, 1)
        self.length = 0  # slots in use

    @staticmethod
    def bytes_per_token(config: Qwen3Config, dtype: torch.dtype) -> int:
        """Of all layers: 2 (keys and values) * L * K * N values."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, K, T, N) behind the last token; return all of the layer's, (B, K, S, N)."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed")
        self.keys[layer, :, :, self.length:end] = keys
        self.values[layer, :, :, self.length:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens, keeping what is there."""
        if capacity > self.capacity:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty(*old.shape[:3], capacity, old.shape[4])
                new[:, :, :, :self.length] = old[:, :, :, :self.length]
                setattr(self, name, new)


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
    T, S = q.shape[2], k.shape[2]
    # A whole prompt at once: the kernel that knows the triangle skips the half that a mask would only hide.
    causal = mask is not None and mask.ndim == 2 and T == S
    mask = None if causal else mask
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention with QK-Norm and RoPE (Qwen3, arXiv:2505.09388, section 2). (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Qwen3Config, layer: int):
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
        # Apple's fused attention has leaked future tokens and returned NaN, by version of PyTorch.
        attend = attention_written_out if x.device.type == "mps" else attention_fused
        out = attend(q, k, v, mask, self.head_dim ** -0.5)  # (B, H, T, N)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202, eq. 6). (B, T, D) -> (B, T, F) -> (B, T, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
