"""Sharing a checkpoint among ranks: which rows and columns of each tensor a rank has, and loads.

    q_proj, k_proj, v_proj, o_proj (q_b_proj, kv_b_proj)    those of whole heads: `share_heads` of parts.py
    gate_proj, up_proj, down_proj, of experts too           some of the F; stored with a scale for each block of 128,
                                                            whole blocks, so that shares may be uneven, or empty
    embed_tokens, lm_head                                   some of the V
    norms, routers and projections to a latent              whole, on every rank
"""

import functools
import math
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor, nn

from ..config import Config
from ..model import Layer, Model
from .packed_formats import FORMATS
from .parallel import Place, gather_logits, here, on_first_rank, span
from .parts import CHANCE, PARALLEL, share_cache, share_heads
from .processes import check_alike
from .quantized import Layout
from .safetensors_reader import CheckpointFiles

COLUMNS = ("o_proj", "down_proj")  # of these a rank has columns, of the others rows
WIDTHS = ("gate_proj", "up_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")


class Share(NamedTuple):
    """The rows (axis 0) or columns (axis 1) of a tensor that a rank has, of `size` that there are."""

    axis: int
    first: int
    end: int
    size: int


class Shares:
    """Which part of each tensor of a checkpoint is a rank's. ValueError where so many ranks cannot share it."""

    def __init__(self, config: Config, files: CheckpointFiles, place: Place | None = None):
        self.config, self.files, self.place = config, files, place or here()
        self.heads = share_heads(config, self.place)
        self.share = functools.cache(self.share)  # thousands of experts are cut alike

    def of(self, name: str) -> Share:
        """That of a tensor. Weights that have a scale together stay together."""
        linear, _, leaf = name.rpartition(".")
        kind = linear.rpartition(".")[2]
        if self.place.ranks == 1 or kind not in (*WIDTHS, *VOCABULARY, *self.heads):
            size = (*self.files.tensors[name].shape, 1)[0]
            return Share(0, 0, size, size)
        axis = int(kind in COLUMNS)
        shape, block, in_blocks = self.layout(linear)
        if len(shape) != 2:
            raise ValueError(f"{self.files.directory}: {name} has {len(shape)} dimensions, a matrix has 2")
        share = self.share(kind, shape[axis], block[axis], block[axis] if in_blocks else 1)
        if leaf == "weight":
            return Share(axis, *share, shape[axis])
        first, end = share[0] // block[axis], math.ceil(share[1] / block[axis])  # of scales, one for each block
        return Share(axis, first, end, math.ceil(shape[axis] / block[axis]))

    def layout(self, linear: str) -> Layout:
        """How the whole W is stored."""
        for make in FORMATS:
            if layout := make.layout(self.files, linear, self.config):
                return layout
        if (weight := self.files.tensors.get(f"{linear}.weight")) is None:
            raise ValueError(f"{self.files.directory}: {linear} is stored in a format that processes cannot share")
        return weight.shape, (1, 1), False

    def share(self, kind: str, size: int, block: int, unit: int) -> tuple[int, int]:
        """(first, end) of the W's rows or columns."""
        ranks = self.place.ranks
        if kind not in self.heads:
            if size < ranks and unit == 1:
                raise ValueError(f"{ranks} processes cannot share the {size} rows of {kind}; start fewer")
            return span(size, self.place, unit)
        if unit < size and (fitting := self.largest_fit(kind, size, unit)) < ranks:
            raise ValueError(f"{ranks} processes would cut {kind}'s blocks of {unit} weights with one scale; start "
                             f"{fitting}")
        return self.heads[kind]

    def largest_fit(self, kind: str, size: int, unit: int) -> int:
        """As many ranks as there are, or the most below it whose heads begin and end with a block."""
        for ranks in range(self.place.ranks, 1, -1):
            with suppress(ValueError):  # these cannot share the heads
                edges = {edge for each in range(ranks) for edge in share_heads(self.config, Place(each, ranks))[kind]}
                if all(edge % unit == 0 or edge == size for edge in edges):
                    return ranks
        return 1

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """A rank's part of a tensor: a view, so that of a mapped file the rest is not read."""
        axis, first, end, size = self.of(name)
        return tensor if end - first == size else tensor.narrow(axis, first, end - first)

    def count(self, name: str) -> int:
        """How many numbers that are."""
        _, first, end, size = self.of(name)
        return math.prod(self.files.tensors[name].shape) * (end - first) // max(size, 1)

    def finish(self, model: Model) -> None:
        """After loading: the head gives all logits, and nothing is trained, since the sums have no gradient."""
        if self.place.ranks > 1:
            head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
            gather_logits(model.requires_grad_(False), self.of(head).first)


def share_model(model: Model, files: CheckpointFiles) -> Shares:
    """Swap the parts that need all ranks for parallel ones, and leave room for no more than a share of each tensor.

    Before loading; in one process nothing is swapped, and every share is the whole.
    """
    shares = Shares(model.config, files)
    if shares.place.ranks == 1:
        return shares
    stored = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in sorted(files.tensors.items())]
    check_alike("checkpoint", (model.config, stored))
    for module in model.modules():
        module.__class__ = PARALLEL.get(type(module), type(module))
        if isinstance(module, Layer):
            share_cache(module.self_attn, shares.heads)
    for name, weight in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        if name in files.tensors:
            setattr(model.get_submodule(module), leaf, nn.Parameter(shares.cut(name, weight.detach())))
    for module, name in CHANCE:
        setattr(module, name, on_first_rank(getattr(module, name)))
    return shares
