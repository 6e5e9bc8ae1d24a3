"""Parts switched off or made wrong for one run, by hooks: what was a head or an expert for?

    with switched(model, [Part("head", layer=3, number=2)]):      and afterwards nothing is switched off any more
        ...

    head        the columns of o_proj that read this head get zeros, as if they were zeros themselves
    expert      the router still chooses it, and its answer counts nothing, as if its down_proj were zeros
    wrong rope  the rotary embedding turns pairs of other values: neighbours instead of the halves of a head, or the
                other way round. Queries and keys are turned alike, nothing crashes, and the text gets bad.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """What can be switched off: a head, an expert, or the right pairs of RoPE."""
    kind: str  # "head", "expert" or "wrong rope"
    layer: int = 0
    number: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "wrong rope" else f"layer{self.layer}.{self.kind}{self.number}"


def parse_parts(text: str) -> list[Part]:
    """"layer3.head2" or several, "layer3.head2,layer4.expert5"; they are switched off together."""
    parts = []
    for word in text.split(","):
        if not (match := re.fullmatch(r"layer(\d{1,9})\.(head|expert)(\d{1,9})", word.strip(), re.ASCII)):
            raise ValueError(f"--without {text[:60]}: expected parts like layer3.head2 or layer4.expert5, with commas "
                             "between several; all numbers count from 0")
        parts.append(Part(match[2], int(match[1]), int(match[3])))
    return parts


def check_part(part: Part, config) -> None:
    """ValueError where this model has no such part."""
    if part.kind == "wrong rope":
        return
    L, H, experts = config.num_hidden_layers, config.num_attention_heads, count_experts(config, part.layer)
    if part.layer >= L:
        raise ValueError(f"--without {part}: the model has the layers 0 to {L - 1}")
    if part.kind == "expert" and not experts:
        raise ValueError(f"--without {part}: layer {part.layer} has no experts")
    if part.number >= (most := H if part.kind == "head" else experts):
        raise ValueError(f"--without {part}: layer {part.layer} has the {part.kind}s 0 to {most - 1}")


def count_experts(config, layer: int) -> int:
    """How many experts this layer has; 0 where it has an MLP."""
    number = getattr(config, "num_experts", getattr(config, "n_routed_experts", 0))
    return number if number and config.is_sparse(layer) else 0


@contextmanager
def switched(model: torch.nn.Module, parts: Sequence[Part]) -> Iterator[None]:
    """A context in which these parts of the model are off. Raises ValueError for a part that is not there."""
    with ExitStack() as stack:
        for part in parts:
            check_part(part, model.config)
            if part.kind == "wrong rope":
                for layer in model.model.layers:
                    turn_other_pairs(stack, layer.self_attn)
                continue
            layer = model.model.layers[part.layer]
            if part.kind == "head":
                hook = layer.self_attn.o_proj.register_forward_pre_hook(without_head(part.number, model.config))
            else:
                hook = layer.mlp.experts.register_forward_pre_hook(without_expert(part.number))
            stack.callback(hook.remove)
        yield


def without_head(head: int, config):
    def zeros(_, args: tuple[Tensor]) -> tuple[Tensor]:
        heads = args[0].unflatten(-1, (config.num_attention_heads, -1)).clone()  # (B, T, H, N)
        heads[..., head, :] = 0
        return (heads.flatten(-2),)
    return zeros


def without_expert(expert: int):
    def zeros(_, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, weights, topk_ids = args
        return x, weights.masked_fill(topk_ids == expert, 0), topk_ids
    return zeros


def turn_other_pairs(stack: ExitStack, attention: torch.nn.Module) -> None:
    if hasattr(attention, "rope_interleave"):
        stack.enter_context(patch.object(attention, "rope_interleave", not attention.rope_interleave))
        return
    for norm in (attention.q_norm, attention.k_norm):  # the last step before queries and keys are rotated
        stack.callback(norm.register_forward_hook(lambda _, __, x: deinterleave(x)).remove)


def deinterleave(x: Tensor) -> Tensor:
    """Values in the order 0 2 4 … 1 3 5 …: what is rotated as the halves of a head were neighbours."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1)
