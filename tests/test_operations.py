"""The operations of a token: the engine's fewer ones give the lesson's bits, and there are no more of them than said.

    python -m pytest tests/test_operations.py -s        prints how many there are
"""

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from tests.packages import PACKAGES, module, with_engine
from tests.test_generate import EACH, PROMPT, made

# Operations of a layer (where a model has experts, of one with 2 or 3 of them for a token), and all others of a token.
# Before the engine joined any there were 88, 115 and 180, and 30. Qwen3-0.6B has 28 layers: 2,494 became 1,311.
LAYER, REST, AT_MOST = {"qwen3": 46, "qwen3_moe": 69, "deepseek_v3": 127}, 23, 1600


def operations(package: str, layers: int) -> int:
    """How many operations of PyTorch a token takes: those that Python calls, not what these call themselves."""
    sparse = {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0} if package == "deepseek_v3" else {}
    config = module(package, "config").Config(**EACH[package] | sparse | {"num_hidden_layers": layers})
    model, generate = module(package, "model").Model(config).bfloat16().eval(), module(package, "generate")
    model, cache, token = with_engine(package, model), generate.new_cache(model, 20), torch.tensor([7])
    with torch.inference_mode():
        generate.prefill(model, torch.tensor([PROMPT]), cache)
        generate.decode(model, token, cache)
        with profile(use_kineto=False) as record:  # kineto takes a second to start
            generate.decode(model, token, cache)
    return sum(event.cpu_parent is None and event.name.startswith("aten::") for event in record.function_events)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_token_takes_no_more_operations_than_said(package):
    one, two = (operations(package, layers) for layers in (1, 2))
    print(f"{package}: {two - one} a layer and {2 * one - two}, with 28 layers {28 * (two - one) + 2 * one - two}")
    assert two - one <= LAYER[package] and 2 * one - two <= REST
    assert package != "qwen3" or 28 * LAYER[package] + REST <= AT_MOST


@pytest.mark.parametrize("size", [8, 24, 128, 1024, 2560, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_norm_gives_the_bits_of_the_lesson(dtype, size):
    """(engine/fast.py is one file in all packages.)"""
    plain, fast = module("qwen3", "layers").RMSNorm(size, 1e-6), module("qwen3", "engine.fast").FastRMSNorm(size, 1e-6)
    plain.weight.data = fast.weight.data = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = torch.randn(3, 5, size + 3, generator=torch.Generator().manual_seed(2)).to(dtype)[..., :size]
    for some in (x, x[:1, :1], x[:, :1] * 100, x.contiguous() * 0):
        with torch.inference_mode():
            assert torch.equal(fast(some), plain(some))
    few = x[0].clone().requires_grad_(), x[0].clone().requires_grad_()
    for part, rows in zip((plain, fast), few):
        part(rows).float().square().sum().backward()
    assert torch.equal(few[0].grad, few[1].grad) and torch.equal(plain.weight.grad, fast.weight.grad)


def lessons_sums(monkeypatch, package: str) -> None:
    """Let the engine's attention add up as the lesson does: kernels and grouped matmuls do it in another order."""
    fused, lesson = module(package, "engine.parts").FusedAttention, module(package, "engine.parts").Attention
    for name in {"sdpa", "each_head"} & set(vars(fused)):
        monkeypatch.setattr(fused, name, vars(lesson)[name])


@torch.inference_mode()
def logits_of(package: str, model: torch.nn.Module, padding: list[int] | None) -> list[Tensor]:
    """Of a prompt, of three tokens after it, one by one, and of two at once."""
    generate, ids = module(package, "generate"), torch.tensor([PROMPT] * len(padding or [0]))
    cache = generate.new_cache(model, 20, padding)
    logits = [model(ids, cache)]
    for token in (5, 60, 31):
        logits.append(model(torch.full((len(ids), 1), token), cache))
    return [*logits, model(ids[:, :2], cache)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_token_and_a_prompt_have_the_bits_of_the_lesson(monkeypatch, package, dtype):
    lessons_sums(monkeypatch, package)
    monkeypatch.setattr(module(package, "engine.fast"), "SLOW_IN_16_BITS", False)
    plain, fast = (made(package, engine).to(dtype) for engine in (False, True))
    for padding in (None, [0, 0], [0, 3]):
        for ours, theirs in zip(logits_of(package, fast, padding), logits_of(package, plain, padding), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("package", PACKAGES)
def test_training_and_a_compiler_get_the_operations_of_the_lesson(monkeypatch, package):
    """So that gradients have the lesson's bits, and a compiler has nothing to look through."""
    fast = module(package, "engine.fast")
    assert not fast.wants_few_operations(torch.ones(1))
    with torch.no_grad():
        assert fast.wants_few_operations(torch.ones(1)) and not fast.wants_few_operations(torch.ones(1).to("meta"))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not fast.wants_few_operations(torch.ones(1))
