"""6b. Speculative decoding: two tokens for one reading of the weights, where a draft turns out right.

    tokens so far     … a b c          c was just chosen, from the model's state h at b
    draft             the MTP module, from h and c                       -> d?
    one step          the model reads c and d? together                  -> what follows c, and what follows d?
    d? is accepted    ... c d e        e is what follows d?, and is free
    d? is rejected    ... c x          x is what follows c; d? is cut out of the cache

Decoding waits for weights to come from memory, and two tokens need hardly more of them than one; that the draft is
sometimes wrong costs a little arithmetic. It changes no answer: which tokens come, and with what probability, is
decided by the model alone.

Papers: Leviathan et al. (arXiv:2211.17192, algorithm 1, theorem 3.5); multi-token prediction as the draft:
DeepSeek-V3 (arXiv:2412.19437, sections 2.2 and 5.4.3).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layers import KVCache
from .model import Model

if TYPE_CHECKING:
    from .generate import Sampler  # which imports this file


@dataclass
class Acceptance:
    """How many drafts were made and how many were right."""

    drafted: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        share = self.accepted / self.drafted if self.drafted else 0
        return f"{self.accepted} of {self.drafted} drafts accepted ({share:.0%})"


@torch.inference_mode()
def speculate(model: Model, prompt_ids: list[int], max_new_tokens: int, sampler: "Sampler", stop_ids: Collection[int],
              cache: KVCache, acceptance: Acceptance, chunk: int,
              progress: Callable[[int, int], None] | None) -> Iterator[int]:
    """The tokens of `generate`.

    The layer that drafts has a cache of its own, `cache.drafts`: slot t holds what it made of the model's state at t
    and of the token at t+1.
    """
    if cache.drafts is None:
        cache.drafts = KVCache(model.config, 0, cache.latents.dtype, cache.device, layers=1)
    # One known token is computed again: the state at it is wanted, and no cache has that.
    start = max(0, min(cache.length - 1, cache.drafts.length))
    for one in (cache, cache.drafts):
        one.length = start
        one.reserve(len(prompt_ids) + max_new_tokens)  # a draft may lie one beyond the last token
    hidden = read(model, prompt_ids[start:], cache, chunk, progress)  # (1, T, D)

    def chosen(token: int) -> int:
        sampler.add(torch.tensor([token], device=cache.device))
        return token

    generator = sampler.generator
    # Chosen, and not yet handed out.
    new = [chosen(draw(sampler.distribution(model.head(hidden[0, -1:]), 1), generator))]
    following = prompt_ids[start + 1:] + new  # the token behind each state in `hidden`

    count = 0
    while True:
        for token in new:
            if token in stop_ids:
                return
            yield token
            count += 1
            if count == max_new_tokens:
                return
        # A guess may be anything, also 0 where a damaged draft layer gives no number: the model decides.
        logits = draft(model, following, hidden, cache.drafts, chunk).nan_to_num(0, 0, 0)  # (1, V)
        guess = sampler.distribution(logits, count + 1)  # (V,)
        drafted = draw(guess, generator)
        hidden = model.model(torch.tensor([[new[-1], drafted]], device=cache.device), cache)  # (1, 2, D)
        logits = model.head(hidden[0])  # (2, V)
        truth = sampler.distribution(logits[:1], count + 1)  # (V,)
        token = chosen(verify(truth, guess, drafted, generator))
        acceptance.drafted += 1
        acceptance.accepted += token == drafted
        if token == drafted:
            # What follows the draft: only now, since a penalty has to know of it.
            after = sampler.distribution(logits[1:], count + 2)
            new = [token, chosen(draw(after, generator))]
        else:
            cache.truncate(cache.length - 1)
            new, hidden = [token], hidden[:, :1]
        following = new


def read(model: Model, ids: list[int], cache: KVCache, chunk: int, progress: Callable[[int, int], None] | None) -> Tensor:
    """Put tokens into the cache, in chunks; return the final states of all, (1, T, D)."""
    states = []
    for first in range(0, len(ids), chunk):
        part = torch.tensor([ids[first:first + chunk]], device=cache.device)

        def passed(layers: int, all_: int) -> None:
            if progress:
                progress(first + part.shape[1] * layers // all_, len(ids))

        states.append(model.model(part, cache, passed))
    return torch.cat(states, 1)


def draft(model: Model, following: list[int], hidden: Tensor, cache: KVCache, chunk: int) -> Tensor:
    """Logits (1, V) for the token behind the last of `following`, which came after the states `hidden` (1, T, D)."""
    parts = torch.tensor([following], device=cache.device).split(chunk, 1)
    for ids, states in zip(parts[:-1], hidden.split(chunk, 1)):
        model.model.predict_second(ids, states, cache)
    return model.mtp(parts[-1], hidden[:, -parts[-1].shape[1]:], cache, last_only=True)[0]


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probabilities, 1, generator=generator))


def verify(truth: Tensor, guess: Tensor, drafted: int, generator: torch.Generator) -> int:
    """The draft where it stands, else another token in its place; truth and guess are distributions (V,).

    A draft is kept with probability min(1, truth/guess), and what is lost by that is drawn from where the guess was
    too small; together that is the truth exactly. Greedy decoding is the case of one certain token.
    """
    if float(torch.rand((), generator=generator, device=generator.device)) * guess[drafted] < truth[drafted]:
        return drafted
    missing = (truth - guess).clamp(min=0)
    return draw(missing if missing.any() else truth, generator)
