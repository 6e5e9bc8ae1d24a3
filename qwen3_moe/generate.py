"""6. The loop: logits -> next id, again and again. Ids only; text is the tokenizer's business.

    prompt ids ── prefill, in chunks ──> logits of the last position ── sample ──> id ──┐
                                             ^                                          │ until a stop id
                                             └────────── decode: one token ─────────────┘ or max_new_tokens

Prefill works on many tokens at once and is bound by arithmetic; decode reads every weight for one token and
is bound by memory bandwidth.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from .compiled import CompiledStep
from .config import Config
from .layers import KVCache
from .model import Model

# A prompt is fed in pieces, so that MLP activations and mask take memory for one piece, not for all of it. Smaller ones
# would be slower: keys are seen in more pieces, experts get fewer rows each.
PREFILL_CHUNK = 4096


def sample(logits: Tensor, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None, min_p: float | None = None) -> Tensor:
    """Choose an id for each row: logits (B, V) -> (B,) int64. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = candidates(logits, temperature, top_k, top_p, min_p)
    choice = torch.multinomial(probabilities, 1, generator=generator)  # normalises by itself
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)


def candidates(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
               min_p: float | None) -> tuple[Tensor, Tensor | None]:
    """logits (B, V) -> what may be drawn: probabilities (B, C), not normalised, and their ids (B, C), None for all.

    Logits are divided by the temperature. Then these are kept, one rule after the other:

        top_k   the top_k likeliest (None or 0: all)
        top_p   the smallest set of the likeliest whose probabilities reach top_p (arXiv:1904.09751, section 3.1)
        min_p   those at least min_p times as likely as the likeliest (arXiv:2407.01082): few where the model is sure
    """
    logits = logits.float()
    # Softmax does not change when all logits shift; with the largest at 0 a tiny temperature cannot overflow (below
    # 1e-38 it would be 0 in float32, and 0/0).
    logits = (logits - logits.max(-1, keepdim=True).values) / max(temperature, 1e-30)
    top_p, ids = 1 if top_p is None else top_p, None
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # (B, top_k), likeliest first
    probabilities = logits.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the sum of all likelier ones: 0 for the first, which stays
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    if min_p:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0)
    return probabilities, ids


def penalise(logits: Tensor, text: Tensor, answer: Tensor, repetition_penalty: float, presence_penalty: float) -> Tensor:
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

    def __init__(self, model: Model, prompts: list[list[int]], seed: int | None, temperature: float, top_k: int | None,
                 top_p: float | None, min_p: float | None, repetition_penalty: float | None,
                 presence_penalty: float | None):
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.penalties = 1.0 if repetition_penalty is None else repetition_penalty, presence_penalty or 0.0
        self.generator = new_generator(model, seed)
        self.penalises = self.penalties != (1, 0)
        if self.penalises:
            self.text = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=self.generator.device)
            self.answer = torch.zeros_like(self.text)
            for seen, prompt in zip(self.text, prompts):
                seen[torch.tensor(prompt, device=seen.device)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,)"""
        tokens = sample(self.penalised(logits), self.temperature, self.top_k, self.top_p, self.generator, self.min_p)
        self.add(tokens)
        return tokens

    def penalised(self, logits: Tensor) -> Tensor:
        return penalise(logits, self.text, self.answer, *self.penalties) if self.penalises else logits

    def add(self, tokens: Tensor) -> None:
        """Remember a token (B,) of each row's answer."""
        if self.penalises:
            for seen in (self.text, self.answer):
                seen.scatter_(1, tokens[:, None], True)


def are_finite(logits: Tensor) -> Tensor:
    """(B, V) -> (B,) bool. By the extremes, which are NaN if any number is: four times as fast as isfinite() of all."""
    return logits.amax(-1).isfinite() & logits.amin(-1).isfinite()


def check_finite(logits: Tensor, number: int) -> None:
    """ValueError where a number is infinite or NaN: greedy decoding would go on, and sampling end somewhere deep."""
    if not are_finite(logits).all():
        raise ValueError(f"the logits of new token {number} are not finite: the weights are damaged, or overflow in "
                         f"{str(logits.dtype).removeprefix('torch.')}; try --dtype float32 or bfloat16")


