"""The compiled decode step: the tokens of the plain one, on a CPU, where it is compiled and not recorded."""

import math
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen3.engine import fast
from tests.packages import PACKAGES, module, stack_on_the_cpu, without_compiler
from tests.packed import write
from tests.seeded import LONG_PROMPT, write_case

CASE = {"qwen3": "grouped", "qwen3_moe": "two_of_eight", "deepseek_v3": "moonlight"}


def load(folder: Path, monkeypatch, package: str, weights: str = "float32") -> torch.nn.Module:
    """All but FP8 weights in float32, where rounding decides nothing; experts stacked, as they are on a GPU."""
    if package != "qwen3":
        stack_on_the_cpu(monkeypatch, package)
    if weights == "float32":
        return module(package, "weights").load_model(write_case(folder, package, CASE[package]), dtype="float32")
    fp8_checkpoint = import_module(f"tests.{package}.test_weights").fp8_checkpoint
    return module(package, "weights").load_model(fp8_checkpoint(folder, 256, 256, "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float32", "fp8"])
@pytest.mark.parametrize("package", PACKAGES)
def test_compiled_steps_give_the_tokens_of_plain_ones(tmp_path, monkeypatch, package, weights):
    model, generate = load(tmp_path, monkeypatch, package, weights), module(package, "generate")
    monkeypatch.setattr(module(package, "engine.compiled"), "BLOCK", 10)
    torch._dynamo.utils.counters.clear()
    for sampling in ({}, {"temperature": 1.0, "top_k": 20, "seed": 3}):
        cache = generate.new_cache(model, 60)
        for tensor in cache.tensors:
            tensor.fill_(torch.nan)  # what is not written yet may be anything
        request = dict(max_new_tokens=24, **sampling)
        plain = list(generate.generate(model, LONG_PROMPT[:20], **request))
        assert list(generate.generate(model, LONG_PROMPT[:20], cache=cache, compiled=True, **request)) == plain
        assert cache.length == 43 and len(set(plain)) > 5
    # For three blocks, two runs and all layers; DeepSeek's are of two kinds, and one of these is compiled twice because
    # the first of its kind begins in the cache where a stride would end.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (3 if package == "deepseek_v3" else 1)


@pytest.mark.parametrize("package", PACKAGES)
def test_one_step_without_the_compiler_is_a_plain_step(tmp_path, monkeypatch, package):
    """The same code, run as it stands: what static cache, mask and position do, at each place in a block."""
    model, generate = load(tmp_path, monkeypatch, package), module(package, "generate")
    compiled = module(package, "engine.compiled")
    without_compiler(monkeypatch, package)
    monkeypatch.setattr(compiled, "BLOCK", 8)
    plain = list(generate.generate(model, LONG_PROMPT[:5], max_new_tokens=30))
    assert list(generate.generate(model, LONG_PROMPT[:5], max_new_tokens=30, compiled=True)) == plain
    cache, other = (generate.new_cache(model, 30) for _ in range(2))
    step = compiled.CompiledStep(model, other)
    with torch.inference_mode():
        for token in LONG_PROMPT[:20]:
            logits = model(torch.tensor([[token]]), cache, last_only=True)[:, -1]
            assert torch.allclose(step(model, torch.tensor([token]), other), logits, atol=1e-5)
    assert other.length == 20


@pytest.mark.parametrize("package", PACKAGES)
def test_what_cannot_be_compiled_is_one_sentence(tmp_path, monkeypatch, package):
    def fails(*_):
        raise RuntimeError("no C++ compiler\nfound")

    model, generate = load(tmp_path, monkeypatch, package), module(package, "generate")
    without_compiler(monkeypatch, package, lambda function: fails)
    with pytest.raises(ValueError, match=r"^torch.compile failed \(no C\+\+ compiler\); leave out --compile$"):
        list(generate.generate(model, [1, 2], max_new_tokens=3, compiled=True))


@pytest.mark.parametrize("package", ["qwen3_moe", "deepseek_v3"])
def test_experts_that_are_not_stacked_are_refused_at_once(tmp_path, package):
    model = module(package, "weights").load_model(write_case(tmp_path, package, CASE[package]))
    with pytest.raises(ValueError, match="leave out --compile"):
        module(package, "generate").generate(model, [1, 2], max_new_tokens=3, compiled=True)


