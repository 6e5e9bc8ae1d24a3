"""How much of a model each of N GPUs holds and reads for a token, and what that takes on paper. Nothing is loaded.

    uv run python -m scripts.parallel.plan                           the table of README.md
    uv run python -m scripts.parallel.plan deepseek-v3 -n 8 16       one published shape; --fp8 as if stored in FP8

The shares are those with which models are loaded (engine/shares.py), counted from a model without memory.
"""

import argparse
import importlib
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3",
                               "activation_scheme": "dynamic"}}
TABLE = [("qwen3-32b", False), ("qwen3-30b-a3b", False), ("qwen3-235b-a22b", False), ("qwen3-235b-a22b", True),
         ("qwen3-coder-480b-a35b-instruct", True), ("moonlight-16b-a3b-instruct", False), ("deepseek-v3", False),
         ("kimi-k2-instruct", False)]
REACHED = 0.7  # of a GPU's memory bandwidth; a guess, from what single GPUs reach
BANDWIDTH = 3.35e12  # bytes a second of an H100


def sizes(name: str, fp8: bool = False, ranks: tuple[int, ...] = (1,)) -> dict:
    """The layers, and for each number of ranks (bytes held, bytes read for a token) of the fullest, or why not."""
    from scripts.benchmark.shapes import published

    import torch

    package, fields = published()[name]
    parts, shares, parallel, reader = (importlib.import_module(f"{package}.engine.{module}") for module in (
        "parts", "shares", "parallel", "safetensors_reader"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(fields | (FP8 if fp8 else {})))
        config = importlib.import_module(f"{package}.config").Config.from_checkpoint(folder)
    L, (active, E) = config.num_hidden_layers, parts.count_experts(config)
    # All layers but the first are alike, and so are all experts: one of each is enough.
    first = getattr(config, "first_k_dense_replace", 0)
    one = {"n_routed_experts": 1} if hasattr(config, "n_routed_experts") else {"num_experts": 1} if E > 1 else {}
    with torch.device("meta"):
        model = importlib.import_module(f"{package}.model").Model(replace(config, num_hidden_layers=first + 1, **one))
    linear, tensors = importlib.import_module(f"{package}.layers").Linear, {}
    for tensor, weight in model.named_parameters():
        quantised = bool(config.weight_block_size and ".layers." in tensor and "eh_proj" not in tensor
                         and isinstance(model.get_submodule(tensor.rpartition(".")[0]), linear))
        dtype = torch.float8_e4m3fn if quantised else torch.bfloat16
        tensors[tensor] = reader.TensorInfo(Path(), tuple(weight.shape), dtype, 0, 0)
        if quantised:
            grid = tuple(math.ceil(size / block) for size, block in zip(weight.shape, config.weight_block_size))
            tensors[f"{tensor}_scale_inv"] = reader.TensorInfo(Path(), grid, torch.float32, 0, 0)
    files, found = SimpleNamespace(tensors=tensors, directory=name), {"layers": L}
    for n in ranks:
        try:
            every = [shares.Shares(config, files, parallel.Place(rank, n)) for rank in range(n)]
            counts = [count(share, first, L, E, active) for share in every]
            found[n] = max(held for held, _ in counts), max(read for _, read in counts)
        except ValueError as error:
            found[n] = str(error)
    return found


def count(share, first: int, L: int, E: int, active: int) -> tuple[int, int]:
    """(Bytes that a rank holds, those of them that a token reads)."""
    held = read = 0
    for name, tensor in share.files.tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        size = share.count(name) * tensor.dtype.itemsize * (L - first if layer == first else 1)
        is_expert = ".experts." in name
        held += size * (E if is_expert or ".mlp.gate." in name else 1)
        is_read = (layer is None or layer <= first) and (name != "model.embed_tokens.weight" or
                                                         share.config.tie_word_embeddings)
        read += is_read * size * (active if is_expert else E if ".mlp.gate." in name else 1)
    return held, read


def milliseconds(read: int, layers: int, tau: float, bandwidth: float = BANDWIDTH) -> float:
    """For one token: what the fullest rank reads, and 2L + 2 sums of tau seconds each."""
    return 1000 * (read / (REACHED * bandwidth) + (2 * layers + 2) * tau)


def table(names: list[tuple[str, bool]] = TABLE, ranks: tuple[int, ...] = (1, 2, 4, 8, 16)) -> str:
    """GB of weights on the fullest of N GPUs."""
    lines = [f"{'GB of weights on each of':36}" + "".join(f"{n:8}" for n in ranks)]
    for name, fp8 in names:
        found = sizes(name, fp8, ranks)
        cells = ["-" if isinstance(found[n], str) else f"{found[n][0] / 1e9:.1f}" for n in ranks]
        lines.append(f"{name + (' in FP8' if fp8 else ''):36}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.parallel.plan", description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="?", help="a published one, such as deepseek-v3; default: the README's table")
    parser.add_argument("-n", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of GPUs")
    parser.add_argument("--fp8", action="store_true", help="as if it were stored in FP8")
    parsed = parser.parse_args(arguments)
    if parsed.shape is None:
        print(table(ranks=tuple(parsed.n)))
        return 0
    from scripts.benchmark.shapes import published

    name = parsed.shape.lower()
    if name not in published() or min(parsed.n) < 1:
        parser.error(f"{name[:60]} with {min(parsed.n)} GPUs: known shapes are {', '.join(list(published())[:4])}, … "
                     "and at least one GPU is needed")
    found = sizes(name, parsed.fp8, tuple(parsed.n))
    for n in parsed.n:
        print(f"{n:3} GPUs: " + (found[n] if isinstance(found[n], str) else (
            f"{found[n][0] / 1e9:.1f} GB held by the fullest, {found[n][1] / 1e9:.1f} GB read for a token, on H100s "
            f"{milliseconds(found[n][1], found['layers'], 18e-6 if n > 1 else 0):.1f} ms on paper")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
