"""What several packages share: files that are equal byte for byte, and code that may differ, with the reason.

    uv run python -m scripts.copies             copy each file that was changed since git's HEAD to its twins
    uv run python -m scripts.copies FILE …      copy these files to their twins, whatever git says
    uv run python -m scripts.copies --readme    write the diffs of model.py into the READMEs
    uv run python -m scripts.copies --check     write nothing; exit code 1 if one of the above has something to do

Every package stands alone, so what is the same idea is the same file in each of them. tests/test_copies.py reads the
tables below.
"""

import argparse
import ast
import difflib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL = ("qwen3", "qwen3_moe", "deepseek_v3")
QWEN, EXPERTS = ALL[:2], ALL[1:]

# Files that are equal byte for byte: path -> the packages that have it.
EQUAL = {
    "layers.py": QWEN,
    "generate.py": QWEN,
    "tokenizer.py": QWEN,
    "engine/experts.py": EXPERTS,
    "engine/expert_picture.py": EXPERTS,
    **{f"engine/{name}.py": ALL for name in (
        "__init__", "architecture_fields", "arguments", "batch", "batch_file", "chat_formats", "chatml_shapes",
        "compiled", "continuous", "conversation", "fast", "fields", "fp8", "generation_fields", "int4",
        "integer_fields", "integer_linear", "journal", "memory", "nibbles", "one_query", "packed_formats",
        "parallel", "prepare", "processes", "progress", "prompts", "quantization_fields", "quantized", "releases",
        "replicas", "requests", "rope_fields", "rounding", "safetensors_reader", "shares", "sizes", "supported",
        "template_expressions", "template_reader", "template_shapes", "templates", "terminal", "tiktoken_vocab",
        "vocabulary", "yarn")},
}
# Where a package keeps such a file under another name: (package, path) -> its path in that package.
ELSEWHERE = {("deepseek_v3", "engine/yarn.py"): "yarn.py"}  # a lesson there, where it is on
# Files of the engine that have one name in several packages and differ: path -> why.
OWN = {"engine/parts.py": "what the other files of the engine have to know of this package's architecture"}
# Functions, methods and classes of one name in the lesson that differ: "file.py name" -> why.
MAY_DIFFER = {
    "config.py Config": "each architecture has fields of its own",
    "config.py Config.from_checkpoint": "each architecture has fields of its own",
    "config.py Config.is_sparse": "which layers have experts is said in other fields",
    "layers.py inverse_frequencies": "only a part of each head is rotated",
    "layers.py KVCache.__init__": "the draft layer has a cache of its own",
    "layers.py KVCache.truncate": "the draft layer has a cache of its own",
    "tokenizer.py Tokenizer.chat": "each family's own chat format",
    "generate.py new_cache": "the draft layer has a cache of its own",
    "moe.py Router": "a softmax in one, sigmoids, a bias and groups in the other",
    "model.py Layer.__init__": "where the experts come in",
    "model.py Transformer.__init__": "the layer that predicts a second token",
    "model.py Transformer.forward": "the layer that predicts a second token shares its inner part",
    "weights.py load_model": "the mapped files are a lesson of the mixture of experts",
    "generate.py generate": "speculative",
    "main.py parse_arguments": "--show-experts, --speculative",
    "main.py run": "--show-experts, --speculative",
}
# What a package's README shows of its model.py: package -> the package that it is compared to.
COMPARED = {"qwen3_moe": "qwen3", "deepseek_v3": "qwen3_moe"}
BEGIN, END = "<!-- begin: scripts.copies --readme writes this diff -->", "<!-- end of the diff -->"


def twins() -> list[list[str]]:
    """Paths that are equal byte for byte, in groups."""
    return [[f"{package}/{ELSEWHERE.get((package, path), path)}" for package in packages]
            for path, packages in EQUAL.items()]


