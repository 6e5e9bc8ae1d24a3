"""One function of the learner, in the real module: so each exercise is checked alone, in any order.

The module is run anew from its real source. Then these statements of the learner's file run in it: the function that
is asked for, imports, and names that the real file does not have (helpers). Everything else stays as in the package.
All keep the learner's file name and line numbers, so that an error names the learner's line.
"""

import ast
import functools
import importlib
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from .exercises import COMMAND, EXTRA, Exercise, bound, find, source_path


class Off(Exception):
    """An exercise is not right; the text says in one sentence what is off."""


def real_name(package: str, file: str) -> str:
    return f"{__package__}.solutions" if file == EXTRA else f"{package}.{Path(file).stem}"


@functools.lru_cache(maxsize=64)
def real_code(package: str, file: str) -> tuple[ast.Module, CodeType]:
    path = source_path(package, file)
    tree = ast.parse(path.read_text("utf-8"))
    return tree, compile(tree, str(path), "exec")


def real_module(package: str, file: str) -> ModuleType:
    """A fresh copy of the real module; its relative imports are those of the package."""
    name = real_name(package, file)
    importlib.import_module(name)
    module = ModuleType(name)
    module.__package__, module.__file__ = name.rpartition(".")[0], str(source_path(package, file))
    exec(real_code(package, file)[1], module.__dict__)
    return module


def read(path: Path) -> ast.Module:
    """The learner's file. Off where Python cannot read it."""
    try:
        return ast.parse(path.read_text("utf-8-sig"), str(path))
    except FileNotFoundError:
        raise Off(f"{path.name} is gone; the command without --check writes it again") from None
    except SyntaxError as error:
        where = f"{path.name}, line {error.lineno}: Python cannot read this line" if error.lineno else \
            f"{path.name}: Python cannot read it"
        raise Off(f"{where} ({error.msg})") from None
    except (OSError, ValueError) as error:  # not to be read, not UTF-8, null bytes
        raise Off(f"{path.name} cannot be read: {str(error)[:120]}") from None


def graft(package: str, exercise: Exercise, path: Path) -> ModuleType:
    """The real module with the learner's function in it. Off in one sentence where that cannot be."""
    tree, original = read(path), real_code(package, exercise.file)[0]
    module, known = real_module(package, exercise.file), {}
    for node in original.body:
        known |= dict.fromkeys(bound(node), node)
    same = {ast.dump(node) for node in original.body}
    owner, _, name = exercise.target.rpartition(".")
    wanted = find(tree, exercise.target)
    if wanted is None:
        what = f"{name} of class {owner}" if owner else f"function {name}"
        raise Off(f"{path.name}: the {what} is gone; {COMMAND} {package} --again {exercise.name} puts it back")

    real = getattr(module, owner or name)
    before = parameters(getattr(real, name) if owner else real)
    for node in tree.body:
        if owner and isinstance(node, ast.ClassDef) and node.name == owner:
            if wanted in node.body:
                transplant(module, real, node, find_class(original, owner), name, path)
        elif node is wanted or is_import(node) or not (bound(node) & known.keys() or ast.dump(node) in same):
            execute([node], module, path)
    after = parameters(vars(real)[name] if owner else getattr(module, name))
    if after is not None and before is not None and after[:len(before)] != before:
        raise Off(f"{path.name}, line {wanted.lineno}: the parameters of {name} must stay "
                  f"({', '.join(before)}), they are ({', '.join(after)})")
    return module


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def find_class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def parameters(function: Callable) -> list[str] | None:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def execute(nodes: list[ast.stmt], module: ModuleType, path: Path) -> None:
    try:
        exec(compile(ast.Module(nodes, []), str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise Off(f"{path.name}, line {error.lineno}: Python cannot read this line ({error.msg})") from None
    except (Exception, SystemExit) as error:  # whatever a learner's file does
        raise Off(f"{path.name}{line_of(error, path)}: {type(error).__name__}: {one_line(error)}") from None


def transplant(module: ModuleType, real: type, node: ast.ClassDef, original: ast.ClassDef, name: str,
               path: Path) -> None:
    """The learner's method, and what else of the class is new or changed and no exercise, go into the real class."""
    own = {ast.dump(part) for part in original.body}
    others = {target for part in original.body for target in bound(part)} - {"__init__"}
    body = [part for part in node.body if bound(part) and ast.dump(part) not in own
            and (name in bound(part) or not bound(part) & others)]
    if not any(name in bound(part) for part in body):  # written exactly as in the package
        body += [part for part in node.body if name in bound(part)]
    scratch = ast.ClassDef(node.name, node.bases, node.keywords, body, [], lineno=node.lineno,
                           col_offset=node.col_offset, end_lineno=node.end_lineno, end_col_offset=node.end_col_offset)
    if hasattr(node, "type_params"):
        scratch.type_params = []
    execute([scratch], module, path)
    made = getattr(module, node.name)
    setattr(module, node.name, real)
    for part in body:
        for key in bound(part):
            value = vars(made)[key]
            inner = getattr(value, "__func__", value)
            for cell in (getattr(inner, "__closure__", None) or ()) if isinstance(inner, FunctionType) else ():
                if cell.cell_contents is made:  # what super() without arguments looks at
                    cell.cell_contents = real
            setattr(real, key, value)


def line_of(error: BaseException, path: Path) -> str:
    """", line 12": the last line of the learner's file that was running."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def one_line(error: BaseException) -> str:
    first, *_ = str(error).splitlines() or [""]
    return first[:150]
