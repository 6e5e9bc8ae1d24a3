"""Router and experts: by hand, all forms of one sum, and what is touched and what is not."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen3_moe.config import Config
from qwen3_moe.engine import experts as engine
from qwen3_moe.engine import sizes
from qwen3_moe.engine.experts import (FastExperts, grouped, grouped_mm_is_one_kernel, one_token, selected,
                                      stacked_grouped)
from qwen3_moe.engine.quantized import FP8Linear
from qwen3_moe.engine.sizes import bytes_per_token, check_memory
from qwen3_moe.generate import generate
from qwen3_moe.layers import MLP, Linear
from qwen3_moe.moe import Experts, Router, SparseMoeBlock
from qwen3_moe.weights import bytes_in_memory, load_model
from tests.packages import stack_on_the_cpu, with_engine
from tests.seeded import PROMPT, qwen3_moe_config, qwen3_shapes, seeded_tensor, write_case, write_checkpoint

ROOT = Path(__file__).parents[2]
FORMS = {"lesson": Experts.forward, "engine": grouped}
CONFIG = Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4,
                num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True)


def config(**changes) -> Config:
    return Config(**{name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | changes)


def router_of(weight: torch.Tensor, **changes) -> Router:
    router = Router(config(num_experts=weight.shape[0], hidden_size=weight.shape[1], **changes))
    router.weight.data = weight
    return router


def test_the_router_by_hand():
    """Logits (ln 1, ln 4, ln 2, ln 3): probabilities 0.1, 0.4, 0.2, 0.3."""
    x = torch.tensor([[1.0]])
    logits = torch.tensor([1.0, 4, 2, 3]).log()[:, None]
    weights, topk_ids = router_of(logits)(x)
    assert topk_ids.tolist() == [[1, 3]] and torch.allclose(weights, torch.tensor([[4 / 7, 3 / 7]]))
    weights, _ = router_of(logits, norm_topk_prob=False)(x)
    assert torch.allclose(weights, torch.tensor([[0.4, 0.3]]))
    weights, _ = router_of(logits, num_experts_per_tok=1)(x)
    assert torch.allclose(weights, torch.tensor([[1.0]]))


def test_softmax_then_the_best_renormalised_is_the_best_then_softmax():
    logits = torch.randn(200, 12)
    weights, topk_ids = logits.softmax(-1).topk(4)
    best, same = logits.topk(4)
    assert torch.equal(topk_ids, same)
    assert torch.allclose(weights / weights.sum(-1, keepdim=True), best.softmax(-1), atol=1e-6)
    assert not torch.allclose(weights, best.softmax(-1), atol=1e-2)  # without renormalising they differ


def test_the_router_takes_its_softmax_in_float32():
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    router = Router(CONFIG).bfloat16()
    router.weight.data = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits = torch.nn.functional.linear(x, router.weight)

    def weights_of(probabilities: torch.Tensor) -> torch.Tensor:
        best = probabilities.topk(2).values
        return (best / best.sum(-1, keepdim=True)).bfloat16()

    for router in (router, with_engine("qwen3_moe", copy.deepcopy(router))):
        weights, _ = router(x)
        assert weights.dtype == torch.bfloat16
        assert torch.equal(weights, weights_of(logits.float().softmax(-1)))
        assert not torch.equal(weights, weights_of(logits.softmax(-1)))


def reference(experts: Experts, x: torch.Tensor, weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """y = sum over all E experts of weight * expert(x), the weight 0 where it was not chosen. The definition."""
    every = weights.new_zeros(len(x), len(experts)).scatter(1, topk_ids, weights)  # (n, E)
    return sum(every[:, e, None] * expert(x) for e, expert in enumerate(experts)).to(x.dtype)


def random_case(E: int, A: int, n: int, dtype: torch.dtype) -> tuple:
    """(experts, x, weights, topk_ids)"""
    generator = torch.Generator().manual_seed(0)
    experts = FastExperts(E, 16, 8)
    for weight in experts.parameters():
        weight.data = torch.randn(weight.shape, generator=generator).to(dtype) * 0.3
    x, scores = torch.randn(n, 16, generator=generator).to(dtype), torch.rand(n, E, generator=generator)
    weights, topk_ids = scores.topk(A)
    return experts, x, weights.to(dtype), topk_ids


def stacked(experts: FastExperts) -> FastExperts:
    weights = [weight.data for weight in experts.parameters()]
    experts.stack(torch.device("cpu"), weights[0].dtype)
    for place, weight in zip(experts.parameters(), weights):
        place.data.copy_(weight)
    return experts


@pytest.mark.parametrize("E, A, n", [(6, 2, 1), (6, 2, 9), (6, 1, 5), (4, 4, 7), (40, 3, 2), (1, 1, 3), (8, 8, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_all_forms_are_one_sum(E, A, n, dtype, tolerance):
    experts, *rows = random_case(E, A, n, dtype)
    slow = reference(experts, *rows).float()

    def check(y: torch.Tensor) -> None:
        assert y.dtype == dtype and (y.float() - slow).abs().max() <= tolerance * slow.abs().max()

    check(Experts.forward(experts, *rows))
    check(grouped(experts, *rows))
    with torch.inference_mode():
        check(Experts.forward(experts, *rows))
        for form in [stacked_grouped, selected] if n == 1 else [stacked_grouped]:
            check(form(stacked(experts), *rows))


def picks_fp8_rows() -> bool:
    try:
        return torch.ones(2).to(torch.float8_e4m3fn)[torch.tensor([0])] is not None
    except NotImplementedError:
        return False


@pytest.mark.skipif(not picks_fp8_rows(), reason="PyTorch 2.9 picks no rows of FP8 on a CPU, uncompiled")
def test_chosen_fp8_experts_meet_their_own_scales():
    """Which differ by a factor of up to 20 here; those of a small checkpoint hardly do."""
    generator = torch.Generator().manual_seed(0)
    experts = FastExperts(6, 256, 128)
    for name, part in list(experts.named_modules()):
        if isinstance(part, Linear):
            rows, columns = part.weight.shape
            scale, config = torch.empty(rows // 128, columns // 128), SimpleNamespace(weight_block_size=(128, 128))
            experts.set_submodule(name, FP8Linear(config, part.weight.data, scale))
    experts.stack(torch.device("cpu"), torch.float8_e4m3fn)
    for stack in (experts.gate_up, experts.down):
        stack.copy_(torch.randn(stack.shape, generator=generator))
    for scale in (experts.gate_up_scale, experts.down_scale):
        scale.copy_(torch.rand(scale.shape, generator=generator) / 20 + 0.0025)
    rows = torch.randn(1, 256, generator=generator), *torch.rand(1, 6, generator=generator).topk(3)
    with torch.inference_mode():
        slow = reference(experts, *rows)
        assert torch.allclose(selected(experts, *rows), slow, atol=1e-5 * float(slow.abs().max()))
        assert torch.allclose(experts(*rows), slow, atol=1e-5 * float(slow.abs().max()))


def test_the_definition_notices_a_wrong_dispatch():
    experts, x, weights, topk_ids = random_case(6, 2, 9, torch.float32)
    right = reference(experts, x, weights, topk_ids)
    for form in FORMS.values():
        for wrong in ((x, weights.flip(1), topk_ids), (x, weights, (topk_ids + 1) % 6), (x.flip(0), weights, topk_ids)):
            assert not torch.allclose(form(experts, *wrong), right, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights_dtype", [torch.float32, None])
def test_one_token_is_a_group_of_one(dtype, weights_dtype):
    experts, x, weights, topk_ids = random_case(40, 3, 1, dtype)
    weights = weights.to(weights_dtype or dtype)
    assert torch.equal(one_token(experts, x, weights, topk_ids), grouped(experts, x, weights, topk_ids))


def calls_of_experts(monkeypatch) -> list[tuple[MLP, int]]:
    """(expert, number of its rows) of each call from now on."""
    seen, forward = [], MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, rows: seen.append((self, len(rows))) or forward(self, rows))
    return seen


@pytest.mark.parametrize("form", FORMS)
def test_only_the_chosen_experts_are_touched(monkeypatch, form):
    experts, x, weights, topk_ids = random_case(40, 3, 1, torch.float32)
    calls = calls_of_experts(monkeypatch)
    with torch.inference_mode():
        FORMS[form](experts, x, weights, topk_ids)
    worked = [(list(experts).index(expert), rows) for expert, rows in calls]
    assert sorted(worked) == sorted((expert, 1) for expert in topk_ids[0].tolist())


@pytest.mark.parametrize("form", FORMS)
def test_each_expert_works_once_on_all_its_tokens(monkeypatch, form):
    experts, *rows = random_case(6, 2, 50, torch.float32)
    calls = calls_of_experts(monkeypatch)
    FORMS[form](experts, *rows)
    assert len(calls) == 6 and sum(rows for _, rows in calls) == 100  # no token's experts are gathered as matrices


def fast_block() -> SparseMoeBlock:
    return with_engine("qwen3_moe", SparseMoeBlock(CONFIG))


@pytest.mark.parametrize("form, waits", [("grouped", 1), ("stacked", 0)])
def test_a_layer_waits_for_the_device_at_most_once(monkeypatch, form, waits):
    """Whatever brings a number to Python makes a GPU's queue run empty."""
    block = fast_block()
    if form == "stacked":
        stacked(block.experts)
        monkeypatch.setattr(engine, "grouped_mm_is_one_kernel", lambda *_: True)
    calls = []
    for name in ("tolist", "item", "nonzero", "unique", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, _name=name, _original=original, **k:
                            calls.append(_name) or _original(*a, **k))
    with torch.inference_mode():
        block(torch.randn(2, 5, 16))
    assert len(calls) == waits, calls


