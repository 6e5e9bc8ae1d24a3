"""The folder of a checkpoint: the small files when a training begins, the weights when it ends.

Names and types are those of the published checkpoints, so that `main`, transformers and whatever reads the format
load the result.
"""

import importlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .configs import KINDS
from .data import BOS, ENDOFTEXT, EOS, IM_END, PAD
from .templates import TEMPLATES

SMALL = ("*.json", "*.jinja", "*.model", "merges.txt", "LICENSE*")  # what a checkpoint has beside its weights
# What a training writes, and so replaces.
WRITTEN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model*.safetensors",
           "model.safetensors.index.json", "training.safetensors", "*.safetensors.part", "losses.json")
LOSSES = "losses.json"  # one a step
SHARD = 4 * 2**30  # bytes of one file


def write_new(folder: Path, package: str, library, chat: bool) -> None:
    """Config, tokenizer and generation defaults of a model that starts from nothing; `chat`: it answers questions."""
    _, config = KINDS[package]
    bos, eos, pad = (BOS, EOS, PAD) if package == "deepseek_v3" else (ENDOFTEXT, IM_END, ENDOFTEXT)
    if not chat:
        eos = pad if package != "deepseek_v3" else eos
    ids = {name: library.token_to_id(token) for name, token in (("bos", bos), ("eos", eos), ("pad", pad))}
    config = config | {"vocab_size": library.get_vocab_size(), "bos_token_id": ids["bos"], "eos_token_id": ids["eos"]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad,
                "model_max_length": config["max_position_embeddings"]}
    if chat:
        settings["chat_template"] = TEMPLATES[package]
    generation = {"do_sample": False, "eos_token_id": list(dict.fromkeys((ids["eos"], ids["pad"]))),
                  "pad_token_id": ids["pad"]}
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    for name, values in (("config", config), ("tokenizer_config", settings), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def copy_small(source: Path, folder: Path) -> None:
    """The files beside the weights, as they are; the index is made anew with the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in SMALL:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)  # follows links, as those of the Hugging Face cache


def new_model(folder: Path, package: str) -> nn.Module:
    """Random weights in the sizes of the folder's config.json."""
    config = importlib.import_module(f"{package}.config").Config.from_checkpoint(folder)
    return importlib.import_module(f"{package}.model").Model(config)


def save_weights(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """model.safetensors, or several files and their index. A tied head is stored once."""
    tensors = {name: p.detach().to(torch.float32 if name.endswith("_bias") else dtype).contiguous()
               for name, p in model.named_parameters()}
    if hasattr(model, "mtp") and len(model.model.layers) > model.config.num_hidden_layers:
        # As in the release, the MTP module holds copies of the embedding and the head.
        last = f"model.layers.{model.config.num_hidden_layers}"
        tensors[f"{last}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{last}.shared_head.head.weight"] = model.lm_head.weight.detach().to(dtype).clone()
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                 "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, shard in zip(names, shards):
        save_file(shard, folder / f"{file}.part", metadata={"format": "pt"})
        (folder / f"{file}.part").replace(folder / file)
