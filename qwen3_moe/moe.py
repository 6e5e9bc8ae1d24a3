"""The mixture of experts, which stands where the dense model has its MLP. All else is Qwen3.

    x (n, D) ── gate ── softmax over all E ── the best A ─┬─ topk_ids (n, A)   which experts
                                                          └─ weights (n, A)    how much of each
       token 0 ──┬── expert 5 ── · 0.7 ──┐
                 └── expert 2 ── · 0.3 ──┴── + ── y       the other E - 2 experts do nothing for token 0
       token 1 ──┬── expert 2 ── · 0.6 ──┐
                 └── expert 0 ── · 0.4 ──┴── + ── y

Why: a model knows more with more weights, but every weight costs time for every token. Here most of them rest.

n = B*T tokens, E experts, A of them active for a token; the rest of the alphabet is in layers.py. An expert
is the SwiGLU of the dense model, only narrower, and a token is routed by itself: what else is in the batch
changes nothing. The checkpoint calls the router `gate`; the `gate_proj` inside an expert is another thing.

Papers: mixture of experts (Shazeer et al. 2017, arXiv:1701.06538), Qwen3 (arXiv:2505.09388, section 2); the shared
expert is DeepSeekMoE's (arXiv:2401.06066). How training keeps the experts evenly used is in the README, section 9.
"""

import torch
from torch import Tensor, nn

from .config import Config
from .layers import MLP, Linear, new_weight


class Router(nn.Module):
    """Chooses num_experts_per_tok experts for each token, and weighs them (arXiv:1701.06538, section 2.1)."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_experts_per_tok, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = new_weight(config.num_experts, config.hidden_size)

    def logits(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, E)"""
        return x @ self.weight.T

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> weights (n, A) in the type of x, topk_ids (n, A) int64, the best first."""
        probabilities = self.logits(x).float().softmax(-1)  # (n, E) float32
        weights, topk_ids = probabilities.topk(self.num_experts_per_tok)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), topk_ids


class Experts(nn.ModuleList):
    """E MLPs. Called with x (n, D) and the router's weights and topk_ids (n, A) each -> (n, D)."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__(MLP(hidden_size, intermediate_size) for _ in range(num_experts))

    def forward(self, x: Tensor, weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Dispatch every token to its experts, and combine what they return.

        Each expert runs once, on all tokens that chose it, so that its matrices are read once.
        """
        results = x.new_zeros(*topk_ids.shape, x.shape[-1])  # (n, A, D)
        used = topk_ids.unique().tolist()
        if torch.is_grad_enabled():  # in training every expert gets a gradient, if of zeros: DDP waits for all of them
            used = range(len(self))
        for e in used:
            token, place = (topk_ids == e).nonzero(as_tuple=True)  # (m,): expert e is the place-th choice of this token
            results[token, place] = self[e](x[token]).to(x.dtype)  # another type under autocast
        return combine(results, weights)


def combine(results: Tensor, weights: Tensor) -> Tensor:
    """Each token's A results, weighed and added up in the weights' type: (n, A, D) and (n, A) -> (n, D)."""
    return (results * weights[..., None]).sum(1).to(results.dtype)


class SparseMoeBlock(nn.Module):
    """Router and experts (B, T, D) -> (B, T, D); and a shared expert where the config has one.

    The released Qwen3-MoE have none. Qwen2-MoE and Qwen3-Next do: an MLP that sees every token, scaled by a
    sigmoid of its own, for what all tokens need and no expert should have to learn again.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_expert = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = Linear(config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (n, D)
        y = self.experts(tokens, *self.gate(tokens))
        if self.shared_expert is not None:
            y = y + self.shared_expert_gate(tokens).sigmoid() * self.shared_expert(tokens)
        return y.view_as(x)
