"""A page becomes a notebook whose cells run from top to bottom, on your machine or in Colab.

    uv run python -m scripts.notebook qwen3          notebooks/qwen3.ipynb
    uv run --with jupyterlab jupyter lab notebooks/qwen3.ipynb

What becomes of a page:

    prose          Markdown cells, one a section; folded parts stay folded, comments are left out
    ```python      a code cell; inside <details> one whose source is hidden, since later blocks may need it
    ```bash        a code cell where the command only asks an embedded model something; it is run by the kernel's own
                   Python, since `uv run` would install PyTorch once more in Colab. All others stay text: they download,
                   train, test or converse, and "run all" should do none of that
    ```text        below a code cell the output that it is to have, else text
    pictures       embedded, as <img> with a data URI: editors refuse an SVG that is attached, or that Markdown links
    links          absolute where the repository has a public address, else relative to the notebook
"""

import argparse
import base64
import hashlib
import html
import json
import mimetypes
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = ""  # where Colab gets the code: https://…; empty: the address of git's remote "origin"
PLACEHOLDER = "https://github.com/OWNER/REPOSITORY"
PAGES = {"qwen3": "qwen3/README.md", "qwen3_moe": "qwen3_moe/README.md", "deepseek_v3": "deepseek_v3/README.md",
         "train": "scripts/train/README.md"}
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$\n?", re.M | re.S)
DETAILS = re.compile(r"<details[^>]*>\s*<summary>(.*?)</summary>|</details>", re.S)
SETUP = '''\
REPOSITORY = {address!r}{why}

def open_repository(address, needed=("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy")):
    """Go to the root of the repository; clone it where it is not, and install what Python lacks."""
    import importlib.util, os, subprocess, sys
    from pathlib import Path

    here, name = Path.cwd(), "llm-from-scratch"
    places = [here, *here.parents, here / name]
    root = next((place for place in places if (place / {page!r}).is_file()), None)
    if root is None and address == {placeholder!r}:
        raise SystemExit("The repository is not here, and its address is not known: write it into REPOSITORY above.")
    if root is None:
        root = here / name
        subprocess.run(["git", "clone", "--depth", "1", address, str(root)], check=True)
    os.chdir(root)
    sys.path.insert(0, str(root))
    if missing := [each for each in needed if importlib.util.find_spec(each) is None]:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

open_repository(REPOSITORY)
import sys  # for the commands below'''


class Notebook:
    """Cells as they come: prose is gathered until code, or the next section, begins."""

    def __init__(self, name: str):
        self.name, self.cells, self.prose, self.summary = name, [], "", None  # summary: of the <details> that is open

    def add(self, kind: str, source: str, **more) -> None:
        source = source.strip("\n")
        extra = {"execution_count": None, "outputs": []} if kind == "code" else {}
        self.cells.append({"cell_type": kind, "id": f"{self.name}-{len(self.cells)}", "metadata": {}, **extra, **more,
                           "source": source.splitlines(keepends=True)})

    def flush(self) -> None:
        text = re.sub(r"<details><summary>[^<]*, continued</summary>\s*</details>", "", self.prose)
        if text.strip():
            self.add("markdown", text)
        self.prose = ""

    def write(self, prose: str) -> None:
        """Prose outside of fenced blocks; a new cell at each section."""
        for part in re.split(r"^(?=##? )", prose, flags=re.M):
            if self.summary is None and re.match(r"##? ", part):
                self.flush()
            self.prose += part
            for tag in DETAILS.finditer(part):
                self.summary = tag[1]

    def code(self, source: str) -> None:
        """A code cell. Inside <details> the fold is closed before it and opened again after it."""
        hidden = {}
        if self.summary is not None:
            before, tag, inside = self.prose.rpartition("</summary>")
            if inside.strip():
                self.prose += "\n</details>\n"
            else:
                opening = before.rpartition("<details")[0]
                self.prose = f"{opening}**{self.summary}** (the next cell is folded)\n"
            hidden = {"metadata": {"jupyter": {"source_hidden": True}, "cellView": "form"}}
        self.flush()
        self.add("code", source, **hidden)
        if self.summary is not None:
            self.prose = f"<details><summary>{self.summary}, continued</summary>\n\n"

    def output(self, text: str) -> None:
        """What the last code cell is to print."""
        self.cells[-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text.splitlines(True)}]


def runs_in_a_cell(command: str) -> bool:
    """Whether it asks an embedded model one question: not a download, a training, a test or a conversation."""
    words = shlex.split(command, comments=True)
    asks = re.fullmatch(r"uv run python -m \w+\.main", " ".join(words[:5])) and not words[4].startswith("scripts")
    return bool(asks) and not {"--chat", "-m", "--model", "-d", "--device", "|", ">", "<"} & set(words[5:])


def as_cell(commands: str) -> str:
    """`uv run python …` for the kernel's own Python; in such a line IPython would fill in {} and $."""
    lines = [line.replace("{", "{{").replace("}", "}}").replace("$", "$$") for line in commands.strip().splitlines()]
    return "\n".join(re.sub(r"^uv run python", '!"{sys.executable}"', line) for line in lines)


