"""Pages as notebooks: sound, complete, never written over what a person changed, and every cell runs."""

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import notebook
from scripts.notebook import PAGES, PLACEHOLDER, ROOT, as_cell, make, runs_in_a_cell
from tests.test_readmes import blocks

ADDRESS = "https://github.com/someone/llm-from-scratch"
RUN = r'''
import contextlib, io, json, re, shlex, subprocess, sys
namespace = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        continue
    wanted, printed = "".join("".join(one["text"]) for one in cell["outputs"]), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            if source.startswith("!"):  # as IPython does it
                for line in source.splitlines():
                    words = shlex.split(eval("f" + repr(line[1:]), namespace))
                    print(subprocess.run(words, check=True, capture_output=True, text=True).stdout, end="")
            else:
                exec(compile(source, f"cell {number}", "exec"), namespace)
    except BaseException as error:
        sys.exit(f"cell {number}: {type(error).__name__}: {error}\n{source}")
    if wanted and printed.getvalue() != wanted:
        sys.exit(f"cell {number} printed\n{printed.getvalue()}and not\n{wanted}")
print("every cell ran")
'''


def source(cell: dict) -> str:
    return "".join(cell["source"])


def outside_of_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def bare(text: str) -> list[str]:
    """The words, without where links lead, pictures, and what only folds."""
    text = re.sub(r"<summary>[^<]*, continued</summary>|\(the next cell is folded\)|<img [^>]*>", "", text)
    text = re.sub(r"</?(details|summary)[^>]*>|\*\*", " ", text)
    return re.sub(r"\]\([^)\s]+\)", "]", text).split()


@pytest.fixture(scope="module", params=PAGES)
def made(request) -> tuple[str, dict]:
    return request.param, make(request.param, ADDRESS, ROOT / f"notebooks/{request.param}.ipynb")


