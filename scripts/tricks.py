"""What may be left out of a package, to see what it buys. Used by benchmark.py --tricks."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F

ALL = ("qwen3", "qwen3_moe", "deepseek_v3")


@dataclass(frozen=True)
class Trick:
    """`leave_out` changes a package in this process; `what` and `context` are the task where it shows most."""

    what: str
    context: int
    leave_out: Callable[[str], None]
    packages: tuple[str, ...] = ALL


def replace(package: str, name: str, new: object) -> None:
    """Put `new` wherever a module of the package has something of that name."""
    for part in ("layers", "attention", "mla", "moe", "model", "generate", "weights"):
        try:
            module = import_module(f"{package}.{part}")
        except ModuleNotFoundError:
            continue
        if hasattr(module, name):
            setattr(module, name, new)


def with_onednn(package: str) -> None:
    replace(package, "product", F.linear)


def written_out(package: str) -> None:
    replace(package, "attend", import_module(f"{package}.attention").attention_written_out)


def heads_apart(package: str) -> None:
    def attend(q, k, v, mask, scale):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)

    replace(package, "attend", attend)


TRICKS = {
    "one row without oneDNN": Trick("decode", 32, with_onednn),
    "queries of a group as rows of one product": Trick("decode", 4096, heads_apart, ("qwen3", "qwen3_moe")),
    "fused attention": Trick("prefill", 4096, written_out),
}


def leave_out(name: str, package: str) -> None:
    with torch.no_grad():
        TRICKS[name].leave_out(package)
