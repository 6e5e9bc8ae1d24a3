"""Docstrings of what others read or call: they are there, and say shapes and errors.

The standard: the first line says what it is or gives, in the field's words. Then, where they apply: shapes in the
letters of layers.py, units, the paper, and what is raised and when. Short ones. Nobody is asked to say twice what the
class, or the table in which a function stands, has said.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qwen3", "qwen3_moe", "deepseek_v3")
LESSON = [path for package in PACKAGES for path in sorted((ROOT / package).glob("*.py"))]
AROUND = [*(path for package in PACKAGES for path in sorted((ROOT / package / "engine").glob("*.py"))),
          *sorted((ROOT / "scripts").rglob("*.py"))]
SHORT = 10  # lines: outside of the lesson, a function up to here may speak for itself
SAY_ALL = ("main", "parse", "parse_arguments", "forward", "__call__", "train")  # names that do, outside of the lesson
SHAPE = re.compile(r"\((?=[^()]*[A-Z…·])[^()\n]*,[^()\n]*\)|[Ss]hape unchanged")
ERRORS = ("ValueError", "FileNotFoundError")


@dataclass
class Definition:
    node: ast.FunctionDef | ast.ClassDef
    name: str  # with the class's
    owner: ast.ClassDef | None
    source: str  # of the file

    @property
    def text(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def of_class(self) -> str:
        return self.owner and ast.get_docstring(self.owner) or ""

    @property
    def statements(self) -> list[ast.stmt]:
        return self.node.body[1:] if self.text else self.node.body

    @property
    def inherits(self) -> bool:
        """Whether the class's docstring speaks for this method: its one call, or a single statement."""
        return bool(self.of_class) and (self.node.name in ("forward", "__call__") or len(self.statements) == 1)


def definitions(source: str, hidden: bool = False) -> Iterator[Definition]:
    """Classes, functions and methods, not those within functions; `hidden`: also those with an underscore in front."""
    def walk(body: list[ast.stmt], owner: ast.ClassDef | None) -> Iterator[Definition]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                name = f"{owner.name}.{node.name}" if owner else node.name
                if hidden or not node.name.startswith("_") or node.name == "__call__":
                    yield Definition(node, name, owner, source)
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, node)
    yield from walk(ast.parse(source).body, None)


def undocumented(source: str) -> list[str]:
    """What has no docstring, own or inherited."""
    return [one.name for one in definitions(source) if not one.text and not one.inherits]


def shapeless(source: str) -> list[str]:
    """Functions that take or give tensors, and say no shape in the docstring, a comment, or the class's docstring."""
    out = []
    for one in definitions(source):
        if isinstance(one.node, ast.ClassDef):
            continue
        given = [argument.annotation for argument in (*one.node.args.args, *one.node.args.kwonlyargs)]
        tensors = any(annotation is not None and re.search(r"\bTensor\b", ast.unparse(annotation))
                      for annotation in [*given, one.node.returns])
        lines = source.splitlines()[one.node.lineno - 1:one.node.end_lineno]
        notes = " ".join(line.partition("#")[2] for line in lines)
        if tensors and not SHAPE.search(f"{one.text} {notes} {one.of_class if one.inherits else ''}"):
            out.append(one.name)
    return out


def says_an_error(text: str) -> bool:
    return bool(re.search(r"\bRaises\b|Error\b|[Rr]efuse", text))


def silent(source: str) -> list[str]:
    """Functions that raise ValueError or FileNotFoundError, and neither they say so, nor their class or all callers."""
    every = list(definitions(source, hidden=True))
    functions = [one for one in every if isinstance(one.node, ast.FunctionDef)]
    said = {one.node.name for one in functions if says_an_error(one.text)}
    out = []
    for one in functions:
        raised = {ast.unparse(node.exc.func) for node in ast.walk(one.node)
                  if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)}
        if raised & set(ERRORS) and not says_an_error(one.text + one.of_class):
            callers = {other.node.name for other in functions if other is not one and any(
                isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == one.node.name
                for node in ast.walk(other.node))}
            if not callers or callers - said:
                out.append(one.name)
    return out


def unclear_first_lines(source: str) -> list[str]:
    """A first line that is empty or ends in the middle of a sentence which goes on for more than a second line."""
    out = []
    for one in definitions(source):
        first = one.text.splitlines()[0] if one.text else "none."
        paragraph = one.text.split("\n\n")[0].splitlines()
        if not first.strip() or (len(paragraph) > 3 and not re.search(r"[.:;)]", first)):
            out.append(one.name)
    return out


