"""The files of a checkpoint: names -> tensors, mapped into memory and not read before they are used.

A checkpoint is a folder with one model.safetensors, or with several such files and
model.safetensors.index.json, whose `weight_map` says which tensor is in which file. A safetensors file is
8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}} and the numbers, row by row;
nothing in it can be executed. That is why .bin and .pth files, which are Python pickles, are never opened.
"""

import json
import math
import mmap
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import read_json

# The types of tensors that a checkpoint may hold, by their names in the safetensors header.
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
FP8 = torch.float8_e4m3fn


class Stored(NamedTuple):
    """Where a tensor lies: `size` bytes from byte `start` of the file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    size: int


class CheckpointFiles:
    """The tensors of a folder: `tensors` by name, `read(name)` maps one into memory.

    Not by the library of the same name, whose get_tensor touches the numbers (0.8: 0.3 MB of each tensor).
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        if single.exists():
            where = dict.fromkeys(["model.safetensors"], set())
        elif index.exists():
            where = files_of_index(index)
        elif pickles := sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in directory.glob(kind)):
            raise ValueError(f"{directory}: has only pickled weights ({pickles[0]}); those can run code when "
                             "opened and are never read here. Convert them to safetensors first.")
        else:
            raise FileNotFoundError(f"{directory}: no weights in it, neither {single.name} nor {index.name}")

        self.directory, self.tensors, self.maps = directory, {}, {}
        for file, promised in where.items():
            path = directory / file
            if not path.is_file():
                raise FileNotFoundError(f"{path}: this part of the checkpoint is missing; download it again")
            found = read_header(path)
            if absent := sorted(promised - found.keys()):
                raise ValueError(f"{path}: {absent[0]} is missing, though {index.name} says that it is here")
            if twice := sorted(found.keys() & self.tensors.keys()):
                raise ValueError(f"{path}: {twice[0]} is in it and in {self.tensors[twice[0]].path.name} too")
            self.tensors |= found

    def read(self, name: str) -> Tensor:
        path, shape, dtype, start, size = self.tensors[name]
        if path not in self.maps:
            self.maps[path] = map_file(path)
        data = self.maps[path][start:start + size]
        if start % dtype.itemsize:
            data = data.clone()  # a number may not begin between two places for numbers
        return data.view(dtype).view(shape)


def map_file(path: Path) -> Tensor:
    """A file's bytes as memory, read when they are touched; what is written to them stays in this process."""
    with path.open("rb") as file:
        if sys.platform == "linux":  # NORESERVE, else it refuses a file that is larger than memory and swap
            how = {"flags": mmap.MAP_PRIVATE | 0x4000, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        else:
            how = {"access": mmap.ACCESS_COPY}
        try:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0, **how), dtype=torch.uint8)
        except OSError as error:
            raise ValueError(f"{path}: cannot be mapped into memory ({error.strerror})") from None


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file; ValueError where it is truncated or damaged."""
    try:
        end = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > end - 8:
                raise ValueError("it ends within the header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            if entry["dtype"] not in STORED:
                raise NotImplementedError(f"{name} is stored as {entry['dtype']}; known are {', '.join(STORED)}")
            dtype = STORED[entry["dtype"]]
            whole = all(type(number) is int for number in (*shape, first, last))
            if not whole or not 0 <= first <= last <= end - 8 - length or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} is not where the header says")
            tensors[name] = Stored(path, shape, dtype, 8 + length + first, last - first)
        return tensors
    except NotImplementedError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); download it again") from None


def files_of_index(index: Path) -> dict[str, set[str]]:
    """File name -> the tensors that the index promises in it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    where: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A path from a downloaded file must not reach anything else on this machine.
        if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\\" in file:
            raise ValueError(f"{index}: {name} points outside the folder, to {file!r}")
        where.setdefault(file, set()).add(name)
    return where
