"""The loop: logits -> next id, again and again. Ids only; text is the tokenizer's business.

    prompt ids ── prefill, in chunks ──> logits of the last position ── sample ──> id ──┐
                                             ^                                          │ until a stop id
                                             └────────── decode: one token ─────────────┘ or max_new_tokens

Prefill works on many tokens at once and is bound by arithmetic; decode reads every weight for one token and
is bound by memory bandwidth. Where the checkpoint can draft, a step may give two tokens: see speculative.py.
"""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .engine.drafts import check_drafting
from .engine.requests import check_cache, check_finite, check_request
from .layers import KVCache
from .model import Model

if TYPE_CHECKING:
    from .speculative import Acceptance

# A prompt is fed in pieces, so that MLP activations and scores take memory for one piece, not for all of it. Smaller
# ones would be slower: every piece reads all weights and all earlier keys again.
PREFILL_CHUNK = 4096


def sample(logits: Tensor, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None, min_p: float | None = None) -> Tensor:
    """Choose an id for each row: logits (B, V) -> (B,) int64. Temperature 0 takes the likeliest (greedy decoding)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = top_k_top_p(logits, temperature, top_k, top_p, min_p)
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


def top_k_top_p(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
                min_p: float | None) -> tuple[Tensor, Tensor]:
    """logits (B, V) -> the C candidates: probabilities (B, C), not normalised again, and their ids (B, C).

    Logits are divided by the temperature. Then these are kept, one rule after the other:

        top_k   the top_k likeliest (None or 0: all)
        top_p   the smallest set of the likeliest whose probabilities reach top_p (arXiv:1904.09751, section 3.1)
        min_p   those at least min_p times as likely as the likeliest (arXiv:2407.01082): few where the model is sure
    """
    logits, ids = logits.float(), torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    # Softmax does not change when all logits shift; with the largest at 0 a tiny temperature cannot overflow (below
    # 1e-38 it would be 0 in float32, and 0/0).
    logits = (logits - logits.max(-1, keepdim=True).values) / max(temperature, 1e-30)
    top_p = 1 if top_p is None else top_p
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # (B, top_k), likeliest first
    probabilities = logits.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the sum of all likelier ones: 0 for the first, which stays
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    if min_p:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0)
    return probabilities, ids


def penalise(logits: Tensor, text: Tensor, answer: Tensor, repetition_penalty: float,
             presence_penalty: float) -> Tensor:
    """Make tokens less likely that came already: logits (B, V) -> (B, V) float32.

    A model that has said a thing twice finds it likely a third time, and may never leave the loop. `text` (B, V) is
    True for the tokens of prompt and answer, `answer` (B, V) for those of the answer alone.

        repetition   tokens of the text: a logit above 0 is divided by the penalty, one below 0 is multiplied by it
                     (CTRL, arXiv:1909.05858, section 4.1); 1 changes nothing
        presence     tokens of the answer: the penalty is subtracted once, however often they came; 0: no change
    """
    logits = logits.float()
    repeated = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    return torch.where(text, repeated, logits) - presence_penalty * answer


class Sampler:
    """`sample` with its settings, its random numbers, and the tokens that came already."""

    def __init__(self, model: Model, prompts: list[list[int]], *, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, min_p: float | None = None, repetition_penalty: float | None = None,
                 presence_penalty: float | None = None, seed: int | None = None):
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.generator = torch.Generator(model.model.norm.weight.device)
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.penalties = 1.0 if repetition_penalty is None else repetition_penalty, presence_penalty or 0.0
        self.penalises = self.penalties != (1, 0)
        if self.penalises:
            shape = len(prompts), model.config.vocab_size
            self.text = torch.zeros(shape, dtype=torch.bool, device=self.generator.device)
            self.answer = torch.zeros_like(self.text)
            for seen, prompt in zip(self.text, prompts):
                seen[torch.tensor(prompt, device=seen.device)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,)"""
        tokens = sample(self.penalised(logits), self.temperature, self.top_k, self.top_p, self.generator, self.min_p)
        self.add(tokens)
        return tokens

    def penalised(self, logits: Tensor) -> Tensor:
        """`penalise` by the tokens that came already, where the settings ask for it: (B, V) -> (B, V)."""
        return penalise(logits, self.text, self.answer, *self.penalties) if self.penalises else logits

    def add(self, tokens: Tensor) -> None:
        """Remember a token (B,) of each row's answer."""
        if self.penalises:
            for seen in (self.text, self.answer):
                seen.scatter_(1, tokens[:, None], True)


