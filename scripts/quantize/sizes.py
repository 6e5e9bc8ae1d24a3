"""How many bytes a published shape takes in 16, 8 and 4 bits, and how many of them a token reads. Nothing is loaded."""

import importlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

SHAPES = ("qwen3-0.6b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b", "deepseek-v3")
GROUP = 32  # columns that share a scale in four bits; in eight a row does


def bytes_of(rows: int, columns: int, bits: int) -> int:
    """A matrix with its scales, which are bfloat16."""
    if bits == 16:
        return 2 * rows * columns
    return rows * columns * bits // 8 + 2 * rows * (columns // GROUP if bits == 4 else 1)


def sizes(name: str, bits: int, head: bool = False) -> tuple[int, int]:
    """(Bytes of all weights, those of them that a token reads); `head`: the output head is rounded, too."""
    from scripts.benchmark.shapes import published

    import torch

    package, fields = published()[name]
    module = lambda part: importlib.import_module(f"{package}.{part}")  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        fields = {key: value for key, value in fields.items() if key != "quantization_config"}  # FP8 counts as 16 bits
        Path(folder, "config.json").write_text(json.dumps(fields))
        config = module("config").Config.from_checkpoint(folder)
    used, every = module("engine.parts").count_experts(config)
    # All layers after the first dense ones are alike, and so are all experts: one of each is enough.
    first = getattr(config, "first_k_dense_replace", 0)
    one = {"n_routed_experts": 1} if hasattr(config, "n_routed_experts") else {"num_experts": 1} if every > 1 else {}
    with torch.device("meta"):
        model = module("model").Model(replace(config, num_hidden_layers=first + 1, **one))
    held = read = 0
    tied = config.tie_word_embeddings
    for tensor, weight in model.named_parameters():
        layer = int(tensor.split(".")[2]) if tensor.startswith("model.layers.") else -1
        times = config.num_hidden_layers - first if layer == first else 1
        rounded = module("engine.rounding").is_rounded(tensor, tuple(weight.shape))
        size = times * (bytes_of(*weight.shape, bits) if rounded else 2 * weight.numel())
        if tensor == "model.embed_tokens.weight":  # a token reads one row of it, unless it is the head, too
            in_head = bytes_of(*weight.shape, bits if head else 16)
            held, read = held + size + in_head * (head and tied), read + in_head * tied
        elif tensor == "lm_head.weight":
            size = bytes_of(*weight.shape, bits if head else 16)
            held, read = held + size, read + size
        elif layer <= first:  # beyond are draft layers
            is_expert, per_expert = ".experts." in tensor, ".mlp.gate." in tensor
            held += size * (every if is_expert or per_expert else 1)
            read += size * (used if is_expert else every if per_expert else 1)
    return held, read


def table(names: tuple[str, ...] = SHAPES) -> str:
    """GB of the weights, and GB that a token reads."""
    lines = [f"{'':16}{'GB of weights in':>23}{'GB read for a token in':>29}",
             (f"{'':16}" + 2 * "  16 bits  8 bits  4 bits  ").rstrip()]
    for name in names:
        found = [sizes(name, bits) for bits in (16, 8, 4)]
        cells = [[f"{one[i] / 1e9:.{i + 1}f}" for one in found] for i in (0, 1)]
        lines.append(f"{name:16}" + "  ".join(f"{a:>9}{b:>8}{c:>8}" for a, b, c in cells))
    return "\n".join(lines)
