"""Speculative decoding: two tokens for one reading of the weights, where a draft turns out right.

    tokens so far     … a b c          c was just chosen, from the model's state h at b
    draft             the MTP module, from h and c                       -> d?
    one step          the model reads c and d? together                  -> what follows c, and what follows d?
    d? is accepted    ... c d e        e follows d? and is free
    d? is rejected    ... c x          x is what follows c; d? is cut out of the cache

Decoding waits for weights to come from memory, and two tokens need hardly more of them than one; that the draft is
sometimes wrong costs a little arithmetic. It changes no answer: which tokens come, and with what probability, is
decided by the model alone.

Papers: Leviathan et al. (arXiv:2211.17192, algorithm 1, theorem 3.5); multi-token prediction as the draft:
DeepSeek-V3 (arXiv:2412.19437, sections 2.2 and 5.4.3).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine.requests import check_finite
from .generate import PREFILL_CHUNK, Sampler, top_k_top_p
from .layers import KVCache
from .model import Model


@dataclass
class Acceptance:
    """How many drafts were made and how many were right."""

    drafted: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        share = self.accepted / self.drafted if self.drafted else 0
        return f"{self.accepted} of {self.drafted} drafts accepted ({share:.0%})"


@torch.inference_mode()
def speculate(model: Model, prompt_ids: list[int], max_new_tokens: int, sampler: Sampler, stop_ids: Collection[int],
              cache: KVCache, acceptance: Acceptance | None = None) -> Iterator[int]:
    """The tokens of `generate`.

    The draft layer has a cache of its own, `cache.drafts`: slot t holds what it made of the model's state at t
    and of the token at t+1.
    """
    acceptance = Acceptance() if acceptance is None else acceptance
    if cache.drafts is None:
        like = cache.tensors[0]
        cache.drafts = KVCache([model.model.layers[-1].self_attn], 0, like.dtype, like.device)
    # The draft layer needs the state before each token that it reads, and no cache has states: start one token earlier.
    start = max(0, min(cache.length - 1, cache.drafts.length))
    for one in (cache, cache.drafts):
        one.length = start
        one.reserve(len(prompt_ids) + max_new_tokens)  # a draft may lie one beyond the last token
    hidden = read(model, prompt_ids[start:], cache)  # (1, T, D)

    # `new` are tokens that are chosen and not yet handed out, `following` the token after each state in `hidden`.
    new = [choose(sampler, distribution(sampler, model.lm_head(hidden[0, -1:]), 1))]
    following = prompt_ids[start + 1:] + new
    count = 0
    while True:
        for token in new:
            if token in stop_ids:
                return
            yield token
            count += 1
            if count == max_new_tokens:
                return
        guess = distribution(sampler, draft(model, following, hidden, cache.drafts), count + 1)  # (V,)
        drafted = draw(guess, sampler.generator)
        hidden = model.model(torch.tensor([[new[-1], drafted]], device=guess.device), cache)  # (1, 2, D)
        logits = model.lm_head(hidden[0])  # (2, V)
        truth = distribution(sampler, logits[:1], count + 1)  # (V,)
        token = verify(truth, guess, drafted, sampler.generator)
        sampler.add(torch.tensor([token], device=guess.device))
        acceptance.drafted += 1
        acceptance.accepted += token == drafted
        if token == drafted:
            # What follows the draft: only now, since a penalty has to know of it.
            new = [token, choose(sampler, distribution(sampler, logits[1:], count + 2))]
        else:
            cache.truncate(cache.length - 1)
            new, hidden = [token], hidden[:, :1]
        following = new


def read(model: Model, ids: list[int], cache: KVCache) -> Tensor:
    """Put tokens into the cache, in chunks; return the final states of all, (1, T, D)."""
    chunks = torch.tensor([ids], device=cache.tensors[0].device).split(PREFILL_CHUNK, 1)
    return torch.cat([model.model(chunk, cache) for chunk in chunks], 1)


def draft(model: Model, following: list[int], hidden: Tensor, cache: KVCache) -> Tensor:
    """Logits (1, V) for the token after the last of `following`, which came after the states `hidden` (1, T, D)."""
    ids = torch.tensor([following], device=hidden.device)
    *chunks, last = zip(ids.split(PREFILL_CHUNK, 1), hidden.split(PREFILL_CHUNK, 1))
    for chunk, states in chunks:
        model.model.predict_second(chunk, states, cache)
    # A guess may be anything, also 0 where a damaged draft layer gives no number: the model decides.
    return model.mtp(*last, cache, last_only=True)[0].nan_to_num(0, 0, 0)


def distribution(sampler: Sampler, logits: Tensor, number: int) -> Tensor:
    """(1, V) -> the probabilities (V,) with which `sampler` would choose new token `number`."""
    check_finite(logits, number)
    logits = sampler.penalised(logits)
    if sampler.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()[0]
    probabilities, ids = top_k_top_p(logits, sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, ids, probabilities)[0]


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """One id by its probability, (V,); they need not add up to 1."""
    return int(torch.multinomial(probabilities, 1, generator=generator))


def choose(sampler: Sampler, probabilities: Tensor) -> int:
    """Draw a token of the answer from its distribution (V,), and remember it."""
    token = draw(probabilities, sampler.generator)
    sampler.add(torch.tensor([token], device=probabilities.device))
    return token


def verify(truth: Tensor, guess: Tensor, drafted: int, generator: torch.Generator) -> int:
    """The draft where it stands, else another token in its place; truth and guess are distributions (V,), p and q.

    A draft is kept with probability min(1, truth/guess), and what is lost by that is drawn from where the guess was
    too small; together that is the truth exactly. Greedy decoding is the case of one certain token.
    """
    chance = float(torch.rand((), generator=generator, device=generator.device))
    if chance * guess[drafted] < truth[drafted]:  # chance < p/q, without a division
        return drafted
    missing = (truth - guess).clamp(min=0)
    return draw(missing if missing.any() else truth, generator)  # where the two agree, rounding may leave nothing