def generate(model: Model, prompt_ids: list[int], *, max_new_tokens: int, stop_ids: Collection[int] = (),
             cache: KVCache | None = None, compiled: bool = False, speculative: bool = False,
             acceptance: "Acceptance | None" = None, **sampling: float | None) -> Iterator[int]:
    """Yield new ids one by one; a stop id ends the sequence and is not yielded.

    `sampling` are the settings of Sampler: temperature, top_k, top_p, min_p, the two penalties, seed.
    A `cache` that already holds the first tokens of the prompt saves computing them again; afterwards it holds all
    tokens but the last. `compiled` decodes by engine/compiled.py: the same tokens, to rounding. `speculative` gives the
    same tokens in fewer steps, counts in `acceptance`, and may leave the last token and a stop id in the cache.
    Raises ValueError, before anything is computed, for a request that cannot be met; and for logits that are not finite
    when they come.
    """
    prompt_ids, stop_ids = list(prompt_ids), set(stop_ids)  # the caller may change theirs before the first token
    check_request(model.config, [prompt_ids], max_new_tokens, **sampling)
    if speculative:
        check_drafting(model.config, compiled)
    own = new_cache(model, 0)
    cache = own if cache is None else check_cache(cache, own, prompt_ids)  # is it like one of this model's own?
    if max_new_tokens == 0:
        return iter(())
    cache.reserve(len(prompt_ids) + max_new_tokens - 1)  # the last new token is never fed back
    sampler = Sampler(model, [prompt_ids], **sampling)
    if speculative:
        from .speculative import speculate  # which builds on this file

        return speculate(model, prompt_ids, max_new_tokens, sampler, stop_ids, cache, acceptance)
    step = compiled_step(model, cache) if compiled else decode
    unread = torch.tensor([prompt_ids[cache.length:]], device=sampler.generator.device)

    @torch.inference_mode()
    def ids() -> Iterator[int]:  # a function of its own, so that what is above happens now and not at the first token
        logits = prefill(model, unread, cache)
        for count in range(1, max_new_tokens + 1):
            check_finite(logits, count)
            token = sampler(logits)  # (1,)
            if int(token) in stop_ids:
                return
            yield int(token)
            if count < max_new_tokens:
                logits = step(model, token, cache)

    return ids()


def prefill(model: Model, token_ids: Tensor, cache: KVCache) -> Tensor:
    """Put (B, T) tokens into the cache; return the logits of the last one, (B, V)."""
    *chunks, last = token_ids.split(PREFILL_CHUNK, dim=1)
    for chunk in chunks:
        model.model(chunk, cache)  # without the head, whose logits nobody asks for here
    return model(last, cache, last_only=True)[:, -1]


def decode(model: Model, tokens: Tensor, cache: KVCache) -> Tensor:
    """One more token of each row, (B,), into the cache; return the logits of what follows, (B, V)."""
    return model(tokens[:, None], cache, last_only=True)[:, -1]


def new_cache(model: Model, capacity: int, padding: list[int] | None = None) -> KVCache:
    """An empty cache for the model's layers, of the activations' type, on the model's device."""
    like = model.model.norm.weight  # in the type of the activations even where other weights are stored in fewer bits
    layers = model.model.layers[:model.config.num_hidden_layers]  # the draft layer has a cache of its own
    return KVCache([layer.self_attn for layer in layers], capacity, like.dtype, like.device, padding)


def generate_batch(model: Model, prompts: list[list[int]], **settings) -> list[list[int]]:
    """New ids for each of several prompts of any lengths, computed together; the settings are those of `generate`."""
    from .engine.batch import generate_batch

    return generate_batch(model, prompts, **settings)


def compiled_step(model: Model, cache: KVCache):
    """`decode` once more, by torch.compile and CUDA graphs. Raises ValueError where PyTorch cannot compile."""
    from .engine.compiled import CompiledStep

    return CompiledStep(model, cache)
