"""Weights of four and eight bits: what published formats mean, bit by bit, and that it is computed.

The checkpoints are written by tests/packed.py, from the definitions of the formats.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.packages import PACKAGES, module
from tests.packed import CONFIGS, RELEASES, WIDTHS, is_packed, quantised, write
from tests.seeded import PROMPT, seeded_tensor, write_checkpoint
from tests.test_releases import IDS, change_config, is_one_sentence, logits, tensors_of

# Alike in all packages.
int4, formats, nibbles = (module("qwen3", f"engine.{name}") for name in ("int4", "packed_formats", "nibbles"))
REFERENCE = {package: Path(__file__).parent / package / "reference/packed.safetensors" for package in PACKAGES}
FEW = ("gptq, desc_act", "compressed, zero points")


@pytest.fixture(params=PACKAGES)
def package(request) -> str:
    return request.param


def linear_of(package: str) -> type:
    return module(package, "engine.integer_linear").IntegerLinear


def packed_parts(package: str, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in model.named_modules() if isinstance(part, linear_of(package))}


# The formats, by hand and against the libraries

def config_of(quantization: str, group: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(quantization=quantization, weight_block_size=group and (1, group))


def test_words_by_hand():
    """0, 1, …, 7 in a word, and the zero points 1 … 8, by the definitions of AWQ, GPTQ and compressed-tensors."""
    one_to_eight, scale = torch.arange(1, 9)[None], torch.full((1, 8), 0.5).half()
    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    in_awqs_order = torch.tensor([[0x75316420]], dtype=torch.int32)
    row = torch.arange(8)

    # AWQ, one column in, eight rows out: W[o] = (o - zero) / 2
    awq = formats.AWQLinear.make(config_of("awq"), (8, 1), qweight=in_awqs_order, qzeros=in_awqs_order + 0x11111111,
                                 scales=scale)
    assert torch.equal(awq.matrix(torch.float32), (row - one_to_eight[0])[:, None] * 0.5)
    assert torch.equal(awq.integers().values, row[:, None].byte())

    # GPTQ, eight columns in, eight rows out, all rows 0 … 7; the zero points that are stored are one less
    qweight, qzeros = word.expand(1, 8).contiguous(), word
    for quantization, zero in (("gptq", one_to_eight), ("gptq_v2", one_to_eight - 1)):
        gptq = formats.GPTQLinear.make(config_of(quantization), (8, 8), qweight=qweight, qzeros=qzeros, scales=scale)
        assert torch.equal(gptq.matrix(torch.float32), (row - zero.T) * 0.5)

    # compressed-tensors: signed numbers, raised by 8
    stored = {"weight_packed": word, "weight_scale": scale[:, :1], "weight_shape": torch.tensor([1, 8])}
    compressed = formats.CompressedLinear.make(config_of("compressed-tensors"), (1, 8), **stored)
    assert torch.equal(compressed.matrix(torch.float32), (row - 8)[None] * 0.5)
    zero = formats.CompressedLinear.make(config_of("compressed-tensors"), (1, 8), **stored,
                                         weight_zero_point=torch.tensor([[5]], dtype=torch.int32))
    assert torch.equal(zero.matrix(torch.float32), (row - 5)[None] * 0.5)

    # Eight bits: -128 and 127 are stored as 0 and 255
    bytes_ = torch.tensor([[0, 255, 128, 1]], dtype=torch.uint8).view(torch.int32)
    eight = formats.CompressedLinear.make(config_of("compressed-tensors"), (1, 4), weight_packed=bytes_,
                                          weight_scale=scale[:, :1], weight_shape=torch.tensor([1, 4]))
    assert eight.matrix(torch.float32).tolist() == [[-64, 63.5, 0, -63.5]]


def cases_of_reference() -> list[str]:
    return sorted({" ".join(name.split()[:4]) for name in load_file(REFERENCE["qwen3"]) if name[0] in "48"})


def rows_of(packed, dtype: torch.dtype) -> torch.Tensor:
    """W of all pieces, in the order of its rows."""
    return packed.in_order(torch.cat(list(packed.pieces(dtype))).T).T[:packed.rows]


@pytest.mark.parametrize("case", cases_of_reference())
def test_a_matrix_of_compressed_tensors_is_that_librarys_bit_for_bit(case):
    stored = {name.removeprefix(f"{case} "): tensor for name, tensor in load_file(REFERENCE["qwen3"]).items()
              if name.startswith(f"{case} ")}
    wanted = stored.pop("weight")
    linear = formats.CompressedLinear.make(config_of("compressed-tensors"), tuple(wanted.shape), **stored)
    assert torch.equal(linear.matrix(wanted.dtype), wanted)
    packed = linear.pack()
    assert torch.equal(rows_of(packed, wanted.dtype), wanted)
    bits, group, dtype, symmetric = case.split()
    q, scale, zero, _, _ = quantised("matrix", (20, 96), int(bits), int(group), getattr(torch, dtype),
                                     symmetric == "symmetric")
    assert torch.equal(scale, stored["weight_scale"])
    if bits == "4":  # in eight bits, what is quantised again was rounded too far for it
        assert torch.equal(linear.integers().values, q.byte())


@pytest.mark.parametrize("package, release", [
    pytest.param(package, release, marks=() if package == "qwen3" or release == "compressed" else pytest.mark.slow)
    for package in PACKAGES for release in RELEASES
    if release.startswith("compressed") and "act order" not in release and "zero points" not in release])
def test_logits_are_those_of_transformers_with_compressed_tensors(tmp_path, package, release):
    """It unpacks experts into the type of their scales, whatever is asked for."""
    wanted = load_file(REFERENCE[package])[release]
    model = module(package, "weights").load_model(write(tmp_path, package, release), dtype="float32")
    for name, weight in model.named_parameters():
        if ".experts." in name:
            weight.data = weight.data.to(RELEASES[release][1].get("dtype", torch.bfloat16)).float()
    with torch.inference_mode():
        assert (model(IDS)[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("package, release", [
    pytest.param(package, release, marks=() if package == "qwen3" or release in FEW else pytest.mark.slow)
    for package in PACKAGES for release in RELEASES])
def test_a_release_is_what_its_bits_mean(tmp_path, package, release):
    """In float32 the matrices are those that are meant, exactly, and so are the logits, up to the order of sums."""
    folder = write(tmp_path / "packed", package, release)
    plain = write(tmp_path / "plain", package, release, plain=True)
    model = module(package, "weights").load_model(folder)
    meant = load_file(plain / "model.safetensors")
    parts = packed_parts(package, model)
    assert len(parts) == sum(is_packed(name, tensor.shape) for name, tensor in meant.items()) > 5
    for name, part in parts.items():
        assert torch.equal(part.matrix(torch.float32), meant[f"{name}.weight"])
        assert (part.packed is None) == (".experts." in name)  # experts wait for a token
    wanted = logits(package, plain)
    with torch.inference_mode():
        assert (model(IDS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(logits(package, folder, dtype="float32"), wanted)
    stored, state = load_file(folder / "model.safetensors"), model.state_dict()
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)
    bytes_in_memory = module(package, "weights").bytes_in_memory
    assert bytes_in_memory(folder) == sum(tensor.nbytes for tensor in stored.values())
    assert bytes_in_memory(folder, "float32") == sum(tensor.nbytes for tensor in meant.values())


# The matmul

SHAPES = [(64, 96, 32), (100, 256, 128), (130, 64, 64), (48, 480, 96), (48, 480, 48), (256, 512, 256)]  # O, I, group
KERNELS = ["as it is", "none"]


def integers(O: int, I: int, group: int, bits: int, dtype: torch.dtype, symmetric: bool, mixed: bool):
    order = torch.randperm(I, generator=torch.Generator().manual_seed(3)) if mixed else None
    q, scale, zero, groups, _ = quantised("W", (O, I), bits, group, dtype, symmetric, order)
    q, zero = (t.byte() if bits == 4 else (t - 128).to(torch.int8) for t in (q, zero))
    return int4.Integers(q, scale, zero, group, groups if mixed else None)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch) -> str:
    """PyTorch's matmul of packed weights, or a PyTorch without it."""
    if request.param == "none":
        monkeypatch.setattr(int4, "layout", lambda: None)
    return request.param


