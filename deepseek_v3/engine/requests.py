"""What generation cannot do, refused in one sentence before anything is computed; and logits that are not finite."""

import math

from torch import Tensor

from ..config import Config
from ..layers import KVCache


def check_request(config: Config, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 0.0,
                  top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
                  repetition_penalty: float | None = None, presence_penalty: float | None = None,
                  seed: int | None = None) -> None:
    """ValueError for what `generate` could not do; cheap, so that it can be asked before a model is loaded."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected 0 (greedy) or more")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k is {top_k}, expected 1 or more (or 0 for no limit)")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected more than 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}, expected 0 (off) to 1")
    if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty is {repetition_penalty}, expected more than 0 (1 is off)")
    if presence_penalty is not None and not math.isfinite(presence_penalty):
        raise ValueError(f"presence_penalty is {presence_penalty}, expected a finite number (0 is off)")
    if seed is not None and not -2**63 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected a number of 64 bits")
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt is empty; the model needs at least one token to go on from")
        if wrong := [token for token in prompt if not 0 <= token < config.vocab_size]:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {config.vocab_size}")
        if len(prompt) + max_new_tokens > config.context_length:
            raise ValueError(f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the context of "
                             f"{config.context_length} tokens")


def check_cache(cache: KVCache, own: KVCache, prompt_ids: list[int]) -> KVCache:
    """The cache, if it is like the model's own and leaves a token of the prompt to compute; else ValueError."""
    def kind(cache: KVCache) -> list[tuple]:
        return [(*t.shape[:3], t.shape[4], t.dtype, t.device) for t in cache.tensors] + [cache.padding is None]

    if kind(cache) != kind(own):
        raise ValueError("the cache was made for another model, type or device, or for a batch; "
                         "new_cache(model, capacity) makes one that fits")
    if cache.length >= len(prompt_ids):
        raise ValueError(f"the cache holds {cache.length} tokens, the prompt has {len(prompt_ids)}: "
                         "nothing is left to compute")
    return cache


def are_finite(logits: Tensor) -> Tensor:
    """(B, V) -> (B,) bool. The extremes are NaN if any number is: four times as fast as isfinite() of all."""
    return logits.amax(-1).isfinite() & logits.amin(-1).isfinite()


def check_finite(logits: Tensor, number: int) -> None:
    """ValueError where a number is infinite or NaN: greedy decoding would go on, and sampling end somewhere deep."""
    if not are_finite(logits).all():
        raise ValueError(f"the logits of new token {number} are not finite: the weights are damaged, or overflow in "
                         f"{str(logits.dtype).removeprefix('torch.')}; try --dtype float32 or bfloat16")
