"""The exercises of the training lesson: its solutions are right, and usual mistakes are told in the right words."""

import re
from pathlib import Path

import pytest

from scripts.train import practice

ROOT = Path(__file__).parents[1]
README = (ROOT / "scripts/train/README.md").read_text()
SOLUTIONS = dict(re.findall(r"<summary>Solution: (\w+)</summary>\n\n```python\n(.*?)```", README, re.S))
HEAD = "import torch\nimport torch.nn.functional as F\n\n"
LOSS_BY_HAND = """\
    keep = targets != -100
    p = logits.softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
"""
ZERO, MOVE = "    optimizer.zero_grad()\n", "    optimizer.step()\n"
STEP = f"""{ZERO}\
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
{MOVE}"""
# Exercise -> [(words of the verdict, a place of the solution, what stands there instead)]; of the loss, which can be
# written in many ways, what it returns and the lines before that.
WRONG = {
    "next_token_loss": [
        ("padding positions are counted: those with -100 are left out of the sum", "s.mean()",
         "s = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)"),
        ("padding positions are counted, as if token 0", "s.mean()",
         "s = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])"),
        ("padding positions are counted: -100 as an index", "s.mean()", """\
s = torch.stack([-logits.log_softmax(-1)[b, t, targets[b, t]] for b in range(len(targets))
                     for t in range(targets.shape[1])])"""),
        ("-100 was used as an index", "s.mean()", "s = -logits.log_softmax(-1).gather(-1, targets[..., None])"),
        ("this is the sum", "-p[keep].log().sum()", LOSS_BY_HAND),
        ("the sign", "p[keep].log().mean()", LOSS_BY_HAND),
        ("this is in bits", "-p[keep].log2().mean()", LOSS_BY_HAND),
        ("the logarithm is missing", "-p[keep].mean()", LOSS_BY_HAND),
        ("the logarithm of the mean", "-p[keep].mean().log()", LOSS_BY_HAND),
        ("for scores near 1,000", "-p[keep].log().mean()", LOSS_BY_HAND),
        ("for scores near 1,000", "-(logits.exp() / logits.exp().sum(-1, keepdim=True))[keep].gather("
         "-1, targets[keep][:, None]).log().mean()", LOSS_BY_HAND),
        ("the softmax is missing",
         "-logits[keep].gather(-1, targets[keep][:, None]).mean()", LOSS_BY_HAND),
        ("the softmax runs over the positions",
         "-logits.log_softmax(1)[keep].gather(-1, targets[keep][:, None]).mean()", LOSS_BY_HAND),
        ("shifted once more", "l.mean()", """\
x, y = logits[:, :-1], targets[:, 1:]
    l = -x.log_softmax(-1)[y != -100].gather(-1, y[y != -100][:, None])"""),
        ("each row is averaged first", "torch.stack(r).mean()", LOSS_BY_HAND +
         "    r = [-a[b].log().mean() for a, b in zip(p, keep)]"),
        ("no gradient flows", "torch.tensor(-p[keep].log().mean().item())", LOSS_BY_HAND),
        ("returns float", "-p[keep].log().mean().item()", LOSS_BY_HAND),
        ("returns a tensor of shape", "-p[keep].log()", LOSS_BY_HAND),
        ("changes an input", "-logits.log_softmax(-1).gather(-1, targets[..., None]).mean()",
         "targets[targets == -100] = 0"),
        ("without cross_entropy", "F.cross_entropy(logits.flatten(0, 1), targets.flatten())", "pass"),
        ("without cross_entropy", "[torch.nn.CrossEntropyLoss()(a, b) for a, b in zip(logits, targets)][0]", "pass"),
        (" is right, for inputs of shape (2, 5, 110) and (2, 5)", "(-p[keep].log()).max()", LOSS_BY_HAND),
        ("raised TypeError: ", "None + 1", "pass"),
    ],
    "training_step": [
        ("zero_grad() is missing", ZERO, ""),
        ("between backward and the step", "    loss.backward()\n", "    loss.backward()\n    optimizer.zero_grad()\n"),
        ("comes at the end", STEP, STEP.replace(ZERO, "") + ZERO),
        ("optimizer.step() is missing", MOVE, ""),
        ("stands before backward", STEP, ZERO + MOVE + "    loss.backward()\n"),
        ("zeroed between", STEP, STEP.replace(ZERO, "").replace(MOVE, ZERO + MOVE)),
        ("loss.backward() is missing", "    loss.backward()\n", ""),
        ("not cut to length 1 when", "    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n", ""),
        ("not cut to length 1 when", ", 1.0)", ", 1e9)"),
        ("the loss after the step", "return loss.item()",
         "return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()"),
        ("keeps the whole forward pass", "return loss.item()", "return loss"),
        ("returns NoneType", "return loss.item()", "return"),
        ("the first loss is ", "targets.flatten())", "targets.clamp(min=0).flatten())"),
        ("losses and weights", "optimizer.step()", "optimizer.step(), optimizer.step()"),
        ("backward() found no gradient", "loss.backward()", "loss.detach().backward()"),
    ],
    "balance_loss": [
        ("the factor E", "return E * ", "return "),
        ("this is the mean over the experts", "return E * (f * probabilities.mean(0)).sum()",
         "return (f * probabilities.mean(0)).mean()"),
        ("divided by the number of tokens", "topk_ids.numel()", "len(topk_ids)"),
        ("f_e is a count", " / topk_ids.numel()", ""),
        ("P_e is a sum", "probabilities.mean(0)", "probabilities.sum(0)"),
        ("the probabilities take the place", "(f * ", "(probabilities.mean(0) * "),
        ("the counts take the place", "probabilities.mean(0)", "f"),
        ("a softmax is taken once more", "probabilities.mean(0)", "probabilities.softmax(-1).mean(0)"),
        ("only the first choice", "topk_ids.flatten(), minlength=E) / topk_ids.numel()",
         "topk_ids[:, 0], minlength=E) / len(topk_ids)"),
        ("an expert that nobody chose", ", minlength=E", ""),
        ("no gradient flows", "probabilities.mean(0)", "probabilities.detach().mean(0)"),
        ("its gradient is not",
         "probabilities.mean(0)", "(2 * probabilities.mean(0) - probabilities.mean(0).detach())"),
    ],
}


