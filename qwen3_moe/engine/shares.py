"""Sharing a checkpoint among ranks: which rows and columns of each tensor a rank has, and loads.

    q_proj, k_proj, v_proj, o_proj (q_b_proj, kv_b_proj)    those of whole heads: `share_heads` of parts.py
    gate_proj, up_proj, down_proj, of experts too           some of the F: the rows of two, the columns of one
    embed_tokens, lm_head                                   some of the V
    norms, routers and projections to a latent              whole, on every rank

Where W is quantised, several rows or columns share an entry of what is stored: 128 x 128 weights in FP8 a scale, 8 of
four bits a word, 32 or more of their columns a scale. Formats say so of each tensor (QuantizedLinear.layout). No entry
is cut: shares are multiples of the least common multiple of these numbers, and may be uneven, or empty.
"""

import functools
import math
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor, nn

from ..config import Config
from ..model import Layer, Model
from .int4 import GROUPS, is_in_order
from .packed_formats import FORMATS, count_weights, packed_shape
from .parallel import Place, gather_logits, here, on_first_rank, span
from .parts import CHANCE, PARALLEL, share_cache, share_heads
from .processes import check_alike
from .quantized import COLUMN_GROUPS, COLUMNS, ROWS, Axes, entries
from .safetensors_reader import CheckpointFiles

BY_COLUMNS = ("o_proj", "down_proj")  # of these a rank has columns, of the others rows
WIDTHS = ("gate_proj", "up_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")


class Share(NamedTuple):
    """The rows (axis 0) or columns (axis 1) of a tensor that a rank has, of `size` that there are."""

    axis: int
    first: int
    end: int
    size: int


