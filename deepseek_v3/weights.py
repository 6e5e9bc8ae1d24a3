"""5b. A checkpoint becomes a model: tensors of files -> parameters, nothing copied twice.

The model is built on PyTorch's "meta" device, where tensors have a shape and no memory. Each tensor of the
checkpoint is then put in its place. On the CPU it stays where it is, in the memory-mapped file: the
operating system reads a page when it is first used, so a model of any size starts at once, and an expert that
no token is routed to is never read: a mixture of experts larger than memory runs, as fast as the disk brings
the experts that it wants. Another type or device costs one conversion per tensor.

New against Qwen3-MoE: the router's bias stays float32, and the layer that predicts a second token may be missing,
as in checkpoints that were converted; its embedding and head are the model's own once more and are not loaded.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import DTYPES, Config
from .engine.safetensors_reader import FP8, CheckpointFiles
from .layers import Linear, dequantize
from .model import Model, MTPLayer
from .moe import Experts

BIAS = "e_score_correction_bias"  # the one tensor that is float32 whatever the others are


def load_model(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None,
               progress: Callable[[int, int], None] | None = None) -> Model:
    """The checkpoint in `directory` as a model in eval mode.

    dtype None keeps the checkpoint's own; FP8 weights then stay FP8 and are dequantised as they are used,
    while a dtype expands them once. `progress(done, total)` counts tensors.
    Raises FileNotFoundError or ValueError, saying which file or tensor is missing, damaged or unexpected.
    """
    files = CheckpointFiles(directory)
    config = what_is_stored(Config.from_checkpoint(directory), files)
    compute = compute_dtype(config, files, dtype)
    experts = config.n_routed_experts if config.is_sparse(config.num_hidden_layers - 1) else 0
    if max(config.num_hidden_layers, experts) > len(files.tensors):  # a damaged number, and each would be built before one is missed
        raise ValueError(f"{files.directory}: config.json asks for {config.num_hidden_layers} layers and {experts} experts, "
                         f"the files hold {len(files.tensors)} tensors")
    with torch.device("meta"):
        model = Model(config)
    names = check_names_and_shapes(model, files)
    stacked = type_of_stacks(config, files, torch.device(device), dtype, compute)
    for module in model.modules():
        if stacked is not None and isinstance(module, Experts):
            module.stack(device, stacked)

    for done, name in enumerate(names, start=1):
        tensor = files.read(name).to(device)
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if tensor.dtype == FP8 or leaf == "weight_scale_inv":
            if dtype is None:
                put(module, leaf, tensor)
            elif leaf == "weight":
                scale = files.read(f"{name}_scale_inv").to(device)
                put(module, leaf, dequantize(tensor, scale, compute))
        else:
            put(module, leaf, tensor.to(torch.float32 if leaf == BIAS else compute))
        if progress:
            progress(done, len(names))
    return model.eval()


def what_is_stored(config: Config, files: CheckpointFiles) -> Config:
    """The config, without the layer that predicts a second token where no tensor of it is in the files."""
    last = f"model.layers.{config.num_hidden_layers}."
    return config if any(name.startswith(last) for name in files.tensors) else dataclasses.replace(
        config, num_nextn_predict_layers=0)


def type_of_stacks(config: Config, files: CheckpointFiles, device: torch.device, dtype: torch.dtype | str | None,
                   compute: torch.dtype) -> torch.dtype | None:
    """The type of the tensors that hold all experts of a layer (Experts.stack); None where these stay by themselves.

    On the CPU they stay in the file. On a GPU FP8 experts that remain FP8 do where their widths are not whole blocks.
    """
    if device.type != "cuda":
        return None
    stored = {tensor.dtype for name, tensor in files.tensors.items() if ".experts." in name and name.endswith(".weight")}
    if dtype is not None or FP8 not in stored:
        return compute
    return FP8 if stored == {FP8} and config.hidden_size % 128 == config.moe_intermediate_size % 128 == 0 else None


def put(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Make a tensor the parameter; or, where that has a place in a stack of experts, copy it there."""
    place = getattr(module, leaf)
    if place is None or place.is_meta:
        trained = place is not None and place.requires_grad and tensor.dtype != FP8
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=trained))
    else:
        place.data.copy_(tensor)


