"""The draft layer (MTP module) of a checkpoint: whether it is there as it should be, and whether it can be used."""

import re
from collections.abc import Collection
from dataclasses import replace

import torch

from ..config import Config
from ..layers import Linear
from ..model import MTPLayer
from .fields import plain
from .packed_formats import INTEGERS
from .quantized import FP8
from .safetensors_reader import CheckpointFiles, is_copy


def check_drafts(config: Config, files: CheckpointFiles) -> Config:
    """The config without the draft layer, unless the files hold that layer as it should be.

    The main model needs none: what lies after its last layer is dropped where it is not announced, not whole, more
    than one layer, or made for another embedding or head than the model's. `no_drafts` then says which.
    """
    first, why, notes = config.num_hidden_layers, "", config.notes
    extra = {name: int(match[1]) for name in files.tensors if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    extra = {name: layer for name, layer in extra.items() if layer >= first}
    its_own = (".eh_proj.weight", ".enorm.weight", ".hnorm.weight")
    drafts = {layer for name, layer in extra.items() if name.endswith(its_own)}
    if ordinary := sorted(set(extra.values()) - drafts):
        notes += (f"the files hold layer {ordinary[0]} and config.json has only {first} layers (num_hidden_layers): it "
                  "is not used",)
    if config.num_nextn_predict_layers != 1 or any(layer > first for layer in extra.values()):
        why = (f"config.json announces {config.num_nextn_predict_layers} draft layers, the files hold "
               f"{len(set(extra.values()))}, one is expected")
    elif extra:
        copies = {f"model.layers.{first}.embed_tokens.weight": "model.embed_tokens.weight",
                  f"model.layers.{first}.shared_head.head.weight":
                  "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"}
        why = what_is_wrong(config, files, extra, copies)
        if not why:
            extra = [*copies, *(f"{name}_scale_inv" for name in copies)]
    for name in extra:
        files.tensors.pop(name, None)
    config = replace(config, notes=notes)
    if extra and not why and config.num_nextn_predict_layers == 1:
        return config
    return replace(config, num_nextn_predict_layers=0, no_drafts=why if extra else "")


def what_is_wrong(config: Config, files: CheckpointFiles, extra: Collection[str], copies: dict[str, str]) -> str:
    """Why the tensors `extra` are no draft layer for this model; "" if they are one."""
    why, first = "", config.num_hidden_layers
    with torch.device("meta"):
        layer = MTPLayer(config, first)
    expected = {f"model.layers.{first}.{name}": tuple(p.shape) for name, p in layer.named_parameters()}
    for name, module in layer.named_modules():
        whole, shape = f"model.layers.{first}.{name}", tuple(module.weight.shape) if isinstance(module, Linear) else ()
        for format in INTEGERS if shape else ():
            if leaves := format.stored(files, whole, shape, config):
                del expected[f"{whole}.weight"]
                expected |= {f"{whole}.{leaf}": size for leaf, size in leaves.items()}
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
    return why


def check_drafting(config: Config, compiled: bool = False) -> None:
    """ValueError where drafts are asked for and cannot be made."""
    if compiled:
        raise ValueError("drafting is not compiled; leave out --compile or --speculative")
    if config.no_drafts:
        raise ValueError(f"this checkpoint's draft layer cannot be used ({config.no_drafts}); leave out --speculative")
    if not config.num_nextn_predict_layers:
        raise ValueError("this checkpoint has no layer that predicts a second token; leave out --speculative")