def test_gradients_go_through_the_experts_even_when_they_are_stacked(monkeypatch):
    monkeypatch.setattr(engine, "grouped_mm_is_one_kernel", lambda *_: True)
    block = fast_block()
    stacked(block.experts)
    block(torch.randn(1, 30, 16)).square().sum().backward()
    assert sum(weight.grad is not None and bool(weight.grad.any()) for weight in block.experts.parameters()) >= 12
    assert block.gate.weight.grad.any()


def test_stacks_that_are_no_longer_the_experts_own_are_not_used(monkeypatch):
    monkeypatch.setattr(engine, "grouped_mm_is_one_kernel", lambda *_: True)
    block, x = fast_block(), torch.randn(1, 9, 16)
    stacked(block.experts)
    twin = copy.deepcopy(block)
    for model in (twin, copy.deepcopy(block).double().float()):
        for weight in model.experts.parameters():
            weight.data *= 2
        with torch.inference_mode():
            expected = model.experts(*(rows := (x[0], *model.gate(x[0]))))
            assert torch.allclose(reference(model.experts, *rows), expected, atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(block.double()(x.double()).float(), block.float()(x), atol=1e-5)
    assert block.experts.gate_up is None  # or a GPU would hold the experts twice


@pytest.mark.parametrize("dtype, widths, capability, expected", [
    (torch.bfloat16, (16, 8), (9, 0), True), (torch.bfloat16, (16, 8), (10, 0), True),
    (torch.bfloat16, (16, 8), (8, 0), False), (torch.float32, (16, 8), (9, 0), False),
    (torch.bfloat16, (16, 9), (9, 0), False), (torch.bfloat16, (20, 8), (9, 0), False)])
def test_where_the_grouped_matmul_is_one_kernel(monkeypatch, dtype, widths, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert grouped_mm_is_one_kernel(torch.device("cuda"), dtype, *widths) is expected
    assert not grouped_mm_is_one_kernel(torch.device("cpu"), torch.bfloat16, 16, 8)


def test_a_token_is_routed_by_itself():
    """The rest of the batch decides in which group it is computed, and not with what result."""
    x = torch.randn(1, 20, 16)
    for block in (SparseMoeBlock(CONFIG), fast_block()):
        together = block(x)
        for t in range(20):
            assert torch.allclose(block(x[:, t:t + 1]), together[:, t:t + 1], atol=1e-6)


@pytest.mark.parametrize("name", ["two_of_eight", "dense_in_between", "shared_expert"])
def test_stacked_experts_load_and_give_the_same_tokens(tmp_path, monkeypatch, name):
    """As on a GPU, on the CPU: same names, same numbers, no byte twice."""
    folder = write_case(tmp_path, "qwen3_moe", name)
    single = load_model(folder)
    stack_on_the_cpu(monkeypatch, "qwen3_moe", one_kernel=True)
    model = load_model(folder)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in single.named_parameters()}
    for (n, ours), theirs in zip(model.named_parameters(), single.parameters()):
        assert torch.equal(ours, theirs), n
    sparse = [module for module in model.modules() if isinstance(module, Experts)]
    for experts in sparse:
        storage = experts.gate_up.untyped_storage()
        assert experts[1].up_proj.weight.untyped_storage().data_ptr() == storage.data_ptr()
    used, asked = [], []
    monkeypatch.setattr(engine, "stacked_grouped", lambda *a: used.append(1) or stacked_grouped(*a))
    monkeypatch.setattr(engine, "grouped_mm_is_one_kernel", lambda *a: asked.append(a) or True)
    assert list(generate(model, PROMPT, max_new_tokens=8)) == list(generate(single, PROMPT, max_new_tokens=8))
    assert set(asked) == {(torch.device("cpu"), sparse[0].down.dtype, *sparse[0].down.shape[1:])}
    assert len(used) == 8 * len(sparse)


def test_the_bytes_of_a_token_count_only_its_experts(tmp_path):
    folder = write_case(tmp_path, "qwen3_moe", "two_of_eight")
    model = load_model(folder)
    expert = sum(p.nbytes for p in model.model.layers[0].mlp.experts[0].parameters())
    total = sum(p.nbytes for p in model.parameters())
    assert bytes_in_memory(folder) == total
    assert bytes_in_memory(folder, active=True) == total - 3 * 6 * expert
    assert bytes_per_token(model) == total - 3 * 6 * expert - model.model.embed_tokens.weight.nbytes


MEASURE = """
import sys
from pathlib import Path
import torch
from qwen3_moe.generate import generate
from qwen3_moe.engine.expert_picture import Routing
from qwen3_moe.weights import load_model

def resident(kind: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024

# What the libraries themselves allocate at first use; with a small model, whose freed memory hides nothing.
list(generate(load_model(sys.argv[2]), [1, 2], max_new_tokens=2))
anon, file = resident("RssAnon"), resident("RssFile")
model = load_model(sys.argv[1])
routing = Routing(model)
list(generate(model, [5, 17, 3], max_new_tokens=4))
used = sum(int((counts > 0).sum()) for counts in routing.counts.values())
print(resident("RssAnon") - anon, resident("RssFile") - file, used)
"""


@pytest.mark.ahead
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_an_expert_that_is_never_routed_to_is_never_read(tmp_path):
    config = qwen3_moe_config(vocab_size=256, hidden_size=512, num_hidden_layers=2, num_experts=64,
                              moe_intermediate_size=512, head_dim=32, torch_dtype="bfloat16")
    shapes = qwen3_shapes(config)
    drawn = {shape: seeded_tensor("", shape, 1 if len(shape) == 1 else 0.05).bfloat16()
             for shape in set(shapes.values())}
    tensors = {name: drawn[shape].clone() for name, shape in shapes.items()}  # experts may be alike: the router decides
    folder = write_checkpoint(tmp_path / "made", config, torch.bfloat16, shapes={}, **tensors)
    small = write_checkpoint(tmp_path / "small", qwen3_moe_config(torch_dtype="bfloat16"), torch.bfloat16)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder), str(small)], capture_output=True, text=True,
                          check=True, cwd=ROOT)
    anonymous, mapped, used = map(int, done.stdout.split())
    size, expert = (folder / "model.safetensors").stat().st_size, 3 * 512 * 512 * 2
    rest = size - 2 * 64 * expert
    assert size > 2e8 and used < 40  # of 128 experts
    assert anonymous < 0.05 * size
    # The kernel maps some pages around the one that was asked for.
    assert mapped < 1.15 * (rest + used * expert) + 8e6 < 0.4 * size


