"""3. The building blocks: RMSNorm, the linear product, rotary position embedding, the key/value cache, SwiGLU.

All of it is the dense Qwen3's, line for line; what is new in a mixture of experts has its own file, moe.py, and so
has attention, attention.py.

One alphabet of dimensions, for every shape note and einsum:

    B batch      T new tokens     S all tokens so far, cached and new     D hidden size     V vocabulary
    H query heads     K key/value heads     G = H/K queries that share a key     N head size     F MLP size
    E experts     A experts active for a token

What is particular to Qwen3 among similar models: an RMSNorm on every query and key head before the
rotation (QK-Norm), no biases anywhere, and a head size N of its own (H*N need not be D).

Papers: RMSNorm (arXiv:1910.07467), RoPE (arXiv:2104.09864), YaRN (arXiv:2309.00071), SwiGLU (arXiv:2002.05202).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config, Yarn


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
    """Normal numbers of standard deviation 0.02. On the meta device none: for them PyTorch imports its compiler, a second."""
    weight = torch.empty(shape)
    return nn.Parameter(weight if weight.is_meta else weight.normal_(std=0.02))


class Linear(nn.Module):
    """y = x W^T with W (out, in), no bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = new_weight(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.matrix(x.dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), ready to multiply."""
        return self.weight


# Without AVX-512, as on many laptops, PyTorch multiplies matrices of 16-bit numbers at a sixth of its speed in float32.
SLOW_IN_16_BITS = torch.backends.cpu.get_cpu_capability() == "AVX2"


def product(x: Tensor, W: Tensor) -> Tensor:
    """x W^T: (…, T, in) and (…, out, in) -> (…, T, out)."""
    rows = x.shape[:-1].numel() // W.shape[:-2].numel()  # for each matrix
    if rows == 1 and torch.compiler.is_compiling():
        return product_of_one_row(x, W)
    if x.device.type == "cpu" and rows >= 16 and x.itemsize == 2 and SLOW_IN_16_BITS:
        return product_in_float32(x, W)
    return x @ W.mT  # one row too: with torch 2.15 at full bandwidth; with 2.9 it takes up to 1.3 times as long as torch.mv


def product_of_one_row(x: Tensor, W: Tensor) -> Tensor:
    """The same as one loop over W, for a compiler: a W made from FP8, or chosen among experts, is not written to memory."""
    return (x[..., None, :].float() * W.unsqueeze(-3).float()).sum(-1).to(x.dtype)


def product_in_float32(x: Tensor, W: Tensor) -> Tensor:
    """The same in float32, rounded once. From 16 rows on: to fewer the conversion of W costs more than it saves."""
    # Piece by piece, since the whole W in float32 (a head's has 150,000 rows) would take twice its own memory.
    x32 = x.float()
    return torch.cat([(x32 @ piece.float().mT).to(x.dtype) for piece in W.split(512, dim=-2)], dim=-1)


class RotaryEmbedding:
    """RoPE's cosines and sines by position (arXiv:2104.09864, section 3.2.2); with YaRN where the config says so.

    Pair j of a head of N values turns by the angle position * theta^(-2j/N). Qwen3 pairs value j with value
    j + N/2 ("half-split"); the paper and DeepSeek pair neighbours ("interleaved"):

        half-split   0 1 2 3 | 4 5 6 7        interleaved   0 1  2 3  4 5  6 7
                     └───────┘ (0,4)                        └─┘  └─┘  └─┘  └─┘
                       └───────┘ (1,5) ...                 (0,1) (2,3) ...

    Weights trained with one are wrong with the other, and nothing crashes: the text just gets bad.
    """

    def __init__(self, config: Config):
        self.config = config
        self.cos = self.sin = torch.empty(0, config.head_dim // 2)

    def __call__(self, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B or 1, T), all below `length` -> cos and sin (B or 1, 1, T, N/2), ready to multiply all heads."""
        cos, sin = self.cos, self.sin  # taken once: another thread may change them at any moment
        if length > min(len(cos), len(sin)) or {cos.device, sin.device} != {positions.device}:
            cos, sin = self.grow(max(256, 2 ** math.ceil(math.log2(length))), positions.device)
        # The tables stay float32 and are rounded here: rounding an angle of 30,000 first would lose the position.
        return cos[positions][:, None].to(dtype), sin[positions][:, None].to(dtype)

    @torch.inference_mode(False)  # else tables made while generating could never be trained through
    def grow(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        frequency, scale = inverse_frequencies(self.config)
        angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency  # (length, N/2)
        cos, sin = (angle.cos() * scale).to(device), (angle.sin() * scale).to(device)
        self.cos, self.sin = cos, sin
        return cos, sin


def inverse_frequencies(config: Config) -> tuple[Tensor, float]:
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
        return frequency, mscale(yarn, yarn.mscale) / mscale(yarn, yarn.mscale_all_dim) * yarn.attn_factor
    return frequency, mscale(yarn, 1.0) * yarn.attn_factor


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

    def __init__(self, config: Config, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu",
                 padding: list[int] | None = None):
        shape = (config.num_hidden_layers, len(padding or [0]), config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.padding = torch.tensor(padding, device=device)[:, None] if padding and any(padding) else None  # (B, 1)
        self.length = 0  # slots in use

    @staticmethod
    def bytes_per_token(config: Config, dtype: torch.dtype) -> int:
        """Of all layers: 2 (keys and values) * L * K * N values."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def made_for(self) -> tuple:
        """What must agree with a model's own cache: all sizes but the capacity, type and device, no padding."""
        return *self.keys.shape[:3], self.keys.shape[4], self.keys.dtype, self.device, self.padding is None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, K, T, N) after the last token; return all of the layer's, (B, K, S, N)."""
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


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202, eq. 6). (B, T, D) -> (B, T, F) -> (B, T, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
