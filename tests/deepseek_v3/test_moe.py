"""The router of DeepSeek-V3 by hand and by loops, and its shared experts.

The forms of dispatch and combine are tested with Qwen3-MoE.
"""

import dataclasses

import pytest
import torch

from deepseek_v3.config import Config
from deepseek_v3.engine import experts as faster, sizes
from deepseek_v3.engine.sizes import bytes_in_memory, bytes_per_token
from deepseek_v3.generate import generate
from deepseek_v3.moe import DeepSeekMoE, Experts, Router
from deepseek_v3.weights import load_model
from tests.packages import stack_on_the_cpu
from tests.seeded import PROMPT, deepseek_v3_config, write_case, write_checkpoint

CONFIG = Config(
    vocab_size=50, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=None, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, n_group=4, topk_group=2, norm_topk_prob=True,
    routed_scaling_factor=2.5, first_k_dense_replace=0, num_nextn_predict_layers=0, max_position_embeddings=64,
    rms_norm_eps=1e-6, rope_theta=1e4)


def router_of(scores: list[float], bias: list[float] | None = None, **changes) -> Router:
    """One whose experts have these scores for the token (1.0)."""
    router = Router(dataclasses.replace(CONFIG, **{"hidden_size": 1, "n_routed_experts": len(scores)} | changes))
    router.weight.data = torch.tensor(scores).logit()[:, None]
    router.e_score_correction_bias.data = torch.tensor(bias or [0.0] * len(scores))
    return router


def weighed(router: Router, x: float = 1.0) -> dict[int, float]:
    weights, topk_ids = (out.detach() for out in router(torch.tensor([[x]])))
    return {int(e): round(float(w), 4) for e, w in zip(topk_ids[0], weights[0])}


def test_sigmoids_normalised_and_scaled_by_hand():
    """0.6 and 0.2 of 0.8, times 2.5."""
    one = dict(n_group=1, topk_group=1, num_experts_per_tok=2)
    scores, raw = [0.1, 0.6, 0.2, 0.05], one | dict(norm_topk_prob=False)
    assert weighed(router_of(scores, **one)) == {1: 1.875, 2: 0.625}
    assert weighed(router_of(scores, **raw)) == {1: 1.5, 2: 0.5}
    assert weighed(router_of(scores, **raw | dict(routed_scaling_factor=1.0))) == {1: 0.6, 2: 0.2}


def test_the_bias_chooses_and_never_weighs():
    one = dict(n_group=1, topk_group=1, num_experts_per_tok=2, routed_scaling_factor=1.0)
    assert weighed(router_of([0.1, 0.6, 0.2, 0.05], [0, 0, 0, 100.0], **one)) == {3: 0.0769, 1: 0.9231}
    assert weighed(router_of([0.1, 0.6, 0.2, 0.05], [0, -100.0, 0, 0], **one)) == {2: 0.6667, 0: 0.3333}


def test_a_group_is_as_good_as_its_two_best():
    """0.9 alone loses to 0.6 and 0.5."""
    scores = [0.9, 0.1, 0.05, 0.6, 0.5, 0.01]
    assert set(weighed(router_of(scores, n_group=2, topk_group=1, num_experts_per_tok=2))) == {3, 4}
    assert set(weighed(router_of(scores, n_group=2, topk_group=2, num_experts_per_tok=2))) == {0, 3}


def test_groups_that_are_not_allowed_are_never_chosen_even_below_zero():
    """All biased scores of the best group are negative; an expert at 0 elsewhere must not win."""
    scores, bias = [0.5, 0.5, 0.4, 0.1, 0.1, 0.1], [-1.0, -1.0, -3.0, -2.0, -2.0, -2.0]
    assert set(weighed(router_of(scores, bias, n_group=2, topk_group=1, num_experts_per_tok=3))) == {0, 1, 2}


def by_loops(router: Router, x: torch.Tensor) -> torch.Tensor:
    """Weight of each expert for each token, (n, E), sorted out in plain Python."""
    matrix = router.weight.detach().double()
    out = torch.zeros(len(x), len(router.weight))
    for t, row in enumerate(x.double()):
        scores = [1 / (1 + float(torch.exp(-(w @ row)))) for w in matrix]
        choice = [s + float(b) for s, b in zip(scores, router.e_score_correction_bias)]
        size = len(scores) // router.n_group
        groups = [choice[g * size:(g + 1) * size] for g in range(router.n_group)]
        best = sorted(range(router.n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))[:router.topk_group]
        allowed = [e for e in range(len(scores)) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -choice[e])[:router.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) if router.norm_topk_prob else 1
        for e in chosen:
            out[t, e] = scores[e] / total * router.routed_scaling_factor
    return out


@pytest.mark.parametrize("E, groups, best, A, normalise", [
    (8, 4, 2, 3, True), (12, 3, 1, 4, False), (10, 2, 2, 6, True), (7, 1, 1, 2, True), (16, 8, 3, 1, True)])
