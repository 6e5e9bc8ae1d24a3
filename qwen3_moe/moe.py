"""3c. The mixture of experts, which stands where the dense model has its MLP. All else is Qwen3.

    x (n, D) ── gate ── softmax over all E ── the best A ─┬─ chosen (n, A)    which experts
                                                          └─ weights (n, A)   how much of each
       token 0 ──┬── expert 5 ── · 0.7 ──┐
                 └── expert 2 ── · 0.3 ──┴── + ── y       the other E - 2 experts do nothing for token 0
       token 1 ──┬── expert 2 ── · 0.6 ──┐
                 └── expert 0 ── · 0.4 ──┴── + ── y

n = B*T tokens, E experts, A of them active for a token; the rest of the alphabet is in layers.py. An expert
is the SwiGLU of the dense model, only narrower, and a token is routed by itself: what else is in the batch
changes nothing.

Papers: mixture of experts (Shazeer et al. 2017, arXiv:1701.06538), Qwen3 (arXiv:2505.09388, section 2), load
balancing over the global batch (arXiv:2501.11873); the shared expert is DeepSeekMoE's (arXiv:2401.06066).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config
from .engine.quantized import dequantize
from .layers import MLP, Linear, new_weight, product, product_of_one_row

# grouped_mm(rows, matrices, offs): the first offs[0] rows times matrix 0, those up to offs[1] times matrix 1, …
grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # torch 2.9 has it under the second name only


def grouped_mm_is_one_kernel(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """On Hopper and Blackwell GPUs in bfloat16, if rows begin at multiples of 16 bytes. Elsewhere it is PyTorch's own loop,
    which waits more often than ours."""
    if device.type != "cuda" or dtype != torch.bfloat16 or any(width % 8 for width in widths):
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


class Router(nn.Module):
    """Chooses num_experts_per_tok experts for each token, and weighs them (arXiv:1701.06538, section 2.1)."""

    def __init__(self, config: Config):
        super().__init__()
        self.active, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = new_weight(config.num_experts, config.hidden_size)

    def scores(self, x: Tensor) -> Tensor:
        """(n, D) -> the probability of each expert, (n, E) float32."""
        return product(x, self.weight).float().softmax(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> weights (n, A) in the type of x, chosen (n, A) int64, the best first."""
        weights, chosen = self.scores(x).topk(self.active)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), chosen


