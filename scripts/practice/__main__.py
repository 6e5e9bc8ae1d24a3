"""The workshop: build a package yourself, one body after the other.

    uv run python -m scripts.practice qwen3                     write practice/qwen3/, or show what is done
    uv run python -m scripts.practice qwen3 --check             check all; when all are right, your package answers
    uv run python -m scripts.practice qwen3 --check rms_norm    check one
    uv run python -m scripts.practice qwen3 --hint rms_norm     a hint; the next call shows a stronger one
    uv run python -m scripts.practice qwen3 --solution rms_norm
    uv run python -m scripts.practice qwen3 --again rms_norm    take it out once more; the old file is kept beside it
    uv run python -m scripts.practice qwen3 --fresh             begin anew; the old folder is kept under another name
"""

import argparse
import ast
import contextlib
import difflib
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

from . import folder as folders
from .exercises import COMMAND, PACKAGES, ROOT, Exercise, find, of, reading, region, source_path
from .folder import State, shown

ALL = "all"


class Parser(argparse.ArgumentParser):
    """One sentence for a mistake, exit code 2."""

    def error(self, message: str) -> NoReturn:
        if "required: PACKAGE" in message:
            message = f"say which package: {', '.join(PACKAGES)}"
        print(f"practice: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.practice", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", metavar="PACKAGE", help=", ".join(PACKAGES))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", nargs="?", const=ALL, metavar="NAME", help="exit code 1 where one is not right")
    for flag, meaning in (("--hint", "three, each stronger than the one before"), ("--solution", "the real body"),
                          ("--again", "take the body out once more")):
        what.add_argument(flag, metavar="NAME", help=meaning)
    what.add_argument("--fresh", action="store_true", help="begin anew")
    arguments = parser.parse_args(words)
    if arguments.package not in PACKAGES:
        parser.error(f"there is no package {arguments.package[:40]!r}: {', '.join(PACKAGES)}")
    names = of(arguments.package)
    for name in (arguments.check, arguments.hint, arguments.solution, arguments.again):
        if name is not None and name not in names and not (name == ALL and arguments.check == ALL):
            near = difflib.get_close_matches(name, names, 1)
            parser.error(f"{arguments.package} has no exercise {name[:40]!r}"
                         + (f", did you mean {near[0]}?" if near else f": {', '.join(names)}"))
    return arguments


