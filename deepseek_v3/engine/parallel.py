"""One model on several GPUs (tensor parallelism): each rank holds a share of every large matrix, two sums a layer.

All ranks, as the processes are called, read the same tokens and compute the same numbers. Only of the large matrices
each has some of the rows or of the columns, and computes with these (shares.py says which):

    x (B, T, D)   the same on every rank
      ├─ q_proj, k_proj, v_proj   rows of some heads ──── attention of these heads
      │  o_proj                   their columns ───────── a part of (B, T, D) ──── the sum over all ranks
      ├─ gate_proj, up_proj       some of the F rows ──── SwiGLU of these
      │  down_proj                their columns ───────── a part of (B, T, D) ──── the sum over all ranks
      └─ lm_head                  some of the V rows ──── logits of these tokens ─ zeros for the others, and the sum

Rows first and columns after them: what the rows give is what the columns need, so nothing is sent in between
(Megatron-LM, arXiv:1909.08053, section 3). Every expert is cut in the same way, so that all ranks have the same work
wherever tokens are routed. Each rank caches the keys and values of its own heads. Norms and routers are whole.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Layer, Model
from . import processes
from .processes import rank, ranks


class Place(NamedTuple):
    """Which of how many ranks."""

    rank: int
    ranks: int


def here() -> Place:
    return Place(rank(), ranks())


def span(size: int, place: Place, unit: int = 1) -> tuple[int, int]:
    """(first, end) of a rank's share of `size` rows, in whole units. Shares may differ by one unit, or be empty."""
    units = math.ceil(size / unit)
    first, end = (units * number // place.ranks * unit for number in (place.rank, place.rank + 1))
    return first, min(end, size)


def summed(part: Tensor) -> Tensor:
    """The parts of all ranks added up, to the same bits on each: in float32, and rounded once."""
    if part.requires_grad:  # all_reduce has no gradient: training would go on, and wrong
        raise ValueError("a model that is shared among several processes cannot be trained; train a whole one, as "
                         "scripts/parallel/train.py does")
    whole = part.to(torch.float32, copy=True)  # summed in place
    dist.all_reduce(whole, group=processes.GROUP)
    return whole.to(part.dtype)


class ParallelLayer(Layer):
    """The lesson's layer with the two sums: attention and MLP give each rank a part of their result."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache) -> Tensor:
        x = x + summed(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        x = x + summed(self.mlp(self.post_attention_layernorm(x)))
        return x


class ParallelEmbedding(nn.Embedding):
    """Some rows of the embedding: zeros for tokens of other ranks, and the sum. (B, T) -> (B, T, D)"""

    def forward(self, token_ids: Tensor) -> Tensor:
        first, end = span(self.num_embeddings, here())
        own = (token_ids >= first) & (token_ids < end)
        return summed(F.embedding(torch.where(own, token_ids - first, 0), self.weight) * own[..., None])


def gather_logits(model: Model, first: int) -> None:
    """Let the head, in whatever format it is, give all logits: its own from token `first` on, zeros around, the sum."""
    def whole(head: nn.Module, inputs: tuple, part: Tensor) -> Tensor:  # (…, own rows) -> (…, V)
        return summed(F.pad(part, (first, model.config.vocab_size - first - part.shape[-1])))

    model.lm_head.register_forward_hook(whole)


CHOOSING: list[Callable] = []  # what is being chosen right now


def on_first_rank(choose: Callable) -> Callable:
    """`choose`, with the first rank's result on every rank: what is drawn by chance is drawn once.

    All ranks run it and share the result when it is there, never in between: not all of them may come by there.
    """
    if hasattr(choose, "by_itself"):  # another model was loaded before
        return choose

    @functools.wraps(choose)
    def chosen(*arguments, **more):
        if CHOOSING or ranks() == 1:
            return choose(*arguments, **more)
        CHOOSING.append(choose)
        try:
            result = choose(*arguments, **more)
        finally:
            CHOOSING.clear()
        shared = torch.as_tensor(result, device=arguments[0].device)
        dist.broadcast(shared, group=processes.GROUP, group_src=0)
        return shared if isinstance(result, Tensor) else shared.item()

    chosen.by_itself = choose
    return chosen
