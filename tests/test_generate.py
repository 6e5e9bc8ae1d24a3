"""The loop: every fast path against the slow one (a whole forward for each token); sampling's distribution."""

import itertools

import pytest
import torch

from qwen3.generate import sample
from tests.packages import PACKAGES, module as module_of, with_engine

NUMBERS = dict(vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=6,
               num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=1e4)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
LATENT = dict(vocab_size=61, hidden_size=24, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=3,
              num_attention_heads=3, q_lora_rank=14, kv_lora_rank=18, qk_nope_head_dim=10, qk_rope_head_dim=6,
              v_head_dim=8, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2,
              norm_topk_prob=True, routed_scaling_factor=2.5, first_k_dense_replace=1, num_nextn_predict_layers=1,
              max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=1e4)
EACH = {"qwen3": NUMBERS, "qwen3_moe": NUMBERS | EXPERTS, "deepseek_v3": LATENT}
PROMPT = [5, 17, 3, 44, 44, 9, 60, 0, 21, 8, 33]


@pytest.fixture(scope="module", params=PACKAGES)
def package(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def module(package):
    return module_of(package, "generate")


def made(package: str, engine: bool = True) -> torch.nn.Module:
    """A small model with weights larger than at the start of training, so that tokens depend on the context."""
    config = module_of(package, "config").Config(**EACH[package])
    torch.manual_seed(4)
    model = module_of(package, "model").Model(config).eval()
    for weight in model.parameters():
        weight.data *= {1: 1, 2: 14}[weight.ndim]
    return with_engine(package, model) if engine else model


@pytest.fixture(scope="module")
def model(package) -> torch.nn.Module:
    return made(package)


@torch.inference_mode()
def slowly(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The definition: all over again for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def test_the_model_used_here_depends_on_its_context(model):
    assert len(set(slowly(model, PROMPT, 20))) > 8


@pytest.mark.parametrize("length", [1, 2, 11])
def test_cache_and_no_cache_give_the_same_tokens(module, model, length):
    assert list(module.generate(model, PROMPT[:length], max_new_tokens=20)) == slowly(model, PROMPT[:length], 20)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 10, 11, 12])
