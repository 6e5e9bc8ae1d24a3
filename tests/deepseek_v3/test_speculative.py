"""Speculative decoding gives the tokens, and with sampling the distribution, of plain decoding, whatever the drafts."""

import copy
import dataclasses
import functools

import pytest
import torch

from deepseek_v3 import speculative as lesson
from deepseek_v3.config import Config
from deepseek_v3.generate import Sampler, generate, new_cache
from deepseek_v3.model import Model
from deepseek_v3.speculative import Acceptance, distribution, draw, verify
from tests.test_generate import LATENT, LOGITS, PROMPT, PROMPTS, exactly, made, slowly


def speculative(model: Model, prompt: list[int], count: int, **more) -> tuple[list[int], Acceptance]:
    acceptance = Acceptance()
    tokens = generate(model, prompt, max_new_tokens=count, speculative=True, acceptance=acceptance, **more)
    return list(tokens), acceptance


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
def model() -> Model:
    return made("deepseek_v3")


@pytest.fixture(scope="module")
def plainly(model):
    """The tokens that come without drafts, by whole forwards; of each prompt once."""
    return functools.cache(lambda prompt: slowly(model, list(prompt), 40))


@pytest.mark.parametrize("length", [1, 2, 11])
def test_speculation_gives_the_tokens_of_plain_decoding(model, plainly, monkeypatch, length):
    expected = plainly(tuple(PROMPT[:length]))
    for wrong_every in (0, 1, 2, 3, 5):
        monkeypatch.setitem(vars(model), "mtp", Cheat(model, expected, length, wrong_every))
        for count in (1, 2, 3, 20, 21):
            model.mtp.calls = 0
            tokens, acceptance = speculative(model, PROMPT[:length], count)
            assert tokens == expected[:count], wrong_every
            if wrong_every == 0:
                assert acceptance.accepted == acceptance.drafted == count // 2
            if wrong_every == 1:
                assert acceptance.accepted == 0 and acceptance.drafted == count - 1


def test_speculation_with_the_models_own_drafts_in_the_engine_and_in_the_lesson(model):
    plain = made("deepseek_v3", engine=False)
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        fast, slow = (one.mtp(ids[:, 1:], one.model(ids)[:, :-1]) for one in (model, plain))
        assert (fast - slow).abs().max() <= 1e-5 * slow.abs().max()
    for prompt in PROMPTS:
        expected = slowly(plain, prompt, 20)
        for one in (model, plain):
            tokens, acceptance = speculative(one, prompt, 20)
            assert tokens == expected and acceptance.drafted > 0


def test_speculation_reads_the_prompt_in_chunks(model, plainly, monkeypatch):
    """The drafts too are those of the whole, so as many are accepted."""
    logits, original = [], Model.mtp
    monkeypatch.setattr(Model, "mtp", lambda *a, **k: logits.append(original(*a, **k)) or logits[-1])
    speculative(model, PROMPT, 3)
    for chunk in (1, 3, 10, 11, 12):
        whole, part = len(logits), logits[:]
        monkeypatch.setattr(lesson, "PREFILL_CHUNK", chunk)
        assert speculative(model, PROMPT, 8)[0] == plainly(tuple(PROMPT))[:8]
        assert torch.allclose(logits[whole][:, -1], part[0][:, -1], atol=1e-4)


def test_drafts_come_from_the_states_and_tokens_that_mtp_is_defined_on(model, plainly, monkeypatch):
    """Each draft, with its cache, is that of one forward over everything so far."""
    drafts, original = [], Model.mtp
    expected = plainly(tuple(PROMPT))[:12]
    cheat = Cheat(model, expected, len(PROMPT), 3)

    def spy(self, token_ids, hidden, cache=None, last_only=False):
        drafts.append((cache.length + token_ids.shape[1], original(self, token_ids, hidden, cache, last_only)[0, -1]))
        cache.length -= token_ids.shape[1]
        return cheat(token_ids, hidden, cache, last_only)

    cheat.model = type("Original", (), {"mtp": lambda self, *a: original(model, *a)})()
    monkeypatch.setattr(Model, "mtp", spy)
    speculative(model, PROMPT, 12)
    with torch.inference_mode():
        ids = torch.tensor([PROMPT + expected])
        whole = original(model, ids[:, 1:], model.model(ids)[:, :-1])[0]
    assert len(drafts) >= 6
    for length, logits in drafts:
        assert torch.allclose(logits, whole[length - 1], atol=1e-3)


def test_speculation_stops_at_a_stop_token_even_within_a_draft(model, plainly, monkeypatch):
    expected = plainly(tuple(PROMPT))
    monkeypatch.setitem(vars(model), "mtp", Cheat(model, expected, len(PROMPT), 0))
    for place in range(1, 8):
        if expected.index(expected[place]) == place:
            assert speculative(model, PROMPT, 20, stop_ids=[expected[place]])[0] == expected[:place]


