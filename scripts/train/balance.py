"""Keeping the experts of a mixture evenly used: by a loss (Qwen3-MoE), or by a bias (DeepSeek-V3).

Left alone, an expert that is rarely chosen rarely learns, so it is chosen even less; in the end a few do all the work.
"""

import torch
from torch import Tensor, nn

from .together import summed


def routers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "Router"]


class BalanceLoss:
    """E · Σ_e f_e · P_e, averaged over the layers (arXiv:2101.03961, eq. 4-6). Equal use gives 1.

    f_e is the share of the choices that fell on expert e: counted, so without a gradient. P_e is the expert's mean
    probability, and has one: an expert that is chosen too often becomes less probable. Both are taken over the whole
    batch and not one sequence, as in Qwen3 (arXiv:2505.09388, section 2; arXiv:2501.11873).
    """

    def __init__(self, model: nn.Module):
        self.terms = []
        for router in routers(model):
            router.register_forward_hook(self.listen)

    def listen(self, router: nn.Module, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        """After each router's forward pass: its tokens (n, D), and the experts that it chose (n, A)."""
        (x,), (_, topk_ids) = inputs, outputs
        if torch.is_grad_enabled():
            self.terms.append(balance_loss(router.logits(x).float().softmax(-1), topk_ids))

    def loss(self) -> Tensor:
        """Of the forward passes since the last call."""
        terms, self.terms = self.terms, []
        return sum(terms) / len(terms)


def balance_loss(probabilities: Tensor, topk_ids: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e of one layer; probabilities (n, E), topk_ids (n, A) -> scalar.

    Of several processes each has a part: f is counted over all of their tokens, P summed over its own.
    """
    E, A = probabilities.shape[-1], topk_ids.shape[-1]
    counts = summed(torch.bincount(topk_ids.flatten(), minlength=E))
    f, P = counts / counts.sum(), probabilities.sum(0) * A / counts.sum()
    return E * (f * P).sum()


class BalanceBias:
    """No loss: after each step the bias of a busy expert goes down and that of an idle one up.

    The bias chooses and never weighs, so the text loss is not disturbed (arXiv:2408.15664, algorithm 1).
    """

    def __init__(self, model: nn.Module):
        self.topk_ids = {}
        for router in routers(model):
            router.register_forward_hook(self.listen)

    def listen(self, router: nn.Module, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():
            self.topk_ids[router] = outputs[1]

    @torch.no_grad()
    def update(self, speed: float) -> None:
        """`speed`: the size of the step, the same for every expert that is off the mean (V3's gamma)."""
        for router, topk_ids in self.topk_ids.items():
            counts = summed(torch.bincount(topk_ids.flatten(), minlength=len(router.weight))).float()
            router.e_score_correction_bias += speed * (counts.mean() - counts).sign()
