"""What the lines of the lesson are for: every non-blank line of a package's flat files, sorted into seven kinds.

    uv run python -m scripts.lines                       a table for each package
    uv run python -m scripts.lines qwen3 --show speed    the lines of one kind, with file and number

The rules look at the syntax and at the tables below, never at what a line means. A line gets the kind of the innermost
statement for which a rule speaks; a line for which none does is counted as teaching.

    head         imports, `__all__`, names that are only passed on (`A = other.A`), and what stands under
                 `if __name__ == "__main__"` or `if TYPE_CHECKING`
    robustness   `raise` and `assert`; a block that ends in `raise`, with the `if`, `else`, `for` or `except` above it;
                 calls of `warn…`, `refuse…` and `check_…`, and functions of these names
    interface    parsing of arguments (`add_argument`), notes to the user (`note`, `print`, `notes.append`), properties
                 that hand out a value without computing, what NAMED lists, and all of main.py
    variants     what only some checkpoints need: an `if` that asks for a name in ASKED, and what NAMED lists
    speed        what only makes it faster: the same, and an `if` that looks at a device, a type or a compiler
    loading      reading of files that is not what its file is about: NAMED
    teach        everything else

An `if` is meant with its block; `a if b else c` with all of its statement. Docstrings and comments have the kind of the
code that they belong to: a docstring that of its function or class, a comment line that of the code below it. A file's
own docstring teaches, except that of main.py. The column "prose" says how many of the lines that teach are docstrings
and comments.
"""

import argparse
import ast
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("qwen3", "qwen3_moe", "deepseek_v3")
KINDS = ("teach", "speed", "variants", "robustness", "interface", "loading", "head")

# Functions, classes, methods and fields of a kind that syntax does not show: kind -> {"file.name": why}.
NAMED: dict[str, dict[str, str]] = {
    "speed": {
        "generate.compiled_step": "offers the engine's compiled step",
    },
    "variants": {
        "config.Yarn": "only checkpoints with stretched contexts have it",
        "config.Config.quantization": "only quantised checkpoints have it",
        "config.Config.weight_block_size": "only quantised checkpoints have it",
    },
    "interface": {
        "generate.generate_batch": "offers the engine's batches under this file's name",
        "config.Config.notes": "lines for the user",
    },
    "loading": {
        "config.Config.from_checkpoint": "field by field from two JSON files",
        "tokenizer.Tokenizer.from_checkpoint": "finds and opens the vocabulary's file",
    },
}
# An `if` that asks for one of these names is of a kind: name -> (kind, why).
ASKED = {
    "rope_scaling": ("variants", "stretched contexts: off in every published Qwen3; DeepSeek-V3's lesson is yarn.py"),
    "shared_expert": ("variants", "no published Qwen3-MoE has one"),
    "shared_expert_intermediate_size": ("variants", "no published Qwen3-MoE has one"),
    "interleaved": ("variants", "Kimi's and GLM's files may have the pairs of RoPE in another order"),
    "engine": ("speed", "load_model's switch between the lesson and the engine"),
    "compiled": ("speed", "generate's switch to the compiled step"),
    "is_meta": ("speed", "saves the time to draw numbers that a file replaces"),
    **dict.fromkeys(("is_cuda", "is_cpu", "is_mps", "cuda", "mps", "itemsize", "is_compiling", "is_grad_enabled"),
                    ("speed", "a device, a type or a compiler")),
}
NOTES = ("note", "print", "notes.append")


def called(node: ast.stmt) -> str:
    """The name of the function that a statement calls and does nothing else, such as "warnings.warn"."""
    return ast.unparse(node.value.func) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else ""


def is_definition(node: ast.stmt) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.ClassDef))


def ends_in_raise(block: list[ast.stmt]) -> bool:
    return bool(block) and (isinstance(block[-1], ast.Raise) or is_robustness(block[-1]))