def test_a_cache_goes_on_speculatively_and_plainly_in_turn(model):
    cache, history = new_cache(model, 4), list(PROMPT)
    for turn, fast in enumerate([True, False, True, True, False]):
        cache.truncate(min(cache.length, max(0, len(history) - 4)))  # as a chat that leaves thoughts out
        history = history[:-1] + [turn, 7]
        answer = list(generate(model, history, max_new_tokens=6, cache=cache, speculative=fast))
        assert answer == slowly(model, history, 6)
        history += answer


def test_cutting_a_cache_cuts_what_the_drafts_know_of_it(model):
    """Slot t was made of the token at t+1, which may be another one afterwards."""
    cache = new_cache(model, 4)
    list(generate(model, PROMPT, max_new_tokens=6, cache=cache, speculative=True))
    assert cache.drafts.length >= len(PROMPT) + 3
    cache.truncate(5)
    assert cache.drafts.length == 4
    cache.truncate(0)
    assert cache.drafts.length == 0


@pytest.mark.parametrize("guess", [[0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 0.9, 0.1, 0.0, 0.0],
                                   [0.5, 0.2, 0.0, 0.2, 0.1], [0.0, 0.0, 1.0, 0.0, 0.0]])
def test_accepting_and_rejecting_give_exactly_the_models_distribution(guess):
    generator, count = torch.Generator().manual_seed(3), 5000
    truth, guess = torch.tensor([0.5, 0.2, 0.0, 0.2, 0.1]), torch.tensor(guess)
    drawn = [verify(truth, guess, draw(guess, generator), generator) for _ in range(count)]
    drawn, expected = torch.bincount(torch.tensor(drawn), minlength=5), truth * count
    assert drawn[2] == 0
    # Three degrees of freedom: exceeded once in ten thousand seeds.
    assert ((drawn - expected) ** 2 / expected)[expected > 0].sum() < 22


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0.0, None, None), (1.0, None, None), (0.6, 5, 0.8), (1.3, 6, 0.99), (1.0, None, 0.5)])
def test_the_distribution_is_the_one_that_is_sampled_from(model, temperature, top_k, top_p):
    sampler = Sampler(model, [PROMPT], temperature=temperature, top_k=top_k, top_p=top_p)
    expected = exactly(temperature, top_k, top_p).float() if temperature else torch.eye(8)[0]
    assert torch.allclose(distribution(sampler, LOGITS[None], 1), expected, atol=1e-6)


@pytest.mark.slow
def test_speculation_with_sampling_has_the_distribution_of_plain_sampling():
    """The first three tokens of many answers; the draft is bad here, so that rejection is exercised.

    test_numbers.py has the exact distribution, of every way that tokens can be drafted, kept and refused.
    """
    torch.manual_seed(4)
    model = Model(Config(**LATENT | dict(num_hidden_layers=1))).eval()  # one layer is enough, and quick
    for weight in model.parameters():
        weight.data *= {1: 1, 2: 14}[weight.ndim]
    settings = dict(temperature=1.0, top_k=3)
    sampler, expected = Sampler(model, [PROMPT], **settings), {}

    def after(*ids: int) -> dict[int, float]:
        p = distribution(sampler, model(torch.tensor([[*PROMPT, *ids]]))[:, -1], 1)
        return {token: float(p[token]) for token in p.nonzero().flatten().tolist()}

    with torch.inference_mode():
        for a, first in after().items():
            for b, second in after(a).items():
                expected |= {(a, b, c): first * second * third for c, third in after(a, b).items()}
    count, drawn, all_ = 400, {}, Acceptance()
    for seed in range(count):
        tokens, acceptance = speculative(model, PROMPT, 3, seed=seed, **settings)
        drawn[tuple(tokens)] = drawn.get(tuple(tokens), 0) + 1
        all_.drafted, all_.accepted = all_.drafted + acceptance.drafted, all_.accepted + acceptance.accepted
    assert drawn.keys() <= expected.keys() and 0 < all_.accepted < all_.drafted
    large = [key for key, p in expected.items() if p * count >= 5]
    chi = sum((drawn.get(key, 0) - count * expected[key]) ** 2 / (count * expected[key]) for key in large)
    assert len(large) >= 5 and chi < 3 * len(large) + 10


def test_a_checkpoint_without_the_layer_is_refused(model):
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="no layer that predicts a second token"):
        generate(other, PROMPT, max_new_tokens=3, speculative=True)
    with pytest.raises(ValueError, match="no layer for multi-token prediction"):
        other.mtp(torch.tensor([[1]]), torch.zeros(1, 1, 24))


def test_a_damaged_draft_layer_costs_time_and_no_token(model, plainly):
    model = copy.deepcopy(model)
    for weight in model.model.layers[-1].parameters():
        weight.data.fill_(torch.nan)
    assert speculative(model, PROMPT, 6)[0] == plainly(tuple(PROMPT))[:6]
    assert len(speculative(model, PROMPT, 6, temperature=1.0, repetition_penalty=1.2)[0]) == 6
