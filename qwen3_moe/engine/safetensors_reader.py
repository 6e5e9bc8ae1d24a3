"""The files of a checkpoint: names -> tensors, mapped into memory and not read before they are used.

A checkpoint is a folder with one model.safetensors, or with several such files and
model.safetensors.index.json, whose `weight_map` says which tensor is in which file. A safetensors file is
8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}} and the numbers, row by row;
nothing in it can be executed. That is why .bin and .pth files, which are Python pickles, are never opened.
"""

import json
import math
import mmap
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .fields import one_line, plain, read_json, short

# The dtypes of weights and scales, by their names in the header; those of config.json are fields.DTYPES.
SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
# Words of packed integers, their zero points and groups (packed_formats.py), known under these names alone.
INTEGERS = {"I32": torch.int32, "I64": torch.int64}
PACKED = re.compile(r".+\.(qweight|qzeros|g_idx|weight_(packed|shape|zero_point|g_idx))")
FOUR_BITS = {"U8": " (4-bit weights, as NVFP4's, are)", "U32": " (4-bit weights in MLX's format are)",
             "I32": " (4-bit weights of AWQ and GPTQ are)"}
# Tensors that are no weights: tables that follow from the config, counters, and scales of activations and of a
# quantised cache, which are kept in wider types here. A superfluous tensor that is not on this list is an error.
NO_WEIGHTS = re.compile(
    r"(^|\.)(rotary_emb\.[^.]+|position_ids|masked_bias|(local_)?tokens_per_expert|num_batches_tracked)$"
    r"|\.(input_scale(_ub)?|input_global_scale|activation_scale|(prob_)?output_scale|[qkv]_scale)$")
FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(\.weight)?(_scale_inv|_scale)?")


class TensorInfo(NamedTuple):
    """Where a tensor lies: `size` bytes from byte `start` of the file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int


class CheckpointFiles:
    """The tensors of a folder: `tensors` by name, `read(name)` maps one into memory; `passed_over` are no weights.

    The `safetensors` library checks each header, and what it refuses is refused. It does not read the tensors: its
    get_tensor touches the numbers (0.8: 0.3 MB of each tensor).
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        index = "model.safetensors.index.json"
        self.directory, self.tensors, self.maps, self.passed_over = directory, {}, {}, []
        for file, promised in files_of(directory, index).items():
            path = directory / file
            if not path.is_file():
                raise FileNotFoundError(f"{path}: this part of the checkpoint is missing; download it again")
            found = read_header(path)
            if absent := sorted(name for name in promised - found.keys() if not NO_WEIGHTS.search(name)):
                raise ValueError(f"{path}: {plain(absent[0])} is missing, though {index} says that it is here")
            if twice := sorted(found.keys() & self.tensors.keys()):
                raise ValueError(f"{path}: {plain(twice[0])} is in it and in {self.tensors[twice[0]].path.name} too")
            self.tensors |= found
        for name in [name for name, tensor in self.tensors.items() if is_no_weight(name, tensor)]:
            del self.tensors[name]
            self.passed_over.append(name)
        shared: dict[re.Match, TensorInfo] = {}  # one scale for all experts of a layer
        for name, tensor in list(self.tensors.items()):
            if tensor.dtype in INTEGERS and PACKED.fullmatch(name):
                self.tensors[name] = tensor._replace(dtype=INTEGERS[tensor.dtype])
            elif not isinstance(tensor.dtype, torch.dtype):
                stored = short(tensor.dtype)[1:-1] + FOUR_BITS.get(tensor.dtype, "")
                known = ", ".join(SAFETENSORS_DTYPES)
                raise ValueError(f"{tensor.path}: {plain(name)} is stored as {stored}; known are {known}")
            fused = FUSED.fullmatch(name)
            if fused and fused[4] and tensor.size == tensor.dtype.itemsize:
                shared[fused] = self.tensors.pop(name)
            elif fused and len(tensor.shape) and tensor.shape[0] <= 4096:
                del self.tensors[name]
                self.tensors |= split_experts(tensor, fused)
            elif name.endswith(".weight_scale") and f"{name[:-5]}packed" not in self.tensors:  # another spelling
                self.tensors[f"{name}_inv"] = self.tensors.pop(name)
        for fused, tensor in shared.items():
            names = "gate_proj|up_proj" if fused[2] == "gate_up_proj" else "down_proj"
            weight = re.compile(rf"{re.escape(fused[1])}\.\d+\.({names})\.weight")
            self.tensors |= {f"{name}_scale_inv": tensor for name in self.tensors if weight.fullmatch(name)}

    def read(self, name: str) -> Tensor:
        """A tensor on the file's own bytes, with a storage of its own: saving it writes its numbers and no others."""
        path, shape, dtype, start, size = self.tensors[name]
        if path not in self.maps:
            self.maps[path] = map_file(path)
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        data = torch.frombuffer(self.maps[path], dtype=torch.uint8, count=size, offset=start)
        if start % dtype.itemsize:
            data = data.clone()  # misaligned: view(dtype) needs a multiple of the number's size
        return data.view(dtype).view(shape)


