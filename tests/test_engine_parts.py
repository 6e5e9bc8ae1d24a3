"""Every part that the engine swaps in equals the part of the lesson that it replaces, and may be used like it."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.packages import PACKAGES, force_form, module
from tests.test_generate import EACH, PROMPT, made

PARTS = [(package, part.__name__) for package in PACKAGES for part in module(package, "engine.parts").FASTER]
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.04}


def pair_of(package: str, name: str) -> tuple[nn.Module, nn.Module]:
    """(The lesson's part, the engine's) with the same weights, large enough to make a difference."""
    faster = {part.__name__: (part, twin) for part, twin in module(package, "engine.parts").FASTER.items()}
    config = module(package, "config").Config(**EACH[package])
    arguments = {"Linear": (24, 40), "RMSNorm": (24, 1e-6), "Attention": (config, 1), "Router": (config,),
                 "Experts": (8, 24, 16)}[name]
    torch.manual_seed(1)
    plain, fast = (part(*arguments) for part in faster[name])
    for weight in plain.parameters():
        weight.data = torch.randn(weight.shape) * 0.3 + (weight.ndim == 1)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def inputs_of(package: str, name: str, dtype: torch.dtype, B: int, T: int, padding: bool = False) -> tuple[Tensor, ...]:
    """What the part is called with; the first of it is x."""
    x = torch.randn(B, T, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    if name == "Attention":
        layers, config = module(package, "layers"), module(package, "config").Config(**EACH[package])
        cos, sin = layers.RotaryEmbedding(config)(torch.arange(T)[None], dtype)
        starts = torch.tensor([[0], [3]]) if padding else None
        return x, cos, sin, layers.attention_mask(0, T, starts, x.device), None
    if name == "Experts":
        scores = torch.rand(B * T, 8, generator=torch.Generator().manual_seed(3))
        weights, topk_ids = scores.topk(3)
        return x.flatten(0, 1), weights.to(dtype), topk_ids
    return (x.flatten(0, 1) if name == "Router" else x,)


def outputs(part: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """A router's weights and ids, or what another part gives."""
    y = part(*inputs)
    return list(y) if isinstance(y, tuple) else [y]


