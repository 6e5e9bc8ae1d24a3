"""Continuous batching: when a row's answer ends, the next prompt takes its place.

    slices          row 0   aaaaaaaaaa | dddd            a slice of prompts ends with its longest answer,
                    row 1   bbb······· | eeeeeee         and the other rows wait (·)
                    row 2   ccccc····· | ff·····

    continuous      row 0   aaaaaaaaaa | …               no row waits
                    row 1   bbb | eeeeeee | …
                    row 2   ccccc | dddd | ff | …

One reading of the weights still gives a token to each row. For that, rows have lengths of their own in the cache
(RaggedKVCache), and settings and random numbers of their own. Idea: Orca (Yu et al., OSDI 2022, section 3.2).
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from ..generate import PREFILL_CHUNK, Sampler, new_cache, prefill, sample, top_k_top_p
from ..layers import KVCache
from ..model import Model
from .requests import are_finite

CLEARED = 256  # slots


@dataclass
class Request:
    """A prompt and how it is answered; `sampling` are the settings of generate.Sampler, the seed among them."""

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: dict[str, float | None] = field(default_factory=dict)
    index: int = 0  # for the caller, who gets answers in the order in which they end


class Row:
    """A request that is being answered: its new ids so far, and why it ended: "stop", "length", "error" or not yet."""

    def __init__(self, model: Model, request: Request):
        self.request, self.ids = request, []
        self.end = "" if request.max_new_tokens else "length"
        self.sampler = Sampler(model, [request.prompt_ids], **request.sampling)

    def add(self, token: int, finite: bool, stop_ids: Collection[int]) -> None:
        if not finite:
            self.end = "error"  # as generate and generate_batch end there
        elif token in stop_ids:
            self.end = "stop"
        else:
            self.ids.append(token)
            self.end = "length" if len(self.ids) == self.request.max_new_tokens else ""


class RaggedKVCache:
    """The KV cache of rows that have lengths of their own; each layer writes a token to each row's next slot.

        slot        0 1 2 3 4 5
        row 0       a b c d →            a query of row 0 sees slots 0 to 4, with its own
        row 1       x y →
        row 2       p q r s t →          all rows are handed out up to the longest one's end, and a mask hides the rest
    """

    def __init__(self, model: Model, rows: int, capacity: int):
        self.tensors = new_cache(model, capacity, [0] * rows).tensors
        self.lengths, self.cleared = [0] * rows, 0

    def clear_to(self, end: int) -> None:
        """Zeros in the slots up to `end` that nobody has written: a masked slot has the weight 0, and 0 · NaN is NaN.

        Only as far as slots are used: memory that was never written takes none on a CPU.
        """
        if end > self.cleared:
            start, self.cleared = self.cleared, max(end, min(self.cleared + CLEARED, self.tensors[0].shape[3]))
            for tensor in self.tensors:
                tensor[:, :, :, start:self.cleared] = 0

    def put(self, row: int, cache: KVCache, other: int, first: int) -> None:
        """Begin a row with a prompt: row `other` of a usual cache, from slot `first` on."""
        self.lengths[row] = cache.length - first
        self.clear_to(self.lengths[row])
        for tensor, new in zip(self.tensors, cache.tensors):
            tensor[:, row, :, :self.lengths[row]] = new[:, other, :, first:cache.length]

    def clear(self, row: int) -> None:
        """Zeros in a row whose numbers are not finite."""
        for tensor in self.tensors:
            tensor[:, row, :, :self.cleared] = 0

    def take_last(self, row: int) -> None:
        """The last row takes the place of another."""
        self.lengths[row] = length = self.lengths.pop()
        for tensor in self.tensors:
            tensor[:, row, :, :length] = tensor[:, len(self.lengths), :, :length]

    def begin_step(self) -> tuple[Tensor, Tensor]:
        """Where each row's next token goes, positions (B, 1), and which keys it sees, the mask (B, 1, 1, S)."""
        device, self.longest = self.tensors[0].device, max(self.lengths) + 1
        self.clear_to(self.longest)
        self.rows = torch.arange(len(self.lengths), device=device)
        self.positions = torch.tensor(self.lengths, device=device)
        # The one rule, as in layers.attention_mask: a query sees the keys of its own row up to itself.
        mask = torch.arange(self.longest, device=device) <= self.positions[:, None]  # (B, S)
        return self.positions[:, None], mask[:, None, None]

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        """Put new keys and values (B, K, 1, N) after each row's last token; return all of the layer's, (B, K, S, N)."""
        for tensor, part in zip(self.tensors, new):
            tensor[layer][self.rows, :, self.positions] = part[:, :, 0]
        return [tensor[layer, :len(self.lengths), :, :self.longest] for tensor in self.tensors]


def decode(model: Model, tokens: Tensor, cache: RaggedKVCache) -> Tensor:
    """generate.decode for rows with lengths of their own: one more token of each, (B,), gives logits (B, V)."""
    positions, mask = cache.begin_step()
    x = model.model.embed_tokens(tokens[:, None])  # (B, 1, D)
    cos, sin = model.model.rotary_emb(positions, x.dtype)
    for layer in model.model.layers[:model.config.num_hidden_layers]:
        x = layer(x, cos, sin, mask, cache)
    cache.lengths = [length + 1 for length in cache.lengths]
    return model.lm_head(model.model.norm(x))[:, -1]


