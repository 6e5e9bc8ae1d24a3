"""What is new at the command line, and that the rest is there: --show-experts, memory, the embedded checkpoint."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen3_moe import main as module
from qwen3_moe.generate import generate
from qwen3_moe.main import main
from qwen3_moe.engine.expert_picture import Routing
from qwen3_moe.weights import load_model
from tests.seeded import PROMPT, write_case

ROOT = Path(__file__).parents[2]
TINY = ROOT / "checkpoints/Qwen3-MoE-Tiny"
ROUTER = "A router scores all experts for a token and sends it to the best few.\n"


def test_the_answer_goes_to_standard_output_and_nothing_else_does(capfd, monkeypatch):
    monkeypatch.setattr(module, "DEFAULT", "not downloaded")
    assert main(["-p", "What is a router?"]) == 0
    out, err = capfd.readouterr()
    assert out == ROUTER
    assert "`bash scripts/download_qwen3_moe.sh` gets it): using Qwen3-MoE-Tiny" in err
    assert re.search(r"Qwen3-MoE-Tiny: 5\.8 MB of weights in bfloat16 on \w+.*, 1.3 kB of cache per token\n", err)


def test_thinking_adds_up(capfd):
    assert main(["-m", str(TINY), "--thinking", "-p", "What is 347 + 586?"]) == 0
    out, err = capfd.readouterr()
    assert out == "933\n" and "4 + 8 + 1 = 13, write 3, carry 1.\n" in err


def test_the_picture_changes_nothing_in_the_answer(capfd):
    for arguments in (["--no-thinking"], ["--no-thinking", "-t", "2", "--seed", "3", "-n", "20"]):
        assert main(["-m", str(TINY), "-p", "What is a router?", *arguments]) == 0
        plain = capfd.readouterr().out
        assert main(["-m", str(TINY), "-p", "What is a router?", "--show-experts", *arguments]) == 0
        out, err = capfd.readouterr()
        assert out == plain
        assert len(re.findall(r"^layer +\d │[ ░▒▓█]{8}│ busiest +\d\.\d  idle +\d$", err, re.M)) == 5
        assert re.search(r"experts by layer: \d+ tokens, 2 of 8 experts each", err)


def test_the_picture_in_the_readme_is_this_one(capfd):
    assert main(["-m", str(TINY), "--show-experts", "-p", "What is a router?"]) == 0
    readme = (ROOT / "qwen3_moe/README.md").read_text()
    drawn, shown = (re.findall(r"^layer .*$", text, re.M) for text in (capfd.readouterr().err, readme))
    assert len(drawn) == len(shown) == 5
    # Another processor may round a token to another expert.
    assert sum(a == b for ours, theirs in zip(drawn, shown) for a, b in zip(ours, theirs)) >= 0.9 * len("".join(drawn))


def test_the_counts_are_those_of_the_router(tmp_path):
    """Prompt and answer without its last token, which is never fed back; in sparse layers only."""
    folder = write_case(tmp_path, "qwen3_moe", "dense_in_between")
    routing = Routing(model := load_model(folder))
    answer = list(generate(model, PROMPT, max_new_tokens=5))
    assert list(routing.counts) == [1, 5]
    assert all(int(counts.sum()) == 2 * (len(PROMPT) + 4) for counts in routing.counts.values())
    again_model = load_model(folder)
    again = Routing(again_model)
    with torch.inference_mode():
        again_model(torch.tensor([PROMPT + answer[:-1]]))
    assert all(torch.equal(routing.counts[layer], again.counts[layer]) for layer in (1, 5))


def test_the_picture_by_hand(tmp_path):
    routing = Routing(load_model(write_case(tmp_path, "qwen3_moe", "two_of_eight")))
    routing.counts = {0: torch.tensor([0, 1, 5, 6, 10, 22, 0, 4]), 7: torch.tensor([6] * 8)}  # fair is 6
    lines = routing.picture(80).splitlines()
    assert "24 tokens, 2 of 8 experts each" in lines[0] and "░ under half" in lines[1]
    assert lines[2:] == ["layer  0 │ ░▒▒▓█ ▒│ busiest  3.7  idle   2", "layer  7 │▒▒▒▒▒▒▒▒│ busiest  1.0  idle   0"]
    routing.counts = {0: torch.tensor([1] * 64 + [3] * 64)}  # more experts than columns: several share a character
    first, _, second = routing.picture(80).splitlines()
    assert "3 experts a character" in first and re.fullmatch(r"layer  0 │▒{21}▓{22}│ busiest  1.5  idle   0", second)
    for E in (8, 46, 47, 128, 160):
        routing.counts = {0: torch.tensor([3] * E)}
        assert max(map(len, routing.picture(80).splitlines())) <= 80
    routing.counts = {}
    assert routing.picture() == "no layer of this model has experts"


@pytest.mark.ahead
def test_as_a_process_whose_standard_error_is_closed_no_note_goes_elsewhere():
    words = f'"{sys.executable}" -m qwen3_moe.main -m Qwen3-MoE-Tiny -p "What is a router?" 2>&-'
    done = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ROUTER)


def test_a_conversation_shows_the_experts_of_all_of_it(capfd, monkeypatch):
    lines = iter(["What is a router?", "Hello!"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, "/exit"))
    assert main(["-m", str(TINY), "--chat", "--no-thinking", "--show-experts"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith(ROUTER) and err.count("experts by layer") == 1


@pytest.mark.parametrize("arguments, message", [
    (["-m", "Qwen3-7B-A1B"], "neither a folder nor a checkpoint"),
    (["-m", str(ROOT / "checkpoints/Qwen3-Tiny")], "a dense Qwen3 model; run it with"),
    (["--show"], "unrecognized arguments: --show; --help lists the flags")])
def test_a_mistake_gets_one_sentence_and_exit_code_2(capfd, arguments, message):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and err.startswith("qwen3_moe: ") and message in err and err.count("\n") == 1
