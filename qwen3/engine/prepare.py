"""Loading with the engine: faster parts for those of the lesson, more formats, and a sentence for what does not fit.

    read_checkpoint     config and files, each corrected by the other
    prepare             swap parts, then give each its tensors: on the CPU they stay in the mapped file
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import Config
from ..layers import Linear
from ..model import Model
from .fields import DTYPES, plain
from .parts import FASTER, KEPT_IN_FLOAT32, correct, count_parts, stack_experts
from .integer_linear import Budget, IntegerLinear
from .memory import free_memory, give_back
from .packed_formats import FORMATS, CompressedLinear, suit_kernel
from .processes import on_this_machine, ranks
from .quantized import FP8, QuantizedLinear
from .rounding import BITS, GROUP, is_rounded, packed_tensors
from .safetensors_reader import CheckpointFiles, is_copy, read_header
from .shares import share_model
from .supported import check_tensor_names


def read_checkpoint(directory: str | Path, every: int = 997) -> tuple[Config, CheckpointFiles]:
    """The config and the files, each corrected by the other.

    A tied head may be stored once more: a copy is dropped, another one is the head, as in transformers.
    `every` 1 compares all rows, as loading does; 997 every 997th, for what is asked before.
    """
    config, files, notes = Config.from_checkpoint(directory), CheckpointFiles(directory), []
    check_tensor_names(files.directory, files.tensors)
    parts = count_parts(config)
    if max(parts.values()) > len(files.tensors):  # a damaged number: all would be built before one is missed
        asked = " and ".join(f"{count} {what}" for what, count in parts.items())
        raise ValueError(f"{files.directory}: config.json asks for {asked}, the files hold {len(files.tensors)} "
                         "tensors")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in files.tensors and embedding not in files.tensors:
        files.tensors[embedding] = files.tensors.pop(head)  # stored once, under the other name
    if config.tie_word_embeddings and head in files.tensors:
        if is_copy(files, head, embedding, every):
            del files.tensors[head]
        else:
            config = replace(config, tie_word_embeddings=False)
            notes.append("config.json ties the head to the embedding, but the files hold another lm_head.weight: "
                         "that one is used")
    config = correct(config, files)
    if config.quantization == "fp8":
        scales = sorted({name.rpartition(".")[2] for name in files.passed_over if name.endswith("_scale")})
        unused = f" ({', '.join(scales)} not used)" if scales else ""
        notes.append("FP8 weights: activations and cache stay in a wider type here than the checkpoint's scheme asks "
                     f"for{unused}")
    config, more = suit_kernel(config, files)
    return replace(config, notes=(*config.notes, *notes, *more)), files


def compute_dtype(config: Config, files: CheckpointFiles, dtype: torch.dtype | str | None) -> torch.dtype:
    """One type for activations, norms and cache, decided once: asked for, or the config's, or the embedding's."""
    if dtype in BITS:
        if config.quantization not in (None, "fp8"):
            raise ValueError(f"{files.directory}: its weights are integers already; leave out --dtype {dtype}")
        if ranks() > 1:
            raise ValueError(f"--dtype {dtype} rounds whole matrices, of which {ranks()} processes have shares; write a"
                             f" rounded checkpoint first: uv run python -m scripts.quantize NAME --bits {BITS[dtype]}")
        dtype = None
    dtype = DTYPES.get(dtype, dtype) or config.dtype
    if dtype is None:
        stored = files.tensors.get("model.embed_tokens.weight") or files.tensors.get("lm_head.weight")
        dtype = stored.dtype if stored else None
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is not known; choose one of {', '.join((*DTYPES, *BITS))}")
    return dtype


def prepare(model: Model, files: CheckpointFiles, device: str | torch.device, dtype: torch.dtype | str | None,
            progress: Callable[[int, int], None] | None = None) -> Model:
    """The model of the lesson, built on the meta device, with the engine's parts in it and the files' tensors in those.

    dtype None keeps the checkpoint's own; quantised weights then stay as they are and are dequantised as they are
    used, while a dtype expands them once. "int4" and "int8" round the matrices of the layers, in memory.
    """
    device, compute, bits = torch.device(device), compute_dtype(model.config, files, dtype), BITS.get(dtype)
    for module in model.modules():
        module.__class__ = FASTER.get(type(module), type(module))
    formats = find_formats(model, files)
    shapes = check_names_and_shapes(model, files, formats)
    shares = share_model(model, files)  # of one process the whole
    stack_experts(model, files, device, dtype, compute)
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(shapes))
        return shares.cut(name, files.read(name).view(shapes[name])).to(device)

    def swap(name: str, linear: QuantizedLinear) -> None:
        model.set_submodule(name, linear)
        if isinstance(linear, IntegerLinear) and device.type == "cpu" and ".experts." not in name:
            linear.pack()  # experts are packed when a token is first routed to them: many never are

    for name, module in list(model.named_modules()):
        shape = tuple(module.weight.shape) if isinstance(module, Linear) else ()
        rounds = bool(bits) and is_rounded(f"{name}.weight", shape)
        if name in formats:
            format, leaves = formats[name]
            tensors = {leaf: read(f"{name}.{leaf}") for leaf in leaves}
            if dtype is None:
                tensors = {leaf: place(module, leaf, tensor) for leaf, tensor in tensors.items()}
            linear = format.make(model.config, shape, **tensors)
            if rounds:
                linear = rounded(model.config, linear.matrix(torch.float32), bits)
            if dtype is None or rounds:
                swap(name, linear)
            else:
                place(module, "weight", linear.matrix(compute))
        elif rounds:
            swap(name, rounded(model.config, read(f"{name}.weight"), bits))
        else:
            for leaf in list(module._parameters):
                if (whole := f"{name}.{leaf}") in shapes:
                    place(module, leaf, read(whole).to(torch.float32 if leaf in KEPT_IN_FLOAT32 else compute))
    bound_experts(model, device)
    model.tie_weights()
    shares.finish(model)
    rope = model.model.rotary_emb
    rope.inv_freq = rope.inv_freq.to(device)  # once, and not at each forward
    if formats or bits:
        give_back()  # what expanding or packing took beside its results
    return model.eval()


def bound_experts(model: Model, device: torch.device) -> None:
    """Packed experts may fill what is left of memory, but for a quarter: cache and activations come from it too.

    Processes of one machine share what it has.
    """
    experts = [part for name, part in model.named_modules() if isinstance(part, IntegerLinear) and ".experts." in name]
    free = free_memory(device) if experts and device.type == "cpu" else None
    if free is not None:
        budget = Budget(free * 3 // 4 // len(on_this_machine()))
        for part in experts:
            part.budget = budget


def rounded(config: Config, W: Tensor, bits: int) -> CompressedLinear:
    packed = {leaf: tensor.to(W.device) for leaf, tensor in packed_tensors(W, bits, GROUP).items()}
    return CompressedLinear.make(config, tuple(W.shape), **packed)


def place(module: nn.Module, leaf: str, tensor: Tensor) -> Tensor:
    """Make a tensor the module's parameter; or, where that has a place in a stack of experts, copy it there."""
    own = getattr(module, leaf, None)
    if own is None or own.is_meta:
        trained = own is not None and own.requires_grad and tensor.itemsize > 1
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=trained))
    else:
        own.data.copy_(tensor)
    return getattr(module, leaf).data


