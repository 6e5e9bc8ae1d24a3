"""What is right in an exercise, and what its usual mistakes look like from outside.

Each check runs the learner's function on random inputs beside the right one. Where the results differ, they are
compared with those of the usual mistakes, written out here; the one that fits says what is off.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwen3.config import Config  # noqa: I001  before torch: see qwen3/__init__.py
from qwen3.model import Model

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .balance import balance_loss

EMBEDDED = Path(__file__).resolve().parents[2] / "checkpoints" / "Qwen3-Tiny"


class Off(Exception):
    """An exercise is not right; the text says in one sentence what is off."""


def close(a: Tensor, b: Tensor, relative: float = 1e-4, absolute: float = 1e-7) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=relative, atol=absolute)


def sentence_of(error: BaseException, name: str) -> str:
    """What a learner's function raised, in one sentence; the usual reasons by name."""
    first, *_ = str(error).splitlines() or [""]
    if isinstance(error, (RuntimeError, IndexError)) and "-100" in first and "out of" in first:
        return "-100 was used as an index: take out the positions without a target first"
    if isinstance(error, RuntimeError) and "does not require grad" in first:
        return "backward() found no gradient: .item(), .detach() or torch.no_grad() cut the loss off from the weights"
    return f"{name} raised {type(error).__name__}: {first[:150]}"


def compare(function: Callable, right: Callable, mistakes: dict[str, Callable], cases: list[tuple]) -> None:
    """In every case the same number, and the same gradient for the first input."""
    given = []
    for x, other in cases:
        ours, theirs, others = x.clone().requires_grad_(), x.clone().requires_grad_(), other.clone()
        result = function(theirs, others)
        if not isinstance(result, Tensor) or result.ndim:
            what = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise Off(f"it returns {what}, wanted is a tensor without dimensions")
        if not (torch.equal(theirs.detach(), x) and torch.equal(others, other)):
            raise Off("it changes an input: make a new tensor instead of writing into the one that was given")
        given.append((result, theirs, right(ours, other), ours))
    if not all(close(result.detach(), wanted.detach()) for result, _, wanted, _ in given):
        for sentence, wrong in mistakes.items():
            if all(close(result.detach(), wrong(*case)) for (result, *_), case in zip(given, cases)):
                raise Off(sentence)
        for (result, _, wanted, _), case in zip(given, cases):
            if not close(result.detach(), wanted.detach()):
                shapes = " and ".join(str(tuple(x.shape)) for x in case)
                raise Off(f"{result.item():.4f} where {wanted.item():.4f} is right, for inputs of shape {shapes}")
    for result, theirs, wanted, ours in given:
        if not result.requires_grad:
            raise Off("no gradient flows: .item(), .detach(), torch.no_grad() or a new torch.tensor cuts it off")
        result.backward()
        wanted.backward()
        if theirs.grad is None or not close(theirs.grad, ours.grad, 1e-3):
            raise Off("the value is right and its gradient is not: .detach() or .item() cuts a part of it off")


def names_used(code) -> set[str]:
    """The names that a function uses, those of functions inside it too; its docstring does not count."""
    inner = (names_used(constant) for constant in code.co_consts if hasattr(constant, "co_names"))
    return set(code.co_names).union(*inner)


# --- the loss ---

def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def at(scores: Tensor, targets: Tensor) -> Tensor:
    """The entry of each position's target (B, T), that of token 0 where there is none."""
    return scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0]


