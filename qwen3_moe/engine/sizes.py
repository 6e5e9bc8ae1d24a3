"""How many bytes weights and cache take, and whether they fit: from config and headers, before anything is loaded."""

import math
from pathlib import Path

import torch

from ..config import Config
from ..layers import KVCache
from ..model import Layer, Model
from .arguments import name_of
from .memory import free_memory, gigabytes
from .packed_formats import LEAF
from .parallel import Place, here
from .parts import KEPT_IN_FLOAT32, count_experts, share_cache, share_heads
from .prepare import compute_dtype, read_checkpoint
from .processes import of_all, on_this_machine, rank, ranks
from .quantized import FP8
from .releases import in_fewer_bits
from .rounding import BITS, GROUP, is_rounded
from .safetensors_reader import CheckpointFiles
from .shares import Shares


def bytes_in_memory(directory: str | Path, dtype: torch.dtype | str | None = None, active: bool = False) -> int:
    """What the weights will take, computed from the headers alone; `active` counts only experts that a token uses.

    Of several ranks that share the model (shares.py), what this one has.
    """
    return count_bytes(*read_checkpoint(directory), dtype, active)


def count_bytes(config: Config, files: CheckpointFiles, dtype: torch.dtype | str | None, active: bool,
                place: Place | None = None) -> int:
    """`bytes_in_memory` of files that are open already, or of the share that a process holds."""
    dense, experts, shares = 0, 0, Shares(config, files, place)
    compute = compute_dtype(config, files, None if place and dtype in BITS else dtype)  # shares are never rounded here
    for name, (_, shape, stored, *_) in files.tensors.items():
        is_scale = name.endswith("_scale_inv")
        if is_scale and dtype is not None:
            continue  # multiplied in
        is_packed = bool(LEAF.fullmatch(name))
        as_stored = name.endswith(KEPT_IN_FLOAT32) or dtype is None and (stored == FP8 or is_scale or is_packed)
        count = (shares.count_weights if is_packed and dtype is not None else shares.count)(name)
        size = count * (stored if as_stored else compute).itemsize
        if dtype in BITS and is_rounded(name, shape):
            size = count * BITS[dtype] // 8 + (count // GROUP if dtype == "int4" else shape[0]) * 2 + 16
        dense, experts = (dense, experts + size) if ".experts." in name else (dense + size, experts)
    used, every = count_experts(config)
    return dense + (experts * used // every if active else experts)


def bytes_per_token(model: Model) -> int:
    """What one new token reads: all weights, but only its own experts, and only a row of an untied embedding."""
    total = experts = 0
    drafts = f"model.layers.{model.config.num_hidden_layers}."  # a draft layer has no part in a plain step
    for name, parameter in model.named_parameters():
        if not name.startswith(drafts):
            total += parameter.nbytes
            experts += parameter.nbytes if ".experts." in name else 0
    used, every = count_experts(model.config)
    total -= experts - experts * used // every
    return total if model.config.tie_word_embeddings else total - model.model.embed_tokens.weight.nbytes


def cache_bytes_per_token(config: Config, dtype: torch.dtype) -> int:
    """What the cache keeps of a token in all layers, as a layer says it."""
    with torch.device("meta"):
        attention = Layer(config, 0).self_attn
    if here().ranks > 1:
        share_cache(attention, share_heads(config, here()))
    cache = KVCache([attention], 1, dtype, "meta")
    return config.num_hidden_layers * sum(tensor.nbytes for tensor in cache.tensors)


def check_memory(directory: str | Path, device: torch.device, dtype: str | None, tokens: int, cache: int) -> str:
    """How large the weights are, in words; ValueError if they and a cache of `cache` bytes do not fit on the device.

    On the CPU, weights that need no conversion stay in the file. Of experts, only what a single token reads must fit.
    Ranks that share a model have a GPU each, and the memory of their machine together.
    """
    config, files = read_checkpoint(directory)
    here_too = on_this_machine() if device.type == "cpu" else [rank()]
    places = [Place(number % ranks(), ranks()) for number in here_too]
    weights = [count_bytes(config, files, dtype, False, place) for place in places]
    size, cache, free = weights[places.index(here())], cache * len(places), free_memory(device)
    compute, (used, every) = compute_dtype(config, files, dtype), count_experts(config)
    stored = {tensor.dtype for name, tensor in files.tensors.items()
              if not name.endswith(("_scale_inv", *KEPT_IN_FLOAT32)) and not LEAF.fullmatch(name)}
    stay_in_file = device.type == "cpu" and stored <= {compute, FP8 if dtype is None else compute}
    needed = sum(count_bytes(config, files, dtype, stay_in_file, place) for place in places)
    if device.type == "cpu" and dtype in BITS:  # of matrices rounded here, the words stay beside what is packed of them
        needed += sum(math.prod(tensor.shape) * BITS[dtype] // 8 * 9 // 8 for name, tensor in files.tensors.items()
                      if is_rounded(name, tensor.shape) and ".experts." not in name)
    if free is not None and sum(weights) + cache > free >= needed + cache:
        return f"{gigabytes(size)} (more than the {gigabytes(free)} free: experts come from the disk when routed to)"
    if free is not None and needed + cache > free:
        advice = "choose a smaller checkpoint, another device or a smaller -n" if used == every else (
            "choose a smaller checkpoint or -n, or `-d cpu` without --dtype, where experts stay in the file until they "
            "are wanted")
        if config.quantization in (None, "fp8") and device.type != "mps":  # Apple's GPUs would expand it
            # Without a type asked for, its experts too stay in the file on the CPU.
            rounded = {kind: sum(count_bytes(config, files, kind, device.type == "cpu", place) for place in places)
                       for kind in BITS}
            advice = in_fewer_bits(Path(directory), free - cache, rounded) or advice
        raise ValueError(f"{name_of(Path(directory))} needs {gigabytes(needed)} for weights and {gigabytes(cache)} for "
                         f"the cache of {tokens:,} tokens, but {device} has {gigabytes(free)} free; {advice}")
    return gigabytes(size)


def keep_or_expand(directory: str | Path, device: torch.device, asked: str | None, cache: int,
                   processes: int = 1) -> tuple[str | None, str]:
    """(The type that FP8 weights are given while loading, None for their own; why, in words for the user).

    On a CPU, where a token takes several times as long in FP8, they are expanded unless `asked` is "fp8", if all of
    them and `cache` bytes leave a tenth of the memory free; the experts of a mixture too then lie in memory, and not in
    the file. `processes` have a model each, or share one. ValueError where FP8 is asked for and cannot be.
    """
    config, files = read_checkpoint(directory)
    if not any(tensor.dtype == FP8 for tensor in files.tensors.values()):
        if asked == "fp8":
            raise ValueError(f"{name_of(Path(directory))} has no FP8 weights that --dtype fp8 could keep; leave it out")
        return asked, ""
    if asked == "fp8" and device.type == "mps":
        raise ValueError("Apple's GPUs have no FP8; leave out --dtype fp8, or give -d cpu")
    if asked not in (None, "fp8") or device.type != "cpu":
        return None if asked == "fp8" else asked, ""
    if asked == "fp8":
        return None, " (slow there, as --dtype fp8 asks)"
    compute, free, here_too = compute_dtype(config, files, None), free_memory(device), on_this_machine()
    kept, expanded = ([count_bytes(config, files, dtype, False, Place(number % ranks(), ranks()))
                       for number in here_too] for dtype in (None, compute))
    needed, own, name = sum(expanded) * processes + cache * len(here_too), here_too.index(rank()), str(compute)[6:]
    if all(of_all(free is not None and needed <= free * 9 // 10)):  # by all ranks or by none
        return name, f" (expanded from FP8, which a CPU is slow at; --dtype fp8 keeps it: {gigabytes(kept[own])})"
    return None, f" (slow there; in {name} it would take {gigabytes(expanded[own])}, more than there is room for)"
