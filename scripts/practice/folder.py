"""practice/PACKAGE/: the learner's copy. Written once; what a learner wrote is never lost.

    write       a folder that is not there yet, all of it or nothing; files that are missing in one that is
    put_back    one exercise is taken out again; the file before that is kept beside it
    set_aside   the whole folder gets another name
    State       what a learner has reached, in progress.json
"""

import ast
import json
import os
import shutil
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from .exercises import COMMAND, EXTRA, ROOT, Exercise, bound, find, of, reading, region, source_path

WIDTH = 118


def shown(path: Path) -> str:
    """As short as it can be typed."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def stub(package: str, exercise: Exercise, indent: str) -> list[str]:
    """What stands where the body was."""
    words = [f"EXERCISE {exercise.name} ({exercise.level}, {exercise.minutes} minutes). Read "
             f"{reading(package, exercise)}.", exercise.task,
             f"Check: {COMMAND} {package} --check {exercise.name}"]
    lines = [line for text in words for line in textwrap.wrap(text, WIDTH - len(indent) - 2, break_on_hyphens=False)]
    return [f"{indent}# {line}" for line in lines] + [
        f'{indent}raise NotImplementedError("exercise {exercise.name} is still to be written")']


def take_out(source: str, package: str, exercises: list[Exercise]) -> str:
    """A file's text with stubs in place of the exercises' bodies."""
    lines = source.splitlines()
    regions = sorted(((region(source, exercise), exercise) for exercise in exercises), key=lambda one: one[0])
    for (first, last), exercise in reversed(regions):
        body = next(line for line in lines[first - 1:last] if line.strip())
        lines[first - 1:last] = stub(package, exercise, body[:len(body) - len(body.lstrip())])
    return "\n".join(lines) + "\n"


def files_of(package: str) -> dict[str, str]:
    """Everything that the folder holds, path -> text: the package with its exercises taken out."""
    exercises = of(package).values()
    paths = [path for path in sorted((ROOT / package).rglob("*.py")) if "__pycache__" not in path.parts]
    files = {path.relative_to(ROOT / package).as_posix(): path.read_text("utf-8") for path in paths}
    if any(exercise.file == EXTRA for exercise in exercises):
        files[EXTRA] = extra_file(package)
    for name in {exercise.file for exercise in exercises}:
        files[name] = take_out(files[name], package, [exercise for exercise in exercises if exercise.file == name])
    return files


def extra_file(package: str) -> str:
    """What is the body of no package: the functions of solutions.py that this package's exercises are."""
    source = source_path(package, EXTRA).read_text("utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    parts = ['"""Exercises that are the body of no file of the package."""', "\n".join(
        line for line in lines if line.startswith(("import ", "from ")))]
    for exercise in of(package).values():
        if exercise.file == EXTRA:
            node = find(tree, exercise.target)
            parts.append("\n" + "\n".join(lines[node.lineno - 1:node.end_lineno]))
    return "\n\n".join(parts) + "\n"


def write(package: str, folder: Path) -> list[str]:
    """Make the folder, or add what is missing in it; the files that were written."""
    files = files_of(package)
    if not folder.exists():
        new = folder.with_name(f".{folder.name}.{os.getpid()}")  # renamed when complete: Ctrl-C may come
        try:
            for name, text in files.items():
                save(new / name, text)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return list(files)
    missing = [name for name in files if not (folder / name).exists()]
    for name in missing:
        save(folder / name, files[name])
    return missing


def save(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def free_name(path: Path) -> Path:
    """A name beside it that nothing has: layers.old-1.py, layers.old-2.py, …"""
    number = 1
    while (other := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    return other


def set_aside(folder: Path) -> Path:
    other = free_name(folder)
    folder.rename(other)
    return other


def put_back(package: str, exercise: Exercise, folder: Path) -> Path:
    """The exercise as it was at first; the rest of the file stays. Returns where the file before that is kept."""
    path = folder / exercise.file
    text = path.read_text("utf-8-sig")
    original = files_of(package)[exercise.file]
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{shown(path)}, line {getattr(error, 'lineno', 1)}: Python cannot read this line; mend it "
                         f"first, or begin anew with --fresh") from None
    fresh, mine = find(ast.parse(original), exercise.target), find(tree, exercise.target)
    lines, new = text.splitlines(), original.splitlines()[first_line(fresh) - 1:fresh.end_lineno]
    owner = exercise.target.rpartition(".")[0]
    if mine is not None:
        lines[first_line(mine) - 1:mine.end_lineno] = new
    elif not owner:
        lines += ["", "", *new]
    elif (node := find(tree, owner)) is not None:
        lines[node.end_lineno:node.end_lineno] = ["", *new]
    else:
        raise ValueError(f"{shown(path)}: the class {owner} is gone, so {exercise.name} has no place; begin anew with "
                         "--fresh")
    kept = free_name(path)
    save(kept, text)
    save(path, "\n".join(lines) + "\n")
    return kept


def first_line(node: ast.AST) -> int:
    """That of its first decorator, if it has one."""
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])


@dataclass
class State:
    """How many hints were shown of each exercise, and which were right when they were last checked."""

    path: Path
    hints: dict[str, int] = field(default_factory=dict)
    right: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> "State":
        """What is damaged counts as nothing."""
        state = cls(folder / "progress.json")
        try:
            found = json.loads(state.path.read_text("utf-8"))
            hints, right = found["hints"], found["right"]
            state.hints = {name: number for name, number in hints.items() if isinstance(number, int)}
            state.right = [name for name in right if isinstance(name, str)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass
        return state

    def save(self) -> None:
        """Written beside and renamed, so that Ctrl-C leaves the old one."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"hints": self.hints, "right": self.right}, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)


def changed_elsewhere(package: str, folder: Path) -> list[str]:
    """Parts of the package, outside of the exercises, that are not as they were: "layers.py: new_weight"."""
    found = []
    for name, text in files_of(package).items():
        try:
            mine = parts(ast.parse((folder / name).read_text("utf-8-sig")))
        except (OSError, SyntaxError, ValueError):
            found.append(name)
            continue
        targets = {exercise.target for exercise in of(package).values() if exercise.file == name}
        found += [f"{name}: {part}" for part, dump in parts(ast.parse(text)).items()
                  if part not in targets and mine.get(part) != dump]
    return found


def parts(tree: ast.Module) -> dict[str, str]:
    """Functions, methods and other named statements of a file, by name."""
    every = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            every |= {f"{node.name}.{name}": ast.dump(part) for part in node.body for name in bound(part)}
        else:
            every |= {name: ast.dump(node) for name in bound(node)}
    return every