def find_formats(model: Model, files: CheckpointFiles) -> dict[str, tuple[type[QuantizedLinear], dict]]:
    """Linear's name -> (the class that takes its stored tensors, their shapes), for those that are quantised."""
    found = {}
    for name, module in model.named_modules():
        for make in FORMATS if isinstance(module, Linear) else ():
            if leaves := make.stored(files, name, tuple(module.weight.shape), model.config):
                found[name] = make, leaves
    return found


def check_names_and_shapes(model: Model, files: CheckpointFiles, formats: dict[str, tuple]) -> dict[str, tuple]:
    """What to load: name -> shape. ValueError where a parameter or a tensor lacks the other, or their shapes differ."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, (_, leaves) in formats.items():
        del expected[f"{name}.weight"]
        expected |= {f"{name}.{leaf}": shape for leaf, shape in leaves.items()}
    found = set(files.tensors)
    for wrong, what in ((expected.keys() - found, "missing from the checkpoint"),
                        (found - expected.keys(), "in the checkpoint, but the config has no place for it")):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ValueError(f"{files.directory}: {plain(min(wrong))}{more} is {what}")
    for name, shape in expected.items():
        stored = files.tensors[name]
        reshaped = name.endswith("_scale_inv") and math.prod(stored.shape) == math.prod(shape)
        if stored.shape != shape and not reshaped:
            raise ValueError(f"{stored.path}: {name} has shape {stored.shape}, the config asks for {shape}")
        if stored.dtype == FP8 and name.rpartition(".")[0] not in formats:
            raise ValueError(f"{stored.path}: {name} is FP8, and only the weights of linear layers can be")
    return expected


def check_plain(model: Model, files: CheckpointFiles, dtype: torch.dtype | str | None) -> torch.dtype:
    """The type in which the lesson's own loading makes all weights; ValueError for what only the engine can load."""
    if dtype in BITS:
        raise ValueError(f"only the engine computes in {dtype}; leave out --plain (or engine=False)")
    if ranks() > 1:
        raise ValueError(f"the lesson's own code runs in one process, and there are {ranks()}; leave out --plain (or "
                         "engine=False)")
    if find_formats(model, files):
        raise ValueError(f"{files.directory}: its weights are quantised, which only the engine reads; leave out "
                         "--plain (or engine=False)")
    check_names_and_shapes(model, files, {})
    embedding = "model.embed_tokens.weight"
    if embedding not in read_header(files.tensors[embedding].path):  # renamed by read_checkpoint
        raise ValueError(f"{files.directory}: stores the embedding as lm_head.weight, which only the engine reads; "
                         "leave out --plain (or engine=False)")
    return compute_dtype(model.config, files, dtype)