def is_robustness(node: ast.stmt) -> bool:
    """Whether all of a statement is there to refuse something."""
    if isinstance(node, (ast.Raise, ast.Assert)):
        return True
    if isinstance(node, ast.FunctionDef):
        return node.name.startswith(("check_", "refuse"))
    if isinstance(node, (ast.If, ast.For, ast.While)):
        return ends_in_raise(node.body) and (not node.orelse or ends_in_raise(node.orelse))
    return called(node).rpartition(".")[2].startswith(("check_", "refuse", "warn"))


def is_head(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return "__name__" in ast.unparse(node.test) or "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Assign):
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        passed_on = all(isinstance(value, (ast.Name, ast.Attribute)) for value in values) and node.col_offset == 0
        return passed_on or ast.unparse(node.targets[0]) == "__all__"
    return isinstance(node, (ast.Import, ast.ImportFrom))


def hands_out(node: ast.stmt) -> bool:
    """A property that returns a value which is there already."""
    if not isinstance(node, ast.FunctionDef) or "property" not in map(ast.unparse, node.decorator_list):
        return False
    last = node.body[-1]
    computes = (ast.Call, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.comprehension)
    return len(node.body) - (ast.get_docstring(node) is not None) == 1 and isinstance(last, ast.Return) and not any(
        isinstance(inner, computes) for inner in ast.walk(last))


def asks(test: ast.expr) -> str | None:
    """The kind of what a condition guards, by the names in it; comparing a device or a type is a matter of speed."""
    names = [getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(test)]
    found = [ASKED[name][0] for name in names if name in ASKED]
    comparisons = [node for node in ast.walk(test) if isinstance(node, ast.Compare)]
    compared = [ast.unparse(side) for node in comparisons for side in (node.left, *node.comparators)]
    machine = any(re.fullmatch(r"(.*\.)?(device|dtype)(\.type)?", side) for side in compared)
    return found[0] if found else "speed" if machine else None


def asks_inside(node: ast.stmt) -> str | None:
    """The same for `a if b else c` in a statement that has no block."""
    if hasattr(node, "body"):
        return None
    return next((asks(one.test) for one in ast.walk(node) if isinstance(one, ast.IfExp) and asks(one.test)), None)


def kind_by_rule(node: ast.stmt, name: str) -> str | None:
    """The kind that a rule gives to a whole statement; `name` is "file.Class.method" where it defines something."""
    for kind, names in NAMED.items():
        if name in names:
            return kind
    if is_head(node):
        return "head"
    if is_robustness(node):
        return "robustness"
    block = node.body if isinstance(node, (ast.If, ast.For)) and not node.orelse else [node]  # a note under a condition
    if all(called(inner).endswith((*NOTES, "add_argument")) for inner in block) or hands_out(node):
        return "interface"
    return asks_inside(node)


def kinds(source: str, file: str) -> dict[int, str]:
    """Number -> kind of each non-blank line of a file of the lesson; `file` is its name without .py."""
    lines, out = source.splitlines(), {}

    def paint(first: int, last: int, kind: str) -> None:
        out.update(dict.fromkeys(range(first, last + 1), kind))

    def walk(block: list[ast.stmt], kind: str, scope: str) -> None:
        for node in block:
            target = node.target if isinstance(node, ast.AnnAssign) else None
            name = f"{scope}.{node.name if is_definition(node) else ast.unparse(target) if target else ''}"
            own = kind_by_rule(node, name) or kind
            first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
            paint(first, node.end_lineno, own)
            if own not in ("head", "robustness"):
                inside(node, own, name if is_definition(node) else scope)

    def inside(node: ast.stmt, kind: str, scope: str) -> None:
        """The blocks of a statement. One that ends in `raise` is robustness, with the line that leads to it."""
        blocks = [(node.lineno, getattr(node, "body", []))]
        blocks += [(one.lineno, one.body) for one in getattr(node, "handlers", [])]
        blocks += [(one.body[0].lineno, one.body) for one in getattr(node, "cases", [])]
        blocks += [(block[0].lineno, block) for name in ("orelse", "finalbody") if (block := getattr(node, name, []))]
        for number, (first, block) in enumerate(blocks):
            tried = number == 0 and isinstance(node, ast.Try)
            asked = asks(node.test) if number == 0 and isinstance(node, ast.If) else None
            if ends_in_raise(block) and not is_definition(node) and not tried:
                paint(first, block[-1].end_lineno, "robustness")
                continue
            if asked:
                paint(first, block[-1].end_lineno, asked)
            walk(block, asked or kind, scope)
        if isinstance(node, ast.Try) and node.handlers and all(ends_in_raise(one.body) for one in node.handlers):
            paint(node.lineno, node.lineno, "robustness")  # `try:` itself; what it tries keeps its kind

    walk(ast.parse(source).body, "interface" if file == "main" else "teach", file)
    below = "teach"
    for number in range(len(lines), 0, -1):
        if lines[number - 1].lstrip().startswith("#"):
            out[number] = below
        elif lines[number - 1].strip():
            below = out[number]
    return {number: out[number] for number, line in enumerate(lines, start=1) if line.strip()}


def prose(source: str) -> set[int]:
    """The lines that are docstrings or comments."""
    out = {number for number, line in enumerate(source.splitlines(), start=1) if line.lstrip().startswith("#")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return out


def lesson(package: str, root: Path = ROOT) -> list[Path]:
    """The flat files of a package, in reading order where it has one."""
    paths = {path.stem: path for path in sorted((root / package).glob("*.py")) if path.stem != "__init__"}
    for node in ast.parse((root / package / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "READING_ORDER":
            return [paths[name] for name in ast.literal_eval(node.value) if name in paths]
    return list(paths.values())


def count(package: str, root: Path = ROOT) -> dict[str, Counter]:
    """File -> how many lines of each kind; "prose" counts those among "teach"."""
    out = {}
    for path in lesson(package, root):
        source = path.read_text("utf-8")
        by_line = kinds(source, path.stem)
        out[path.name] = Counter(by_line.values())
        out[path.name]["prose"] = sum(by_line.get(number) == "teach" for number in prose(source))
    return out


def table(package: str, root: Path = ROOT) -> str:
    """A package's counts as text: a row for each file, a column for each kind."""
    files = count(package, root)
    files["all"] = sum(files.values(), Counter())
    rows = [[package, *KINDS[:1], "prose", *KINDS[1:], "lines", "share that teaches"]]
    for name, counts in files.items():
        total = sum(counts[kind] for kind in KINDS)
        rows.append([name, counts["teach"], counts["prose"], *(counts[kind] for kind in KINDS[1:]), total,
                     f"{counts['teach'] / max(total, 1):.0%}"])
    text = "\n".join("".join(f"{value:<16}" if column == 0 else f"{value or '–':>{len(rows[0][column]) + 2}}"
                             for column, value in enumerate(row)) for row in rows)
    engine = sorted((root / package / "engine").rglob("*.py"))
    lines = sum(1 for path in engine for line in path.read_text("utf-8").splitlines() if line.strip())
    return f"{text}\nengine/: {lines} lines in {len(engine)} files"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.lines", description=__doc__.partition("\n")[0])
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="one or more of " + ", ".join(PACKAGES))
    parser.add_argument("--show", choices=KINDS, help="list the lines of this kind instead of counting")
    given = parser.parse_args(arguments)
    for package in given.packages:
        if package not in PACKAGES:
            parser.error(f"{package!r} is not a package; choose from {', '.join(PACKAGES)}")
    for package in given.packages or PACKAGES:
        if given.show:
            for path in lesson(package):
                source = path.read_text("utf-8")
                lines = source.splitlines()
                for number, kind in kinds(source, path.stem).items():
                    if kind == given.show:
                        print(f"{package}/{path.name}:{number}: {lines[number - 1]}")
        else:
            print(table(package) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
