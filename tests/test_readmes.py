"""What the READMEs show is what happens: Python blocks run, commands run, and print what stands below them."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = [path.relative_to(ROOT) for path in [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md"))]]  # pytest keeps one of its own in .pytest_cache
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(readme: Path) -> list[tuple[str, str, int]]:
    """(language, text, line) of every fenced block."""
    text = (ROOT / readme).read_text()
    return [(match[1], match[2], text[:match.start()].count("\n") + 2) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_python_blocks_run_one_after_the_other(readme, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace: dict = {}
    for language, text, line in blocks(readme):
        if language == "python":
            exec(compile("\n" * (line - 1) + text, str(readme), "exec"), namespace)  # lines as in the README


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_commands_do_what_is_shown_below_them(readme, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    every = blocks(readme)
    for (language, text, _), (below, shown, _) in zip(every, every[1:] + [("", "", 0)]):
        for line in text.splitlines() if language == "bash" else []:
            words = shlex.split(line, comments=True)
            if words[:4] == ["uv", "run", "python", "-m"] and "checkpoints" not in line and "--chat" not in words and "-m" not in words[5:]:
                main = importlib.import_module(words[4]).main
                # The embedded checkpoint, whatever has been downloaded on this machine.
                monkeypatch.setattr(importlib.import_module(words[4]), "DEFAULT", "not downloaded")
                assert main(words[5:]) == 0
                out = capfd.readouterr().out
                if below == "text":
                    assert out == shown
            elif words and words[0] == "bash":
                assert (ROOT / words[1]).is_file()
            elif words[:3] == ["uv", "run", "python"] and words[3] != "-m":
                assert (ROOT / words[3]).is_file()


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_files_that_are_linked_exist(readme):
    prose = BLOCK.sub("", (ROOT / readme).read_text())  # a["b"](c) in code is no link
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if "://" not in target:
            assert (ROOT / readme.parent / target).exists(), target


def test_something_is_tested():
    assert sum(language == "python" for readme in READMES for language, _, _ in blocks(readme)) >= 10