def bytes_in_memory(directory: str | Path, dtype: torch.dtype | str | None = None, active: bool = False) -> int:
    """What the weights will take, computed from the headers alone; `active`: counting only experts that a token uses."""
    config, files = Config.from_checkpoint(directory), CheckpointFiles(directory)
    compute = compute_dtype(config, files, dtype)
    dense = experts = 0
    for name, (_, shape, stored, *_) in files.tensors.items():
        is_scale = name.endswith("_scale_inv")
        if (is_scale and dtype is not None) or name in copies(config):
            continue  # a scale that was multiplied in, or a tensor once more
        as_stored = name.endswith(BIAS) or dtype is None and (stored == FP8 or is_scale)
        size = math.prod(shape) * (stored if as_stored else compute).itemsize
        dense, experts = (dense, experts + size) if ".experts." in name else (dense + size, experts)
    return dense + (experts * config.num_experts_per_tok // config.n_routed_experts if active else experts)


def bytes_per_token(model: Model) -> int:
    """What one new token reads: every weight but the experts that it is not routed to, the layer that predicts a
    second token and, where the embedding is not the head as well, all but a row of that."""
    def size(module: nn.Module) -> int:
        experts = sum(p.nbytes for inner in module.modules() if isinstance(inner, Experts) for p in inner.parameters())
        idle = experts - experts * model.config.num_experts_per_tok // model.config.n_routed_experts
        return sum(p.nbytes for p in module.parameters()) - idle

    total = size(model) - sum(size(layer) for layer in model.model.layers if isinstance(layer, MTPLayer))
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
    """How large the weights are, in words; ValueError if they and a cache of `cache` bytes do not fit on the device.

    On the CPU weights that need no conversion stay in the file, and what must fit is what a single token reads.
    """
    weights, free, files = bytes_in_memory(directory, dtype), free_memory(device), CheckpointFiles(directory)
    compute = compute_dtype(Config.from_checkpoint(directory), files, dtype)
    stored = {tensor.dtype for name, tensor in files.tensors.items() if not name.endswith(("_scale_inv", BIAS))}
    stay_in_file = device.type == "cpu" and stored <= {compute, FP8 if dtype is None else compute}
    needed = bytes_in_memory(directory, dtype, active=stay_in_file)
    if free is not None and weights + cache > free >= needed + cache:
        return f"{gigabytes(weights)} (more than the {gigabytes(free)} free: experts come from the disk when routed to)"
    if free is not None and needed + cache > free:
        raise ValueError(f"{Path(directory).name} needs {gigabytes(needed)} for weights and {gigabytes(cache)} for the "
                         f"cache of {tokens:,} tokens, but {device} has {gigabytes(free)} free; choose a smaller "
                         "checkpoint or -n, or `-d cpu` without --dtype, where experts stay in the file until they are wanted")
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
    head = "lm_head.weight"
    tied = {head: "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    last = f"model.layers.{config.num_hidden_layers}"
    second = {f"{last}.embed_tokens.weight": "model.embed_tokens.weight", f"{last}.shared_head.head.weight": tied.get(head, head)}
    return tied | (second if config.num_nextn_predict_layers else {})


def check_copy(files: CheckpointFiles, copy: str, original: str) -> None:
    """A stored copy may be left out only if it is one; every 997th row is compared."""
    one, other = files.read(copy), files.read(original)
    if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(one[::997], other[::997]):
        raise ValueError(f"{files.tensors[copy].path}: {copy} differs from {original}, of which it should be a copy by config.json")