def is_copy(files: CheckpointFiles, one: str, other: str, every: int = 1) -> bool:
    """Whether two tensors hold the same bytes, as tied ones do; `every` 997 compares every 997th row."""
    its, others = files.tensors[one], files.tensors.get(other)
    if others is None or (its.shape, its.dtype) != (others.shape, others.dtype) or not its.shape:
        return False
    return torch.equal(*(files.read(name)[::every].view(torch.uint8) for name in (one, other)))


def is_no_weight(name: str, tensor: TensorInfo) -> bool:
    return tensor.size == 0 or bool(NO_WEIGHTS.search(name))


def split_experts(tensor: TensorInfo, fused: re.Match) -> dict[str, TensorInfo]:
    """All experts of a layer in one tensor, as transformers 5 keeps them -> each expert's own, on the same bytes.

    gate_up_proj (E, 2F, D) has the rows of gate_proj first, then those of up_proj; down_proj is (E, D, F). A scale that
    both halves share, (E,) or (E, 1, 1), is given to each.
    """
    experts, matrix, _, scale = fused.groups()
    E, shape, size = tensor.shape[0], tensor.shape[1:], tensor.size // tensor.shape[0]
    leaf, names, shared = f"weight{'_scale_inv' if scale else ''}", [matrix], True
    if matrix == "gate_up_proj":
        names = ["gate_proj", "up_proj"]
        shared = bool(scale) and math.prod(shape[:1]) == 1
        if not shared and shape[0] % 2:
            raise ValueError(f"{tensor.path}: {plain(fused[0])} has {shape[0]} rows, which gate and up cannot share "
                             "evenly")
    step = 0 if shared else size // 2
    shape, part = (shape, size) if shared else ((shape[0] // 2, *shape[1:]), size // 2)
    return {f"{experts}.{e}.{name}.{leaf}":
            tensor._replace(shape=shape, start=tensor.start + e * size + i * step, size=part)
            for e in range(E) for i, name in enumerate(names)}


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes as memory, read when they are touched; what is written to them stays in this process."""
    with path.open("rb") as file:
        if sys.platform == "linux":  # NORESERVE, else it refuses a file that is larger than memory and swap
            how = {"flags": mmap.MAP_PRIVATE | 0x4000, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        else:
            how = {"access": mmap.ACCESS_COPY}
        try:
            return mmap.mmap(file.fileno(), 0, **how)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"{path}: cannot be mapped into memory ({why})") from None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; ValueError where it is truncated or damaged."""
    try:
        with path.open("rb") as file:
            end, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            if length > min(end - 8, 100_000_000):
                raise ValueError("it ends within the header")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=no_key_twice)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        tensors = {}
        for name, entry in header.items():
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            dtype = SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])  # one that is not known may be a buffer's
            itemsize = getattr(INTEGERS.get(dtype, dtype), "itemsize", None)
            whole = all(type(number) is int and number >= 0 for number in (*shape, first, last)) and first <= last
            if not whole or (itemsize and last - first != math.prod(shape) * itemsize):
                raise ValueError(f"{plain(name)} is not where the header says")
            tensors[name] = TensorInfo(path, shape, dtype, 8 + length + first, last - first)
        covered = 8 + length  # every byte belongs to one tensor, and to one only
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
            if tensor.start != covered:
                raise ValueError(f"{plain(name)} is not where the header says: it begins at byte {tensor.start}, not "
                                 f"{covered}")
            covered += tensor.size
        if covered != end:
            raise ValueError(f"its tensors end at byte {covered}, the file at {end}")
        check_with_library(path)
        return tensors
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or damaged ({one_line(error)}); download it again") from None


