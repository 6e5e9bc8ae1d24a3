"""Attention of one token over a long cache: every form is as exact as the kernel, and one is chosen, once."""

import time

import pytest
import torch
from torch import Tensor

from qwen3.engine import fast, one_query  # one file in all packages
from tests.packages import PACKAGES, module
from tests.test_generate import PROMPT, made

SCALE, S = 16 ** -0.5, 1500


def inputs(dtype: torch.dtype, B: int, G: int, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, and keys and values as a cache hands them out: B rows, 3 key heads, G queries each."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(B, 3 * G, 1, 16, generator=generator) * size
    k, v = (torch.randn(B, 3, S + 9, 16, generator=generator).to(dtype)[:, :, :S] for _ in "kv")
    return q.to(dtype), k, v


def error(form, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Against float64, as a share of the result."""
    exact = one_query.rows(q.double(), k.double(), v.double(), None, SCALE)
    return float((form(q, k, v, None, SCALE).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("B, G", [(1, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("size", [0.3, 1, 4])
def test_every_form_is_as_exact_as_the_kernel(B, G, size):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = inputs(dtype, B, G, size)
        limit = 1e-5 if dtype == torch.float32 else 1.05 * error(one_query.rows, *given)
        for form in one_query.forms_of(dtype):
            assert error(form, *given) <= limit, form.__name__
    assert one_query.matmuls in one_query.forms_of(torch.float32)


def test_matmuls_are_left_out_in_16_bits_since_they_round_the_scores():
    given = inputs(torch.bfloat16, 1, 2, size=4)
    assert error(one_query.matmuls, *given) > 3 * error(one_query.rows, *given)


def test_the_forms_on_the_kernel_hide_what_a_mask_hides():
    q, k, v = inputs(torch.float32, 2, 2)
    mask = (torch.arange(S) >= torch.tensor([[0], [7]]))[:, None, None]
    expected = [one_query.rows(q[row:row + 1], k[row:row + 1, :, 7 * row:], v[row:row + 1, :, 7 * row:], None, SCALE)
                for row in range(2)]
    for form in (one_query.rows, one_query.heads):
        assert torch.allclose(form(q, k, v, mask, SCALE), torch.cat(expected), atol=1e-5), form.__name__


@pytest.fixture
def timed(monkeypatch) -> dict[str, list[int]]:
    """Forms that take 1, 5 and 9 ms at first, and their calls: how many keys each was given."""
    calls = {"rows": [], "heads": [], "matmuls": []}

    def form(name: str, seconds: float):
        def run(q, k, *_):
            calls[name].append(k.shape[2])
            now[0] += seconds
            return q
        run.__name__ = name
        return run

    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for name, seconds in (("rows", 0.005), ("heads", 0.001), ("matmuls", 0.009)):
        monkeypatch.setattr(one_query, name, form(name, seconds))
    monkeypatch.setattr(one_query, "FORMS", {name: getattr(one_query, name) for name in calls})
    monkeypatch.setattr(one_query, "CHOSEN", {})
    monkeypatch.setattr(one_query, "FORM", "")
    return calls


def counts(calls: dict[str, list[int]]) -> list[int]:
    return [len(one) for one in calls.values()]


def test_the_fastest_is_chosen_once_for_each_shape(monkeypatch, timed):
    given = *inputs(torch.float32, 1, 2), None, SCALE
    for _ in range(3):
        assert one_query.attention_of_one_query(*given) is given[0]
    assert counts(timed) == [4, 7, 4] and set(timed["rows"]) == {one_query.LONG} and timed["heads"][-3:] == [S] * 3
    one_query.attention_of_one_query(*inputs(torch.bfloat16, 1, 2), None, SCALE)
    assert counts(timed) == [8, 12, 4]  # matmuls are not tried in bfloat16
    monkeypatch.setattr(one_query, "MARGIN", 0.1)
    one_query.CHOSEN.clear()
    one_query.attention_of_one_query(*given)
    assert timed["rows"][-1] == S  # too little is won


def test_nothing_is_measured_where_a_form_is_set_or_nothing_is_to_choose(monkeypatch, timed):
    q, k, v = inputs(torch.float32, 1, 2)
    mask, few = torch.ones(1, 1, 1, S, dtype=torch.bool), one_query.LONG - 1
    for given in ((q, k[:, :, :few], v[:, :, :few], None), (q, k, v, mask), [t.to("meta") for t in (q, k, v)] + [None]):
        one_query.attention_of_one_query(*given, SCALE)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    one_query.attention_of_one_query(q, k, v, None, SCALE)
    assert counts(timed) == [4, 0, 0]
    for form in ("heads", "matmuls"):
        monkeypatch.setattr(one_query, "FORM", form)
        one_query.attention_of_one_query(q, k, v, None, SCALE)
    assert counts(timed) == [4, 1, 1]
    one_query.attention_of_one_query(q.half(), k.half(), v.half(), None, SCALE)  # set to matmuls: not in 16 bits
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    one_query.attention_of_one_query(q, k, v, None, SCALE)
    assert counts(timed) == [6, 1, 1] and one_query.CHOSEN == {}


def test_a_form_that_there_is_not_is_one_sentence(monkeypatch):
    monkeypatch.setattr(one_query, "FORM", "fast" * 99)
    with pytest.raises(ValueError, match="LLM_ATTENTION='fastfast.*' is no form of .*; choose one of rows, heads, mat"):
        fast.fused_sdpa(*inputs(torch.float32, 1, 2), torch.ones(1, S).bool(), SCALE)


@pytest.mark.parametrize("package", PACKAGES)
def test_in_float32_the_tokens_do_not_depend_on_the_form(monkeypatch, package):
    ours, model, generate = module(package, "engine.one_query"), made(package), module(package, "generate")
    monkeypatch.setattr(ours, "LONG", 2)
    answers = []
    for form in ours.FORMS:
        monkeypatch.setattr(ours, "FORM", form)
        answers.append(list(generate.generate(model, PROMPT, max_new_tokens=8)))
        answers.append(generate.generate_batch(model, [PROMPT, PROMPT[::-1]], max_new_tokens=8))
    assert answers[:2] * 3 == answers
