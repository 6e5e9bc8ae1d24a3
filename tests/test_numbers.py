"""Penalties and min_p, logits that are not finite, and what trainers and servers do: autocast, threads, DDP."""

import copy
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.packages import PACKAGES, module as module_of, without_compiler
from tests.test_generate import EACH, PROMPT, PROMPTS, made, slowly

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On models this small threads only wait for one another: five times as long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=PACKAGES)
def package(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def module(package):
    return module_of(package, "generate")


@pytest.fixture(scope="module")
def model(package) -> torch.nn.Module:
    return made(package)


@pytest.fixture(scope="module")
def published(package) -> torch.nn.Module:
    return module_of(package, "weights").load_model(CHECKPOINTS / PACKAGES[package], dtype="float32")


# Sampling

def drawn(module, logits: torch.Tensor, **settings) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return set(module.sample(logits.expand(2000, -1), 1.0, generator=generator, **settings).tolist())


@pytest.mark.parametrize("settings, expected", [
    (dict(top_p=0.5), {0}), (dict(top_p=0.500001), {0, 1}), (dict(top_p=0.75), {0, 1}), (dict(top_p=1.0), {0, 1, 2}),
    (dict(min_p=0.5), {0, 1, 2}), (dict(min_p=0.500001), {0}), (dict(min_p=1.0), {0}), (dict(min_p=0.0), {0, 1, 2}),
    (dict(top_k=1), {0}), (dict(top_k=3), {0, 1, 2}), (dict(top_p=0.6, min_p=0.5), {0, 1}),
    (dict(top_k=1, min_p=0.1), {0})])
def test_at_a_boundary_exactly_what_the_rule_says_is_kept(module, settings, expected):
    """Probabilities 1/2, 1/4 and 1/4, exact in float32; what reaches top_p ends it, what equals min_p is kept."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    assert logits.softmax(-1).tolist() == [0.5, 0.25, 0.25]
    got = drawn(module, logits[None], **settings)
    assert got == expected or (expected == {0, 1} and got == {0, 2})  # which of two alike is not said


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 2.25, -3.0, 1.5])
# (repetition_penalty, temperature, top_k, top_p, min_p) after the tokens 0, 4, 4 -> probabilities: transformers 5.24
EXPECTED = {
    (1.3, 1.0, None, None, None): [0.191536, 0.111789, 0.067804, 0.041125, 0.011208, 0.390182, 0.002047, 0.184309],
    (1.3, 0.7, None, None, 0.2): [0.212314, 0.0, 0.0, 0.0, 0.0, 0.586722, 0.0, 0.200963],
    (0.8, 1.3, 6, None, 0.1): [0.337301, 0.106392, 0.072422, 0.049299, 0.0, 0.278291, 0.0, 0.156295],
    (1.5, 1.0, 5, 0.9, 0.3): [0.21357, 0.0, 0.0, 0.0, 0.0, 0.534126, 0.0, 0.252303],
    (2.0, 0.6, 7, 0.95, 0.05): [0.081089, 0.081089, 0.0, 0.0, 0.0, 0.651239, 0.0, 0.186583],
    (1.0, 1.0, None, None, 0.5): [0.437824, 0.0, 0.0, 0.0, 0.0, 0.562177, 0.0, 0.0],
    (1.0, 1.0, 4, 0.8, 1.0): [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]}


@pytest.mark.parametrize("settings", EXPECTED)
def test_penalty_and_sampling_give_the_probabilities_of_transformers(module, settings):
    repetition_penalty, temperature, top_k, top_p, min_p = settings
    text = torch.zeros(1, 8, dtype=torch.bool)
    text[0, [0, 4]] = True
    logits = module.penalise(LOGITS[None], text, text, repetition_penalty, 0.0)
    probabilities, ids = module.top_k_top_p(logits, temperature, top_k, top_p, min_p)
    all_ = torch.zeros(1, 8).scatter(-1, ids, probabilities)
    assert torch.allclose(all_ / all_.sum(), torch.tensor(EXPECTED[settings]), atol=2e-6)
    count, generator = 20000, torch.Generator().manual_seed(1)
    tokens = module.sample(logits.expand(count, -1), temperature, top_k, top_p, generator, min_p=min_p)
    counts = torch.bincount(tokens, minlength=8)
    expected = torch.tensor(EXPECTED[settings]) * count
    assert counts[expected == 0].sum() == 0 and ((counts - expected) ** 2 / expected)[expected > 0].sum() < 30


def test_penalties_by_hand(module):
    """Repetition first, of prompt and answer; then presence, once, of the answer alone (the order of vLLM)."""
    text, answer = torch.tensor([[1, 1, 1, 0, 0]]).bool(), torch.tensor([[0, 1, 1, 0, 0]]).bool()
    logits = torch.tensor([[3.0, 3.0, -3.0, 3.0, -3.0]])
    assert module.penalise(logits, text, answer, 2.0, 0.25).tolist() == [[1.5, 1.25, -6.25, 3.0, -3.0]]
    assert module.penalise(logits.bfloat16(), text, answer, 1.1, 0.0).dtype == torch.float32
    assert logits[0, 0] == 3


# By transformers 5.24: "What is a router?" without thinking, greedy, float32, nine tokens, with repetition_penalty 3 (a
# word other than the question's comes) and without
PENALISED = {"qwen3": ([32, 1312, 1064, 482, 338, 513, 1673, 312, 526], [32, 1088, 907, 531, 894, 403, 258, 406, 303]),
             "qwen3_moe": ([32, 1313, 1064, 482, 338, 513, 1677, 312, 526],
                           [32, 1088, 908, 531, 895, 403, 258, 406, 303]),
             "deepseek_v3": ([32, 629, 515, 414, 331, 315, 729, 312, 283],
                             [32, 1089, 907, 532, 894, 403, 258, 406, 303])}


def test_the_repetition_penalty_of_a_checkpoint_gives_the_tokens_of_transformers(module, package, published):
    tokenizer = module_of(package, "tokenizer").Tokenizer.from_checkpoint(CHECKPOINTS / PACKAGES[package])
    prompt = tokenizer.chat([{"role": "user", "content": "What is a router?"}], False)
    request = dict(max_new_tokens=9, stop_ids=published.config.eos_token_id)
    penalised, plain = PENALISED[package]
    assert list(module.generate(published, prompt, **request, repetition_penalty=3.0)) == penalised
    assert list(module.generate(published, prompt, **request)) == plain


def penalised_slowly(model: torch.nn.Module, prompt: list[int], count: int, repetition: float,
                     presence: float) -> list[int]:
    """The definition, in Python's own numbers."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1].tolist()
        for token in set(ids):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in set(ids[len(prompt):]):
            logits[token] -= presence
        ids.append(logits.index(max(logits)))
    return ids[len(prompt):]


@pytest.mark.parametrize("repetition, presence", [(1.4, 0.5), (0.8, 1.5)])
def test_all_ways_penalise_alike(module, package, model, monkeypatch, repetition, presence):
    more = dict(repetition_penalty=repetition, presence_penalty=presence, max_new_tokens=8)
    with torch.inference_mode():
        expected = [penalised_slowly(model, prompt, 8, repetition, presence) for prompt in PROMPTS[:3]]
    assert expected[0] != slowly(model, PROMPT, 8)
    assert module.generate_batch(model, PROMPTS[:3], **more) == expected  # padding is no token of a prompt
    assert list(module.generate(model, PROMPT, **more)) == expected[0]
    cache = module.new_cache(model, 30)
    list(module.generate(model, PROMPT[:6], max_new_tokens=2, cache=cache))
    cache.truncate(6)
    assert list(module.generate(model, PROMPT, cache=cache, **more)) == expected[0]  # cached tokens count as well
    if package == "qwen3":
        without_compiler(monkeypatch, package)
        assert list(module.generate(model, PROMPT, compiled=True, **more)) == expected[0]
    if package == "deepseek_v3":
        from tests.deepseek_v3.test_speculative import Cheat

        assert list(module.generate(model, PROMPT, speculative=True, **more)) == expected[0]
        for wrong_every in (0, 2, 3):
            monkeypatch.setitem(vars(model), "mtp", Cheat(model, expected[0], len(PROMPT), wrong_every))
            assert list(module.generate(model, PROMPT, speculative=True, **more)) == expected[0]


def test_neutral_penalties_compute_nothing(module, model, monkeypatch):
    monkeypatch.setattr(module, "penalise", None)
    off = dict(repetition_penalty=1.0, presence_penalty=0.0, min_p=0.0, max_new_tokens=4)
    assert list(module.generate(model, PROMPT, **off)) == slowly(model, PROMPT, 4)
    assert module.generate_batch(model, [PROMPT], **off) == [slowly(model, PROMPT, 4)]


@pytest.mark.parametrize("settings", [
    dict(temperature=1.2, repetition_penalty=1.5, presence_penalty=0.7, top_k=2),
    dict(temperature=0.8, repetition_penalty=1.3, min_p=0.2)])
def test_speculation_has_exactly_the_distribution_of_plain_sampling(monkeypatch, settings):
    """Every way that three tokens of a vocabulary of three can be drafted, kept, refused and drawn, each weighed."""
    from deepseek_v3 import generate, speculative
    from deepseek_v3.config import Config
    from deepseek_v3.model import Model

    torch.manual_seed(5)
    model = Model(Config(**EACH["deepseek_v3"] | {"vocab_size": 3, "num_hidden_layers": 1})).eval()
    for weight in model.parameters():
        weight.data *= {1: 1, 2: 8}[weight.ndim]
    prompt, tape, place, chance = [1, 2, 1], [], 0, 1.0

    def choose(probabilities: list[float]) -> int:
        nonlocal place, chance
        if place == len(tape):
            tape.append([0, probabilities])
        index, place = tape[place][0], place + 1
        chance *= probabilities[index]
        return index

    def draw(probabilities, generator=None):
        return choose((probabilities / probabilities.sum()).tolist())

    def verify(truth, guess, drafted, generator):
        if choose([1 - (keep := min(1.0, float(truth[drafted] / guess[drafted]))), keep]):
            return drafted
        missing = (truth - guess).clamp(min=0)
        return draw(missing if missing.any() else truth)

    monkeypatch.setattr(speculative, "draw", draw)
    monkeypatch.setattr(speculative, "verify", verify)
    found, accepted = {}, 0
    while True:
        place, chance, acceptance = 0, 1.0, speculative.Acceptance()
        tokens = tuple(generate.generate(model, prompt, max_new_tokens=3, speculative=True, acceptance=acceptance,
                                         **settings))
        found[tokens] = found.get(tokens, 0.0) + chance
        accepted += acceptance.accepted
        # The next way: the last choice that has another outcome of some probability.
        while tape:
            index, probabilities = tape[-1]
            following = [i for i in range(index + 1, len(probabilities)) if probabilities[i] > 0]
            if following:
                tape[-1][0] = following[0]
                break
            tape.pop()
        if not tape:
            break

    plain = dict(settings)
    repetition, presence = plain.pop("repetition_penalty", 1.0), plain.pop("presence_penalty", 0.0)
    sampler = generate.Sampler(model, [prompt], **plain)
    for tokens in itertools.product(range(3), repeat=3):
        expected = 1.0
        for count, token in enumerate(tokens):
            ids = prompt + list(tokens[:count])
            with torch.inference_mode():
                logits = model(torch.tensor([ids]))[0, -1].tolist()
            for other in set(ids):
                logits[other] = logits[other] / repetition if logits[other] > 0 else logits[other] * repetition
            for other in set(ids[len(prompt):]):
                logits[other] -= presence
            expected *= float(speculative.distribution(sampler, torch.tensor([logits]), count + 1)[token])
        assert found.get(tokens, 0.0) == pytest.approx(expected, abs=1e-5)
    assert accepted > 10


@pytest.mark.parametrize("more, message", [
    (dict(min_p=-0.1), "min_p is -0.1"), (dict(min_p=1.1), "min_p is 1.1"), (dict(min_p=float("nan")), "min_p is nan"),
    (dict(repetition_penalty=0.0), "repetition_penalty is 0.0"),
    (dict(repetition_penalty=-1.0), "repetition_penalty is -1"),
    (dict(repetition_penalty=float("inf")), "repetition_penalty is inf"),
    (dict(presence_penalty=float("nan")), "presence_penalty is nan"),
    (dict(presence_penalty=float("-inf")), "presence_penalty is -inf")])
def test_numbers_that_mean_nothing_are_refused(module, model, more, message):
    for call in (lambda: module.generate(model, PROMPT, max_new_tokens=2, **more),
                 lambda: module.generate_batch(model, PROMPTS, max_new_tokens=2, **more)):
        with pytest.raises(ValueError, match=message):
            call()


# The request

def test_a_prompt_is_read_at_the_call(module, model):
    prompt, stops = list(PROMPT), [slowly(model, PROMPT, 4)[3]]
    ids = module.generate(model, prompt, max_new_tokens=3, stop_ids=stops)
    prompt.append(7)
    stops[0] = slowly(model, PROMPT, 1)[0]
    assert list(ids) == slowly(model, PROMPT, 3)


def test_a_cache_that_does_not_fit_is_refused_in_a_sentence(module, package, model):
    KVCache = module_of(package, "layers").KVCache
    layers = [layer.self_attn for layer in model.model.layers[:model.config.num_hidden_layers]]
    for cache in (module.new_cache(model, 40, [0, 0]), module.new_cache(model, 40, [0, 3]),
                  module.new_cache(model, 40, [3]), KVCache(layers, 40, torch.bfloat16),
                  KVCache(layers, 40, torch.float32, "meta"), KVCache(layers[:2], 40, torch.float32)):
        with pytest.raises(ValueError, match="the cache was made for another model, type or device, or for a batch"):
            module.generate(model, PROMPT, max_new_tokens=3, cache=cache)
    ids = module.generate(model, PROMPT, max_new_tokens=3, cache=module.new_cache(model, 2, [0]))
    assert list(ids) == slowly(model, PROMPT, 3)


# Logits that are not finite

SAMPLED = [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, {"repetition_penalty": 1.1}]


def sick(model: torch.nn.Module, token: int, value: float = float("nan")) -> torch.nn.Module:
    """A model that has no numbers for one token, once it is read."""
    model = copy.deepcopy(model)
    model.model.embed_tokens.weight.data[token] = value
    return model


@pytest.mark.parametrize("more", SAMPLED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prompt_whose_logits_are_not_finite_is_one_sentence(module, package, model, more, value):
    ids = module.generate(sick(model, PROMPT[-1], value), PROMPT, max_new_tokens=9, **more)
    message = r"^the logits of new token 1 are not finite: .* float32; try --dtype float32 or bfloat16$"
    with pytest.raises(ValueError, match=message):
        next(ids)
    if package == "deepseek_v3":
        with pytest.raises(ValueError, match=r"^the logits of new token 1 are not finite"):
            list(module.generate(sick(model, PROMPT[-1], value), PROMPT, max_new_tokens=9, speculative=True, **more))


@pytest.mark.parametrize("way", ["plain", "compiled", "speculative"])
def test_an_answer_ends_where_its_logits_are_not_finite(module, package, model, monkeypatch, way):
    if (way, package) not in {("plain", package), ("compiled", "qwen3"), ("speculative", "deepseek_v3")}:
        pytest.skip("not a way of this package (or one that needs a GPU's stacks)")
    without_compiler(monkeypatch, package)
    answer, got, how = slowly(model, PROMPT, 12), [], {} if way == "plain" else {way: True}
    place = next(i for i in range(2, 9) if answer[i] not in answer[:i] + PROMPT)
    with pytest.raises(ValueError, match=f"^the logits of new token {place + 2} are not finite"):
        for token in module.generate(sick(model, answer[place]), PROMPT, max_new_tokens=12, **how):
            got.append(token)
    assert got == answer[:place + 1]


@pytest.mark.parametrize("more", SAMPLED)
def test_in_a_batch_only_the_row_whose_logits_are_not_finite_ends(module, model, more):
    healthy = module.generate_batch(model, PROMPTS[:3], max_new_tokens=8, seed=1, **more)


    def comes_first_here(row: int, i: int) -> bool:
        """And in no other row."""
        seen = PROMPTS[row] + healthy[row][:i]
        return healthy[row][i] not in sum((PROMPTS[other] + healthy[other] for other in range(3) if other != row), seen)

    row, place = next((row, i) for row in range(3) for i in range(2, 7) if comes_first_here(row, i))
    message = f"^row {row} ends after {place + 1} tokens: its logits are not finite$"
    with pytest.warns(UserWarning, match=message) as seen:
        answers = module.generate_batch(sick(model, healthy[row][place]), PROMPTS[:3], max_new_tokens=8, seed=1, **more)
    assert len(seen) == 1 and answers[row] == healthy[row][:place + 1]
    if not more.get("temperature"):
        assert answers[:row] + answers[row + 1:] == healthy[:row] + healthy[row + 1:]


def test_padding_is_never_sick_where_its_row_is_not(module, model):
    without = [[5, 17, 3, 44], [9], [21, 8]]
    healthy = module.generate_batch(model, without, max_new_tokens=2)
    token = next(t for t in range(61) if t not in sum(without + healthy, []))
    for sick_one in {0, token} - set(sum(without + healthy, [])):
        assert module.generate_batch(sick(model, sick_one), without, max_new_tokens=2) == healthy


def test_what_overflows_in_float16_says_so(module, model):
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 1e6
    assert len(list(module.generate(copy.deepcopy(model).bfloat16(), PROMPT, max_new_tokens=2))) == 2
    with pytest.raises(ValueError, match="not finite: the weights are damaged, or overflow in float16"):
        list(module.generate(model.half(), PROMPT, max_new_tokens=2))


# Training

IDS = torch.tensor([[(7 * i * i + 3 * i) % 500 for i in range(40)], [(5 * i * i + i) % 500 for i in range(40)]])
# The loss of each embedded checkpoint on these ids by transformers 5.24: float32, autocast to bfloat16 and to float16
AUTOCAST = {"qwen3": (27.7038, 27.7012, 27.7052), "qwen3_moe": (24.2549, 24.1684, 24.2537),
            "deepseek_v3": (21.8012, 21.7438, 21.7949)}


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids)[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("number, dtype", [(1, torch.bfloat16), (2, torch.float16)])
def test_autocast_gives_the_loss_of_transformers(package, published, number, dtype):
    with torch.autocast("cpu", dtype=dtype):
        with torch.no_grad():
            assert float(loss_of(published, IDS)) == pytest.approx(AUTOCAST[package][number], rel=0.0025)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_tokens_and_gradients(module, model, dtype):
    model, ids = copy.deepcopy(model), torch.tensor([PROMPT, PROMPT[::-1]])
    with torch.autocast("cpu", dtype=dtype):
        assert len(list(module.generate(model, PROMPT, max_new_tokens=2))) == 2
        assert [len(answer) for answer in module.generate_batch(model, PROMPTS[:2], max_new_tokens=2)] == [2, 2]
        loss_of(model, ids).backward()
    found = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])
    model.zero_grad()
    loss_of(model, ids).backward()
    right = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])
    assert F.cosine_similarity(found, right, dim=0) > 0.5  # the weights are so large that roundings grow


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, use_reentrant):
    model, ids = copy.deepcopy(model), torch.tensor([PROMPT, PROMPT[::-1]])
    loss_of(model, ids).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
    loss_of(model, ids).backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            right = expected[name]
            assert torch.allclose(weight.grad, right, atol=1e-5 * float(right.abs().max()) + 1e-9), name


