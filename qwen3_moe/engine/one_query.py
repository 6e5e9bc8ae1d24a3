"""Attention of one token over a long cache, by the form that is fastest on this processor.

    rows       PyTorch's kernel, a group's queries as rows of one head: each key is read once
    heads      PyTorch's kernel, each query as a head of its own: keys are read G times, by a simpler loop
    matmuls    two batched matmuls, for each key head: float32 only, since in 16 bits the scores would be rounded, which
               is two to nine times the kernel's error

All give the same to rounding. Which is faster depends on the processor: over 4,096 keys of Qwen3-0.6B in bfloat16,
`heads` takes 0.9 times as long as `rows` on an Intel Xeon with AMX, and 2.8 times as long on an AMD Zen 4. So the first
time that a process needs it, all are tried on the keys at hand, for some milliseconds, and one is chosen for good.

Another run may choose another form and, in the last bit, compute another number. Who needs the same bits in every run
sets the environment variable LLM_ATTENTION to a form, or calls torch.use_deterministic_algorithms(True), which takes
`rows`.
"""

import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LONG = 1024  # keys: for fewer, the forms differ by less than a token's time varies
MARGIN = 0.9  # of the time of `rows`, or it stays
TURNS = 4  # that each form is tried
FORM = os.environ.get("LLM_ATTENTION", "")  # "": the fastest
CHOSEN: dict[tuple, Callable[..., Tensor]] = {}  # type and shape -> the form


def rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q (B, H, 1, N), k (B, K, S, N), v (B, K, S, M) -> (B, H, 1, M), and so do the others."""
    folded = q.reshape(*k.shape[:2], -1, q.shape[-1])  # (B, K, G, N)
    return F.scaled_dot_product_attention(folded, k, v, mask, scale=scale).reshape(*q.shape[:3], -1)


def heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def matmuls(q: Tensor, k: Tensor, v: Tensor, mask: None, scale: float) -> Tensor:
    scores = q.reshape(*k.shape[:2], -1, q.shape[-1]) @ k.mT * scale  # (B, K, G, S)
    return (scores.softmax(-1) @ v).reshape(*q.shape[:3], -1)


FORMS = {form.__name__: form for form in (rows, heads, matmuls)}


def attention_of_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale) v. q (B, H, 1, N), k (B, K, S, N), v (B, K, S, M), mask (B, 1, 1, S) or None.

    Returns (B, H, 1, M).
    """
    return form_for(q, k, v, mask, scale)(q, k, v, mask, scale)


def form_for(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Callable[..., Tensor]:
    """The form that was set, the one that was chosen before, or the fastest now; `rows` wherever nothing is to choose.

    Raises ValueError for a form that there is not.
    """
    if torch.compiler.is_compiling() or q.device.type != "cpu" or mask is not None or k.shape[2] < LONG:
        return rows
    if FORM or torch.are_deterministic_algorithms_enabled():
        if FORM and FORM not in FORMS:
            raise ValueError(f"LLM_ATTENTION={FORM[:80]!r} is no form of attention; choose one of {', '.join(FORMS)}")
        return FORMS[FORM] if FORMS.get(FORM) in forms_of(q.dtype) else rows
    kind = q.dtype, *q.shape, k.shape[1], v.shape[-1]
    if kind not in CHOSEN:
        CHOSEN.setdefault(kind, fastest(q, k[:, :, :LONG], v[:, :, :LONG], None, scale))  # one, also among threads
    return CHOSEN[kind]


def forms_of(dtype: torch.dtype) -> list[Callable[..., Tensor]]:
    """Those that are as exact as PyTorch's kernel."""
    return [form for form in FORMS.values() if form is not matmuls or dtype == torch.float32]


@torch.no_grad()
def fastest(q: Tensor, *others) -> Callable[..., Tensor]:
    """The form that takes the least time, by its best of some turns; `rows` unless another is clearly faster."""
    seconds = {form: [] for form in forms_of(q.dtype)}
    for _ in range(TURNS):  # in turn, so that what else the machine does hits all of them
        for form, times in seconds.items():
            start = time.perf_counter()
            form(q, *others)
            times.append(time.perf_counter() - start)
    best = min(seconds, key=lambda form: min(seconds[form]))
    return best if min(seconds[best]) < MARGIN * min(seconds[rows]) else rows