def test_memory_on_the_cpu_is_what_a_token_needs_and_elsewhere_everything(tmp_path, monkeypatch):
    folder = write_case(tmp_path, "qwen3_moe", "two_of_eight")
    total, active = bytes_in_memory(folder), bytes_in_memory(folder, active=True)
    cpu = torch.device("cpu")
    monkeypatch.setattr(sizes, "free_memory", lambda device: total + 100)
    assert check_memory(folder, cpu, None, 10, 100) == f"{total / 1e6:.1f} MB"
    monkeypatch.setattr(sizes, "free_memory", lambda device: active + 100)
    assert "experts come from the disk when routed to" in check_memory(folder, cpu, None, 10, 100)
    assert "from the disk" in check_memory(folder, cpu, "float32", 10, 100)  # which is the file's own type
    message = r"needs 0\.\d MB for weights and 0.0 MB for the cache of 10 tokens, but .* free"
    for device, dtype, free in ((torch.device("meta"), None, total), (cpu, "bfloat16", total // 2)):  # to be copied
        monkeypatch.setattr(sizes, "free_memory", lambda device: free)
        with pytest.raises(ValueError, match=message):
            check_memory(folder, device, dtype, 10, 100)
    monkeypatch.setattr(sizes, "free_memory", lambda device: active)
    with pytest.raises(ValueError, match="but cpu has"):
        check_memory(folder, cpu, None, 10, 100)
