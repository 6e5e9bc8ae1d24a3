"""5b. A checkpoint becomes a model: tensors of files -> parameters, nothing copied twice.

The model is built on PyTorch's "meta" device, where tensors have a shape and no memory. Each tensor of the
checkpoint is then put in its place. On the CPU it stays where it is, in the memory-mapped file: the
operating system reads a page when it is first used, so a model of any size starts at once. Another type or
device costs one conversion per tensor.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import DTYPES, Config
from .engine.safetensors_reader import FP8, CheckpointFiles
from .layers import Linear, dequantize
from .model import Model


def load_model(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None,
               progress: Callable[[int, int], None] | None = None) -> Model:
    """The checkpoint in `directory` as a model in eval mode.

    dtype None keeps the checkpoint's own; FP8 weights then stay FP8 and are dequantised as they are used,
    while a dtype expands them once. `progress(done, total)` counts tensors.
    Raises FileNotFoundError or ValueError, saying which file or tensor is missing, damaged or unexpected.
    """
    config = Config.from_checkpoint(directory)
    files = CheckpointFiles(directory)
    compute = compute_dtype(config, files, dtype)
    if config.num_hidden_layers > len(files.tensors):  # a damaged number, and each would be built before one is missed
        raise ValueError(f"{files.directory}: config.json asks for {config.num_hidden_layers} layers, the files hold "
                         f"{len(files.tensors)} tensors")
    with torch.device("meta"):
        model = Model(config)
    names = check_names_and_shapes(model, files)

    for done, name in enumerate(names, start=1):
        tensor = files.read(name).to(device)
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if tensor.dtype == FP8 or leaf == "weight_scale_inv":
            if dtype is None:
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
            elif leaf == "weight":
                scale = files.read(f"{name}_scale_inv").to(device)
                module.weight = nn.Parameter(dequantize(tensor, scale, compute))
        else:
            setattr(module, leaf, nn.Parameter(tensor.to(compute)))
        if progress:
            progress(done, len(names))
    return model.eval()


def bytes_in_memory(directory: str | Path, dtype: torch.dtype | str | None = None) -> int:
    """What the weights will take on the device, computed from the headers alone."""
    config, files = Config.from_checkpoint(directory), CheckpointFiles(directory)
    compute = compute_dtype(config, files, dtype)
    total = 0
    for name, (_, shape, stored, *_) in files.tensors.items():
        is_scale = name.endswith("_scale_inv")
        if (is_scale and dtype is not None) or name in copies(config):
            continue  # a scale that was multiplied in, or a tensor once more
        total += math.prod(shape) * (stored if dtype is None and (stored == FP8 or is_scale) else compute).itemsize
    return total


def bytes_per_token(model: Model) -> int:
    """What one new token reads: every weight, but of an embedding that is not the head as well only a row."""
    total = sum(p.nbytes for p in model.parameters())
    return total if model.lm_head is None else total - model.model.embed_tokens.weight.nbytes


def find_device(name: str | None) -> torch.device:
    """The named device, or the fastest that is there; ValueError if it cannot be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):  # by device, an absent one raises any of these
        raise ValueError(f"device {name!r} is not usable here; `-d cpu` always is") from None
    return device


def free_memory(device: torch.device) -> int | None:
    """Bytes, or None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:  # Linux counts what it could drop, such as files that it caches
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


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
        stored = files.tensors.get("model.embed_tokens.weight")
        dtype = stored.dtype if stored else None
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    return dtype


def check_names_and_shapes(model: Model, files: CheckpointFiles) -> list[str]:
    """The names to load. Each parameter has its tensor, each tensor its parameter, of one shape; else ValueError."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in list(expected):
        stored = files.tensors.get(name)
        if stored is not None and stored.dtype == FP8:
            block = model.config.weight_block_size
            if block is None or not isinstance(model.get_submodule(name.rpartition(".")[0]), Linear):
                raise ValueError(f"{stored.path}: {name} is FP8, which config.json's quantization_config does not announce")
            expected[f"{name}_scale_inv"] = tuple(math.ceil(n / b) for n, b in zip(expected[name], block))
    found = set(files.tensors)
    for copy, original in copies(model.config).items():
        if copy in found and original in found:  # some checkpoints store it, others do not
            check_copy(files, copy, original)
            found.remove(copy)

    for wrong, what in ((expected.keys() - found, "missing from the checkpoint"),
                        (found - expected.keys(), "in the checkpoint, but the config has no place for it")):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(f"{files.directory}: {min(wrong)}{more} is {what}")
    for name, shape in expected.items():
        stored = files.tensors[name]
        if stored.shape != shape:
            raise ValueError(f"{stored.path}: {name} has shape {stored.shape}, the config asks for {shape}")
    return list(expected)


def copies(config: Config) -> dict[str, str]:
    """Tensors that are another one once more, and are not loaded: name -> name of the original."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def check_copy(files: CheckpointFiles, copy: str, original: str) -> None:
    """A stored copy may be left out only if it is one; every 997th row is compared."""
    one, other = files.read(copy), files.read(original)
    if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(one[::997], other[::997]):
        raise ValueError(f"{files.tensors[copy].path}: {copy} differs from {original}, of which it should be a copy by config.json")
