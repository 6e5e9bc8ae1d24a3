"""The same idea is the same code in every package: definitions of one name must not drift apart."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [path.parent.name for path in sorted(ROOT.glob("*/config.py"))]
FILES = ["config.py", "tokenizer.py", "layers.py", "model.py", "weights.py", "generate.py", "main.py"]
# What differs by nature, with the reason: {"file.py name": why}
MAY_DIFFER: dict[str, str] = {}


def definitions(source: str, package: str) -> dict[str, str]:
    """Name -> code of each class and function at the top, without docstrings, the package's own name made neutral."""
    out = {}
    for node in ast.parse(source.replace(package, "package")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for inner in ast.walk(node):
                if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner) is not None:
                    inner.body = inner.body[1:] or [ast.Pass()]
            out[node.name] = ast.unparse(node)
    return out


def test_packages_are_found():
    assert "qwen3" in PACKAGES


def test_a_difference_is_noticed_and_a_docstring_is_none():
    one = definitions('def f(x):\n    """a"""\n    return qwen3.g(x)', "qwen3")
    assert one == definitions('def f(x):\n    """b"""\n    return other.g(x)', "other")
    assert one != definitions("def f(x):\n    return other.g(x + 1)", "other")


@pytest.mark.parametrize("file", FILES)
def test_same_name_same_code(file):
    every = {package: definitions((ROOT / package / file).read_text(), package) for package in PACKAGES}
    for (one, left), (other, right) in itertools.combinations(every.items(), 2):
        for name in left.keys() & right.keys():
            if f"{file} {name}" not in MAY_DIFFER:
                assert left[name] == right[name], f"{one}/{file} and {other}/{file} differ in {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_stands_alone_and_is_read_in_one_sitting(package):
    for path in (ROOT / package).glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 300, f"{path} is too long to be read in one sitting"
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                top = name.partition(".")[0]
                assert top == package or top not in {*PACKAGES, "transformers", "jinja2", "huggingface_hub", "pickle"}, f"{path}: {name}"
        assert "torch.load" not in text and "pickle.load" not in text
