"""Several prompts at once: one reading of the weights gives a token to each."""

import warnings
from collections.abc import Collection

import torch

from ..generate import Sampler, decode, new_cache, prefill
from ..model import Model
from .requests import are_finite, check_request


@torch.inference_mode()
def generate_batch(model: Model, prompts: list[list[int]], *, max_new_tokens: int, stop_ids: Collection[int] = (),
                   **sampling: float | None) -> list[list[int]]:
    """New ids for each of several prompts of any lengths, computed together; each ends on its own.

    Prompts are padded on the left, so that all of them end, and go on, in the same slot of the cache. `sampling` are
    the settings of generate.Sampler. Raises ValueError before anything is computed for a request that cannot be met.
    A row whose logits are not finite ends there, with a warning.
    """
    if not prompts:
        return []
    check_request(model.config, prompts, max_new_tokens, **sampling)
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    cache = new_cache(model, longest + max(max_new_tokens - 1, 0), padding)
    sampler = Sampler(model, prompts, **sampling)
    # Any token would do as padding. With the first of the row no number appears that the row would not have by itself.
    padded = [[prompt[0]] * pad + list(prompt) for pad, prompt in zip(padding, prompts)]
    padded = torch.tensor(padded, device=sampler.generator.device)

    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for count in range(max_new_tokens):
        logits = prefill(model, padded, cache) if count == 0 else decode(model, tokens, cache)
        if not (finite := are_finite(logits)).all():  # (B,)
            for row in sorted(unfinished - set(finite.nonzero().flatten().tolist())):
                warnings.warn(f"row {row} ends after {count} tokens: its logits are not finite", stacklevel=2)
                unfinished.discard(row)
            logits = torch.where(finite[:, None], logits, 0)  # or no row could be drawn
        tokens = sampler(logits)  # (B,)
        for row, token in enumerate(tokens.tolist()):
            if token in stop_ids:
                unfinished.discard(row)
            elif row in unfinished:
                answers[row].append(token)
        if not unfinished:
            break
    return answers