LOSS_MISTAKES: dict[str, Callable] = {
    "padding positions are counted: those with -100 are left out of the sum, and must be left out of the number too":
        lambda x, y: loss(x, y) * (y != -100).sum() / y.numel(),
    "padding positions are counted, as if token 0 were their target: leave out those with -100":
        lambda x, y: -at(x.log_softmax(-1), y).mean(),
    "padding positions are counted: -100 as an index reads the hundredth token from the end":
        lambda x, y: -at(x.log_softmax(-1), y % x.shape[-1]).mean(),
    "this is the sum: divide by the number of positions that have a target":
        lambda x, y: loss(x, y) * (y != -100).sum(),
    "the sign is the wrong way round: the loss is minus the logarithm":
        lambda x, y: -loss(x, y),
    "this is in bits: use the natural logarithm, which torch.log is":
        lambda x, y: loss(x, y) / torch.tensor(2.0).log(),
    "the softmax is missing: logits are scores and no probabilities":
        lambda x, y: -at(x, y)[y != -100].mean(),
    "the logarithm is missing: this is minus the mean probability":
        lambda x, y: -at(x.softmax(-1), y)[y != -100].mean(),
    "this is the logarithm of the mean probability: take the logarithm of each, then the mean":
        lambda x, y: -at(x.softmax(-1), y)[y != -100].mean().log(),
    "the targets are shifted once more: targets[b, t] is already the token after position t":
        lambda x, y: loss(x[:, :-1], y[:, 1:]),
    "the softmax runs over the positions: it belongs over the vocabulary, the last dimension":
        lambda x, y: -at(x.log_softmax(1), y)[y != -100].mean(),
    "each row is averaged first: take the mean over all targets of the batch together":
        lambda x, y: torch.stack([loss(a[None], b[None]) for a, b in zip(x, y)]).mean(),
}


def check_next_token_loss(function: Callable) -> None:
    forbidden = {"cross_entropy", "nll_loss", "CrossEntropyLoss", "NLLLoss"}
    if forbidden & names_used(function.__code__):
        raise Off("the exercise is to do without cross_entropy and nll_loss")
    generator, cases = torch.Generator().manual_seed(20), []
    for B, T, V, padded in ((2, 5, 110, 0.4), (3, 8, 150, 0.3), (1, 4, 101, 0.0), (4, 9, 200, 0.8)):
        logits = 3 * torch.randn(B, T, V, generator=generator)
        targets = torch.randint(1, V, (B, T), generator=generator)
        targets[torch.rand(B, T, generator=generator) < padded] = -100
        targets[:, 1] = 7  # at least one target in each row
        cases.append((logits, targets))
    compare(function, loss, LOSS_MISTAKES, cases)
    logits, targets = 300 * cases[0][0], cases[0][1]
    result = function(logits, targets)
    if not close(result, loss(logits, targets)):
        raise Off(f"{result.item():.4g} for scores near 1,000: exp overflows, or the logarithm of 0 is taken; "
                  "log_softmax subtracts the largest score first")


# --- the step ---

def small_model() -> nn.Module:
    """Qwen3 with two narrow layers; the embedding larger than usual, so that the gradient is longer than 1."""
    config = replace(Config.from_checkpoint(EMBEDDED), vocab_size=120, hidden_size=32, intermediate_size=48,
                     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        model = Model(config)
    model.model.embed_tokens.weight.data *= 20
    return model


def step(model: nn.Module, ids: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer,
         order: str = "zero backward clip move", after: bool = False) -> float:
    """The right step, and in another order a wrong one; `after`: the loss is measured again after it."""
    total = loss(model(ids), targets)
    for what in order.split():
        if what == "zero":
            optimizer.zero_grad()
        elif what == "backward":
            total.backward()
        elif what == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            optimizer.step()
    return loss(model(ids), targets).item() if after else total.item()


STEP_MISTAKES: dict[str, dict] = {
    "the gradients of the steps before are still there: optimizer.zero_grad() is missing":
        {"order": "backward clip move"},
    "the gradients are zeroed between backward and the step: optimizer.zero_grad() belongs before backward":
        {"order": "backward zero clip move"},
    "optimizer.zero_grad() comes at the end: gradients that are there before the first step are added to it":
        {"order": "backward clip move zero"},
    "the weights do not move: optimizer.step() is missing":
        {"order": "zero backward clip"},
    "the weights do not move: optimizer.step() stands before backward, which is still to find the gradients":
        {"order": "zero move backward clip"},
    "there is no gradient: loss.backward() is missing":
        {"order": "zero clip move"},
    "the gradient is not cut to length 1 when the weights move: clip_grad_norm_ is missing, or not after backward":
        {"order": "zero backward move"},
    "the gradient is not cut to length 1, and those of the steps before are still there":
        {"order": "backward move"},
    "this is the loss after the step: return the one that backward was called on":
        {"after": True},
}


def run_steps(function: Callable) -> tuple[Tensor, Tensor, list[str]]:
    """Three steps on three batches -> losses, all weights in one row, the order in which things were called."""
    model, generator, losses, calls = small_model(), torch.Generator().manual_seed(20), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)  # unlike Adam's, its step shows the gradient's length
    model(torch.tensor([[1, 2, 3]])).sum().backward()  # gradients that are left over
    model.model.norm.weight.register_hook(lambda gradient: calls.append("backward"))
    optimizer.register_step_post_hook(lambda *_: calls.append("move"))
    for _ in range(3):
        ids = torch.randint(120, (2, 12), generator=generator)
        targets = torch.cat((ids[:, 1:], torch.full((2, 1), -100)), 1)
        targets[0, :6] = -100
        result = function(model, ids, targets, optimizer)
        if isinstance(result, Tensor) and result.requires_grad:
            raise Off("it returns a tensor that keeps the whole forward pass in memory: return loss.item()")
        if not isinstance(result, float) and not (isinstance(result, Tensor) and result.numel() == 1):
            raise Off(f"it returns {type(result).__name__}, wanted is the loss as a Python float")
        losses.append(float(result))
    return torch.tensor(losses), torch.cat([p.detach().flatten() for p in model.parameters()]), calls