def test_the_router_is_the_papers_rule(E, groups, best, A, normalise):
    torch.manual_seed(E)
    router = Router(dataclasses.replace(CONFIG, n_routed_experts=E, n_group=groups, topk_group=best,
                                        num_experts_per_tok=A, norm_topk_prob=normalise))
    router.weight.data, router.e_score_correction_bias.data = torch.randn(E, 16), torch.randn(E) * 0.3 - 0.5
    x = torch.randn(200, 16)
    weights, topk_ids = router(x)
    dense = torch.zeros(200, E).scatter(1, topk_ids, weights)
    assert weights.dtype == torch.float32 and torch.allclose(dense, by_loops(router, x), atol=1e-5)
    if normalise:
        assert torch.allclose(weights.sum(-1), torch.full((200,), 2.5))


def test_the_router_is_float32_for_bfloat16_activations():
    torch.manual_seed(0)
    router = Router(CONFIG)
    router.weight.data = torch.randn(8, 16).bfloat16()
    x = torch.randn(64, 16).bfloat16()
    exact = (x.double() @ router.weight.double().T).sigmoid()
    scores = router.logits(x).sigmoid()
    assert scores.dtype == torch.float32 and (scores - exact).abs().max() < 1e-6
    weights, _ = router(x)  # not rounded to bfloat16
    assert weights.dtype == torch.float32 and torch.allclose(weights.sum(-1), torch.tensor(2.5))


def by_all_experts(experts: Experts, x: torch.Tensor, weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """y = sum over all E experts of weight * expert(x), the weight 0 where an expert was not chosen."""
    every = weights.new_zeros(len(x), len(experts)).scatter(1, topk_ids, weights)  # (n, E)
    return sum(every[:, e, None] * expert(x) for e, expert in enumerate(experts)).to(x.dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_the_block_is_routed_experts_and_the_shared_ones_unscaled(dtype, tolerance):
    torch.manual_seed(0)
    block = DeepSeekMoE(CONFIG)
    for weight in block.parameters():
        weight.data = (torch.randn(weight.shape) * 0.3).to(dtype if weight.requires_grad else torch.float32)
    x = torch.randn(2, 9, 16).to(dtype)
    tokens = x.flatten(0, 1)
    routed = by_all_experts(block.experts, tokens, *block.gate(tokens)).float()
    expected = routed + block.shared_experts(tokens).float()
    out = block(x)
    assert out.dtype == dtype and out.shape == x.shape
    assert (out.flatten(0, 1).float() - expected).abs().max() <= tolerance * expected.abs().max()
    for form in block.experts, lambda *given: faster.grouped(block.experts, *given):
        assert (form(tokens, *block.gate(tokens)).float() - routed).abs().max() <= tolerance * routed.abs().max()
    assert block.shared_experts.gate_proj.weight.shape == (16, 16)  # two of width 8


def test_bias_and_bytes(tmp_path):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    for dtype in (None, "bfloat16"):
        model = load_model(folder, dtype=dtype)
        biases = [p for name, p in model.named_parameters() if name.endswith("e_score_correction_bias")]
        assert len(biases) == 3 and all(p.dtype == torch.float32 and not p.requires_grad for p in biases)
        assert bytes_in_memory(folder, dtype) == sum(p.nbytes for p in model.parameters())
    model = load_model(folder)
    inner, last = model.model.layers[1], model.model.layers[3]
    expert = sum(p.nbytes for p in inner.mlp.experts[0].parameters())
    total = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in last.parameters())
    assert bytes_per_token(model) == total - 2 * 5 * expert - model.model.embed_tokens.weight.nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_larger_than_memory_runs_where_a_token_fits(tmp_path, monkeypatch, dtype):
    config = deepseek_v3_config(torch_dtype=dtype, n_routed_experts=64, n_group=1, topk_group=1)
    folder = write_checkpoint(tmp_path, config, getattr(torch, dtype))
    total, active = bytes_in_memory(folder), bytes_in_memory(folder, active=True)
    assert active < 0.6 * total
    monkeypatch.setattr(sizes, "free_memory", lambda device: active + 100)
    text = sizes.check_memory(folder, torch.device("cpu"), None, 10, 100)
    assert "experts come from the disk when routed to" in text


def test_stacked_experts_give_the_same_tokens(tmp_path, monkeypatch):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    plain = list(generate(load_model(folder), PROMPT, max_new_tokens=8))
    stack_on_the_cpu(monkeypatch, "deepseek_v3", one_kernel=True)
    used, forward = [], faster.stacked_grouped
    monkeypatch.setattr(faster, "stacked_grouped", lambda *a: used.append(1) or forward(*a))
    assert list(generate(load_model(folder), PROMPT, max_new_tokens=8)) == plain and len(used) == 16