def write(path: Path, *functions: str) -> Path:
    path.write_text(HEAD + "\n\n".join(functions), encoding="utf-8")
    return path


def wrong(name: str, old: str, new: str) -> str:
    """The solution with one place changed; of the loss, a body and what it returns."""
    if name == "next_token_loss":
        return f"def next_token_loss(logits, targets):\n    {new.strip()}\n    return {old}\n"
    assert SOLUTIONS[name].count(old) == 1
    return SOLUTIONS[name].replace(old, new)


def test_the_solutions_of_the_lesson_are_right(tmp_path, capsys):
    path = write(tmp_path / "train.py", *SOLUTIONS.values())
    assert tuple(SOLUTIONS) == practice.NAMES
    assert practice.main(["--check"], path) == 0
    assert capsys.readouterr().out == "".join(f"{name:16} right\n" for name in practice.NAMES) + "3 of 3 right\n"


@pytest.mark.parametrize("name", practice.NAMES)
def test_each_usual_mistake_is_told_in_its_own_words(name, tmp_path, capsys):
    for wanted, old, new in WRONG[name]:
        path = write(tmp_path / "train.py", wrong(name, old, new))
        assert practice.main(["--check", name], path) == 1
        out, err = capsys.readouterr()
        verdict, count = out.splitlines()
        assert wanted in verdict and len(verdict) < 300 and count == "0 of 1 right" and not err, (wanted, out)


def test_the_file_is_written_once_and_never_over_what_a_learner_wrote(tmp_path, capsys):
    path = tmp_path / "practice" / "train.py"
    assert practice.main([], path) == 0 and "--check" in capsys.readouterr().out
    assert practice.main(["--check"], path) == 1
    assert capsys.readouterr().out.count("not written yet") == 3
    path.write_text("mine = 1\n")
    assert practice.main([], path) == 2 and path.read_text() == "mine = 1\n"
    assert "--restart" in capsys.readouterr().err
    assert practice.main(["--restart"], path) == 0 and path.read_text() == practice.STUBS
    assert path.with_suffix(".old.py").read_text() == "mine = 1\n"


def test_the_stubs_ask_for_what_the_lesson_explains():
    for name, section in zip(practice.NAMES, (4, 7, 9)):
        assert re.search(rf"def {name}\(.*\n    \"\"\".*\(section {section}, \d+ minutes\)$", practice.STUBS, re.M)
        assert re.search(rf"^\| `{name}` \| .* \| section {section} \|$", README, re.M)


@pytest.mark.parametrize("text, wanted", [
    ("def f(:\n", "line 1: Python cannot read this line"), ("x = 1\ny = x.nothing\n", "line 2: AttributeError"),
    ("import no_such_module\n", "line 1: ModuleNotFoundError"), ("raise SystemExit(0)\n", "line 1: SystemExit"),
    (None, "is not there yet")])
def test_a_file_that_cannot_be_run_is_one_sentence(text, wanted, tmp_path, capsys):
    path = tmp_path / "train.py"
    if text is not None:
        path.write_text(text)
    assert practice.main(["--check"], path) == 2
    out, err = capsys.readouterr()
    assert not out and wanted in err and err.startswith("practice: ") and err.count("\n") == 1 and len(err) < 300


def test_a_function_that_is_gone_or_fails_is_named(tmp_path, capsys):
    path = write(tmp_path / "train.py", "def balance_loss(probabilities, topk_ids):\n    return {}[7]\n")
    assert practice.main(["--check"], path) == 1
    out = capsys.readouterr().out
    assert "there is no function next_token_loss" in out and "balance_loss raised KeyError: 7, line 5" in out
