"""Which part of the lesson is swapped for which, and what else the engine has to know of this architecture.

The other files of the engine know nothing of it.
"""

import torch
from torch import Tensor, nn

from .. import generate
from ..config import Config
from ..layers import Attention, KVCache, Linear, RMSNorm, rotate
from ..model import Layer, Model
from . import continuous
from .fast import FastLinear, FastRMSNorm, fused_sdpa, wants_few_operations
from .parallel import ParallelEmbedding, ParallelLayer, Place, span
from .safetensors_reader import CheckpointFiles

KEPT_IN_FLOAT32 = ()  # stay float32 whatever the others are, by the last part of their names


class FusedAttention(Attention):
    """Attention whose softmax(q k^T) v is one kernel, with the parameters of Attention."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        if x.shape[1] > 1 or not wants_few_operations(x):
            return super().forward(x, cos, sin, mask, cache)
        # One token: heads stand before it without a transpose, and those of queries and keys are rotated together.
        heads = len(x), -1, 1, self.head_dim
        q, k = self.q_norm(self.q_proj(x).view(heads)), self.k_norm(self.k_proj(x).view(heads))  # (B, H or K, 1, N)
        v = self.v_proj(x).view(heads)  # (B, K, 1, N)
        q, k = rotate(torch.cat((q, k), 1), cos, sin).split((q.shape[1], k.shape[1]), 1)
        if cache is not None:
            k, v = cache.write(self.layer_idx, k, v)  # (B, K, S, N)
        return self.o_proj(self.sdpa(q, k, v, mask).reshape(len(x), 1, -1))

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if q.device.type == "mps":  # some versions of PyTorch leak future tokens there, or return NaN
            return super().sdpa(q, k, v, mask)
        return fused_sdpa(q, k, v, mask, self.scale)


# Part of the lesson -> its faster twin, with the same parameters.
FASTER = {Linear: FastLinear, RMSNorm: FastRMSNorm, Attention: FusedAttention}

PARALLEL = {Layer: ParallelLayer, nn.Embedding: ParallelEmbedding}  # and where several ranks share a model
CHANCE = [(generate, "sample"), (continuous, "draw")]  # functions that draw a token


def share_heads(config: Config, place: Place) -> dict[str, tuple[int, int]]:
    """Linear of attention -> (first, end) of the rows that a rank has, of o_proj the columns: those of whole heads.

    Of several ranks with the same key head each has some of its queries.
    """
    H, K, N, n = config.num_attention_heads, config.num_key_value_heads, config.head_dim, place.ranks
    if n > H or (n > K and n % K):
        more = f", or a multiple of {K} up to {H}" if H > K else ""
        raise ValueError(f"{n} processes cannot share {H} query heads and {K} key heads; start up to {K}{more}")
    if n <= K:
        first, end = span(K, place)
        queries = first * (H // K), end * (H // K)
    else:
        first = place.rank * K // n
        end, (one, other) = first + 1, span(H // K, Place(place.rank % (n // K), n // K))
        queries = first * (H // K) + one, first * (H // K) + other
    queries, keys = (queries[0] * N, queries[1] * N), (first * N, end * N)
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}


def share_cache(attention: Attention, heads: dict[str, tuple[int, int]]) -> None:
    """A rank caches its own heads."""
    first, end = heads["k_proj"]
    attention.cached = [((end - first) // attention.head_dim, attention.head_dim)] * 2


def count_parts(config: Config) -> dict[str, int]:
    """What the model is built of, each with a tensor of its own or more: a damaged number shows in too few tensors."""
    return {"layers": config.num_hidden_layers}


def count_experts(config: Config) -> tuple[int, int]:
    """(Experts that a token uses, experts of a layer)."""
    return 1, 1


def correct(config: Config, files: CheckpointFiles) -> Config:
    """The config as far as the files contradict it."""
    return config


def stack_experts(model: Model, files: CheckpointFiles, device: torch.device, dtype: torch.dtype | str | None,
                  compute: torch.dtype) -> None:
    """Put all experts of a layer into few tensors, where that is faster."""


def check_compiled(model: Model) -> None:
    """ValueError for a model whose decode step cannot be compiled; any dense one can be."""