def assert_equal(ours: nn.Module, theirs: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    dtype = inputs[0].dtype
    for mine, other in zip(outputs(ours, *inputs), outputs(theirs, *inputs), strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        if mine.is_floating_point() or dtype != torch.bfloat16:  # two experts may be as good as each other to rounding
            assert (mine.double() - other.double()).abs().max() <= TOLERANCE[dtype] * other.abs().max()


def test_the_table_names_every_part_that_the_engine_replaces():
    assert len(PARTS) == 12 and {name for _, name in PARTS} == {"Linear", "RMSNorm", "Attention", "Router", "Experts"}


@pytest.mark.parametrize("package, name, B, T, padding", [
    (*part, B, T, padding) for part in PARTS for B, T, padding in ((1, 1, False), (1, 18, False), (2, 1, False),
                                                                   (2, 9, False), (2, 9, True))
    if part[1] == "Attention" or not padding])
def test_a_part_equals_the_one_that_it_replaces(monkeypatch, package, name, B, T, padding):
    plain, fast = pair_of(package, name)
    forms = (None, True, False) if (package, name) == ("deepseek_v3", "Attention") else (None,)
    for slow in (True, False):  # whatever this processor is
        monkeypatch.setattr(module(package, "engine.fast"), "SLOW_IN_16_BITS", slow)
        for dtype, form in ((dtype, form) for dtype in (torch.float32, torch.bfloat16) for form in forms):
            plain, fast, inputs = plain.to(dtype), fast.to(dtype), inputs_of(package, name, dtype, B, T, padding)
            for part in (plain, fast):
                force_form(part, form)
            with torch.inference_mode():
                assert_equal(fast, plain, inputs)
            assert_equal(fast, plain, inputs)
        plain, fast = pair_of(package, name)


def copies(part: nn.Module):
    """The part again, by every way in which programs keep and move parts."""
    yield copy.deepcopy(part)
    yield pickle.loads(pickle.dumps(part))
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(part)
    for weight in again.parameters():
        weight.data = torch.zeros_like(weight)
    again.load_state_dict(torch.load(file, weights_only=True))
    yield again


@pytest.mark.parametrize("package, name", PARTS)
def test_a_part_keeps_names_shapes_and_numbers_wherever_it_goes(package, name):
    plain, fast = pair_of(package, name)
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    inputs = inputs_of(package, name, torch.float32, 1, 9)
    for part in (fast, *copies(fast), fast.double().float(), *copies(fast)):
        assert {key: value.shape for key, value in part.state_dict().items()} == shapes
        assert_equal(part, plain, inputs)
    for dtype in (torch.float64, torch.bfloat16):
        assert_equal(fast.to(dtype), plain.to(dtype), inputs_of(package, name, dtype, 1, 9))


def gradients(part: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Of every parameter, and of x."""
    x = inputs[0].clone().requires_grad_()
    outputs(part, x, *inputs[1:])[0].square().sum().backward()
    return {name: weight.grad for name, weight in part.named_parameters() if weight.requires_grad} | {"x": x.grad}


@pytest.mark.parametrize("package, name", PARTS)
def test_a_part_has_the_gradients_of_the_one_that_it_replaces(package, name):
    plain, fast = pair_of(package, name)
    for T in (1, 9):
        inputs = inputs_of(package, name, torch.float32, 1, T)
        plain.zero_grad(), fast.zero_grad()
        expected, found = gradients(plain, inputs), gradients(fast, inputs)
        assert expected.keys() == found.keys() and all(grad is not None for grad in found.values())
        largest = max(grad.abs().max() for grad in expected.values())  # some are 0: a single query sees one key
        for key, grad in expected.items():
            assert (found[key] - grad).abs().max() <= 1e-5 * largest, key


@pytest.mark.parametrize("package", ["qwen3_moe", "deepseek_v3"])
def test_stacked_experts_equal_those_of_the_lesson_and_keep_names_and_gradients(package):
    plain, fast = pair_of(package, "Experts")
    numbers = {name: weight.data for name, weight in fast.named_parameters()}
    fast.stack(torch.device("cpu"), torch.float32)
    for name, weight in fast.named_parameters():
        weight.data.copy_(numbers[name])
    inputs = inputs_of(package, "Experts", torch.float32, 1, 9)
    for part in (fast, *copies(fast)):
        assert {name: weight.shape for name, weight in part.state_dict().items()} == {
            name: weight.shape for name, weight in plain.state_dict().items()}
        assert_equal(part, plain, inputs)
        with torch.inference_mode():
            assert_equal(part, plain, inputs)
        plain.zero_grad()
        found = gradients(part, inputs)
        for name, grad in gradients(plain, inputs).items():
            assert (found[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-7, name
    assert fast.is_stacked()


# FP8 (engine/quantized.py, one file in all packages)

@pytest.mark.parametrize("scale, block", [((2, 3), (128, 128)), ((200, 1), (1, 300)), ((1, 1), (200, 300))])
def test_an_fp8_linear_multiplies_by_its_scales_and_keeps_its_bytes(scale, block):
    quantized, generator = module("qwen3", "engine.quantized"), torch.Generator().manual_seed(0)
    weight = torch.randn(200, 300, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(scale, generator=generator) + 0.5
    linear = quantized.FP8Linear(SimpleNamespace(weight_block_size=None), weight, scales)
    every = scales.repeat_interleave(block[0], 0)[:200].repeat_interleave(block[1], 1)[:, :300]
    W, x = weight.float() * every, torch.randn(2, 20, 300, generator=generator)
    assert linear.block == block
    for part in (linear, copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(part.matrix(torch.float32), W) and part.matrix(torch.bfloat16).dtype == torch.bfloat16
        assert torch.allclose(part(x), x @ W.T, atol=1e-3)
        state = part.state_dict()
        assert list(state) == ["weight", "weight_scale_inv"] and state["weight"].dtype == torch.float8_e4m3fn
        assert torch.equal(state["weight"].view(torch.uint8), weight.view(torch.uint8))
        assert not any(parameter.requires_grad for parameter in part.parameters())
    rows = x.clone().requires_grad_()
    linear(rows).sum().backward()  # what is trained before it, or beside it, gets its gradients
    assert torch.allclose(rows.grad, W.sum(0).expand_as(rows), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_is_widened_on_the_cpu_to_the_bits_of_the_definition(monkeypatch, dtype):
    """All 256 values: zeros of both signs, subnormal numbers, NaN; in pieces that end within blocks and between."""
    quantized, fp8, seed = module("qwen3", "engine.quantized"), module("qwen3", "engine.fp8"), torch.Generator()
    every = torch.arange(256, dtype=torch.uint8)[torch.randint(0, 256, (300, 200), generator=seed.manual_seed(0))]
    every[:70][every[:70] == 0x7F] = 0  # one of the two NaN in the first piece, the other in the second
    every[70:140][every[70:140] == 0xFF] = 0
    weight = every.view(torch.float8_e4m3fn)
    assert len(every.unique()) == 256 and torch.equal(weight.view(torch.uint8), every)

    def bits(W: Tensor) -> Tensor:
        return W.view(torch.int32 if dtype == torch.float32 else torch.int16).where(~W.isnan(), 0)

    for grid in ((3, 2), (300, 1), (1, 1)):
        for scale in (torch.rand(grid, generator=seed) * 1e-3, torch.full(grid, 1e-40), torch.full(grid, 1e37)):
            linear = quantized.FP8Linear(SimpleNamespace(weight_block_size=None), weight, scale)
            block = linear.block
            meant = scale.repeat_interleave(block[0], 0)[:300].repeat_interleave(block[1], 1)[:, :200]
            meant = (weight.to(torch.float32) * meant).to(dtype)
            for piece, part in ((2**20, 2**17), (200 * 70, 200 * 30)):
                monkeypatch.setattr(fp8, "PIECE", piece)
                monkeypatch.setattr(fp8, "PART", part)
                W = linear.matrix(dtype)
                assert torch.equal(W.isnan(), meant.isnan()) and torch.equal(bits(W), bits(meant))
    clean = torch.where(weight.float().isnan(), 0.0, weight.float()).to(torch.float8_e4m3fn)
    linear = quantized.FP8Linear(SimpleNamespace(weight_block_size=None), clean, torch.rand(3, 2, generator=seed))
    monkeypatch.setattr(fp8, "PIECE", 200 * 70)
    for x in (torch.randn(1, 200, generator=seed).to(dtype), torch.randn(2, 30, 200, generator=seed).to(dtype)):
        expected = x.double() @ linear.matrix(dtype).double().T
        assert linear(x).shape == expected.shape and linear(x).dtype == dtype
        assert (linear(x) - expected).abs().max() <= (torch.finfo(dtype).eps + 2e-6) * expected.abs().max()


# Progress (engine/conversation.py, one file in all packages)

def listeners(model: nn.Module) -> int:
    return sum(len(layer._forward_hooks) for layer in model.model.layers)


@pytest.mark.parametrize("package", PACKAGES)
def test_progress_counts_to_the_end_of_the_prompt_and_stops_listening(monkeypatch, package):
    conversation, generate, model = module(package, "engine.conversation"), module(package, "generate"), made(package)
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 4)
    ways = [{}]
    if package == "deepseek_v3":
        monkeypatch.setattr(module(package, "speculative"), "PREFILL_CHUNK", 4)
        ways.append({"speculative": True})
    for more in ways:
        seen = []
        reading = conversation.Reading(model, len(PROMPT), lambda *done: seen.append(done))
        assert listeners(model) == model.config.num_hidden_layers
        ids = generate.generate(model, PROMPT, max_new_tokens=5, **more)
        next(ids)
        count = len(seen)
        assert seen == sorted(seen) and seen[-1] == (11, 11) and seen[0] == (4 // 3, 11) and count == 9
        assert listeners(model) == 0
        assert len(list(ids)) == 4 and len(seen) == count  # decoding is not counted
        reading.end()  # once more does no harm
    reading = conversation.Reading(model, len(PROMPT), lambda *done: None)
    reading.end()
    assert listeners(model) == 0


@pytest.mark.parametrize("when", ["reading", "asking"])
@pytest.mark.parametrize("package", PACKAGES)
def test_nobody_listens_after_ctrl_c_in_the_middle(monkeypatch, capfd, package, when):
    main, models, left = module(package, "main"), [], []
    generate = main.generate

    def interrupted(model, ids, **rest):
        models.append(model)
        assert listeners(model) == model.config.num_hidden_layers
        if when == "asking":
            raise KeyboardInterrupt
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: interrupt(hook))
        return generate(model, ids, **rest)

    def interrupt(hook):
        hook.remove()
        left.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "generate", interrupted)
    assert main.main(["-m", PACKAGES[package], "-p", "What is RoPE?"]) == 130
    assert len(models) == 1 and listeners(models[0]) == 0 and left == [1] * (when == "reading")
    assert capfd.readouterr().out.strip() == ""