def steps(model: torch.nn.Module, prompts: list[list[int]]) -> None:
    """As a trainer does them; each prompt is so short that most experts get no token."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for prompt in prompts:
        optimizer.zero_grad()
        model(torch.tensor([prompt])).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("engine", [True, False])
def test_distributed_training_goes_on_where_experts_get_no_token(package, engine):
    model = made(package, engine).train()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        steps(DistributedDataParallel(model), [[5, 7], [9], [3, 4]])  # the second step would raise
    finally:
        dist.destroy_process_group()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(grad is not None for grad in grads.values())
    if package != "qwen3":
        assert 0 < sum(not grad.any() for name, grad in grads.items() if ".experts." in name) < len(grads)


def one_of_two(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for package, engine in itertools.product(PACKAGES, (True, False)):
        model = made(package, engine).train()
        steps(DistributedDataParallel(model), [[5 + rank, 7], [9 + rank], [3, 4 + rank]])
        mine = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both), package
    dist.barrier()
    os._exit(0)  # gloo's threads, taken down as a process ends, abort it in one of five runs


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "store"),), nprocs=2)


def test_an_expert_without_tokens_is_not_called_where_no_gradient_is_wanted(package, model, monkeypatch):
    if package == "qwen3":
        pytest.skip("no experts")
    MLP, called = module_of(package, "layers").MLP, []
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: called.append(len(x)) or forward(self, x))
    with torch.no_grad():
        model(torch.tensor([[5, 7]]))
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen(torch.tensor([[5, 7]]))
    assert 0 not in called
    model(torch.tensor([[5, 7]]))
    assert 0 in called


# Threads

def state() -> dict[str, object]:
    return {"mkldnn": torch.backends.mkldnn.enabled, "dtype": torch.get_default_dtype(),
            "grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(),
            "threads": torch.get_num_threads(), "interop": torch.get_num_interop_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "tf32": torch.backends.cuda.matmul.allow_tf32, "precision": torch.get_float32_matmul_precision(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "seed": torch.initial_seed(), "device": torch.get_default_device(),
            "numbers": torch.get_rng_state().sum().item()}


def test_many_threads_generate_as_one_and_leave_the_process_as_it_was(module, package, model):
    """Flags, speed and bits."""
    model = copy.deepcopy(model).to(torch.bfloat16 if package == "qwen3_moe" else torch.float32)
    requests = [dict(prompt_ids=(PROMPT * 9)[i:11 * i + 5], max_new_tokens=3, seed=i, **more)
                for i, more in enumerate([{}, {"temperature": 1.0}, {"repetition_penalty": 1.2}] * 4)]
    alone = [list(module.generate(model, **request)) for request in requests]
    x, W = torch.ones(256, 512).bfloat16(), torch.ones(1024, 512).bfloat16()

    def seconds(enough: float = 0.0) -> float:
        """Of a matmul that a prompt would need; the best of many, since the machine has others to serve."""
        times = [1.0]
        while len(times) < (500 if enough else 20) and min(times) > enough:
            start = time.perf_counter()
            x @ W.mT
            times.append(time.perf_counter() - start)
        return min(times)

    before, fast = state(), seconds()
    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda request: list(module.generate(model, **request)), requests)) == alone
    assert state() == before
    assert seconds(enough=8 * fast) <= 8 * fast  # without oneDNN it takes 50 times as long


def test_a_matmul_of_one_row_touches_no_flag_of_the_process(package, monkeypatch):
    fast, flags, x = module_of(package, "engine.fast"), type(torch.backends.mkldnn), torch.ones(1, 8).bfloat16()

    def fail(*_) -> None:
        pytest.fail("a flag of the whole process was set")

    monkeypatch.setattr(flags, "__setattr__", fail)
    monkeypatch.setattr(flags, "enabled", property(lambda self: True, fail))
    assert fast.matmul(x, torch.ones(4, 8).bfloat16()).tolist() == [[8.0] * 4]


def test_positions_are_computed_anew_and_kept_nowhere(model):
    """So that no other thread, with a longer or a shorter prompt, can change them meanwhile."""
    rotary = model.model.rotary_emb
    before = dict(vars(rotary))
    rotary(torch.arange(900)[None], torch.bfloat16)
    assert before.keys() == vars(rotary).keys() and all(vars(rotary)[name] is value for name, value in before.items())
