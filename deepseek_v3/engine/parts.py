"""Which part of the lesson is swapped for which, and what else the engine has to know of this architecture.

The other files of the engine know nothing of it.
"""

import torch
from torch import Tensor, nn

from .. import generate, speculative
from ..config import Config
from ..layers import KVCache, Linear, RMSNorm, deinterleave, rotate
from ..mla import Attention
from ..model import Layer, MTPLayer
from ..moe import Experts
from . import continuous
from .drafts import check_drafts as correct  # noqa: F401 for prepare.py
from .experts import FastExperts, check_compiled, stack_experts  # noqa: F401 for prepare.py and compiled.py
from .fast import FastLinear, FastRMSNorm, fused_sdpa, matmul, wants_few_operations
from .parallel import ParallelEmbedding, ParallelLayer, Place, span

KEPT_IN_FLOAT32 = ("e_score_correction_bias",)  # stay float32 whatever the others are, by the last part of their names


class FusedAttention(Attention):
    """Attention whose softmax(q k^T) v is one kernel, with the parameters of Attention."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        if x.shape[1] > 1 or not wants_few_operations(x):
            return super().forward(x, cos, sin, mask, cache)
        # One token: heads stand before it without a transpose, and all that is rotated is rotated together.
        N, P, R, B = self.qk_nope_head_dim, self.qk_rope_head_dim, self.kv_lora_rank, len(x)
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(B, -1, 1, N + P).split((N, P), -1)  # (B, H, 1, N), (B, H, 1, P)
        c, k_rope = self.kv_a_proj_with_mqa(x).view(B, 1, 1, R + P).split((R, P), -1)  # (B, 1, 1, R), (B, 1, 1, P)
        both = torch.cat((q_rope, k_rope), 1)  # (B, H + 1, 1, P)
        both = rotate(deinterleave(both) if self.rope_interleave else both, cos, sin)
        q_rope, k_rope = both.split((q_rope.shape[1], 1), 1)
        latents = torch.cat((self.kv_a_layernorm(c), k_rope), -1)  # (B, 1, 1, R + P)
        if cache is not None:
            (latents,) = cache.write(self.layer_idx, latents)  # (B, 1, S, R + P)
        form = self.absorbed if self.absorbs(1, latents.shape[2]) else self.expanded
        return self.o_proj(form(q_nope, q_rope, latents, mask).reshape(B, 1, -1))

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if k.shape[1] == 1 < q.shape[1] and len(q) == 1:
            return attention_on_latents(q, k, v, mask, self.scale)
        if q.device.type == "mps":  # some versions of PyTorch leak future tokens there, or return NaN
            return super().sdpa(q, k, v, mask)
        return fused_sdpa(q, k, v, mask, self.scale)

    def each_head(self, x: Tensor, W: Tensor) -> Tensor:
        rows = x.transpose(0, 1).flatten(1, 2).contiguous()  # (H, B*T, in)
        # `matmul` is fast on matrices that lie row by row; W_UK^T lies column by column, and would take several times
        # as long.
        y = matmul(rows, W) if W.stride(-1) == 1 else rows @ W.mT
        return y.unflatten(1, (len(x), -1)).transpose(0, 1)


def attention_on_latents(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """sdpa for one sequence and one key head: q (1, H, T, R + P), k (1, 1, S, R + P), v (1, 1, S, R) -> (1, H, T, R).

    The queries of all heads are rows of two plain matmuls, which read the cache where it lies.
    """
    _, H, T, _ = q.shape
    scores = matmul(q[0].flatten(0, 1), k[0, 0]).view(H, T, -1) * scale
    if T > 1 or mask.ndim > 2:  # a single query of the causal rule sees all
        scores = scores.masked_fill(~(mask if mask.ndim == 2 else mask[0]), -torch.inf)
    weights = scores.float().softmax(-1).to(q.dtype).flatten(0, 1)  # (H T, S)
    return matmul(weights, v[0, 0].mT).view(1, H, T, -1)


# Part of the lesson -> its faster twin, with the same parameters.
FASTER = {Linear: FastLinear, RMSNorm: FastRMSNorm, Attention: FusedAttention, Experts: FastExperts}


class ParallelMTPLayer(ParallelLayer, MTPLayer):
    """The draft layer with the two sums."""


# … and where several ranks share a model.
PARALLEL = {Layer: ParallelLayer, MTPLayer: ParallelMTPLayer, nn.Embedding: ParallelEmbedding}
# Functions that draw a token.
CHANCE = [(generate, "sample"), (continuous, "draw"), (speculative, "draw"), (speculative, "verify")]


def share_heads(config: Config, place: Place) -> dict[str, tuple[int, int]]:
    """Linear of attention -> (first, end) of the rows that a rank has, of o_proj the columns: those of whole heads.

    The projections to a latent are whole, and so is its cache: all heads need all of it.
    """
    H, N, M = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    if place.ranks > H:
        raise ValueError(f"{place.ranks} processes cannot share {H} head{'s' * (H > 1)}; start up to {H}")
    first, end = span(H, place)
    sizes = {"q_proj": N + config.qk_rope_head_dim, "kv_b_proj": N + M, "o_proj": M}
    sizes["q_b_proj"] = sizes["q_proj"]
    return {linear: (first * size, end * size) for linear, size in sizes.items()}


def share_cache(attention: Attention, heads: dict[str, tuple[int, int]]) -> None:
    """A rank caches what its own heads need: of a latent, the whole."""


def count_parts(config: Config) -> dict[str, int]:
    """What the model is built of, each with a tensor of its own or more: a damaged number shows in too few tensors."""
    sparse = config.is_sparse(config.num_hidden_layers - 1)
    return {"layers": config.num_hidden_layers, "experts": config.n_routed_experts if sparse else 0}


def count_experts(config: Config) -> tuple[int, int]:
    """(Experts that a token uses, experts of a layer)."""
    return config.num_experts_per_tok, config.n_routed_experts
