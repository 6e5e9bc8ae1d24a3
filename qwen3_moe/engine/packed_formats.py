"""Where the published formats of small integers keep their bits: AWQ, GPTQ, compressed-tensors' pack-quantized.

All of them store words of 32 bits with p values each, 8 of four bits or 4 of eight, the first in the lowest bits (AWQ:
in the order 0, 2, 4, 6, 1, 3, 5, 7); for a W of O rows (out) and I columns (in), and G groups of columns:

                        values                  scale                  zero point
    AWQ                 qweight (I, O/p)        scales (G, O)          qzeros (G, O/p)
    GPTQ                qweight (I/p, O)        scales (G, O)          qzeros (G, O/p); one less than meant
    compressed-tensors  weight_packed (O, I/p)  weight_scale (O, G)    weight_zero_point (O/p, G); or none, which is
                                                                       the middle of the range

GPTQ may say of each column by g_idx (I,) which group it belongs to. With checkpoint_format gptq_v2 the zero points are
those that are meant. compressed-tensors stores signed numbers, raised by 8 or 128 so that none is negative.

AWQ: Lin et al. 2023 (arXiv:2306.00978). GPTQ: Frantar et al. 2022 (arXiv:2210.17323).
"""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from ..config import Config
from .int4 import GROUPS, Integers, is_in_order
from .integer_linear import IntegerLinear
from .nibbles import look_up, nibbles
from .processes import ranks
from .quantized import COLUMN_GROUPS, COLUMNS, ROWS, Axes, FP8Linear
from .safetensors_reader import CheckpointFiles, TensorInfo

WORDS, FLOATS = (torch.int32, torch.int64), (torch.bfloat16, torch.float16, torch.float32)
LEAF = re.compile(r".+\.(qweight|qzeros|scales|g_idx|weight_(packed|scale|shape|zero_point|g_idx))")
COLUMNS_IN_ORDER = re.compile(r".+\.(o|down)_proj\.(weight_)?g_idx")  # of these a rank has columns
Layout = dict[str, Axes]


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """(…, n) int32 -> (…, count) uint8, the values of a word from the lowest bits on."""
    data = words.contiguous().flatten().view(torch.uint8)
    if bits == 4:  # the table is on the CPU
        data = look_up(data, -1, torch.uint8) if data.device.type == "cpu" else nibbles(data)
    return data.view(*words.shape[:-1], -1)[..., :count]


def middle(values: Tensor, bits: int) -> Tensor:
    """Of eight bits, 0…255 -> int8: values and zero points are lowered by 128 alike."""
    return values if bits == 4 else (values ^ 128).view(torch.int8)


def check_types(files: CheckpointFiles, name: str, layout: Layout) -> Layout:
    """ValueError for words that are not int32, and for scales that are no 16 or 32-bit floats."""
    for leaf in layout:
        found = files.tensors.get(f"{name}.{leaf}")
        known = FLOATS if "scale" in leaf else WORDS if leaf.endswith(("g_idx", "shape")) else WORDS[:1]
        if found and found.dtype not in known:
            raise ValueError(f"{found.path}: {name}.{leaf} is stored as {found.dtype}; known are "
                             f"{', '.join(map(str, known))}")
    return layout


def find(files: CheckpointFiles, name: str, leaf: str, config: Config, *formats: str) -> TensorInfo | None:
    """The tensor that tells the format, if it is there; ValueError if config.json does not announce the format."""
    found = files.tensors.get(f"{name}.{leaf}")
    if found and config.quantization not in formats:
        raise ValueError(f"{found.path}: {name}.{leaf} is packed, as config.json's quantization_config does not say")
    return found


def find_group(files: CheckpointFiles, name: str, axis: int, columns: int, config: Config) -> tuple[int, int]:
    """The axis of groups, by the scales that are stored. ValueError where these make no groups of the columns."""
    found = files.tensors.get(name)
    if found is None or len(found.shape) != 2:  # whatever is wrong is said when shapes are compared
        return COLUMN_GROUPS, 0
    group = group_size(columns, found.shape[axis], config)
    if group is None:
        raise ValueError(f"{found.path}: {name} has shape {found.shape}, which does not divide {columns} columns")
    return COLUMN_GROUPS, group if found.shape[axis] > 1 else 0