class Experts(nn.ModuleList):
    """E MLPs. Called with x (n, D) and the router's weights and choices (n, A) each -> (n, D)."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__(MLP(hidden_size, intermediate_size) for _ in range(num_experts))
        # All experts in two tensors, and two more for the scales of FP8; see `stack`.
        self.gate_up = self.down = self.gate_up_scale = self.down_scale = None

    def stack(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put all experts into gate_up (E, 2F, D) and down (E, D, F); each one's weights become views of them.

        A GPU then computes a layer in two calls, where hundreds of small ones would leave it waiting for Python. For
        FP8, D and F must be multiples of 128, so that the blocks of up begin where those of gate end.
        """
        F_, D = self[0].gate_proj.weight.shape
        self.gate_up, self.down = self.share("weight", F_, D, device, dtype)
        if dtype == torch.float8_e4m3fn:
            self.gate_up_scale, self.down_scale = self.share("weight_scale_inv", F_ // 128, D // 128, device, torch.float32)

    def share(self, leaf: str, F_: int, D: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both tensors for one of the experts' parameters."""
        gate_up = torch.empty(len(self), 2 * F_, D, dtype=dtype, device=device)
        down = torch.empty(len(self), D, F_, dtype=dtype, device=device)
        trained = leaf == "weight" and dtype != torch.float8_e4m3fn
        for expert, rows, more in zip(self, gate_up, down):
            for linear, view in (expert.gate_proj, rows[:F_]), (expert.up_proj, rows[F_:]), (expert.down_proj, more):
                setattr(linear, leaf, nn.Parameter(view, requires_grad=trained))
        return gate_up, down

    def _apply(self, *arguments, **more) -> "Experts":  # what .to() and its like come down to
        # The stacks would keep the old numbers, and the old device's memory.
        self.gate_up = self.down = self.gate_up_scale = self.down_scale = None
        return super()._apply(*arguments, **more)

    def is_stacked(self) -> bool:
        """Whether the stacks are still the experts' own memory; a copy of the model, for one, has new weights."""
        if self.gate_up is None or torch.compiler.is_compiling():  # a compiler knows no addresses, and was asked before
            return self.gate_up is not None
        return self[0].gate_proj.weight.data_ptr() == self.gate_up.data_ptr()

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        # The stacks are no parameters: gradients must go through the experts.
        stacked = not torch.is_grad_enabled() and self.is_stacked()
        if stacked and torch.compiler.is_compiling():
            mix = mix_compiled
        elif stacked and grouped_mm_is_one_kernel(x.device, self.down.dtype, *self.down.shape[1:]):
            mix = mix_stacked
        else:
            mix = mix_one_token if len(x) == 1 and not torch.is_grad_enabled() else mix_grouped
        return mix(self, x, weights, chosen)


def mix_written_out(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """y = sum over all E experts of weight * expert(x), the weight 0 where it was not chosen. The definition."""
    every = weights.new_zeros(len(x), len(experts)).scatter(1, chosen, weights)  # (n, E)
    return sum(every[:, e, None] * expert(x) for e, expert in enumerate(experts)).to(x.dtype)


def mix_grouped(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The same, each expert once, on the tokens that chose it. An expert that no token chose is not touched, except in training.

    Sorting the n*A choices by expert puts what one expert has to do into neighbouring rows:

        chosen   token 0: 5 2    token 1: 2 0          sorted   0 | 2 2 | 5
                                                       token    1 | 0 1 | 0
    """
    sorted_, order = chosen.flatten().sort(stable=True)  # (n*A,)
    ends = group_ends(sorted_, len(experts))
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()  # the one wait for a GPU
    rows = x.new_empty(len(order), x.shape[1])  # (n*A, D), by token again
    for expert, group in zip(experts, order.split(counts)):
        # An expert without tokens still gets a gradient, of zeros, in training: DistributedDataParallel waits for all gradients.
        if len(group) or (torch.is_grad_enabled() and any(weight.requires_grad for weight in expert.parameters())):
            rows[group] = expert(x[group // chosen.shape[1]]).to(rows.dtype)  # another type under autocast
    return weigh(rows, weights)


def mix_one_token(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The same for x (1, D), where nothing has to be sorted: beside products of one row, that took as long as a few of them."""
    return weigh(torch.cat([experts[e](x) for e in chosen[0].tolist()]), weights)


def mix_stacked(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The same in two grouped matrix products, with no wait at all: where a group ends stays on the GPU."""
    sorted_, order = chosen.flatten().sort(stable=True)
    ends = group_ends(sorted_, len(experts))
    gate, up = grouped_mm(x[order // chosen.shape[1]], experts.gate_up.mT, offs=ends).chunk(2, dim=-1)  # (n*A, F)
    rows = grouped_mm(F.silu(gate) * up, experts.down.mT, offs=ends)  # (n*A, D)
    return weigh(rows[order.argsort()], weights)


def mix_compiled(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The same for x (1, D), to be compiled: a loop then reads the chosen matrices where they lie. As it stands it copies them."""
    gate_up, down = experts.gate_up[chosen[0]], experts.down[chosen[0]]  # (A, 2F, D), (A, D, F)
    if experts.gate_up_scale is not None:
        gate_up = dequantize(gate_up, experts.gate_up_scale[chosen[0]], x.dtype)
        down = dequantize(down, experts.down_scale[chosen[0]], x.dtype)
    gate, up = product_of_one_row(x, gate_up).chunk(2, dim=-1)  # (A, 1, F)
    rows = product_of_one_row(F.silu(gate) * up, down)  # (A, 1, D)
    return weigh(rows.flatten(0, 1), weights)


def group_ends(sorted_: Tensor, E: int) -> Tensor:
    """Where the choices of each expert end among the sorted ones, (E,) int32. (torch.bincount would wait for the GPU.)"""
    return torch.searchsorted(sorted_, torch.arange(E, device=sorted_.device), right=True).int()


def weigh(rows: Tensor, weights: Tensor) -> Tensor:
    """Each token's A rows, weighed and added up: (n*A, D) and (n, A) -> (n, D)."""
    return (rows.view(*weights.shape, rows.shape[-1]) * weights[..., None]).sum(1).to(rows.dtype)


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
