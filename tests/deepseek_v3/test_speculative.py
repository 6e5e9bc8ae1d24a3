"""Speculative decoding: the tokens, and with sampling the distribution, of plain decoding, whatever the drafts are worth."""

import copy
import dataclasses

import pytest
import torch

from deepseek_v3 import generate
from deepseek_v3.speculative import draw, verify
from tests.test_generate import LOGITS, PROMPT, PROMPTS, exactly, made, slowly


def speculative(module, model, prompt, count, **more) -> tuple[list[int], object]:
    acceptance = module.Acceptance()
    return list(module.generate(model, prompt, max_new_tokens=count, speculative=True, acceptance=acceptance, **more)), acceptance


class Cheat:
    """A draft that knows the answer, or knows it every other time; the model's own draft is as good as none here."""

    def __init__(self, model, answer: list[int], prompt: int, wrong_every: int):
        self.model, self.answer, self.prompt, self.wrong_every, self.calls = model, answer, prompt, wrong_every, 0

    def __call__(self, token_ids, hidden, cache=None, last_only=False):
        logits = type(self.model).mtp(self.model, token_ids, hidden, cache, last_only)
        self.calls += 1
        place = cache.length + 1 - self.prompt  # of the drafted token in the answer
        token = self.answer[place] if place < len(self.answer) else 0
        if self.wrong_every and self.calls % self.wrong_every == 0:
            token = (token + 1) % 61
        return torch.nn.functional.one_hot(torch.tensor([[token]]), 61).float() * 100 + 0 * logits


@pytest.fixture(scope="module")
def drafting():
    return generate, made("deepseek_v3")


@pytest.mark.parametrize("wrong_every", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_speculation_gives_the_tokens_of_plain_decoding(drafting, monkeypatch, length, wrong_every):
    module, model = drafting
    expected = slowly(model, PROMPT[:length], 40)
    monkeypatch.setattr(model, "mtp", Cheat(model, expected, length, wrong_every), raising=False)
    for count in (1, 2, 3, 20, 21):
        model.mtp.calls = 0
        tokens, acceptance = speculative(module, model, PROMPT[:length], count)
        assert tokens == expected[:count]
        if wrong_every == 0:
            assert acceptance.accepted == acceptance.drafted == count // 2
        if wrong_every == 1:
            assert acceptance.accepted == 0 and acceptance.drafted == count - 1


def test_speculation_with_the_models_own_drafts(drafting):
    module, model = drafting
    for prompt in PROMPTS:
        tokens, acceptance = speculative(module, model, prompt, 20)
        assert tokens == slowly(model, prompt, 20) and acceptance.drafted > 0


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 12])
def test_speculation_reads_the_prompt_in_chunks(drafting, monkeypatch, chunk):
    """The drafts too are those of the whole, so as many are accepted."""
    module, model = drafting
    logits = []
    original = type(model).mtp
    monkeypatch.setattr(type(model), "mtp", lambda *a, **k: logits.append(original(*a, **k)) or logits[-1])
    speculative(module, model, PROMPT, 3)
    whole, part = len(logits), logits[:]
    monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
    assert speculative(module, model, PROMPT, 8)[0] == slowly(model, PROMPT, 8)
    assert torch.allclose(logits[whole][:, -1], part[0][:, -1], atol=1e-4)


def test_drafts_come_from_the_states_and_tokens_that_mtp_is_defined_on(drafting, monkeypatch):
    """Each draft, with its cache, is that of one forward over everything so far."""
    module, model = drafting
    drafts, original = [], type(model).mtp
    expected = slowly(model, PROMPT, 12)
    cheat = Cheat(model, expected, len(PROMPT), 3)

    def spy(self, token_ids, hidden, cache=None, last_only=False):
        drafts.append((cache.length + token_ids.shape[1], original(self, token_ids, hidden, cache, last_only)[0, -1]))
        cache.length -= token_ids.shape[1]
        return cheat(token_ids, hidden, cache, last_only)

    cheat.model = type("Original", (), {"mtp": lambda self, *a: original(model, *a)})()
    monkeypatch.setattr(type(model), "mtp", spy)
    speculative(module, model, PROMPT, 12)
    with torch.inference_mode():
        ids = torch.tensor([PROMPT + expected])
        whole = original(model, ids[:, 1:], model.model(ids)[:, :-1])[0]
    assert len(drafts) >= 6
    for length, logits in drafts:
        assert torch.allclose(logits, whole[length - 1], atol=1e-3)


def test_speculation_stops_at_a_stop_token_even_within_a_draft(drafting, monkeypatch):
    module, model = drafting
    expected = slowly(model, PROMPT, 40)
    monkeypatch.setattr(model, "mtp", Cheat(model, expected, len(PROMPT), 0), raising=False)
    for place in range(1, 8):
        if expected.index(expected[place]) == place:
            assert speculative(module, model, PROMPT, 20, stop_ids=[expected[place]])[0] == expected[:place]