def group_size(columns: int, groups: int, config: Config) -> int | None:
    """Columns that share a scale: as config.json says, or all groups alike; None where neither makes so many groups."""
    said = config.weight_block_size[1] if config.weight_block_size else None
    if said is not None and -(-columns // said) == groups:
        return min(said, columns)
    return columns // groups if groups and columns % groups == 0 else None


def groups_of(linear: IntegerLinear, name: str, groups: int) -> Tensor | None:
    """Each column's group, where the checkpoint says it; ValueError for one that is not there."""
    g_idx = getattr(linear, name, None)
    if g_idx is not None and g_idx.device.type == "cpu" and not 0 <= g_idx.min() <= g_idx.max() < groups:
        raise ValueError(f"a {name} of this checkpoint names a group that is not among the {groups} of its matrix; "
                         "download it again")
    return g_idx


def packed_shape(files: CheckpointFiles, linear: str) -> tuple[int, int] | None:
    """(O, I) of a W that is stored as words, without reading these; None for another, and where parts are missing."""
    leaves = ("weight_packed", "weight_shape", "qweight", "qzeros", "scales")
    packed, shape, *others = (files.tensors.get(f"{linear}.{leaf}") for leaf in leaves)
    if packed and shape and shape.shape == (2,):
        return tuple(files.read(f"{linear}.weight_shape").tolist())
    if not all(found and len(found.shape) == 2 for found in others):
        return None
    (first, second), (_, zeros), (_, O) = (found.shape for found in others)
    p = 4 if zeros == -(-O // 4) else 8
    return O, first * p if second == O else first  # GPTQ packs columns, AWQ rows


def count_weights(files: CheckpointFiles, name: str) -> int:
    """How many weights a tensor of words holds; 0 for what only says how to read them."""
    linear, _, leaf = name.rpartition(".")
    return math.prod(packed_shape(files, linear) or (0,)) if leaf in ("qweight", "weight_packed") else 0


def suit_kernel(config: Config, files: CheckpointFiles) -> tuple[Config, list[str]]:
    """(The config with the type of activations in which PyTorch's kernels compute; notes)."""
    if config.quantization in (None, "fp8"):
        return config, []
    notes, size = [], config.weight_block_size[1] if config.weight_block_size else None
    embedding = files.tensors.get("model.embed_tokens.weight")
    if torch.float16 in (config.dtype, embedding.dtype if embedding and config.dtype is None else None):
        config = replace(config, dtype=torch.bfloat16)
        notes.append("activations and cache are bfloat16 here and not the checkpoint's float16: PyTorch multiplies "
                     "packed weights fast in that type only")
    first = next((name for name in files.tensors if name.endswith(("qweight", "weight_packed"))), None)
    eight_bits = first and count_weights(files, first) == 4 * math.prod(files.tensors[first].shape)
    if size and first and (size % min(GROUPS) or eight_bits):
        notes.append(f"PyTorch has no fast matmul for such packed weights (groups of {size} columns): they are "
                     "dequantised for every token, which is slow")
    order = next((name for name in files.tensors if COLUMNS_IN_ORDER.fullmatch(name)), None) if ranks() > 1 else None
    if size and order and not is_in_order(files.read(order), size):
        notes.append("each process has columns of all groups of o_proj and down_proj (desc_act), for which PyTorch has "
                     "no fast matmul: these are dequantised for every token, which is slow")
    return config, notes


class AWQLinear(IntegerLinear):
    """AWQ as its "gemm" version stores it."""

    @staticmethod
    def layout(files: CheckpointFiles, name: str, shape: tuple[int, int], config: Config) -> Layout | None:
        if config.quantization in ("gptq", "gptq_v2") or not find(files, name, "qweight", config, "awq"):
            return None
        group = find_group(files, f"{name}.scales", 0, shape[1], config)
        return check_types(files, name, {
            "qweight": ((COLUMNS, 1), (ROWS, 8)), "qzeros": (group, (ROWS, 8)), "scales": (group, (ROWS, 1))})

    @classmethod
    def make(cls, config: Config, shape: tuple[int, int], **tensors: Tensor) -> "AWQLinear":
        return cls(shape, group_size(shape[1], len(tensors["scales"]), config), **tensors)

    def integers(self) -> Integers:
        # The values 0, 1, 2, … of a word stand at its places 0, 4, 1, 5, 2, 6, 3, 7. Words are turned before they are
        # unpacked: an eighth of the elements.
        values, zero = (torch.stack([((words >> (4 * place)) & 15).byte() for place in (0, 4, 1, 5, 2, 6, 3, 7)], 1)
                        .flatten(0, 1) for words in (self.qweight.T.contiguous(), self.qzeros.T))
        O = self.shape[0]
        return Integers(values[:O], self.scales.T, zero[:O], self.group)


class GPTQLinear(IntegerLinear):
    """GPTQ in four or eight bits."""

    zeros_are_less = 1  # than what they mean

    @staticmethod
    def layout(files: CheckpointFiles, name: str, shape: tuple[int, int], config: Config) -> Layout | None:
        """With p values a word, as the rows of qweight tell."""
        if config.quantization == "awq":
            return None
        found = find(files, name, "qweight", config, "gptq", "gptq_v2")
        if found is None:
            return None
        p = 4 if found.shape[:1] == (-(-shape[1] // 4),) else 8
        group = find_group(files, f"{name}.scales", 0, shape[1], config)
        order = {"g_idx": ((COLUMNS, 1),)} if f"{name}.g_idx" in files.tensors else {}
        return check_types(files, name, order | {
            "qweight": ((COLUMNS, p), (ROWS, 1)), "qzeros": (group, (ROWS, p)), "scales": (group, (ROWS, 1))})

    @classmethod
    def make(cls, config: Config, shape: tuple[int, int], **tensors: Tensor) -> "GPTQLinear":
        linear = cls(shape, group_size(shape[1], len(tensors["scales"]), config), **tensors)
        linear.zeros_are_less = int(config.quantization == "gptq")
        return linear

    def integers(self) -> Integers:
        O, I = self.shape
        bits = 8 if self.qweight.shape[0] == -(-I // 4) else 4
        values = unpack(self.qweight.T, bits, I)  # words are turned first: an eighth of the elements
        zero = (unpack(self.qzeros, bits, O) + self.zeros_are_less) & (2**bits - 1)  # as AutoGPTQ: 15 + 1 is 0
        g_idx = groups_of(self, "g_idx", len(zero))
        return Integers(middle(values, bits), self.scales.T, middle(zero, bits).T, self.group, g_idx)


class CompressedLinear(IntegerLinear):
    """compressed-tensors' pack-quantized in four or eight bits."""

    @staticmethod
    def layout(files: CheckpointFiles, name: str, shape: tuple[int, int], config: Config) -> Layout | None:
        """With p values a word, as the columns of weight_packed tell."""
        found = find(files, name, "weight_packed", config, "compressed-tensors")
        if found is None:
            return None
        p = 4 if found.shape[1:] == (-(-shape[1] // 4),) else 8
        group = find_group(files, f"{name}.weight_scale", 1, shape[1], config)
        more = {"weight_zero_point": ((ROWS, p), group), "weight_g_idx": ((COLUMNS, 1),)}
        return check_types(files, name, {
            "weight_packed": ((ROWS, 1), (COLUMNS, p)), "weight_scale": ((ROWS, 1), group), "weight_shape": ()
        } | {leaf: axes for leaf, axes in more.items() if f"{name}.{leaf}" in files.tensors})

    @classmethod
    def stored(cls, *arguments) -> dict[str, tuple[int, ...]] | None:
        shapes = super().stored(*arguments)
        return shapes and shapes | {"weight_shape": (2,)}

    @classmethod
    def make(cls, config: Config, shape: tuple[int, int], **tensors: Tensor) -> "CompressedLinear":
        return cls(shape, group_size(shape[1], tensors["weight_scale"].shape[1], config), **tensors)

    def integers(self) -> Integers:
        O, I = self.shape
        bits = 8 if self.weight_packed.shape[1] == -(-I // 4) else 4
        values, scale = unpack(self.weight_packed, bits, I), self.weight_scale
        zero = values.new_full(scale.shape, 2 ** (bits - 1))
        if hasattr(self, "weight_zero_point"):
            zero = unpack(self.weight_zero_point.T, bits, O).T
        g_idx = groups_of(self, "weight_g_idx", scale.shape[1])
        return Integers(middle(values, bits), scale, middle(zero, bits), self.group, g_idx)


INTEGERS = AWQLinear, GPTQLinear, CompressedLinear
FORMATS = FP8Linear, *INTEGERS
