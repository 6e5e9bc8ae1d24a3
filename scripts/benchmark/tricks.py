"""What may be left out of a package, to see what it buys. For --tricks."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch.nn.functional as F

ALL, EXPERTS = ("qwen3", "qwen3_moe", "deepseek_v3"), ("qwen3_moe", "deepseek_v3")


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


def copied(package: str) -> None:
    files = import_module(f"{package}.engine.safetensors_reader").CheckpointFiles
    read = files.read
    files.read = lambda self, name: read(self, name).clone()


def in_16_bits(package: str) -> None:
    replace(package, "SLOW_IN_16_BITS", False)


def heads_apart(package: str) -> None:
    replace(package, "attend", lambda q, k, v, mask, scale: F.scaled_dot_product_attention(
        q, k, v, mask, scale=scale, enable_gqa=True))


def written_out(package: str) -> None:
    replace(package, "attend", import_module(f"{package}.attention").attention_written_out)


def head_for_all(package: str) -> None:
    replace(package, "prefill", lambda model, token_ids, cache, progress=None: model(token_ids, cache)[:, -1])


def every_expert(package: str) -> None:
    replace(package, "mix_grouped", import_module(f"{package}.moe").mix_written_out)


def sorted_token(package: str) -> None:
    replace(package, "mix_one_token", import_module(f"{package}.moe").mix_grouped)


def expanded(package: str) -> None:
    import_module(f"{package}.mla").Attention.absorbs = lambda self, T, S: False


def latents_as_heads(package: str) -> None:
    definition = import_module(f"{package}.attention").attention_written_out
    replace(package, "attention_on_latents", lambda q, latents, R, mask, scale: definition(
        q, latents[:, None], latents[:, None, :, :R], mask, scale))


TRICKS = {
    "weights stay in the mapped file": Trick("start", 32, copied),
    "many rows in float32": Trick("prefill", 512, in_16_bits),
    "queries that share a key as rows of one product": Trick("decode", 4096, heads_apart, ("qwen3", "qwen3_moe")),
    "one token's experts without sorting": Trick("decode", 32, sorted_token, EXPERTS),
    "absorbed instead of expanded latents": Trick("decode", 4096, expanded, ("deepseek_v3",)),
    "latents by plain products": Trick("decode", 4096, latents_as_heads, ("deepseek_v3",)),
    "fused attention": Trick("prefill", 1024, written_out),
    "the head for the last token only": Trick("prefill", 512, head_for_all),
    "each expert on its tokens only": Trick("prefill", 128, every_expert, EXPERTS),
}


def leave_out(name: str, package: str) -> None:
    TRICKS[name].leave_out(package)
