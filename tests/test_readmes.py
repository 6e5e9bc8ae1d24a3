"""What the READMEs show is what happens: Python blocks run, commands run, and print what stands below them."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Without folders whose name begins with a dot: pytest keeps a README of its own in .pytest_cache.
READMES = [path.relative_to(ROOT) for path in [
    ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md")), *sorted(ROOT.glob("scripts/*/README.md")),
    *sorted(ROOT.glob("[!.]*/REFERENCE.md"))]]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(readme: Path) -> list[tuple[str, str, int]]:
    """(language, text, line) of every fenced block."""
    text = (ROOT / readme).read_text()
    return [(match[1], match[2], text[:match.start()].count("\n") + 2) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_python_blocks_run_one_after_the_other(readme, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    namespace: dict = {}
    every = blocks(readme)
    for (language, text, line), (below, shown, _) in zip(every, every[1:] + [("", "", 0)]):
        if language == "python":
            exec(compile("\n" * (line - 1) + text, str(readme), "exec"), namespace)  # lines as in the README
            printed = capsys.readouterr().out
            if printed or below == "text":
                assert below == "text" and printed == shown, f"{readme}, line {line}"


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_commands_do_what_is_shown_below_them(readme, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    every = blocks(readme)
    for (language, text, _), (below, shown, _) in zip(every, every[1:] + [("", "", 0)]):
        for line in text.splitlines() if language == "bash" else []:
            words = shlex.split(line, comments=True)
            asks_for_more = "checkpoints" in line or "--chat" in words or "-m" in words[5:]
            is_script = any(word.startswith("scripts.") for word in words)  # looked at below
            if words[:4] == ["uv", "run", "python", "-m"] and not asks_for_more and not is_script:
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
def test_scripts_that_are_named_exist(readme):
    text = (ROOT / readme).read_text()
    for name in re.findall(r"-m\s+(scripts\.[\w.]*\w)", text):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
    for name in re.findall(r"scripts/[\w/.]*\w", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("readme", READMES, ids=str)
def test_files_that_are_linked_exist(readme):
    prose = BLOCK.sub("", (ROOT / readme).read_text())  # a["b"](c) in code is no link
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        if "://" not in target:
            assert (ROOT / readme.parent / target).exists(), target


@pytest.mark.parametrize("package", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_the_table_of_files_has_their_order_and_their_lines(package):
    table = re.search(r"^\| \| file \|.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / package / "README.md").read_text(), re.M)[1]
    rows = re.findall(r"^\| \d+ \| `(\w+)\.py` \| .+ \| (\d+) \|$", table, re.M)
    assert tuple(name for name, _ in rows) == importlib.import_module(package).READING_ORDER
    for name, said in rows:
        lines = [line for line in (ROOT / package / f"{name}.py").read_text().splitlines() if line.strip()]
        assert abs(len(lines) - int(said)) <= 5, f"{package}/README.md: {name}.py has {len(lines)} lines"


@pytest.mark.parametrize("engine", [True, False])
def test_the_whole_model_of_the_first_page_gives_the_packages_logits(engine, monkeypatch, capsys):
    import torch

    from qwen3.weights import load_model

    monkeypatch.chdir(ROOT)
    namespace: dict = {}
    code = [text for language, text, _ in blocks(Path("README.md")) if language == "python"]
    for text in code:
        exec(text, namespace)
    capsys.readouterr()
    model = load_model("checkpoints/Qwen3-Tiny", dtype="float32", engine=engine)
    config = model.config
    assert [namespace[name] for name in ("layers", "heads", "kv_heads", "size", "theta")] == [
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        config.rope_theta]
    for length in (1, 19, 300):
        ids = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            wanted = model(ids[None])[0]
            assert (namespace["qwen3"](ids) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    whole = code[0].partition("def ")  # the functions; before them the weights and five numbers
    assert sum(bool(line.strip()) for line in (whole[1] + whole[2]).splitlines()) <= 35


def test_something_is_tested():
    assert sum(language == "python" for readme in READMES for language, _, _ in blocks(readme)) >= 10