@pytest.mark.parametrize("bits, symmetric, dtype", [(4, True, torch.bfloat16), (4, False, torch.float16),
                                                    (8, True, torch.bfloat16), (8, False, torch.float16)])
@pytest.mark.parametrize("O, I, group", SHAPES)
def test_a_packed_matmul_is_that_of_the_matrix(kernel, O, I, group, bits, symmetric, dtype):
    for mixed in (False, True):
        whole = integers(O, I, group, bits, dtype, symmetric, mixed)
        packed, W = int4.pack(whole), whole.matrix(torch.float32)
        if kernel == "none":
            assert packed.kernel is None or bits == 8
        assert (packed.order is not None) == (mixed and group < I) and packed.rows == O
        for rows in (1, 3, 100):
            x = torch.randn(rows, I, generator=torch.Generator().manual_seed(rows)) + 0.3
            assert (packed.matmul(x) - x @ W.T).abs().max() <= 1e-5 * (x @ W.T).abs().max()
            x = x.bfloat16()
            exact = x.double() @ W.double().T
            plain, ours = (x @ W.bfloat16().T - exact).square().mean(), (packed.matmul(x) - exact).square().mean()
            assert ours.sqrt() <= 2 * plain.sqrt(), (rows, mixed)


def test_pytorch_has_the_kernel_and_it_reads_our_order():
    """Without it everything is computed more slowly: a change in PyTorch should be noticed."""
    layout = int4.layout()
    assert layout is not None
    q = torch.randint(0, 16, (128, 96), generator=torch.Generator().manual_seed(0))
    ours = nibbles.join_nibbles(q.byte(), *layout)
    assert torch.equal(ours.flatten(), torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1).flatten())
    block, axis = layout
    assert torch.equal(nibbles.nibbles(ours, axis).transpose(1, 2).flatten(0, 1), q.byte())


