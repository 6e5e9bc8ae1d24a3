"""What is the body of no package: the reference mixture of experts, and how training keeps experts evenly used."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mixture(x: Tensor, weights: Tensor, topk_ids: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """The mixture of experts as its definition says it: token by token, expert by expert. Slow, and obviously right.

    x         (n, D): the tokens
    weights   (n, A): how much each chosen expert counts
    topk_ids  (n, A), int64: which experts each token was sent to
    experts   E functions (m, D) -> (m, D) for any number m of tokens

    Returns (n, D): for each token the sum of its A experts' outputs, each times its weight.
    """
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for a in range(topk_ids.shape[1]):
            expert = experts[int(topk_ids[t, a])]
            y[t] += weights[t, a] * expert(x[t:t + 1])[0]
    return y


def balance_loss(probabilities: Tensor, topk_ids: Tensor) -> Tensor:
    """E times the sum over the experts of f_e · P_e (arXiv:2101.03961, eq. 4-6).

    probabilities  (n, E), float: the router's softmax over all E experts, for each of n tokens
    topk_ids       (n, A), int64: the A experts that each token was sent to

    f_e is the share of all n·A choices that fell on expert e; an expert that nobody chose has 0. P_e is the mean
    of the probability of expert e over the n tokens. Returns a tensor without dimensions: 1 where all experts are
    used equally. Gradients flow to the probabilities.
    """
    E = probabilities.shape[-1]
    f = torch.bincount(topk_ids.flatten(), minlength=E) / topk_ids.numel()
    return E * (f * probabilities.mean(0)).sum()


def bias_update(bias: Tensor, topk_ids: Tensor, speed: float) -> Tensor:
    """One step of balancing without a loss (arXiv:2408.15664, algorithm 1): the router's bias for the next batch.

    bias      (E,), float32: what is added to the scores before the best are chosen
    topk_ids  (n, A), int64: the experts that the n tokens of this batch were sent to
    speed     the size of the step, the same for every expert (V3 calls it gamma)

    Returns the new bias (E,): the old one plus `speed` for an expert that was chosen less often than the mean,
    minus `speed` for one that was chosen more often, and unchanged where it is exactly the mean. The old bias is not
    written to.
    """
    counts = torch.bincount(topk_ids.flatten(), minlength=len(bias)).float()
    return bias + speed * (counts.mean() - counts).sign()