def test_it_is_what_nbformat_4_5_asks_for(made):
    name, book = made
    assert json.loads(json.dumps(book)) == book and book.keys() == {"nbformat", "nbformat_minor", "metadata", "cells"}
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"].keys() == {"display_name", "language", "name"}
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", id) for id in ids)
    for cell in book["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell["cell_type"] in ("code", "markdown")
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and source(cell).strip()
        for out in cell.get("outputs", []):
            assert out.keys() == {"output_type", "name", "text"} and out["output_type"] == "stream"


def test_every_block_is_there_once_and_in_order(made):
    name, book = made
    page = Path(PAGES[name])
    code = [source(cell) for cell in book["cells"][2:] if cell["cell_type"] == "code"]
    assert [one for one in code if not one.startswith("!")] == [
        text.strip("\n") for language, text, _ in blocks(page) if language == "python"]
    shown = "\n".join(source(cell) for cell in book["cells"] if cell["cell_type"] == "markdown")
    outputs = ["".join(out["text"]) for cell in book["cells"] for out in cell.get("outputs", [])]
    for language, text, line in blocks(page):
        places = shown.count(f"```{language}\n{text}```") + (
            outputs.count(text) if language == "text" else code.count(as_cell(text)) if language == "bash" else 0)
        again = [other for _, other, _ in blocks(page)].count(text)  # the same block may stand there twice
        assert (places == again) if language != "python" else places == 0, f"{page}, line {line}"


def test_prose_is_whole_and_shows_anywhere(made):
    name, book = made
    prose = [source(cell) for cell in book["cells"] if cell["cell_type"] == "markdown"]
    headings = re.findall(r"^##? .*", outside_of_blocks((ROOT / PAGES[name]).read_text("utf-8")), re.M)
    assert [cell.splitlines()[0] for cell in prose if re.match("##? ", cell)] == headings
    text = re.sub(r"`[^`\n]*`", "", outside_of_blocks("\n\n".join(prose)))
    assert text.count("<details") == text.count("</details>") == text.count("<summary>") and "<!--" not in text
    assert "![" not in text
    for picture in re.findall(r'src="([^"]*)"', text):
        kind, data = picture.split(";base64,")
        assert kind == "data:image/svg+xml" and base64.b64decode(data).startswith(b"<svg")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert target.startswith(("https://", "#")), target
        if target.startswith(ADDRESS):
            assert (ROOT / target.removeprefix(f"{ADDRESS}/blob/HEAD/").partition("#")[0]).exists(), target
    words = re.sub(r"<!--.*?-->", "", outside_of_blocks((ROOT / PAGES[name]).read_text("utf-8")), flags=re.S)
    assert bare(re.sub(r"!\[[^\]]*\]\([^)]*\)", "", words)) == bare(outside_of_blocks("\n\n".join(prose[1:])))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page of one's own: a function that writes it and gives its cells."""
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    monkeypatch.setitem(PAGES, "qwen3", "qwen3/README.md")
    monkeypatch.setattr(notebook, "find_address", lambda: PLACEHOLDER)
    (tmp_path / "qwen3").mkdir()

    def write(text: str, address: str = PLACEHOLDER) -> list[dict]:
        (tmp_path / "qwen3/README.md").write_text(text)
        return make("qwen3", address, tmp_path / "notebooks/qwen3.ipynb")["cells"][2:]
    return write


def test_a_fold_with_code_is_folded_still(page):
    fold, code = "<details><summary>Why</summary>\n\n", "```python\nx = 1\n```\n"
    cells = page(f"# A\n\n{fold}So.\n\n{code}\nMore.\n\n</details>\n\nEnd.\n")
    assert [source(cell) for cell in cells] == [
        "# A\n\n<details><summary>Why</summary>\n\nSo.\n\n\n</details>", "x = 1",
        "<details><summary>Why, continued</summary>\n\n\nMore.\n\n</details>\n\nEnd."]
    assert [cell["metadata"] for cell in cells] == [{}, {"jupyter": {"source_hidden": True}, "cellView": "form"}, {}]
    cells = page(f"A\n<details>\n<summary>Solution</summary>\n\n{code}```text\n1\n```\n</details>\n\nEnd.\n")
    assert [source(cell) for cell in cells] == ["A\n**Solution** (the next cell is folded)", "x = 1", "End."]
    assert cells[1]["outputs"][0]["text"] == ["1\n"]
    whole = "<details><summary>Why</summary>\n\n## B\n\n```diff\n+ a\n```\n\n</details>"
    assert [source(cell) for cell in page(whole + "\n")] == [whole]


def test_what_stands_in_a_cell_and_what_stays_text(page):
    cells = page("A\n```bash\nuv run python -m qwen3.main -p \"${x}\"\n```\n```text\ny\n```\n\nB\n```text\nz\n```\n"
                 "```bash\nbash scripts/download_qwen3.sh\nuv run python -m qwen3.main\n```\n<!-- gone -->\n")
    assert [source(cell) for cell in cells] == [
        "A", '!"{sys.executable}" -m qwen3.main -p "$${{x}}"',
        "B\n```text\nz\n```\n```bash\nbash scripts/download_qwen3.sh\nuv run python -m qwen3.main\n```"]
    assert cells[1]["outputs"][0]["text"] == ["y\n"]


@pytest.mark.parametrize("command,runs", [
    ('uv run python -m qwen3.main -p "What is RoPE?"', True), ("uv run python -m qwen3.main --plain", True),
    ("uv run python -m qwen3.main --chat", False), ("uv run python -m qwen3.main -m Qwen3-0.6B -p x", False),
    ("uv run python -m scripts.train qwen3 --minutes 10", False), ("bash scripts/download_qwen3.sh", False),
    ("uv run pytest", False), ("uv run python -m qwen3.main -p - < text.txt", False), ("", False),
    ("uv run python -m scripts.main", False)])
def test_only_short_questions_run_in_a_cell(command, runs):
    assert runs_in_a_cell(command) == runs


def test_links_and_pictures_lead_on(page, tmp_path):
    (tmp_path / "qwen3/one.svg").write_text("<svg/>")
    text = "[a](../b/c.py#d) [e](#f) [g](https://h.org/i) `[j](k)`\n![Say \"x\"\nnow](one.svg)\n"
    image = f'<img alt="Say &quot;x&quot; now" src="data:image/svg+xml;base64,{base64.b64encode(b"<svg/>").decode()}">'
    same = f"[e](#f) [g](https://h.org/i) `[j](k)`\n{image}"
    assert source(page(text)[0]) == f"[a](../b/c.py#d) {same}"  # from notebooks/, where no address is known
    assert source(page(text, ADDRESS)[0]) == f"[a]({ADDRESS}/blob/HEAD/b/c.py#d) {same}"
    with pytest.raises(FileNotFoundError, match="no picture two.svg"):
        page("![x](two.svg)")


def test_what_a_person_changed_is_not_overwritten(page, tmp_path, capsys):
    page("# A\n\n```python\nprint(1)\n```\n")
    out = tmp_path / "notebooks/qwen3.ipynb"
    assert notebook.main(["qwen3"]) == 0 and "notebooks/qwen3.ipynb: 4 cells" in capsys.readouterr().out
    first = out.read_text()
    book = json.loads(first)
    book["cells"][3] |= {"execution_count": 1, "outputs": [{"output_type": "stream", "name": "stdout", "text": "1\n"}]}
    out.write_text(json.dumps(book))  # it was run and saved by an editor, nothing else
    assert notebook.main(["qwen3"]) == 0 and out.read_text() == first
    book["cells"][3]["source"] = ["print(2)"]
    for changed in (json.dumps(book), "{}", "[]", "no JSON"):
        out.write_text(changed)
        with pytest.raises(SystemExit) as ended:
            notebook.main(["qwen3"])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and "changed by hand" in error and "Traceback" not in error
        assert out.read_text() == changed
    other = tmp_path / "new folder" / "mine.ipynb"
    assert notebook.main(["qwen3", "-o", str(other)]) == 0 and len(json.loads(other.read_text())["cells"]) == 4
    assert notebook.main(["qwen3", "--replace"]) == 0 and out.read_text() == first
    (tmp_path / "a file").write_text("")
    for words in (["gpt2"], ["qwen3", "-o", str(tmp_path / "a file" / "x.ipynb")], []):
        with pytest.raises(SystemExit) as ended:
            notebook.main(words)
        assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("remote,address", [
    (f"{ADDRESS}.git", ADDRESS), (f"{ADDRESS}/", ADDRESS), ("", PLACEHOLDER), ("git@github.com:a/b.git", PLACEHOLDER),
    ("https://user:secret@github.com/a/b", PLACEHOLDER), ("https://localhost/a/b", PLACEHOLDER),
    ("https://10.0.0.1/a/b", PLACEHOLDER), ("http://github.com/a/b", PLACEHOLDER), ("/srv/a", PLACEHOLDER)])
def test_only_a_public_address_is_written_down(remote, address, monkeypatch):
    monkeypatch.setattr(notebook, "REPOSITORY", "")
    monkeypatch.setattr(subprocess, "run", lambda *a, **b: subprocess.CompletedProcess([], 0, remote + "\n", ""))
    assert notebook.find_address() == address


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_first_cell_finds_the_repository_or_clones_it(tmp_path):
    def run(folder: Path, address: str) -> subprocess.CompletedProcess:
        setup = source(make("qwen3", PLACEHOLDER, tmp_path)["cells"][1])
        code = setup.replace("needed=(", "needed=() and (").replace(f"REPOSITORY = {PLACEHOLDER!r}",
                                                                    f"REPOSITORY = {address!r}")
        code += "\nimport os\nprint(os.getcwd(), sys.path[0])"
        return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)

    there, empty = tmp_path / "there", tmp_path / "empty"
    (there / "qwen3").mkdir(parents=True)
    (there / "notebooks").mkdir()
    empty.mkdir()
    (there / "qwen3/README.md").write_text("# A\n")
    assert run(there / "notebooks", PLACEHOLDER).stdout == f"{there} {there}\n"
    refused = run(empty, PLACEHOLDER)
    assert refused.returncode == 1 and "write it into REPOSITORY" in refused.stderr and not refused.stdout
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], cwd=there, check=True)
    for _ in range(2):  # cloned, and then found
        done = run(empty, there.as_uri())
        assert done.stdout == f"{empty / 'llm-from-scratch'} {empty / 'llm-from-scratch'}\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_every_cell_runs_from_top_to_bottom(name, tmp_path):
    """In a process of its own, in a checkout where nothing has been downloaded."""
    def not_embedded(folder: str, names: list[str]) -> list[str]:
        downloaded = [name for name in names if Path(folder).name == "checkpoints" and not name.endswith("-Tiny")]
        return ["__pycache__", *downloaded]

    for folder in ("qwen3", "qwen3_moe", "deepseek_v3", "scripts", "checkpoints", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=not_embedded)
    (tmp_path / "notebooks").mkdir()
    out = tmp_path / f"notebooks/{name}.ipynb"
    assert notebook.main([name, "-o", str(out)]) == 0
    done = subprocess.run([sys.executable, "-c", RUN, str(out)], cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("every cell ran\n"), done.stderr[-3000:]


def test_the_check_above_can_fail(tmp_path):
    out = tmp_path / "x.ipynb"
    for code, printed, said in (("1 / 0", "", "cell 0: ZeroDivisionError"), ("print(1)", "2\n", "cell 0 printed\n1\n"),
                                ("!false", "", "cell 0: CalledProcessError")):
        outputs = [{"text": [printed]}] if printed else []
        out.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [code], "outputs": outputs}]}))
        done = subprocess.run([sys.executable, "-c", RUN, str(out)], capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr, shlex.join(done.args)