def test_prefill_in_chunks_gives_the_logits_of_the_whole(package, module, model, monkeypatch, chunk):
    conversation = module_of(package, "engine.conversation")
    monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
    cache, calls = module.new_cache(model, len(PROMPT)), []
    with torch.inference_mode():
        conversation.Reading(model, len(PROMPT), lambda *done: calls.append(done))
        logits = module.prefill(model, torch.tensor([PROMPT]), cache)
        assert torch.allclose(logits, model(torch.tensor([PROMPT]))[:, -1], atol=1e-4)
    layers = model.config.num_hidden_layers
    assert cache.length == len(PROMPT) and calls[-1] == (11, 11) and len(calls) == -(-11 // chunk) * layers
    assert calls == sorted(calls) and (min(chunk, 11) // layers, 11) == calls[0]
    assert list(module.generate(model, PROMPT, max_new_tokens=8)) == slowly(model, PROMPT, 8)


def test_a_long_prompt_takes_no_memory_in_proportion_to_its_square(module, model, monkeypatch):
    """No mask and no logits larger than a chunk allows."""
    tokens, projected = forwards(monkeypatch, model), []
    hook = model.lm_head.register_forward_hook(lambda head, inputs, _: projected.append(inputs[0].shape[:-1].numel()))
    monkeypatch.setattr(module, "PREFILL_CHUNK", 8)
    list(module.generate(model, list(range(60)), max_new_tokens=3))
    hook.remove()
    assert tokens == [8] * 7 + [4, 1, 1]
    assert projected == [1, 1, 1]  # the end of the prompt and two new tokens: the head runs for nothing else


def test_a_cache_is_cut_back_and_used_again(module, model):
    first = PROMPT + [1, 2, 3]
    cache = module.new_cache(model, len(first))
    answer = list(module.generate(model, first, max_new_tokens=5, cache=cache))
    assert cache.length == len(first) + 4  # all but the last token, which nobody fed back
    second = first + answer[:3] + [7, 7]
    cache.truncate(len(first) + 3)
    assert list(module.generate(model, second, max_new_tokens=9, cache=cache)) == slowly(model, second, 9)
    cache.truncate(len(PROMPT) - 1)
    assert list(module.generate(model, PROMPT, max_new_tokens=9, cache=cache)) == slowly(model, PROMPT, 9)


PROMPTS = [PROMPT, [4], PROMPT[3:5], [1, 2] * 30, PROMPT[::-1]]


def test_a_batch_gives_what_its_prompts_give_alone(module, model):
    assert module.generate_batch(model, PROMPTS, max_new_tokens=15) == [slowly(model, prompt, 15) for prompt in PROMPTS]


def test_a_batch_in_chunks_too(module, model, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_CHUNK", 7)  # whole chunks of padding for the short prompts
    assert module.generate_batch(model, PROMPTS, max_new_tokens=5) == [slowly(model, prompt, 5) for prompt in PROMPTS]


def test_sequences_of_a_batch_end_on_their_own(module, model):
    alone = [slowly(model, prompt, 12) for prompt in PROMPTS]
    stops = {alone[0][4], alone[1][0], alone[3][7]}
    expected = [list(itertools.takewhile(lambda token: token not in stops, answer)) for answer in alone]
    assert module.generate_batch(model, PROMPTS, max_new_tokens=12, stop_ids=stops) == expected
    assert len({len(answer) for answer in expected}) > 2  # else this would test little


def forwards(monkeypatch, model: torch.nn.Module) -> list[int]:
    """The number of tokens of each forward of all layers from now on."""
    Transformer = type(model.model)
    lengths, forward = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward",
                        lambda self, ids, *rest: lengths.append(ids.shape[1]) or forward(self, ids, *rest))
    return lengths


def test_a_stop_token_ends_the_answer_at_once_and_is_not_part_of_it(module, model, monkeypatch):
    answer = slowly(model, PROMPT, 6)
    stop = next(token for token in answer if answer.index(token) >= 2)
    lengths = forwards(monkeypatch, model)
    assert list(module.generate(model, PROMPT, max_new_tokens=20, stop_ids=[stop])) == answer[:answer.index(stop)]
    assert len(lengths) == answer.index(stop) + 1
    assert list(module.generate(model, PROMPT, max_new_tokens=20, stop_ids={answer[0]})) == []


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_no_forward_that_nobody_needs(module, model, monkeypatch, count):
    lengths = forwards(monkeypatch, model)
    assert len(list(module.generate(model, PROMPT, max_new_tokens=count))) == count
    assert lengths == ([len(PROMPT)] + [1] * (count - 1) if count else [])
    lengths.clear()
    answers = module.generate_batch(model, PROMPTS, max_new_tokens=count)
    assert [len(answer) for answer in answers] == [count] * len(PROMPTS)
    assert lengths == ([60] + [1] * (count - 1) if count else [])


def test_ids_come_one_by_one(module, model, monkeypatch):
    lengths = forwards(monkeypatch, model)
    ids = module.generate(model, PROMPT, max_new_tokens=9)
    assert lengths == []
    next(ids)
    assert lengths == [11]  # the first token is out before the second is computed


@pytest.mark.parametrize("request_, message", [
    (dict(prompt_ids=[]), "a prompt is empty"),
    (dict(prompt_ids=[61]), "token id 61 is outside the vocabulary of 61"),
    (dict(prompt_ids=[-1]), "token id -1"),
    (dict(prompt_ids=[1] * 100, max_new_tokens=29), "100 prompt tokens and 29 new ones exceed the context of 128"),
    (dict(max_new_tokens=-1), "max_new_tokens is -1"),
    (dict(temperature=-0.5), "temperature is -0.5"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(top_k=-2), "top_k is -2"),
    (dict(top_p=0.0), "top_p is 0.0"),
    (dict(top_p=1.5), "top_p is 1.5"),
    (dict(seed=2**64), "seed is 18446744073709551616"),
])
def test_what_cannot_be_done_is_refused_before_anything_is_computed(module, model, monkeypatch, request_, message):
    lengths = forwards(monkeypatch, model)
    request_ = dict(prompt_ids=PROMPT, max_new_tokens=5) | request_
    with pytest.raises(ValueError, match=message):
        module.generate(model, **request_)  # not even asked for its first token
    prompt = request_.pop("prompt_ids")
    with pytest.raises(ValueError, match=message):
        module.generate_batch(model, [[1], prompt], **request_)
    assert lengths == []


def test_a_cache_that_leaves_nothing_to_compute_is_refused(module, model):
    cache = module.new_cache(model, 20)
    list(module.generate(model, PROMPT, max_new_tokens=1, cache=cache))
    with pytest.raises(ValueError, match="nothing is left to compute"):
        module.generate(model, PROMPT, max_new_tokens=1, cache=cache)


def test_the_last_token_of_the_context_can_be_generated(module, model):
    assert len(list(module.generate(model, [1] * 100, max_new_tokens=28))) == 28


# Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 2.0, -3.0, 1.5])


def exactly(temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """The distribution, by sorting; ties in the order of the ids."""
    p = torch.softmax(LOGITS.double() / temperature, 0)
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k or len(p)]
    p = torch.tensor([float(p[i]) if i in order else 0.0 for i in range(len(p))])
    p, kept, total = p / p.sum(), [], 0.0
    for i in order:
        if total < (top_p or 1):
            kept.append(i)
        total += float(p[i])
    p = torch.tensor([float(p[i]) if i in kept else 0.0 for i in range(len(p))])
    return p / p.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, None), (0.6, None, None), (2.5, 0, 1.0), (1.0, 4, None), (1.0, 1, None), (1.0, 100, None),
    (1.0, None, 0.9), (0.7, None, 0.5), (1.0, None, 1e-6), (0.6, 5, 0.8), (1.3, 6, 0.99)])