def test_the_order_is_found_on_a_processor_without_vectors_too():
    """ATEN_CPU_CAPABILITY is read once, when PyTorch is imported."""
    code = ("import torch; from qwen3.engine import int4; torch.manual_seed(0)\n"
            "q, scale = torch.randint(0, 16, (128, 96)).byte(), torch.rand(128, 3).bfloat16()\n"
            "whole = int4.Integers(q, scale, torch.full((128, 3), 8).byte(), 32)\n"
            "packed, x = int4.pack(whole), torch.randn(1, 96).bfloat16()\n"
            "error = packed.matmul(x).float() - x.float() @ whole.matrix(torch.float32).T\n"
            "assert packed.kernel and error.abs().max() < 0.5, (int4.layout(), error.abs().max())")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1],
                   env=os.environ | {"ATEN_CPU_CAPABILITY": "default"})


@pytest.mark.parametrize("block, axis", [(64, -2), (32, -2), (32, -1)])
def test_the_orders_of_other_processors(monkeypatch, block, axis):
    """AVX-512, AVX2, and those with neither: packed and unpacked again, without their kernels."""
    monkeypatch.setattr(int4, "layout", lambda: (block, axis))
    whole = integers(100, 96, 32, 4, torch.bfloat16, False, False)
    packed = int4.pack(whole)
    assert packed.values.shape == (-(-100 // block), 96, block // 2)
    assert torch.equal(rows_of(packed, torch.float32), whole.matrix(torch.float32))


def test_widths_that_the_kernel_of_eight_bits_would_read_beyond_are_not_given_to_it():
    """PyTorch's takes columns by 16 or 32, without a check: for others it returns NaN, or the process ends."""
    for I in (24, 40, 48, 56, 100):
        whole = integers(60, I, I, 8, torch.bfloat16, True, False)
        packed, x = int4.pack(whole), torch.ones(1, I, dtype=torch.bfloat16)
        assert packed.kernel is None and torch.equal(packed.matmul(x), x @ whole.matrix(torch.bfloat16).T)


def test_groups_that_are_not_whole_are_multiplied_slowly_and_rightly():
    for group_of in (None, torch.arange(80) % 2):  # 80 columns in groups of 32; two groups of 40 that say 32
        q, scale, zero, _, _ = quantised("W", (48, 80), 4, 32, torch.float32, False)
        whole = int4.Integers(q.byte(), scale, zero.byte(), 32, group_of)
        assert int4.pack(whole) is None
        groups = torch.arange(80) // 32 if group_of is None else group_of
        assert torch.equal(whole.matrix(torch.float32), (q - zero[:, groups]) * scale[:, groups])


def test_gradients_reach_what_is_before_it():
    linear = module("qwen3", "engine.rounding")
    tensors = linear.packed_tensors(seeded_tensor("W", (32, 64), 1.0), 4, 32)
    part = formats.CompressedLinear.make(config_of(None), (32, 64), **tensors)
    for dtype, rows in ((torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 40)):
        x = torch.ones(rows, 64, dtype=dtype, requires_grad=True)
        part(x).sum().backward()
        assert torch.allclose(x.grad.float(), part.matrix(torch.float32).sum(0).expand(rows, 64), rtol=0.02, atol=0.05)


# In a model

def test_in_bfloat16_a_model_errs_at_most_twice_as_much_as_with_plain_matrices(tmp_path):
    for release in ("gptq, bfloat16", "awq", "compressed, 8 bits"):
        folder = write(tmp_path / release, "qwen3", release, torch_dtype="bfloat16")
        plain = write(tmp_path / f"{release} plain", "qwen3", release, plain=True, torch_dtype="bfloat16")
        exact = logits("qwen3", folder, dtype="float32")
        model = module("qwen3", "weights").load_model(folder)
        with torch.inference_mode():
            ours = torch.cat([model(IDS[:, :end + 1])[:, -1:] if end else model(IDS[:, :1]) for end in range(12)], 1)
        errors = [(one - exact).square().mean().sqrt() for one in (ours, logits("qwen3", plain))]
        assert model(IDS[:, :1]).dtype == torch.bfloat16 and errors[0] <= 2 * errors[1], release


@pytest.mark.parametrize("release", ["awq", pytest.param("compressed, 8 bits", marks=pytest.mark.slow)])
def test_tokens_one_by_one_and_in_batches(tmp_path, package, release):
    """Float32: what is decoded is what a whole prompt gives, and what the rows of a batch give."""
    model = module(package, "weights").load_model(write(tmp_path, package, release))
    generate = module(package, "generate")
    alone = [list(generate.generate(model, PROMPT[:n], max_new_tokens=6)) for n in (12, 5)]
    assert generate.generate_batch(model, [PROMPT, PROMPT[:5]], max_new_tokens=6) == alone
    ids = torch.tensor([PROMPT + alone[0]])
    with torch.inference_mode():
        assert model(ids)[0, 11:-1].argmax(-1).tolist() == alone[0]


@pytest.mark.parametrize("package", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("release", FEW[:1])
def test_an_expert_is_unpacked_when_a_token_is_first_routed_to_it(tmp_path, monkeypatch, package, release):
    folder, used, read = write(tmp_path, package, release, torch_dtype="bfloat16"), set(), []
    model = module(package, "weights").load_model(folder)
    format = {type(part) for part in packed_parts(package, model).values()}.pop()
    unpack = format.integers
    monkeypatch.setattr(format, "integers", lambda self: read.append(self) or unpack(self))
    for name, part in model.named_modules():
        if name.endswith(".mlp.gate") and "layers.3" not in name:
            part.register_forward_hook(lambda _, __, out, name=name: used.update(
                f"{name[:-4]}experts.{e}" for e in out[1].flatten().tolist()))
    with torch.inference_mode():
        for _ in range(2):
            model(IDS[:, :1])
    experts = {name for name, part in packed_parts(package, model).items() if ".experts." in name and part.packed}
    assert {name.rpartition(".")[0] for name in experts} == used and len(experts) == 3 * len(used) == len(read)


@pytest.mark.parametrize("package", ["qwen3_moe", "deepseek_v3"])
def test_packed_experts_take_no_more_memory_than_there_is(tmp_path, monkeypatch, package):
    folder = write(tmp_path, package, "awq")
    prepare, load_model = module(package, "engine.prepare"), module(package, "weights").load_model
    wanted = logits(package, folder)
    monkeypatch.setattr(prepare, "free_memory", lambda device: 24_000)
    model = load_model(folder)
    budgets = {part.budget for name, part in packed_parts(package, model).items() if ".experts." in name}
    (budget,) = budgets
    assert budget.most == 18_000 and not budget.total
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model(IDS), wanted)
        kept = {part for name, part in packed_parts(package, model).items() if ".experts." in name and part.packed}
        assert kept == budget.sizes.keys() and 0 < budget.total == sum(budget.sizes.values()) <= budget.most
        assert all(part.packed for name, part in packed_parts(package, model).items() if ".experts." not in name)


def test_copies_and_moves_compute_the_same(tmp_path):
    model = module("qwen3", "weights").load_model(write(tmp_path, "qwen3", "gptq, desc_act"))
    with torch.inference_mode():
        wanted = model(IDS)
        again = copy.deepcopy(model)
        again.load_state_dict(model.state_dict())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again, model.double().float()):
            assert (other(IDS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_training_is_refused_in_a_sentence(tmp_path, package):
    model = module(package, "weights").load_model(write(tmp_path, package, "compressed", only="q_"))
    with pytest.raises(ValueError, match="weights of 4 or 8 bits cannot be trained; start from the release in bf"):
        model.train()
    assert not any(parameter.requires_grad for part in packed_parts(package, model).values()
                   for parameter in part.parameters())


# What the files and config.json say

def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    kept = {name: tensor for name, tensor in (tensors_of(folder) | tensors).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


PROJ = "model.layers.1.mlp.up_proj"
DAMAGED = {
    "no scales": ("gptq", lambda f: change(f, **{f"{PROJ}.scales": None}), "up_proj.scales is missing"),
    "no zero points": ("awq", lambda f: change(f, **{f"{PROJ}.qzeros": None}), "up_proj.qzeros is missing"),
    "no groups": ("gptq", lambda f: change(f, **{f"{PROJ}.scales": torch.ones(3, 96).half()}), "does not divide 64"),
    "words that are missing": ("awq", lambda f: change(f, **{f"{PROJ}.qweight": torch.ones(64, 11).int()}),
                               r"qweight has shape \(64, 11\), the config asks for \(64, 12\)"),
    "words of 64 bits": ("gptq", lambda f: change(f, **{f"{PROJ}.qweight": torch.ones(8, 96).long()}),
                         "qweight is stored as torch.int64; known are torch.int32"),
    "words as floats": ("gptq", lambda f: change(f, **{f"{PROJ}.qweight": torch.ones(8, 96)}), "as torch.float32"),
    "scales as integers": ("compressed", lambda f: change(f, **{f"{PROJ}.weight_scale": torch.ones(96, 2).int()}),
                           "weight_scale is stored as I32"),
    "both": ("compressed", lambda f: change(f, **{f"{PROJ}.weight": torch.ones(96, 64)}),
             "up_proj.weight is in the checkpoint, but the config has no place for it"),
    "not announced": ("gptq", lambda f: change_config(f, quantization_config={}),
                      "qweight is packed, as config.json's quantization_config does not say"),
    "announced as another": ("awq", lambda f: change_config(f, quantization_config=RELEASES["compressed"][2]),
                             "qweight is packed, as config.json's quantization_config does not say"),
    "a group that is none": ("gptq, desc_act", lambda f: change(f, **{f"{PROJ}.g_idx": torch.full((64,), 2).int()}),
                             "a g_idx of this checkpoint names a group that is not among the 2 of its matrix"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, damage):
    release, change_it, message = DAMAGED[damage]
    folder = write(tmp_path, "qwen3", release)
    change_it(folder)
    with pytest.raises(ValueError, match=message) as error:
        module("qwen3", "weights").load_model(folder)
    assert is_one_sentence(error, folder)


def test_notes_say_what_is_computed_otherwise_or_slowly(tmp_path, package):
    read_checkpoint = module(package, "engine.prepare").read_checkpoint

    def notes(release: str, torch_dtype: str = "bfloat16") -> str:
        return " ".join(read_checkpoint(write(tmp_path, package, release, torch_dtype=torch_dtype, only="q_"))[0].notes)

    assert notes("awq") == notes("gptq, whole columns") == notes("compressed, 8 bits") == ""
    assert "activations and cache are bfloat16 here and not the checkpoint's float16" in notes("awq", "float16")
    assert "no fast matmul for such packed weights (groups of 16 columns)" in notes("awq, groups of 16")
    assert "(groups of 32 columns)" in notes("gptq, 8 bits") and "slow" in notes("compressed, 8 bits, groups")
    model = module(package, "weights").load_model(write(tmp_path, package, "awq", torch_dtype="float16", only="q_"))
    assert model(IDS).dtype == torch.bfloat16


# Rounded in memory

@pytest.mark.parametrize("dtype, bits", [("int4", 4), pytest.param("int8", 8, marks=pytest.mark.slow)])
def test_a_small_model_is_rounded_in_memory(tmp_path, package, dtype, bits):
    config = CONFIGS[package](**WIDTHS[package] | {"tie_word_embeddings": False, "torch_dtype": "float32"})
    folder = write_checkpoint(tmp_path, config)
    load_model, rounding = module(package, "weights").load_model, module(package, "engine.rounding")
    model, plain = load_model(folder, dtype=dtype), load_model(folder)
    rounded = {name: part for name, part in model.named_modules() if isinstance(part, linear_of(package))}
    assert len(rounded) == sum("_proj" in name for name, _ in plain.named_parameters())
    for name, part in rounded.items():
        W, group = plain.get_submodule(name).weight, 32 if bits == 4 else part.shape[1]
        q, scale = rounding.round_matrix(W, bits, group)
        W_ = part.matrix(torch.float32)
        assert torch.equal(W_, q * scale.float().repeat_interleave(group, 1))
        plain.get_submodule(name).weight.data = W_
        assert (W - W_).square().mean().sqrt() < (0.1 if bits == 4 else 0.01) * W.std()
    with torch.inference_mode():
        wanted = plain(IDS)
        assert (model(IDS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert module(package, "weights").bytes_in_memory(folder, dtype) == total
    with pytest.raises(ValueError, match="only the engine computes in int"):
        load_model(folder, dtype=dtype, engine=False)


def test_integers_are_not_rounded_again(tmp_path, package):
    folder = write(tmp_path, package, "compressed", only="q_")
    with pytest.raises(ValueError, match="integers already; leave out --dtype int4") as error:
        module(package, "weights").load_model(folder, dtype="int4")
    assert is_one_sentence(error, folder)
    with pytest.raises(ValueError, match="only the engine reads") as error:
        module(package, "weights").load_model(folder, engine=False)
    assert is_one_sentence(error, folder)


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, 256)])
def test_the_scale_that_is_searched_is_no_worse_than_the_largest_value_s(bits, group):
    rounding, W = module("qwen3", "engine.rounding"), seeded_tensor("W", (40, 256), 1.0) ** 3
    W[3] = 0
    q, scale = rounding.round_matrix(W, bits, group)
    most = 2 ** (bits - 1) - 1
    groups = W.unflatten(1, (-1, group))
    plain = (groups.abs().amax(-1, keepdim=True) / most).bfloat16().float().clamp(min=1e-9)
    nearest = (groups / plain).round().clamp(-most - 1, most) * plain
    ours = q.unflatten(1, (-1, group)).float() * scale.float()[..., None]
    errors = [(one - groups).square().sum(-1) for one in (ours, nearest)]
    assert (errors[0] <= errors[1] * 1.0001).all() and errors[0].sum() < errors[1].sum() * (0.9 if bits == 4 else 1)
    assert q.min() >= -most - 1 and q.max() <= most and (ours[3] == 0).all()


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("made", ("AWQ", "GPTQ", "Compressed"))
def test_on_another_device_nothing_is_left_on_the_cpu(bits, made):
    """"meta" stands for a GPU: shapes, types and devices of every operation, without numbers."""
    if (made, bits) == ("AWQ", 8):
        return
    (O, I), G, p = (64, 96), 3, 32 // bits
    words, scales = {"dtype": torch.int32, "device": "meta"}, {"dtype": torch.bfloat16, "device": "meta"}
    if made == "Compressed":
        stored = {"weight_packed": torch.empty(O, I // p, **words), "weight_scale": torch.empty(O, G, **scales),
                  "weight_shape": torch.empty(2, dtype=torch.int64, device="meta")}
    else:
        shape = (I, O // p) if made == "AWQ" else (I // p, O)
        stored = {"qweight": torch.empty(shape, **words), "qzeros": torch.empty(G, O // p, **words),
                  "scales": torch.empty(G, O, **scales)}
    linear = getattr(formats, f"{made}Linear").make(config_of(made.lower()), (O, I), **stored)
    y = linear(torch.empty(1, I, **scales))
    assert y.device.type == "meta" and y.shape == (1, O)


def test_what_is_not_finite_is_not_rounded():
    rounding = module("qwen3", "engine.rounding")
    for wrong in (torch.nan, torch.inf):
        W = torch.ones(2, 64)
        W[1, 3] = wrong
        with pytest.raises(ValueError, match="infinite or NaN"):
            rounding.round_matrix(W, 4, 32)