def at_head(root: Path, path: str) -> bytes | None:
    """What git's last commit has at this path; None if it has nothing. ValueError without git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=root, capture_output=True)
        shown = subprocess.run(["git", "show", f"HEAD:./{path}"], cwd=root, capture_output=True)
    except OSError:
        commit = None
    if commit is None or commit.returncode:
        raise ValueError(f"git cannot say which copy of {path} was changed; name the one that is right: "
                         "python -m scripts.copies FILE")
    return shown.stdout if shown.returncode == 0 else None


def differing(root: Path, groups: list[list[str]]) -> list[list[str]]:
    """The groups that are not equal, or lack a file."""
    return [group for group in groups if len({content(root, path) for path in group}) > 1]


def content(root: Path, path: str) -> bytes | None:
    return (root / path).read_bytes() if (root / path).is_file() else None


def source_of(root: Path, group: list[str]) -> str:
    """Of copies that differ the one to copy: the changed one; or ValueError if there are several, or none."""
    there = [path for path in group if content(root, path) is not None]
    changed = [path for path in there if content(root, path) != at_head(root, path)]
    candidates = changed or there  # a missing twin is made from the others, if these are equal
    versions = {content(root, path): path for path in reversed(candidates)}
    if len(versions) == 1:
        return candidates[0]
    first, second = list(versions.values())[-2:][::-1]
    what = "were both changed, in different ways" if changed else "differ, and git says that neither was changed"
    raise ValueError(f"{first} and {second} {what}; name the one that is right: python -m scripts.copies FILE")


def group_of(root: Path, groups: list[list[str]], name: str) -> tuple[str, list[str]]:
    """A file named by the user -> its path in the tables, and its group."""
    path = Path(name).resolve()
    for group in groups:
        for member in group:
            if path == (root / member).resolve():
                if not path.is_file():
                    raise ValueError(f"{member}: no such file; name a copy that is there")
                return member, group
    raise ValueError(f"{name} has no twins; the files that have some are in the table EQUAL of scripts/copies.py")


def copy(root: Path, groups: list[list[str]], names: list[str], say: Callable[[str], None]) -> None:
    """Make twins equal. Everything is decided before anything is written."""
    if names:
        chosen = [group_of(root, groups, name) for name in names]
    else:
        chosen = [(source_of(root, group), group) for group in differing(root, groups)]
    for source, group in chosen:
        for path in group:
            if content(root, path) != content(root, source):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(content(root, source))
                say(f"{source} -> {path}")


def definition_at(source: str, line: int) -> str:
    """The class and function that a line stands in, such as "Layer.__init__"."""
    around = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.ClassDef, ast.FunctionDef))
              and node.lineno <= line <= node.end_lineno]
    return ".".join(node.name for node in sorted(around, key=lambda node: node.lineno)) or "top of the file"


def changed_line(hunk: list[str], first: int) -> int:
    """Where a hunk's first changed line that is not blank stands in the new file; the hunk begins at line `first`."""
    line = first
    for text in hunk:
        if text[0] in "+-" and text[1:].strip():
            break
        line += text[0] != "-"
    return line


def readable_diff(before: str, after: str, old: str, new: str) -> str:
    """A unified diff whose hunks are headed by the name of what changed, not by line numbers."""
    out, lines = [], list(difflib.unified_diff(before.splitlines(), after.splitlines(), old, new, n=2, lineterm=""))
    for number, line in enumerate(lines):
        if hunk := re.match(r"@@ -\d+(?:,\d+)? \+(\d+)", line):
            line = f"@@ {definition_at(after, changed_line(lines[number + 1:], int(hunk[1])))} @@"
        out.append(line.rstrip())
    return "\n".join(out)


def with_diff(root: Path, package: str) -> tuple[str, str]:
    """A package's README as it is, and as it should be: with the diff of model.py between its markers."""
    old, new = f"{COMPARED[package]}/model.py", f"{package}/model.py"
    text = (root / package / "README.md").read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{package}/README.md: expected one line `{BEGIN}` and below it one `{END}`")
    diff = readable_diff((root / old).read_text("utf-8"), (root / new).read_text("utf-8"), old, new)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return text, f"{before}{BEGIN}\n```diff\n{diff}\n```\n{END}{after}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.copies", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="copy this file to its twins, whatever git says")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--readme", action="store_true", help="write the diffs of model.py into the READMEs")
    what.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something differs")
    given = parser.parse_args(arguments)
    if given.files and (given.readme or given.check):
        parser.error("FILE cannot be combined with --readme or --check")
    try:
        stale = [package for package in COMPARED if len(set(with_diff(root, package))) > 1] if (
            given.readme or given.check) else []
        if given.check:
            groups = differing(root, twins())
            for group in groups:
                print(f"{', '.join(group)}: not equal")
            for package in stale:
                print(f"{package}/README.md: not the diff of today's model.py")
            return int(bool(groups or stale))
        if given.readme:
            for package in stale:
                (root / package / "README.md").write_text(with_diff(root, package)[1], "utf-8")
                print(f"{package}/README.md: written")
        else:
            copy(root, twins(), given.files, print)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