def test_samples_have_the_exact_distribution(temperature, top_k, top_p):
    count = 40000
    generator = torch.Generator().manual_seed(7)
    drawn = sample(LOGITS.expand(count, -1), temperature, top_k, top_p, generator)
    expected = exactly(temperature, top_k, top_p)
    counts = torch.bincount(drawn, minlength=len(LOGITS))
    assert counts[expected == 0].sum() == 0
    chi = ((counts - count * expected) ** 2 / (count * expected))[expected > 0].sum()
    assert chi < 30  # seven degrees of freedom: exceeded once in ten thousand seeds


def test_temperature_zero_is_greedy_whatever_else_is_asked():
    assert sample(LOGITS[None], 0.0, 3, 0.5).tolist() == [0]
    assert sample(torch.stack([LOGITS, -LOGITS]), 0).tolist() == [0, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tiny_temperature_does_not_overflow(dtype):
    logits = torch.tensor([[500.0, 400.0, 100.0]], dtype=dtype)
    for temperature in (1e-6, 1e-40, 1e-320):
        assert sample(logits, temperature).tolist() == sample(logits, temperature, 2, 0.9).tolist() == [0]


def test_rows_are_sampled_independently():
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((2, 8), -torch.inf)
    logits[0, :4], logits[1, 4:] = 0, 0
    drawn = torch.stack([sample(logits, 1.0, 3, 0.9, generator) for _ in range(50)])
    assert (drawn[:, 0] < 4).all() and (drawn[:, 1] >= 4).all() and len(set(drawn[:, 0].tolist())) > 1


def test_sample_changes_nothing_that_it_is_given():
    logits = LOGITS[None].clone()
    sample(logits, 0.6, 3, 0.8, torch.Generator().manual_seed(0))
    assert torch.equal(logits[0], LOGITS)


def test_a_seed_reproduces_and_another_does_not(module, model):
    def run(seed: int | None) -> list[int]:
        return list(module.generate(model, PROMPT, max_new_tokens=20, temperature=1.5, seed=seed))

    assert run(3) == run(3) != run(4)
    assert run(None) != run(None)
    batch = [module.generate_batch(model, PROMPTS, max_new_tokens=9, temperature=1.5, seed=1) for _ in range(2)]
    assert batch[0] == batch[1]