def plural(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def line_in(path: Path, exercise: Exercise) -> str:
    """practice/qwen3/layers.py:31, where Python can read the file."""
    try:
        node = find(ast.parse(path.read_text("utf-8-sig")), exercise.target)
        return f"{shown(path)}:{node.lineno}"
    except (OSError, SyntaxError, ValueError, AttributeError):
        return shown(path)


def show_stages(package: str, folder: Path, state: State) -> None:
    exercises = of(package)
    for name, exercise in exercises.items():
        done = "right" if name in state.right else ""
        print(f"  {name:20} {exercise.level:7} {exercise.minutes:2} min  {done:6} "
              f"{line_in(folder / exercise.file, exercise)}")
    print(f"{len([name for name in exercises if name in state.right])} of {len(exercises)} right")


def show_next(package: str, folder: Path, right: list[str]) -> None:
    exercise = next((exercise for name, exercise in of(package).items() if name not in right), None)
    if exercise is None:
        print(f"All were right when they were last checked; `{COMMAND} {package} --check` lets your package answer")
        return
    print(f"next: {exercise.name} ({exercise.level}, {exercise.minutes} minutes), in "
          f"{line_in(folder / exercise.file, exercise)}; read {reading(package, exercise)}; "
          f"stuck? `{COMMAND} {package} --hint {exercise.name}`")


def begin(package: str, folder: Path) -> None:
    """Write the folder, or say what is there."""
    there = folder.exists()
    written = folders.write(package, folder)
    state, exercises = State.of(folder), of(package)
    if not there:
        minutes = sum(exercise.minutes for exercise in exercises.values())
        print(f"{shown(folder)} is written: {package} with {len(exercises)} bodies taken out, about {minutes} minutes "
              "in all, in any order:")
    else:
        again = f"; {', '.join(written)} was missing and is written again" if written else ""
        print(f"{shown(folder)} is there and stays as it is{again}:")
    show_stages(package, folder, state)
    show_next(package, folder, state.right)


def check(package: str, folder: Path, names: list[str]) -> int:
    """Say of each exercise whether it is right, and how many are; 0 where all of these are, else 1."""
    from .process import verdicts

    exercises, state, right = of(package), State.of(folder), []
    for found in verdicts(package, folder, names):
        name, text = found["name"], found["text"]
        if found["state"] == "right":
            right.append(name)
            text = "right" + (f"; {text}, take that out" if text else "")
        print(f"{name:20} {'not written yet' if found['state'] == 'not written' else text}", flush=True)
    state.right = [name for name in exercises if name in right or (name in state.right and name not in names)]
    remember(state)
    print(f"{len(right)} of {len(names)} right" if len(names) > 1 else
          f"{len(state.right)} of {len(exercises)} right so far")
    if len(names) == len(exercises) == len(right):
        return answer(package, folder)
    if len(right) < len(names) or len(names) == 1:
        show_next(package, folder, right if len(names) > 1 else state.right)
    return 0 if len(right) == len(names) else 1


def answer(package: str, folder: Path) -> int:
    """All are right: the learner's own package speaks."""
    from .process import verdicts
    from .worker import QUESTION

    print(f"Now your own {package} loads {PACKAGES[package]} and is asked: {QUESTION}", flush=True)
    (found,) = verdicts(package, folder, ["answer"])
    elsewhere = folders.changed_elsewhere(package, folder)
    where = f"; you changed as well: {', '.join(elsewhere)[:120]}" if elsewhere else ""
    if found["state"] == "wrong":
        print(f"Each exercise is right by itself, and together they do not run: {found['text']}{where}")
        return 1
    print(f"  {found['text']}")
    if found["state"] == "other":
        print(f"The package itself answers otherwise: {found['ours'][:120]!r}{where}")
        return 1
    print(f"Congratulations: this answer was computed by your code alone, {shown(folder)}, and is the package's own, "
          "word for word.")
    return 0


def hint(package: str, folder: Path, name: str) -> None:
    state, exercise = State.of(folder), of(package)[name]
    number = min(max(state.hints.get(name, 0), 0) + 1, len(exercise.hints))
    state.hints[name] = number
    print(textwrap.fill(f"hint {number} of {len(exercise.hints)}: {exercise.hints[number - 1]}", 100,
                        break_on_hyphens=False))
    print(f"the next is stronger: `{COMMAND} {package} --hint {name}`" if number < len(exercise.hints) else
          f"that was the last: `{COMMAND} {package} --solution {name}` shows the real body")
    remember(state)


def remember(state: State) -> None:
    try:
        state.save()
    except OSError as error:
        print(f"practice: {shown(state.path)} cannot be written ({error.strerror}), so this is not remembered",
              file=sys.stderr)


def solution(package: str, name: str) -> None:
    exercise = of(package)[name]
    path = source_path(package, exercise.file)
    source = path.read_text("utf-8")
    first, last = region(source, exercise)
    print(f"# {path.relative_to(ROOT)}, lines {first}-{last}, of {exercise.target}")
    print("\n".join(source.splitlines()[first - 1:last]))


def run(arguments: argparse.Namespace, practice: Path) -> int:
    """Do what the flags ask for, in the folder of all practice copies; the exit code."""
    package, folder = arguments.package, practice / arguments.package
    if arguments.solution:
        solution(package, arguments.solution)
        return 0
    if arguments.check or arguments.hint or arguments.again:
        if not folder.is_dir():
            raise FileNotFoundError(f"{shown(folder)} is not there yet: `{COMMAND} {package}` writes it")
    if arguments.check:
        return check(package, folder, list(of(package)) if arguments.check == ALL else [arguments.check])
    if arguments.hint:
        hint(package, folder, arguments.hint)
    elif arguments.again:
        kept = folders.put_back(package, of(package)[arguments.again], folder)
        print(f"{arguments.again} is taken out again in {shown(folder / of(package)[arguments.again].file)}; the file "
              f"before that is {shown(kept)}")
    else:
        if arguments.fresh and folder.exists():
            print(f"what you had is kept as {shown(folders.set_aside(folder))}")
        begin(package, folder)
    return 0


def main(words: list[str] | None = None, practice: Path = ROOT / "practice") -> int:
    """0; 1 where an exercise is not right; 2 with one sentence for a mistake; 130 after Ctrl-C."""
    try:
        return run(parse(words), practice)
    except BrokenPipeError:  # whoever reads has left, as `head` does
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"practice: {error}", file=sys.stderr)
    except OSError as error:
        where = shown(Path(error.filename or practice))
        reason = str(error) if error.strerror is None else f"{where}: {error.strerror}"
        print(f"practice: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")
    sys.exit(main())