def no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(names := dict(pairs)) < len(pairs):
        raise ValueError("its header names something twice")
    return names


def check_with_library(path: Path) -> None:
    """Refuse what the library refuses, even if it was overlooked here. It cannot open what is larger than memory."""
    try:
        str(path).encode()
        with safe_open(path, framework="pt"):
            pass
    except UnicodeEncodeError:  # a path that is not UTF-8, which it cannot open
        pass
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise ValueError(str(error)) from None


def files_of(directory: Path, index: str) -> dict[str, set[str]]:
    """File name -> the tensors that are promised in it; several files come with an index, or at least numbered."""
    whole = directory / "model.safetensors"
    if whole.exists() or whole.is_symlink():  # a link to nothing is refused later
        return {"model.safetensors": set()}
    if (directory / index).exists():
        return files_of_index(directory / index)
    numbered = {path.name: match for path in sorted(directory.glob("*.safetensors"))
                if (match := re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", path.name))}
    if numbered:
        if any(match[1] == "model" for match in numbered.values()):  # and not an optimizer's
            numbered = {name: match for name, match in numbered.items() if match[1] == "model"}
        sets = {(match[1], int(match[3])) for match in numbered.values()}
        if len(sets) > 1:
            some = f"{min(numbered)}, {max(numbered)}"
            raise ValueError(f"{directory}: has parts of several checkpoints ({some}) and no {index}")
        ((_, count),) = sets
        if len(numbered) < count:
            raise FileNotFoundError(f"{directory}: only {len(numbered)} of {count} parts are there, and no {index}; "
                                    "download it again")
        return {name: set() for name in numbered}
    if any(directory.glob("*.gguf")):
        raise ValueError(f"{directory}: has only GGUF files, which llama.cpp runs; get the safetensors release of the "
                         "model")
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if pickled := sorted(path.name for path in directory.glob(pattern)):
            raise ValueError(f"{directory}: has only pickled weights ({plain(pickled[0])}); those can run code when "
                             "opened and are never read here; convert them to safetensors first")
    if others := sorted(path.name for path in directory.glob("*.safetensors")):
        raise FileNotFoundError(f"{directory}: has {plain(others[0])}, but neither model.safetensors nor {index}, "
                                "where a release for transformers has its weights; get that, or rename the file if it "
                                "is one")
    raise FileNotFoundError(f"{directory}: no weights in it, neither model.safetensors nor {index}; download it again")


def files_of_index(index: Path) -> dict[str, set[str]]:
    """File name -> the tensors that the index promises in it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    where: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A path from a downloaded file must not reach anything else on this machine.
        if isinstance(file, str) and (len(file.encode("utf-8", "replace")) > 255 or not file.isprintable()):
            raise ValueError(f"{index}: {plain(name)} points to {short(file)}, which is not the name of a file")
        if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\\" in file:
            raise ValueError(f"{index}: {plain(name)} points outside the folder, to {short(file)}")
        where.setdefault(file, set()).add(name)
    return where
