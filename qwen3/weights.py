"""A checkpoint becomes a model: tensors of files -> parameters, by name.

A checkpoint's folder holds config.json and one or more *.safetensors files. Such a file is a table, name -> (type,
shape, place), and then the numbers, row by row. It is mapped into memory: the operating system reads a page when it is
first used. Nothing in it can be executed, which is why .bin and .pth files, Python pickles, are never opened.

The model is built on PyTorch's "meta" device, where tensors have a shape and no memory, since drawing random numbers
that the file replaces would take longer than loading. Then every tensor takes the place of the parameter of its name.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from .engine.prepare import check_plain, prepare, read_checkpoint
from .engine.sizes import bytes_in_memory, check_memory, free_memory  # noqa: F401 for other programs
from .model import Model


def load_model(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None,
               progress: Callable[[int, int], None] | None = None, engine: bool = True) -> Model:
    """The checkpoint in `directory` as a model in eval mode.

    dtype None keeps the checkpoint's own, FP8 too. `engine` swaps in faster parts (engine/parts.py) and reads quantised
    weights; without it the model consists of this package's own parts alone. `progress(done, total)` counts tensors.
    What a user should know stands in model.config.notes.
    Raises FileNotFoundError or ValueError, saying which file or tensor is missing, damaged or unexpected.
    """
    config, files = read_checkpoint(directory, every=1)  # refuses what is damaged, and what is computed otherwise
    with torch.device("meta"):
        model = Model(config)
    if engine:
        return prepare(model, files, device, dtype, progress)

    dtype = check_plain(model, files, dtype)
    tensors = {}
    for path in sorted({tensor.path for tensor in files.tensors.values()}):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name).to(device, dtype) for name in file.keys() if name in files.tensors}
    if config.tie_word_embeddings:  # stored once, and `strict` wants both names
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)  # assign: the tensor itself becomes the parameter, no copy
    model.tie_weights()
    return model.eval()