def generate(model: Model, prompt_ids: list[int], *, max_new_tokens: int, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
             repetition_penalty: float | None = None, presence_penalty: float | None = None,
             stop_ids: Collection[int] = (), seed: int | None = None, cache: KVCache | None = None,
             progress: Callable[[int, int], None] | None = None, compiled: bool = False) -> Iterator[int]:
    """Yield new ids one by one; a stop id ends the sequence and is not yielded.

    A `cache` that already holds the first tokens of the prompt saves computing them again; afterwards it
    holds all tokens but the last. `progress(done, total)` is called during prefill. `compiled` gives the same tokens,
    to rounding, by compiled.py, after some seconds of compiling.
    Raises ValueError, before anything is computed, for a request that cannot be met; and for logits that are
    not finite when they come.
    """
    prompt_ids, stop_ids = list(prompt_ids), set(stop_ids)  # the caller may change theirs before the first token
    check_request(model.config, [prompt_ids], max_new_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty,
                  presence_penalty)
    known = cache.length if cache is not None else 0
    if cache is not None and cache.made_for() != new_cache(model, 0).made_for():
        raise ValueError("the cache was made for another model, type or device, or for a batch; "
                         "new_cache(model, capacity) makes one that fits")
    if known >= len(prompt_ids):
        raise ValueError(f"the cache holds {known} tokens, the prompt has {len(prompt_ids)}: nothing is left to compute")
    if max_new_tokens == 0:
        return iter(())
    capacity = len(prompt_ids) + max_new_tokens - 1  # the last new token is never fed back
    if cache is None:
        cache = new_cache(model, capacity)
    cache.reserve(capacity)
    step = CompiledStep(model, cache) if compiled else None
    choose = Sampler(model, [prompt_ids], seed, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty)

    @torch.inference_mode()
    def ids() -> Iterator[int]:
        prompt = torch.tensor([prompt_ids[known:]], device=cache.device)
        logits = prefill(model, prompt, cache, progress)
        for count in range(1, max_new_tokens + 1):
            check_finite(logits, count)
            token = choose(logits)  # (1,)
            if int(token) in stop_ids:
                return
            yield int(token)
            if count < max_new_tokens:
                logits = step(token) if step else model(token[:, None], cache, last_only=True)[:, -1]

    return ids()


@torch.inference_mode()
def generate_batch(model: Model, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0,
                   top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
                   repetition_penalty: float | None = None, presence_penalty: float | None = None,
                   stop_ids: Collection[int] = (), seed: int | None = None) -> list[list[int]]:
    """New ids for each of several prompts of any lengths, computed together; each ends on its own.

    Prompts are padded on the left, so that all of them end, and go on, in the same slot of the cache.
    Raises ValueError before anything is computed for a request that cannot be met. A row whose logits are not finite
    ends there, with a warning.
    """
    if not prompts:
        return []
    check_request(model.config, prompts, max_new_tokens, temperature, top_k, top_p, seed, min_p, repetition_penalty,
                  presence_penalty)
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    cache = new_cache(model, longest + max(max_new_tokens - 1, 0), padding)
    # Any token would do as padding. With the first of the row no number appears that the row would not have by itself.
    padded = torch.tensor([[prompt[0]] * pad + list(prompt) for pad, prompt in zip(padding, prompts)], device=cache.device)
    choose = Sampler(model, prompts, seed, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty)

    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for count in range(max_new_tokens):
        logits = prefill(model, padded, cache) if count == 0 else model(tokens[:, None], cache, last_only=True)[:, -1]
        if not (finite := are_finite(logits)).all():  # (B,)
            for row in sorted(unfinished - set(finite.nonzero().flatten().tolist())):
                warnings.warn(f"row {row} ends after {count} tokens: its logits are not finite", stacklevel=2)
                unfinished.discard(row)
            logits = torch.where(finite[:, None], logits, 0)  # or no row could be drawn
        tokens = choose(logits)  # (B,)
        for row, token in enumerate(tokens.tolist()):
            if token in stop_ids:
                unfinished.discard(row)
            elif row in unfinished:
                answers[row].append(token)
        if not unfinished:
            break
    return answers


def prefill(model: Model, token_ids: Tensor, cache: KVCache,
            progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Put (B, T) tokens into the cache; return the logits of the last one, (B, V). `progress(done, T)` counts tokens."""
    T = token_ids.shape[1]
    for start in range(0, T, PREFILL_CHUNK):
        chunk = token_ids[:, start:start + PREFILL_CHUNK]

        def passed(layers: int, all_: int) -> None:  # a layer counts as its share of the tokens, else a piece takes long
            if progress:
                progress(start + chunk.shape[1] * layers // all_, T)

        x = model.model(chunk, cache, passed)  # (B, chunk, D)
    return model.head(x[:, -1])  # of nothing else: nobody asks what follows in the middle of a prompt


def new_cache(model: Model, capacity: int, padding: list[int] | None = None) -> KVCache:
    """An empty cache of the activations' type on the model's device."""
    like = model.model.norm.weight  # never FP8
    return KVCache(model.config, capacity, like.dtype, like.device, padding)


def new_generator(model: Model, seed: int | None) -> torch.Generator:
    generator = torch.Generator(model.model.norm.weight.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    return generator


def check_request(config: Config, prompts: list[list[int]], max_new_tokens: int, temperature: float,
                  top_k: int | None, top_p: float | None, seed: int | None, min_p: float | None = None,
                  repetition_penalty: float | None = None, presence_penalty: float | None = None) -> None:
    """ValueError for what `generate` could not do; cheap, so that it can be asked before a model is loaded."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
    if not 0 <= temperature < float("inf"):
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