def read(model: Model, prompts: dict[int, list[int]], cache: RaggedKVCache) -> Tensor:
    """Prefill prompts together and put them into their rows: row -> ids, gives logits (B, V)."""
    longest = max(map(len, prompts.values()))
    padding = [longest - len(prompt) for prompt in prompts.values()]
    own = new_cache(model, longest, padding)
    padded = [[prompt[0]] * pad + prompt for pad, prompt in zip(padding, prompts.values())]
    logits = prefill(model, torch.tensor(padded, device=own.tensors[0].device), own)
    for other, (row, pad) in enumerate(zip(prompts, padding)):
        cache.put(row, own, other, pad)
    return logits


def together(fresh: dict[int, Row]) -> Iterator[dict[int, Row]]:
    """Rows whose prompts are read in one forward: as many as make a chunk, padding included."""
    group: dict[int, Row] = {}
    for slot, row in fresh.items():
        longest = max(len(one.request.prompt_ids) for one in (*group.values(), row))
        if group and longest * (len(group) + 1) > PREFILL_CHUNK:
            yield group
            group = {}
        group[slot] = row
    if group:
        yield group


def draw(logits: Tensor, samplers: list[Sampler]) -> Tensor:
    """A token for each row, (B, V) -> (B,), by its own settings and random numbers: those of a Sampler, bit for bit."""
    groups: dict[tuple, list[int]] = {}
    for i, sampler in enumerate(samplers):
        settings = sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p
        groups.setdefault(settings if sampler.temperature else (0,), []).append(i)
    tokens = torch.empty(len(samplers), dtype=torch.int64, device=logits.device)
    for (temperature, *settings), members in groups.items():
        some = logits if len(members) == len(logits) else logits[members]
        if temperature == 0:
            tokens[members] = sample(some)
            continue
        probabilities, ids = top_k_top_p(some, temperature, *settings)  # rows of the same settings together: faster
        places = [torch.multinomial(one, 1, generator=samplers[i].generator) for one, i in zip(probabilities, members)]
        tokens[members] = ids.gather(-1, torch.stack(places)).squeeze(-1)
    return tokens


def advance(rows: list[Row], logits: Tensor, stop_ids: Collection[int]) -> tuple[int, list[Row]]:
    """Give each row its next token; (how many tokens, the rows that have ended)."""
    finite, samplers = are_finite(logits).tolist(), [row.sampler for row in rows]
    if not all(finite):
        logits = logits.nan_to_num(0, 0, 0)  # or no token could be drawn for those rows; theirs does not count
    if any(sampler.penalises for sampler in samplers):
        logits = torch.cat([sampler.penalised(row[None]) for sampler, row in zip(samplers, logits)])
    tokens = draw(logits, samplers)
    for sampler, token in zip(samplers, tokens.split(1)):
        sampler.add(token)
    for row, token, good in zip(rows, tokens.tolist(), finite):
        row.add(token, good, stop_ids)
    return len(rows), [row for row in rows if row.end]


@torch.inference_mode()
def continuous_batch(model: Model, requests: Iterable[Request], *, rows: int, capacity: int,
                     stop_ids: Collection[int] = ()) -> Iterator[tuple[int, list[Row]]]:
    """Answer requests, `rows` at a time; after each forward yields (how many tokens came, the rows that ended).

    A request is taken from `requests` when a row is free for it. `capacity` is the most tokens that a row can have.
    The tokens are those of `generate` with the request's settings, to rounding. Nothing is checked here.
    """
    cache, waiting, slots = RaggedKVCache(model, rows, capacity), iter(requests), [None] * rows
    while True:
        free = [slot for slot, row in enumerate(slots) if row is None]
        fresh = {slot: Row(model, request) for slot, request in zip(free, islice(waiting, len(free)))}
        if fresh:
            yield 0, [row for row in fresh.values() if row.end]  # no token was asked for
        for group in together({slot: row for slot, row in fresh.items() if not row.end}):
            logits = read(model, {slot: row.request.prompt_ids for slot, row in group.items()}, cache)
            yield advance(list(group.values()), logits, stop_ids)
            for slot, row in group.items():
                slots[slot] = keep(row, slot, cache)
        if fresh:
            continue  # a row that ended with its first token, or without any, has room for another
        while None in slots:  # nothing is waiting: rows move together, so that no empty one is computed
            last = slots.pop()
            if last is None:
                cache.lengths.pop()
            else:
                hole = slots.index(None)
                slots[hole] = last
                cache.take_last(hole)
        if not slots:
            return
        device = cache.tensors[0].device
        logits = decode(model, torch.tensor([row.ids[-1] for row in slots], device=device), cache)
        yield advance(slots, logits, stop_ids)
        slots = [keep(row, slot, cache) for slot, row in enumerate(slots)]


def keep(row: Row, slot: int, cache: RaggedKVCache) -> Row | None:
    """The row, or None if it has ended and its slot is free."""
    if row.end == "error":
        cache.clear(slot)
    return None if row.end else row
