"""5. A checkpoint becomes a model: tensors of files -> parameters, nothing copied twice.

The model is built on PyTorch's "meta" device, where tensors have a shape and no memory. Each tensor of the
checkpoint is then put in its place. On the CPU it stays where it is, in the memory-mapped file: the
operating system reads a page when it is first used, so a model of any size starts at once. Another type or
device costs one conversion per tensor.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .config import DTYPES, Config
from .engine.fields import plain
from .engine.memory import find_device, free_memory, gigabytes
from .engine.quantized import FP8, block_of, dequantize, grid_of, swap_in_fp8
from .engine.safetensors_reader import CheckpointFiles, is_copy
from .engine.supported import check_tensor_names
from .layers import Linear
from .model import Model


def load_model(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None,
               progress: Callable[[int, int], None] | None = None) -> Model:
    """The checkpoint in `directory` as a model in eval mode.

    dtype None keeps the checkpoint's own; FP8 weights then stay FP8 and are dequantised as they are used,
    while a dtype expands them once. `progress(done, total)` counts tensors. What a user should know stands in
    model.config.notes.
    Raises FileNotFoundError or ValueError, saying which file or tensor is missing, damaged or unexpected.
    """
    config, files = read_checkpoint(directory, every=1)
    compute = compute_dtype(config, files, dtype)
    with torch.device("meta"):
        model = Model(config)
    names = check_names_and_shapes(model, files, keep_fp8=dtype is None)

    for done, name in enumerate(names, start=1):
        tensor = files.read(name).view(names[name]).to(device)
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if tensor.dtype == FP8 or leaf == "weight_scale_inv":
            if dtype is None:
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
            elif leaf == "weight":
                scale = files.read(f"{name}_scale_inv")
                block = block_of(names[name], tuple(scale.shape), config.weight_block_size)
                scale = scale.view(grid_of(names[name], block)).to(device)
                setattr(module, leaf, nn.Parameter(dequantize(tensor, scale, compute, block)))
        else:
            setattr(module, leaf, nn.Parameter(tensor.to(compute)))
        if progress:
            progress(done, len(names))
    return model.eval()


def read_checkpoint(directory: str | Path, every: int = 997) -> tuple[Config, CheckpointFiles]:
    """The config and the files, each corrected by the other.

    A tied head may be stored once more: a copy is dropped, another one is the head, as in transformers.
    `every` 1 compares all rows, as loading does; 997 every 997th, for what is asked before.
    """
    config, files, notes = Config.from_checkpoint(directory), CheckpointFiles(directory), []
    check_tensor_names(files.directory, files.tensors)
    if config.num_hidden_layers > len(files.tensors):  # a damaged number, and each would be built before one is missed
        raise ValueError(f"{files.directory}: config.json asks for {config.num_hidden_layers} layers, the files hold "
                         f"{len(files.tensors)} tensors")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in files.tensors and embedding not in files.tensors:
        files.tensors[embedding] = files.tensors.pop(head)  # stored once, under the other name
    if config.tie_word_embeddings and head in files.tensors:
        if is_copy(files, head, embedding, every):
            del files.tensors[head]
        else:
            config = replace(config, tie_word_embeddings=False)
            notes.append("config.json ties the head to the embedding, but the files hold another lm_head.weight: that one is used")
    if config.quantization == "fp8":
        scales = sorted({name.rpartition(".")[2] for name in files.passed_over if name.endswith("_scale")})
        notes.append("FP8 weights: activations and cache stay in a wider type here than the checkpoint's scheme asks for"
                     + (f" ({', '.join(scales)} not used)" if scales else ""))
    return replace(config, notes=(*config.notes, *notes)), files


def bytes_in_memory(directory: str | Path, dtype: torch.dtype | str | None = None) -> int:
    """What the weights will take on the device, computed from the headers alone."""
    config, files = read_checkpoint(directory)
    compute = compute_dtype(config, files, dtype)
    total = 0
    for name, (_, shape, stored, *_) in files.tensors.items():
        is_scale = name.endswith("_scale_inv")
        if is_scale and dtype is not None:
            continue  # multiplied in
        total += math.prod(shape) * (stored if dtype is None and (stored == FP8 or is_scale) else compute).itemsize
    return total


def bytes_per_token(model: Model) -> int:
    """What one new token reads: every weight, but of an embedding that is not the head as well only a row."""
    total = sum(p.nbytes for p in model.parameters())
    return total if model.lm_head is None else total - model.model.embed_tokens.weight.nbytes


def check_memory(directory: str | Path, device: torch.device, dtype: str | None, tokens: int, cache: int) -> str:
    """How large the weights are, in words; ValueError if they and a cache of `cache` bytes do not fit on the device."""
    weights, free = bytes_in_memory(directory, dtype), free_memory(device)
    if free is not None and weights + cache > free:
        raise ValueError(f"{Path(directory).name} needs {gigabytes(weights)} for weights and {gigabytes(cache)} for the "
                         f"cache of {tokens:,} tokens, but {device} has {gigabytes(free)} free; choose a smaller "
                         "checkpoint, another device or a smaller -n")
    return gigabytes(weights)


def compute_dtype(config: Config, files: CheckpointFiles, dtype: torch.dtype | str | None) -> torch.dtype:
    """One type for activations, norms and cache, decided once: asked for, or the config's, or the embedding's."""
    dtype = DTYPES.get(dtype, dtype) or config.dtype
    if dtype is None:
        stored = files.tensors.get("model.embed_tokens.weight") or files.tensors.get("lm_head.weight")
        dtype = stored.dtype if stored else None
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    return dtype


def check_names_and_shapes(model: Model, files: CheckpointFiles, keep_fp8: bool = True) -> dict[str, tuple[int, ...]]:
    """What to load: name -> shape. Each parameter has its tensor, each tensor its parameter, of one shape; else ValueError.

    Where a tensor is FP8 and stays so, the Linear that it belongs to is replaced by one of FP8.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in list(expected):
        stored = files.tensors.get(name)
        if stored is not None and stored.dtype == FP8:
            module = name.rpartition(".")[0]
            if model.config.quantization != "fp8" or not isinstance(model.get_submodule(module), Linear):
                raise ValueError(f"{stored.path}: {name} is FP8, which config.json's quantization_config does not announce")
            scale = files.tensors.get(f"{name}_scale_inv")
            block = block_of(expected[name], scale.shape, model.config.weight_block_size) if scale else (1, 1)
            if block is None:
                raise ValueError(f"{scale.path}: {name}_scale_inv has shape {scale.shape}, no scale for each block, row or tensor of "
                                 f"{expected[name]}")
            expected[f"{name}_scale_inv"] = grid_of(expected[name], block)
            if keep_fp8:
                swap_in_fp8(model, module, block)
    found = set(files.tensors)
    for wrong, what in ((expected.keys() - found, "missing from the checkpoint"),
                        (found - expected.keys(), "in the checkpoint, but the config has no place for it")):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(f"{files.directory}: {plain(min(wrong))}{more} is {what}")
    for name, shape in expected.items():
        stored = files.tensors[name]
        if stored.shape != shape and not (name.endswith("_scale_inv") and math.prod(stored.shape) == math.prod(shape)):
            raise ValueError(f"{stored.path}: {name} has shape {stored.shape}, the config asks for {shape}")
    return expected
