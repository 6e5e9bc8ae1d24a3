"""One training step: predict, measure the loss, go backward, move every weight a little. Then all of them in a row.

    ids (B, T) ── model ──> logits (B, T, V) ── cross-entropy against the token that follows ──> loss, one number
    weights <── optimizer: a step downhill <── gradients, one for each weight <── loss.backward()

The model is the package's own, as the lesson has it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .balance import BalanceBias, BalanceLoss, routers
from .together import add_up, own_rows, summed

WARM_UP = 50  # steps, or a fifth of them all
BALANCE = 0.01  # weight of the balance loss (arXiv:2101.03961, section 2.2: alpha)
BIAS_SPEED = 0.001  # step of DeepSeek-V3's correction bias (arXiv:2412.19437, section 4.2: gamma)
MTP = 0.1  # weight of the loss for the token after the next (the same: lambda, in the later part of its training)


def count_targets(targets: Tensor) -> Tensor:
    return (targets != -100).sum()


def next_token_loss(model: nn.Module, hidden: Tensor, targets: Tensor, count: Tensor | None = None) -> Tensor:
    """The mean of -log p(target) over the positions that have one (B, T); hidden (B, T, D).

    Only those positions go through the head: all others would cost V·D multiplications each, for nothing.
    `count`: of the whole batch, where these are only some of its rows; then this is their part of the mean.
    """
    wanted = targets != -100
    total = F.cross_entropy(model.lm_head(hidden[wanted]).float(), targets[wanted], reduction="sum")
    return total / (wanted.sum() if count is None else count)


def second_token_loss(model: nn.Module, ids: Tensor, hidden: Tensor, targets: Tensor,
                      count: Tensor | None = None) -> Tensor:
    """DeepSeek-V3's second loss: the draft layer predicts the token after the next (arXiv:2412.19437, section 2.2)."""
    return next_token_loss(model, model.model.predict_second(ids[:, 1:], hidden[:, :-1]), targets[:, 1:], count)


def schedule(step: int, steps: int) -> float:
    """The factor on the learning rate: up to 1 in the first steps, then in a straight line down to 0."""
    warm_up = max(1, min(WARM_UP, steps // 5))
    return min((step + 1) / warm_up, (steps - step) / max(steps - warm_up, 1))


class MuonInFloat32(torch.optim.Muon):
    """PyTorch's Muon computes its update in bfloat16, whatever the weights are; this one does not."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                X = p.grad.lerp(average, group["momentum"])  # Nesterov's
                X = X.T if len(p) > p.shape[1] else X
                X = X / X.norm().clamp(min=group["eps"])
                a, b, c = group["ns_coefficients"]
                for _ in range(group["ns_steps"]):  # singular values towards 1: a polynomial, again and again
                    A = X @ X.T
                    X = a * X + (b * A + c * A @ A) @ X
                X = X.T if len(p) > p.shape[1] else X
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(X, alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)  # as large as AdamW's ("match_rms_adamw")


def muon_and_adamw(model: nn.Module, rate: float, mixed: bool = True) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (arXiv:2502.16982), AdamW for embedding, head and norms."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and "layers" in name]
    others = [p for name, p in trained if not (p.ndim == 2 and "layers" in name)]
    Muon = torch.optim.Muon if mixed else MuonInFloat32
    return [Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            *adamw(others, 4 * rate)]  # at 0.3 times Muon's the loss after 300 steps was 0.83, here 0.27


def adamw(parameters: nn.Module | list[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv:1711.05101) alone, for a model or some of its parameters."""
    if isinstance(parameters, nn.Module):
        parameters = [p for p in parameters.parameters() if p.requires_grad]
    return [torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0, fused=True)]


class Training:
    """A model, its optimizers, and the step that it has reached.

    `batch(step)` gives ids and targets (B, T). `optimizers` begin with their largest rates. With `mixed` precision
    matmuls are in bfloat16; weights and sums are in float32 always.
    """

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer],
                 batch: Callable[[int], tuple[Tensor, Tensor]], mixed: bool = True):
        self.model, self.optimizers, self.batch, self.mixed, self.step = model, optimizers, batch, mixed, 0
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.predicts_second = hasattr(model, "mtp")
        self.balance_loss = self.balance_bias = None
        if routers(model):
            if self.predicts_second:
                self.balance_bias = BalanceBias(model)
            else:
                self.balance_loss = BalanceLoss(model)

    def losses(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of the next token, in nats; and what is to be lowered, which is more where there are experts or drafts.

        Of several processes each computes its rows of the batch, and so its part of both.
        """
        count, second_count = count_targets(targets), count_targets(targets[:, 1:])
        ids, targets = ids[own_rows()], targets[own_rows()]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.mixed):
            hidden = self.model.model(ids)
            loss = total = next_token_loss(self.model, hidden, targets, count)
            if self.predicts_second:
                total = total + MTP * second_token_loss(self.model, ids, hidden, targets, second_count)
            if self.balance_loss:
                total = total + BALANCE * self.balance_loss.loss()
        return loss, total

    def run_step(self, steps: int) -> float:
        """The next one of `steps` steps; returns the loss of the next token before it."""
        loss, total = self.losses(*self.batch(self.step))
        self.model.zero_grad()
        total.backward()
        add_up(p.grad for p in self.model.parameters() if p.grad is not None)
        # One odd batch must not throw the model far off: the length of the gradient is cut to 1.
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rates in zip(self.optimizers, self.rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * schedule(self.step, steps)
            optimizer.step()
        if self.balance_bias:
            self.balance_bias.update(BIAS_SPEED * min(1, 2 * (1 - self.step / steps)))  # slower towards the end
        self.step += 1
        return summed(loss).item()