class Shares:
    """Which part of each tensor of a checkpoint is a rank's. ValueError where so many ranks cannot share it.

    `shapes` of the matrices by name of their Linear; without them they are taken from the files.
    """

    def __init__(self, config: Config, files: CheckpointFiles, place: Place | None = None,
                 shapes: dict[str, tuple[int, int]] | None = None):
        self.config, self.files, self.place, self.shapes = config, files, place or here(), shapes or {}
        self.heads, whole = (share_heads(config, each) for each in (self.place, Place(0, 1)))
        self.sizes = {kind: end for kind, (_, end) in whole.items()}
        self.shape, self.layout, self.part = map(functools.cache, (self.shape, self.layout, self.part))

    def of(self, name: str) -> Share:
        """That of a tensor that is stored."""
        linear, _, leaf = name.rpartition(".")
        if self.is_cut(linear):
            first, end, _ = self.part(linear)
            for axis, (counts, size) in enumerate(self.layout(linear).get(leaf, ())):
                if size and is_along(counts, linear):
                    return Share(axis, first // size, math.ceil(end / size), entries(self.shape(linear), counts, size))
        size = (*self.files.tensors[name].shape, 1)[0]
        return Share(0, 0, size, size)

    def is_cut(self, linear: str) -> bool:
        return self.place.ranks > 1 and kind_of(linear) in (*WIDTHS, *VOCABULARY, *self.heads)

    def shape(self, linear: str) -> tuple[int, int]:
        """Of the whole W."""
        weight = self.files.tensors.get(f"{linear}.weight")
        shape = self.shapes.get(linear) or (weight.shape if weight else packed_shape(self.files, linear))
        if shape is None:
            raise ValueError(f"{self.files.directory}: {linear} lacks its weight, or a part of what that is stored as; "
                             "download the checkpoint again")
        if len(shape) != 2:
            raise ValueError(f"{weight.path}: {linear}.weight has {len(shape)} dimensions, a matrix has 2")
        return shape

    def layout(self, linear: str) -> dict[str, Axes]:
        """How the whole W is stored."""
        shape = self.shape(linear)
        found = (make.layout(self.files, linear, shape, self.config) for make in FORMATS)
        layout = next(filter(None, found), {"weight": ((ROWS, 1), (COLUMNS, 1))})
        order, group = next((leaf for leaf in layout if leaf.endswith("g_idx")), None), group_of(layout)
        if order and group and is_along(COLUMN_GROUPS, linear):
            if not is_in_order(self.files.read(f"{linear}.{order}"), group):
                # Columns of all groups are everywhere (desc_act), so each rank needs the scales of all.
                return {leaf: tuple((counts, 0 if counts == COLUMN_GROUPS else size) for counts, size in axes)
                        for leaf, axes in layout.items()}
        return layout

    def part(self, linear: str) -> tuple[int, int, int]:
        """(First, end) of a rank's rows or columns of W, and how many there are."""
        prefix, _, kind = linear.rpartition(".")
        if kind == "up_proj" or kind == "down_proj":  # what gate_proj has rows of
            return self.part(f"{prefix}.gate_proj")
        if kind in self.heads:
            if (unit := self.unit(linear)) > 1 and not self.fit(kind, unit, self.place.ranks):
                raise ValueError(f"{self.place.ranks} processes would cut {kind} within {unit} "
                                 f"{'columns' if kind in BY_COLUMNS else 'rows'} that share a scale or a word; start "
                                 f"{self.largest_fit()}")
            return *self.heads[kind], self.sizes[kind]
        together = [f"{prefix}.{each}" for each in WIDTHS] if kind in WIDTHS else [linear]
        size, unit = self.shape(linear)[0], math.lcm(*map(self.unit, together))
        if kind in WIDTHS and any(map(self.is_packed, together)):
            unit = math.lcm(unit, min(GROUPS))  # PyTorch's kernels want so many columns
            unit = size if 0 < size % unit <= 4 else unit  # the word of so short a rest may have four bits or eight
        if size < self.place.ranks and unit == 1:
            raise ValueError(f"{self.place.ranks} processes cannot share the {size} rows of {kind}; start fewer")
        return *span(size, self.place, unit), size

    def unit(self, linear: str) -> int:
        """So many rows or columns of W are never cut. One block of FP8 with all heads gives all ranks its scale."""
        kind = kind_of(linear)
        unit = math.lcm(*(size for axes in self.layout(linear).values() for counts, size in axes
                          if size and is_along(counts, linear)))
        return 1 if kind in self.heads and unit >= self.sizes[kind] and not self.is_packed(linear) else unit

    def is_packed(self, linear: str) -> bool:
        return "weight" not in self.layout(linear)

    def fit(self, kind: str, unit: int, ranks: int) -> bool:
        """Whether the heads of so many ranks begin and end with whole units."""
        with suppress(ValueError):  # these cannot share the heads
            edges = {edge for each in range(ranks) for edge in share_heads(self.config, Place(each, ranks))[kind]}
            return all(edge % unit == 0 or edge == self.sizes[kind] for edge in edges)
        return False

    def largest_fit(self) -> int:
        """The most ranks, below as many as there are, whose heads begin and end with whole units everywhere."""
        linears = {name.rpartition(".")[0] for name in self.files.tensors}
        units = {(kind, self.unit(linear)) for linear in linears if (kind := kind_of(linear)) in self.heads}
        return next((ranks for ranks in range(self.place.ranks - 1, 1, -1)
                     if all(self.fit(kind, unit, ranks) for kind, unit in units)), 1)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """A rank's part of a tensor: a view, so that of a mapped file the rest is not read."""
        axis, first, end, size = self.of(name)
        part = tensor if end - first == size else tensor.narrow(axis, first, end - first)
        linear, _, leaf = name.rpartition(".")
        if leaf.endswith("g_idx") and first and (group := group_of(self.layout(linear))):
            return part - first // group  # it names the groups that the rank has, from 0 on
        return part

    def count(self, name: str) -> int:
        """How many numbers that are."""
        _, first, end, size = self.of(name)
        return math.prod(self.files.tensors[name].shape) * (end - first) // max(size, 1)

    def count_weights(self, name: str) -> int:
        """How many weights a rank's part of a tensor of words holds; 0 for what only says how to read them."""
        linear = name.rpartition(".")[0]
        first, end, size = self.part(linear) if self.is_cut(linear) else (0, 1, 1)
        return count_weights(self.files, name) * (end - first) // max(size, 1)

    def finish(self, model: Model) -> None:
        """After loading: the head gives all logits, and nothing is trained, since the sums have no gradient."""
        if self.place.ranks > 1:
            head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
            gather_logits(model.requires_grad_(False), self.part(head)[0])


def kind_of(linear: str) -> str:
    return linear.rpartition(".")[2]


def is_along(counts: int, linear: str) -> bool:
    """Whether what an axis counts is what ranks have some of."""
    return (counts != ROWS) == (kind_of(linear) in BY_COLUMNS)


def group_of(layout: dict[str, Axes]) -> int:
    """Columns that share a scale; 0 for all, and for weights without groups."""
    return max((size for axes in layout.values() for counts, size in axes if counts == COLUMN_GROUPS), default=0)


def share_model(model: Model, files: CheckpointFiles) -> Shares:
    """Swap the parts that need all ranks for parallel ones, and leave room for no more than a share of each tensor.

    Before loading; in one process nothing is swapped, and every share is the whole.
    """
    if here().ranks == 1:
        return Shares(model.config, files)
    shares = Shares(model.config, files, shapes={
        name.removesuffix(".weight"): tuple(weight.shape) for name, weight in model.named_parameters()})
    stored = [(name, tensor.shape, str(tensor.dtype)) for name, tensor in sorted(files.tensors.items())]
    check_alike("checkpoint", (model.config, stored))
    for module in model.modules():
        module.__class__ = PARALLEL.get(type(module), type(module))
        if isinstance(module, Layer):
            share_cache(module.self_attn, shares.heads)
    for name, weight in list(model.named_parameters()):
        linear, _, leaf = name.rpartition(".")
        if shares.is_cut(linear):
            first, end, _ = shares.part(linear)
            own = weight.detach().narrow(int(kind_of(linear) in BY_COLUMNS), first, end - first)
            setattr(model.get_submodule(linear), leaf, nn.Parameter(own))
    for module, name in CHANCE:
        setattr(module, name, on_first_rank(getattr(module, name)))
    return shares