def with_links(text: str, page: str, address: str, out: Path) -> str:
    """Pictures embedded, links of the page made to lead on from the notebook. Code in the prose is left alone."""
    folder = (ROOT / page).parent

    def picture(match: re.Match) -> str:
        file = folder / match[2]
        kind = mimetypes.guess_type(file.name)[0] or ""
        if "://" in match[2] or not kind.startswith("image/"):
            return match[0]
        if not file.is_file():
            raise FileNotFoundError(f"{page}: no picture {match[2]}")
        data = base64.b64encode(file.read_bytes()).decode()
        return f'<img alt="{html.escape(" ".join(match[1].split()))}" src="data:{kind};base64,{data}">'

    def link(match: re.Match) -> str:
        target, hash, anchor = match[1].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = os.path.relpath(folder / target, ROOT)
        new = f"{address}/blob/HEAD/{Path(path).as_posix()}" if address != PLACEHOLDER else Path(
            os.path.relpath(folder / target, out.resolve().parent)).as_posix()
        return f"]({new}{hash}{anchor})"

    parts = re.split(r"(`[^`\n]*`)", re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", picture, text))
    return "".join(part if i % 2 else re.sub(r"\]\(([^)\s]+)\)", link, part) for i, part in enumerate(parts))


def make(name: str, address: str, out: Path) -> dict:
    """The notebook of a page, as nbformat 4.5 has it."""
    page = PAGES[name]
    text = (ROOT / page).read_text(encoding="utf-8")
    book, end, last = Notebook(name), 0, None  # last: the language of a block that became a cell
    book.add("markdown", f"*A notebook of `{page}`, made by `python -m scripts.notebook {name}`. Run the first cell, "
             "then go on from top to bottom. Below a cell stands what it prints. Commands that download, train or "
             "converse are shown as text: run them in a terminal.*")
    why = "  # a placeholder: needed only where the repository is not here, as in Colab" * (address == PLACEHOLDER)
    book.add("code", SETUP.format(address=address, why=why, placeholder=PLACEHOLDER, page=page))
    for match in [*BLOCK.finditer(text), None]:
        prose = re.sub(r"<!--.*?-->\n?", "", text[end:match.start() if match else len(text)], flags=re.S)
        if prose.strip():
            last = None
        book.write(with_links(prose, page, address, out))
        if match is None:
            break
        end, (language, block) = match.end(), match.groups()
        is_command = language == "bash" and book.summary is None and all(map(runs_in_a_cell, block.splitlines()))
        if language == "python" or is_command:
            book.code(as_cell(block) if is_command else block)
            last = language
        elif language == "text" and last:
            book.output(block)
            last = None
        else:
            book.prose += match[0]
            last = None
    book.flush()
    return {"nbformat": 4, "nbformat_minor": 5, "cells": book.cells, "metadata": {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}, "llm_from_scratch": {"page": page, "sources": fingerprint(book.cells)}}}


def fingerprint(cells: list[dict]) -> str:
    """Of what is in the cells; running them changes only outputs, which do not count."""
    sources = [[cell["cell_type"], "".join(cell["source"])] for cell in cells]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def is_as_made(path: Path) -> bool:
    """Whether a notebook was written by this script, and its cells are those that it wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return fingerprint(found["cells"]) == found["metadata"]["llm_from_scratch"]["sources"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def find_address() -> str:
    """REPOSITORY, or git's remote where that is an https address that everybody can read, or a placeholder."""
    found = REPOSITORY
    if not found:
        try:
            found = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True,
                                   timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            found = ""
    found = found.removesuffix("/").removesuffix(".git")
    return found if re.fullmatch(r"https://([\w-]+\.)+[a-z]{2,}/[\w.~/-]+", found) else PLACEHOLDER


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.notebook", description=__doc__.partition("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("page", metavar="PAGE", help="one of " + ", ".join(PAGES))
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default notebooks/PAGE.ipynb")
    parser.add_argument("--replace", action="store_true", help="overwrite a notebook even if it was changed by hand")
    given = parser.parse_args(arguments)
    if given.page not in PAGES:
        parser.error(f"{given.page[:40]!r} is no page; choose from {', '.join(PAGES)}")
    out = given.output or ROOT / "notebooks" / f"{given.page}.ipynb"
    shown = str(out)[-80:] if given.output else f"notebooks/{given.page}.ipynb"
    if out.exists() and not given.replace and not is_as_made(out):
        parser.error(f"{shown} was changed by hand, or is no notebook of this script: -o writes another file, and "
                     "--replace overwrites this one")
    try:
        notebook = make(given.page, find_address(), out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        parser.error(f"{shown}: {error.strerror or error}"[:280])
    print(f"{shown}: {len(notebook['cells'])} cells; open it with `uv run --with jupyterlab jupyter lab {shown}`, or "
          "upload it to Colab")
    return 0


if __name__ == "__main__":
    sys.exit(main())