def test_a_cache_goes_on_speculatively_and_plainly_in_turn(drafting):
    module, model = drafting
    cache, history = module.new_cache(model, 4), list(PROMPT)
    for turn, fast in enumerate([True, False, True, True, False]):
        cache.truncate(min(cache.length, max(0, len(history) - 4)))  # as a chat that leaves thoughts out
        history = history[:-1] + [turn, 7]
        answer = list(module.generate(model, history, max_new_tokens=6, cache=cache, speculative=fast))
        assert answer == slowly(model, history, 6)
        history += answer


def test_cutting_a_cache_cuts_what_the_drafts_know_of_it(drafting):
    """Slot t was made of the token at t+1, which may be another one afterwards."""
    module, model = drafting
    cache = module.new_cache(model, 4)
    list(module.generate(model, PROMPT, max_new_tokens=6, cache=cache, speculative=True))
    assert cache.drafts.length >= len(PROMPT) + 3
    cache.truncate(5)
    assert cache.drafts.length == 4
    cache.truncate(0)
    assert cache.drafts.length == 0


def test_accepting_and_rejecting_give_exactly_the_models_distribution(drafting):
    generator = torch.Generator().manual_seed(3)
    truth = torch.tensor([0.5, 0.2, 0.0, 0.2, 0.1])
    for guess in ([0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 0.9, 0.1, 0.0, 0.0], [0.5, 0.2, 0.0, 0.2, 0.1], [0.0, 0.0, 1.0, 0.0, 0.0]):
        guess, count = torch.tensor(guess), 5000
        drawn = torch.bincount(torch.tensor([verify(truth, guess, draw(guess, generator), generator) for _ in range(count)]), minlength=5)
        expected = truth * count
        assert drawn[2] == 0
        assert ((drawn - expected) ** 2 / expected)[expected > 0].sum() < 22  # three degrees of freedom: once in ten thousand seeds


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.0, None, None), (1.0, None, None), (0.6, 5, 0.8), (1.3, 6, 0.99), (1.0, None, 0.5)])
def test_the_distribution_is_the_one_that_is_sampled_from(temperature, top_k, top_p):
    given = generate.distribution(LOGITS[None], temperature, top_k, top_p)[0]
    assert torch.allclose(given, exactly(temperature, top_k, top_p).float() if temperature else torch.eye(8)[0], atol=1e-6)


def test_speculation_with_sampling_has_the_distribution_of_plain_sampling(drafting):
    """The first three tokens of many answers; the draft is bad here, so that rejection is exercised."""
    module, model = drafting
    settings = dict(temperature=1.0, top_k=3)
    with torch.inference_mode():
        first = module.distribution(model(torch.tensor([PROMPT]))[:, -1], 1.0, 3, None)[0]
        expected = {}
        for a in first.nonzero().flatten().tolist():
            then = module.distribution(model(torch.tensor([PROMPT + [a]]))[:, -1], 1.0, 3, None)[0]
            for b in then.nonzero().flatten().tolist():
                after = module.distribution(model(torch.tensor([PROMPT + [a, b]]))[:, -1], 1.0, 3, None)[0]
                for c in after.nonzero().flatten().tolist():
                    expected[a, b, c] = float(first[a] * then[b] * after[c])
    count, drawn = 400, {}
    for seed in range(count):
        key = tuple(speculative(module, model, PROMPT, 3, seed=seed, **settings)[0])
        drawn[key] = drawn.get(key, 0) + 1
    assert drawn.keys() <= expected.keys()
    large = [key for key, p in expected.items() if p * count >= 5]
    chi = sum((drawn.get(key, 0) - count * expected[key]) ** 2 / (count * expected[key]) for key in large)
    assert len(large) >= 5 and chi < 3 * len(large) + 10


def test_a_checkpoint_without_the_layer_is_refused(drafting):
    module, model = drafting
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="no layer that predicts a second token"):
        module.generate(other, PROMPT, max_new_tokens=3, speculative=True)
    with pytest.raises(ValueError, match="no layer for multi-token prediction"):
        other.mtp(torch.tensor([[1]]), torch.zeros(1, 1, 24))


def test_a_damaged_draft_layer_costs_time_and_no_token(drafting):
    module, model = drafting
    model = copy.deepcopy(model)
    for weight in model.model.layers[-1].parameters():
        weight.data.fill_(torch.nan)
    assert speculative(module, model, PROMPT, 6)[0] == slowly(model, PROMPT, 6)
    assert len(speculative(module, model, PROMPT, 6, temperature=1.0, repetition_penalty=1.2)[0]) == 6
