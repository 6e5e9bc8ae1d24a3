"""What may be left out of a package, to see what it buys. For --tricks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

ALL, EXPERTS = ("qwen3", "qwen3_moe", "deepseek_v3"), ("qwen3_moe", "deepseek_v3")


@dataclass(frozen=True)
class Trick:
    """`leave_out` changes a package in this process; `what` and `context` are the task where it shows most."""

    what: str
    context: int
    leave_out: Callable[[str], None]
    packages: tuple[str, ...] = ALL


def engine(package: str, name: str) -> ModuleType:
    return import_module(f"{package}.engine.{name}")


def all_of_it(package: str) -> None:
    weights = import_module(f"{package}.weights")
    weights.load_model = partial(weights.load_model, engine=False)


def copied(package: str) -> None:
    files = engine(package, "safetensors_reader").CheckpointFiles
    read = files.read
    files.read = lambda self, name: read(self, name).clone()


def in_16_bits(package: str) -> None:
    engine(package, "fast").SLOW_IN_16_BITS = False


def heads_apart(package: str) -> None:
    def unfolded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        seen = None if q.shape[2] == 1 and mask.ndim == 2 else mask  # the last query of the causal rule sees all
        return F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)

    engine(package, "parts").fused_sdpa = unfolded


def reference_attention(package: str) -> None:
    faster = engine(package, "parts").FASTER
    del faster[next(part for part in faster if part.__name__ == "Attention")]


def head_for_all(package: str) -> None:
    import_module(f"{package}.generate").prefill = lambda model, token_ids, cache: model(token_ids, cache)[:, -1]


def every_expert(package: str) -> None:
    def every(experts: nn.ModuleList, x: Tensor, weights: Tensor, topk_ids: Tensor) -> Tensor:
        dense = weights.new_zeros(len(x), len(experts)).scatter(1, topk_ids, weights)  # (n, E)
        return sum(dense[:, e, None] * expert(x) for e, expert in enumerate(experts)).to(x.dtype)

    engine(package, "experts").grouped = every


def sorted_token(package: str) -> None:
    experts = engine(package, "experts")
    experts.one_token = experts.grouped


def expanded(package: str) -> None:
    import_module(f"{package}.mla").Attention.absorbs = lambda self, T, S: False


def latents_as_heads(package: str) -> None:
    parts = engine(package, "parts")
    parts.attention_on_latents = parts.fused_sdpa


TRICKS = {
    "all of the engine, against the lesson (--plain)": Trick("decode", 32, all_of_it),
    "weights stay in the mapped file": Trick("start", 32, copied),
    "many rows in float32": Trick("prefill", 512, in_16_bits),
    "queries that share a key as rows of one matmul": Trick("decode", 4096, heads_apart, ("qwen3", "qwen3_moe")),
    "one token's experts without sorting": Trick("decode", 32, sorted_token, EXPERTS),
    "absorbed instead of expanded latents": Trick("decode", 4096, expanded, ("deepseek_v3",)),
    "latents by plain matmuls": Trick("decode", 4096, latents_as_heads, ("deepseek_v3",)),
    "fused attention": Trick("prefill", 1024, reference_attention),
    "the head for the last token only": Trick("prefill", 512, head_for_all),
    "each expert on its tokens only": Trick("prefill", 128, every_expert, EXPERTS),
}


def leave_out(name: str, package: str) -> None:
    TRICKS[name].leave_out(package)