def test_drafting_is_not_compiled(tmp_path):
    model = module("deepseek_v3", "weights").load_model(write_case(tmp_path, "deepseek_v3", "yarn"))
    with pytest.raises(ValueError, match="leave out --compile or --speculative"):
        module("deepseek_v3", "generate").generate(model, [1, 2], max_new_tokens=3, speculative=True, compiled=True)


@pytest.mark.parametrize("rows, matrices", [((1, 1), ()), ((1,), ()), ((3, 1), (3,))])
def test_a_compiler_fuses_the_matmul_of_one_row(monkeypatch, rows, matrices):
    """What `matmul` becomes there is still the matmul. (engine/fast.py is one file in all packages.)"""
    x, W = torch.randn(*rows, 40), torch.randn(*matrices, 7, 40)
    expected = fast.matmul(x, W)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert fast.matmul(x, W).shape == expected.shape and torch.allclose(fast.matmul(x, W), expected, atol=1e-5)
        patch.setattr(fast, "matmul_one_row", lambda x, W: "one loop")
        assert fast.matmul(x.to("meta"), W.to("meta")) == "one loop"  # as on a GPU
    assert fast.matmul(x.to("meta"), W.to("meta")).shape == expected.shape


def largest_buffer(function, *arguments) -> int:
    """How many numbers the largest tensor has that the compiled function makes."""
    from torch._inductor.utils import run_and_get_code

    with torch.inference_mode():
        _, codes = run_and_get_code(torch.compile(function, options={"emulate_precision_casts": True}), *arguments)
    shapes = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", "\n".join(codes))
    assert shapes and "extern_kernels." not in "".join(codes)  # all that is made is seen here
    return max(math.prod(map(int, shape.strip(", ").split(", "))) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_a_compiler_reads_fp8_weights_where_they_lie(package):
    """And makes no matrix of 16-bit numbers first, which would be written and read once more, twice as large."""
    weight, scale = torch.randn(128, 256).to(torch.float8_e4m3fn), torch.rand(1, 2)
    config = SimpleNamespace(weight_block_size=(128, 128))
    linear = module(package, "engine.quantized").FP8Linear(config, weight, scale)
    assert largest_buffer(linear, torch.randn(1, 1, 256).bfloat16()) <= 256


@pytest.mark.slow
def test_compiled_steps_with_packed_weights_give_the_tokens_of_plain_ones(tmp_path, monkeypatch):
    folder = write(tmp_path, "qwen3", "compressed", torch_dtype="bfloat16", num_hidden_layers=1)
    model = module("qwen3", "weights").load_model(folder)
    generate, request = module("qwen3", "generate"), {"max_new_tokens": 12}
    monkeypatch.setattr(module("qwen3", "engine.compiled"), "BLOCK", 10)
    plain = list(generate.generate(model, LONG_PROMPT[:20], **request))
    assert list(generate.generate(model, LONG_PROMPT[:20], compiled=True, **request)) == plain and len(set(plain)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("package", ["qwen3_moe", "deepseek_v3"])
def test_a_compiler_reads_chosen_experts_where_they_lie(package):
    experts = module(package, "engine.experts").FastExperts(8, 64, 32)
    experts.stack(torch.device("cpu"), torch.bfloat16)
    weights, topk_ids = torch.rand(1, 8).topk(3)
    x = torch.randn(1, 64).bfloat16()
    assert largest_buffer(experts, x, weights.bfloat16(), topk_ids) <= 3 * 64  # of 3 x 64 x 64


@pytest.mark.ahead
def test_loading_and_generating_plainly_do_not_import_the_compiler(tmp_path):
    """It takes a second, and PyTorch asks for it as soon as random numbers are wanted on the meta device."""
    code = "import sys\n"
    for package in PACKAGES:
        folder = str(write_case(tmp_path / package, package, CASE[package]))
        code += (f"from {package}.weights import load_model; from {package}.generate import generate\n"
                 f"for engine in (True, False):\n"
                 f"    new = list(generate(load_model({folder!r}, engine=engine), [1, 2], max_new_tokens=2))\n"
                 f"    print(len(new), 'torch._dynamo' in sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout == "2 False\n" * 6, done.stderr