def same_run(a: tuple[Tensor, Tensor, list[str]], b: tuple[Tensor, Tensor, list[str]]) -> bool:
    return a[2] == b[2] and all(close(x, y, absolute=1e-5) for x, y in zip(a[:2], b[:2]))


def check_training_step(function: Callable) -> None:
    given, right = run_steps(function), run_steps(step)
    if same_run(given, right):
        return
    for sentence, changed in STEP_MISTAKES.items():
        if same_run(given, run_steps(lambda *arguments: step(*arguments, **changed))):
            raise Off(sentence)
    first, wanted = given[0][0], right[0][0]
    if not close(first, wanted):
        raise Off(f"the first loss is {first:.4f} where {wanted:.4f} is right: it is the mean over the positions whose "
                  "target is not -100")
    raise Off("losses and weights after three steps are not those of zero_grad, backward, clip_grad_norm_, step")


# --- the balance loss ---

def squared_share(p: Tensor, topk_ids: Tensor) -> Tensor:
    counts = torch.bincount(topk_ids.flatten(), minlength=p.shape[1])
    return p.shape[1] * (counts / topk_ids.numel()).square().sum()


BALANCE_MISTAKES: dict[str, Callable] = {
    "the factor E, the number of experts, is missing; or a mean stands in place of the sum over the experts":
        lambda p, ids: balance_loss(p, ids) / p.shape[1],
    "this is the mean over the experts: take the sum, and multiply it by their number E":
        lambda p, ids: balance_loss(p, ids) / p.shape[1] ** 2,
    "f_e is divided by the number of tokens: divide by the number of choices, n·A":
        lambda p, ids: balance_loss(p, ids) * ids.shape[1],
    "f_e is a count: divide it by the number of choices, n·A":
        lambda p, ids: balance_loss(p, ids) * ids.numel(),
    "P_e is a sum over the tokens: take the mean":
        lambda p, ids: balance_loss(p, ids) * len(p),
    "the probabilities take the place of the counts: f_e is how often expert e was chosen":
        lambda p, ids: p.shape[1] * p.mean(0).square().sum(),
    "the counts take the place of the probabilities: P_e is the mean of probabilities[:, e]": squared_share,
    "a softmax is taken once more: the probabilities have it already":
        lambda p, ids: balance_loss(p.softmax(-1), ids),
    "only the first choice of each token is counted: all A of them count":
        lambda p, ids: balance_loss(p, ids[:, :1]),
}


def check_balance_loss(function: Callable) -> None:
    generator, cases = torch.Generator().manual_seed(20), []
    for n, E, A in ((12, 4, 2), (40, 8, 2), (30, 6, 3), (9, 5, 1)):
        # The last expert is so improbable that nobody chooses it.
        scores = torch.randn(n, E, generator=generator) - torch.tensor([0.0] * (E - 1) + [20.0])
        probabilities = scores.softmax(-1)
        cases.append((probabilities, probabilities.topk(A).indices))
    try:
        compare(function, balance_loss, BALANCE_MISTAKES, cases)
    except RuntimeError as error:
        if "must match the size" in str(error):
            raise Off("an expert that nobody chose is forgotten: torch.bincount needs minlength=E") from None
        raise


CHECKS = {"next_token_loss": check_next_token_loss, "training_step": check_training_step,
          "balance_loss": check_balance_loss}