def in_tables(source: str) -> set[str]:
    """Functions in a table or record at the top level, {"name": function, …} or Check(function, …): that names them."""
    values = [node.value for node in ast.parse(source).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    return {name.id for value in values if value for name in ast.walk(value) if isinstance(name, ast.Name)}


def long_and_undocumented(source: str) -> list[str]:
    """For files around the lesson: classes, and functions longer than SHORT that no table lists."""
    tables = in_tables(source)
    return [one.name for one in definitions(source) if not one.text and one.node.name not in SAY_ALL
            and one.node.name not in tables and not one.inherits
            and (isinstance(one.node, ast.ClassDef) or one.node.end_lineno - one.node.lineno >= SHORT)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", LESSON, ids=name_of)
def test_the_lesson_is_documented(path):
    source = path.read_text("utf-8")
    assert undocumented(source) == [], "without a docstring"
    assert shapeless(source) == [], "no shape of the tensors that come in or go out"
    assert silent(source) == [], "raises an error that no docstring speaks of"
    assert unclear_first_lines(source) == []


def test_what_stands_around_the_lesson_is_documented():
    found = {name_of(path): names for path in AROUND if (names := long_and_undocumented(path.read_text("utf-8")))}
    assert found == {}, "without a docstring, and not short"


@pytest.mark.parametrize("source,names", [
    ("def f(x):\n    return x", ["f"]), ("def f(x):\n    '''What.'''", []), ("def _f(x):\n    return x", []),
    ("class A:\n    def f(self):\n        x = 1\n        return x", ["A", "A.f"]),
    ("class A:\n    '''What.'''\n    def f(self):\n        x = 1\n        return x", ["A.f"]),
    ("class A:\n    '''What.'''\n    def f(self):\n        return 1\n    def forward(self):\n        x = 1\n"
     "        return x", []),
    ("def f(x):\n    '''What.'''\n    def g():\n        return 1", [])])
def test_a_missing_docstring_is_noticed(source, names):
    assert undocumented(source) == names


@pytest.mark.parametrize("source,names", [
    ("def f(x: Tensor):\n    '''What (twice), or so.'''", ["f"]), ("def f() -> Tensor:\n    '''What.'''", ["f"]),
    ("def f(x: Tensor):\n    '''(B, T) -> (B,)'''", []), ("def f(x: Tensor):\n    return x  # (B, T)", []),
    ("def f(x: int):\n    return x", []),
    ("class A:\n    '''(B, T).'''\n    def forward(self, x: 'Tensor | None'):\n        y = x\n        return y", []),
    ("class A:\n    '''(B, T).'''\n    def g(self, x: Tensor):\n        y = x\n        return y", ["A.g"])])
def test_a_missing_shape_is_noticed(source, names):
    assert shapeless(source) == names


@pytest.mark.parametrize("source,names", [
    ("def f():\n    '''What.'''\n    raise ValueError(1)", ["f"]),
    ("def f():\n    '''What. Raises ValueError.'''\n    raise ValueError(1)", []),
    ("def f():\n    '''What.'''\n    raise RuntimeError(1)", []),
    ("def f():\n    '''What.'''\n    raise ValueError(1)\ndef g():\n    '''Raises ValueError.'''\n    f()", []),
    ("def f():\n    '''What.'''\n    raise ValueError(1)\ndef g():\n    '''So.'''\n    f()", ["f"]),
    ("class A:\n    '''Its methods raise ValueError.'''\n    def f(self):\n        raise ValueError(1)", [])])
def test_an_error_that_is_not_told_is_noticed(source, names):
    assert silent(source) == names


def test_a_first_line_that_is_none_is_noticed():
    assert unclear_first_lines("def f():\n    '''\n    What.\n    '''") == []  # Python's own cleaning takes that away
    assert unclear_first_lines("def f():\n    '''Of what\n    it is\n    and so\n    on.'''") == ["f"]


def test_outside_of_the_lesson_short_ones_and_tables_speak_for_themselves():
    long = "".join(f"    x = {i}\n" for i in range(SHORT))
    assert long_and_undocumented("def f():\n" + long) == ["f"]
    assert long_and_undocumented("def f():\n" + long + "TABLE = {'f': f}") == []
    assert long_and_undocumented("def f():\n" + long + "CHECK = Check(f, 1)") == []
    assert long_and_undocumented("def f():\n" + long + "def g():\n    f()") == ["f"]
    assert long_and_undocumented("def main():\n" + long) == long_and_undocumented("def f():\n    return 1") == []
    assert long_and_undocumented("class A:\n    x = 1") == ["A"]
