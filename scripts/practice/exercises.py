"""What an exercise is: a function of a package, or a part of one, that the learner writes."""

import ast
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"qwen3": "Qwen3-Tiny", "qwen3_moe": "Qwen3-MoE-Tiny", "deepseek_v3": "DeepSeek-V3-Tiny"}
COMMAND = "uv run python -m scripts.practice"
EXTRA = "exercises.py"  # for what is the body of no package; its solutions are in solutions.py


@dataclass(frozen=True)
class Exercise:
    """What is taken out of a package, and what a learner is told about it."""

    name: str
    file: str  # of the package, or EXTRA
    target: str  # "rotate" or "Attention.sdpa"
    level: str  # easy, medium, hard
    minutes: int
    task: str  # what to write; stands as a comment in the learner's file
    hints: tuple[str, str, str]  # each stronger than the one before
    heading: str  # words of the README's heading, the best first, where the page does not name the exercise itself
    cut: tuple[str, str] | None = None  # beginnings of the first and the last statement taken out; None: the whole body


def of(package: str) -> dict[str, Exercise]:
    """The exercises of a package by name, in the order of its page."""
    tasks = importlib.import_module(f"{__package__}.tasks_{package}").TASKS
    return {task.name: task for task in tasks}


def source_path(package: str, file: str) -> Path:
    """The real file: of the package, or the solutions of what is in none."""
    return Path(__file__).with_name("solutions.py") if file == EXTRA else ROOT / package / file


def find(tree: ast.Module, target: str) -> ast.AST | None:
    """The statement that binds `target` last, as Python would see it; None where there is none."""
    owner, _, name = target.rpartition(".")
    body = tree.body
    if owner:
        classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
        if not classes:
            return None
        body = classes[-1].body
    found = [node for node in body if name in bound(node)]
    return found[-1] if found else None


def bound(node: ast.stmt) -> set[str]:
    """The names that a statement binds, imports aside."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}


def region(source: str, exercise: Exercise) -> tuple[int, int]:
    """The lines first … last (from 1) of a source that the learner writes."""
    node = find(ast.parse(source), exercise.target)
    if exercise.cut is None:
        has_docstring = ast.get_docstring(node) is not None
        first = (node.body[0].end_lineno if has_docstring else signature_end(source, node)) + 1
        return first, node.end_lineno
    begins, ends = exercise.cut
    statements = [part for part in ast.walk(node) if isinstance(part, ast.stmt)]

    def beginning_with(text: str) -> ast.stmt:
        return next(part for part in statements if ast.get_source_segment(source, part).startswith(text))

    return beginning_with(begins).lineno, beginning_with(ends).end_lineno


def signature_end(source: str, node: ast.FunctionDef) -> int:
    """The line of the colon that ends `def …:`; comments may stand between it and the first statement."""
    lines = source.splitlines()
    number = node.lineno
    while not re.search(r":\s*(#.*)?$", lines[number - 1]):
        number += 1
    return number


def section(package: str, exercise: Exercise) -> str:
    """Where to read: the README's heading above the first mention of the exercise's check, or the one that fits."""
    readme = ROOT / package / "README.md"
    text = readme.read_text("utf-8") if readme.is_file() else ""
    text = re.sub(r"^```.*?^```$", lambda block: re.sub("^#", " ", block[0], flags=re.M), text, flags=re.M | re.S)
    named = re.search(rf"scripts\.practice {package} --check {exercise.name}\b", text)
    headings = list(re.finditer(r"^##+ +(.+?) *$", text, re.M))
    if named:
        above = [heading[1] for heading in headings if heading.start() < named.start()]
        if above:
            return above[-1]
    fitting = (heading[1] for pattern in exercise.heading.split("|") for heading in headings
               if re.search(pattern, heading[1], re.I))
    return next(fitting, "")


def reading(package: str, exercise: Exercise) -> str:
    """`qwen3/README.md, "2. RMSNorm"`"""
    heading = section(package, exercise)
    return f"{package}/README.md" + (f', "{heading}"' if heading else "")
