"""A checkpoint becomes a model that may be larger than memory: tensors of files -> parameters, nothing copied.

A safetensors file is a table, name -> (type, shape, first byte, length), and then the numbers, row by row. The file is
mapped into memory: it gets addresses, and the operating system reads a page (4 kB) when an address in it is first used,
and may drop it again when memory is short. A tensor can lie directly on these addresses:

    file      | header | embed_tokens |  …  | experts.0.gate_proj | experts.0.up_proj |  …  | experts.127.down_proj |
    memory             └ torch.frombuffer ┘   └ its own view ┘      └ its own view ┘          └ not read so far ┘

So a model of any size starts immediately, and an expert that no token is routed to is never read: a mixture of experts
larger than memory runs, as fast as the disk brings the experts that it wants. Of Qwen3-30B-A3B's 61 GB a token
reads 6.1 GB. Another type or device costs one conversion per tensor.

A view takes no more than this, and engine/safetensors_reader.py does it (`CheckpointFiles.read`), after it has
checked that the table tells the truth:

    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensor = torch.frombuffer(mapped, dtype=torch.uint8, count=length, offset=first_byte).view(dtype).view(shape)
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

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
    with torch.device("meta"):  # every tensor has a shape and no memory yet
        model = Model(config)
    if engine:
        return prepare(model, files, device, dtype, progress)

    dtype = check_plain(model, files, dtype)
    for name in files.tensors:
        module, _, leaf = name.rpartition(".")
        tensor = files.read(name).to(device, dtype)  # the view itself where type and device are the file's
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    model.tie_weights()
    return model.eval()
