"""DeepSeekMoE, which stands where a dense model has its MLP.

    x (n, D) ── gate ── sigmoid ──> s (n, E) ─────────────────────────────────┐ weighs
                                    s + bias ── the best groups ── the best A ┴─┬─ topk_ids (n, A)   which experts
                                       chooses                                  └─ weights (n, A)    how much of each
       token 0 ──┬── expert 5 ── · 1.7 ──┐
                 ├── expert 2 ── · 0.8 ──┤       the other E - A routed experts do nothing for token 0,
                 └── shared experts ─────┴── + ── y       the shared ones work for every token

n = B*T tokens, E experts, A of them active for a token; the rest of the alphabet is in layers.py. An expert
is a SwiGLU as in the dense layers, only narrower, and a token is routed by itself: what else is in the batch
changes nothing. Against Qwen3-MoE: each score stands for itself (a sigmoid, no softmax), a bias keeps the
experts evenly used, groups limit the choice, and shared experts are added.

Papers: DeepSeekMoE (arXiv:2401.06066, sections 3.1 and 3.2), DeepSeek-V3 (arXiv:2412.19437, eq. 12-16), balancing
by a bias (arXiv:2408.15664).
"""

import torch
from torch import Tensor, nn

from .config import Config
from .layers import MLP, new_weight


class Router(nn.Module):
    """Chooses num_experts_per_tok experts for each token, and weighs them (DeepSeek-V3, eq. 13-16). All in float32."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_experts_per_tok, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = new_weight(config.n_routed_experts, config.hidden_size)
        # Training moves it against the load and gives it no gradient; float32 in every checkpoint.
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_routed_experts), requires_grad=False)

    def logits(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, E) float32"""
        return x.float() @ self.weight.float().T

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> weights (n, A) float32, topk_ids (n, A) int64."""
        scores = self.logits(x).sigmoid()  # (n, E): how well each expert suits, each by itself
        choice = scores + self.e_score_correction_bias  # what chooses, and never weighs
        if self.n_group > 1:
            groups = choice.unflatten(-1, (self.n_group, -1))  # (n, groups, E / groups)
            worth = groups.topk(2).values.sum(-1)  # a group is as good as its two best
            allowed = torch.zeros_like(worth).scatter(1, worth.topk(self.topk_group).indices, 1).bool()
            # -inf and not 0: a bias may make every score that is allowed negative.
            choice = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        topk_ids = choice.topk(self.num_experts_per_tok).indices
        weights = scores.gather(1, topk_ids)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.routed_scaling_factor, topk_ids


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


class DeepSeekMoE(nn.Module):
    """Routed experts, and shared ones that see every token (DeepSeek-V3, eq. 12). (B, T, D) -> (B, T, D).

    What all tokens need is learned once, by the shared experts. They are one MLP, n_shared_experts times as wide.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (n, D)
        return self.experts(tokens, *self.gate(tokens)).view_as(x) + self.shared_experts(x)
