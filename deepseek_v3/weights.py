"""5. A checkpoint becomes a model: tensors of files -> parameters, nothing copied twice.

The model is built on PyTorch's "meta" device, where tensors have a shape and no memory. Each tensor of the
checkpoint is then put in its place. On the CPU it stays where it is, in the memory-mapped file: the
operating system reads a page when it is first used, so a model of any size starts at once, and an expert that
no token is routed to is never read: a mixture of experts larger than memory runs, as fast as the disk brings
the experts that it wants. Another type or device costs one conversion per tensor.

New against Qwen3-MoE: the router's bias stays float32, and the layer that predicts a second token may be missing,
as in checkpoints that were converted; its embedding and head are the model's own once more and are not loaded.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import DTYPES, Config
from .engine.fields import plain
from .engine.memory import find_device, free_memory, gigabytes
from .engine.quantized import FP8, block_of, dequantize, grid_of, swap_in_fp8
from .engine.safetensors_reader import CheckpointFiles, is_copy
from .engine.supported import check_tensor_names
from .layers import Linear
from .model import Model, MTPLayer
from .moe import Experts

BIAS = "e_score_correction_bias"  # the one tensor that is float32 whatever the others are


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
    stacked = type_of_stacks(config, files, torch.device(device), dtype, compute)
    for module in model.modules():
        if stacked is not None and isinstance(module, Experts):
            module.stack(device, stacked)

    for done, name in enumerate(names, start=1):
        tensor = files.read(name).view(names[name]).to(device)
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if tensor.dtype == FP8 or leaf == "weight_scale_inv":
            if dtype is None:
                put(module, leaf, tensor)
            elif leaf == "weight":
                scale = files.read(f"{name}_scale_inv")
                block = block_of(names[name], tuple(scale.shape), config.weight_block_size)
                scale = scale.view(grid_of(names[name], block)).to(device)
                put(module, leaf, dequantize(tensor, scale, compute, block))
        else:
            put(module, leaf, tensor.to(torch.float32 if leaf == BIAS else compute))
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
    experts = config.n_routed_experts if config.is_sparse(config.num_hidden_layers - 1) else 0
    if max(config.num_hidden_layers, experts) > len(files.tensors):  # a damaged number, and each would be built before one is missed
        raise ValueError(f"{files.directory}: config.json asks for {config.num_hidden_layers} layers and {experts} experts, "
                         f"the files hold {len(files.tensors)} tensors")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in files.tensors and embedding not in files.tensors:
        files.tensors[embedding] = files.tensors.pop(head)  # stored once, under the other name
    if config.tie_word_embeddings and head in files.tensors:
        if is_copy(files, head, embedding, every):
            del files.tensors[head]
        else:
            config = replace(config, tie_word_embeddings=False)
            notes.append("config.json ties the head to the embedding, but the files hold another lm_head.weight: that one is used")
    config = check_drafts(config, files)
    if config.quantization == "fp8":
        scales = sorted({name.rpartition(".")[2] for name in files.passed_over if name.endswith("_scale")})
        notes.append("FP8 weights: activations and cache stay in a wider type here than the checkpoint's scheme asks for"
                     + (f" ({', '.join(scales)} not used)" if scales else ""))
    return replace(config, notes=(*config.notes, *notes)), files


def check_drafts(config: Config, files: CheckpointFiles) -> Config:
    """The config without the layer that predicts a second token, unless the files hold it as it should be.

    The main model needs none: what lies after its last layer is dropped where it is not announced, not whole, more than one
    layer, or made for another embedding or head than the model's. `no_drafts` then says which.
    """
    first, why, notes = config.num_hidden_layers, "", config.notes
    extra = {name: int(match[1]) for name in files.tensors if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    extra = {name: layer for name, layer in extra.items() if layer >= first}
    drafts = {layer for name, layer in extra.items() if name.endswith((".eh_proj.weight", ".enorm.weight", ".hnorm.weight"))}
    if ordinary := sorted(set(extra.values()) - drafts):
        notes += (f"the files hold layer {ordinary[0]} and config.json has only {first} layers (num_hidden_layers): it is not used",)
    if config.num_nextn_predict_layers != 1 or any(layer > first for layer in extra.values()):
        why = f"config.json announces {config.num_nextn_predict_layers} draft layers, the files hold {len(set(extra.values()))}, one is expected"
    elif extra:
        with torch.device("meta"):
            layer = MTPLayer(config, first)
        expected = {f"model.layers.{first}.{name}": tuple(p.shape) for name, p in layer.named_parameters()}
        copies = {f"model.layers.{first}.embed_tokens.weight": "model.embed_tokens.weight", f"model.layers.{first}.shared_head.head.weight":
                  "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"}
        for name, original in copies.items():
            scales = [f"{each}_scale_inv" for each in (name, original)]
            same = is_copy(files, name, original, every=997) if name in extra else True
            if not same or (scales[0] in files.tensors and not is_copy(files, *scales)):
                why = f"{name} differs from {original}, of which it should be a copy"
        for name, shape in expected.items():
            if name not in extra or files.tensors[name].shape != shape or (
                    files.tensors[name].dtype == FP8 and f"{name}_scale_inv" not in extra):
                why = f"{name} is missing or has another shape"
        if unknown := {name.removesuffix("_scale_inv") for name in extra} - expected.keys() - copies.keys():
            why = f"{plain(min(unknown))} is not known"
        if not why:
            extra = [*copies, *(f"{name}_scale_inv" for name in copies)]
    for name in extra:
        files.tensors.pop(name, None)
    config = replace(config, notes=notes)
    return config if extra and not why and config.num_nextn_predict_layers == 1 else replace(
        config, num_nextn_predict_layers=0, no_drafts=why if extra else "")


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
    blocks = {block_of(tensor.shape, scale.shape, config.weight_block_size) for name, tensor in files.tensors.items()
              if ".experts." in name and (scale := files.tensors.get(f"{name}_scale_inv"))}
    whole = config.hidden_size % 128 == config.moe_intermediate_size % 128 == 0
    return FP8 if stored == {FP8} and blocks == {(128, 128)} and whole else None


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
    return count_bytes(*read_checkpoint(directory), dtype, active)


def count_bytes(config: Config, files: CheckpointFiles, dtype: torch.dtype | str | None, active: bool) -> int:
    compute, dense, experts = compute_dtype(config, files, dtype), 0, 0
    for name, (_, shape, stored, *_) in files.tensors.items():
        is_scale = name.endswith("_scale_inv")
        if is_scale and dtype is not None:
            continue  # multiplied in
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


def check_memory(directory: str | Path, device: torch.device, dtype: str | None, tokens: int, cache: int) -> str:
    """How large the weights are, in words; ValueError if they and a cache of `cache` bytes do not fit on the device.

    On the CPU weights that need no conversion stay in the file, and what must fit is what a single token reads.
    """
    config, files = read_checkpoint(directory)
    weights, free = count_bytes(config, files, dtype, active=False), free_memory(device)
    compute = compute_dtype(config, files, dtype)
    stored = {tensor.dtype for name, tensor in files.tensors.items() if not name.endswith(("_scale_inv", BIAS))}
    stay_in_file = device.type == "cpu" and stored <= {compute, FP8 if dtype is None else compute}
    needed = count_bytes(config, files, dtype, active=stay_in_file)
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
