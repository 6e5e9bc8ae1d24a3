"""What is new at the command line, and that the rest is there: --speculative, the embedded checkpoint, thinking."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_v3 import main as module
from deepseek_v3.main import main

ROOT = Path(__file__).parents[2]
TINY = ROOT / "checkpoints/DeepSeek-V3-Tiny"
MLA = "MLA caches one small latent vector and one shared RoPE key per token instead of full keys and values.\n"


def variant(folder: Path, **files: dict) -> Path:
    """The embedded checkpoint with some fields changed."""
    shutil.copytree(TINY, folder)
    for file, changes in files.items():
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_the_answer_goes_to_standard_output_and_nothing_else_does(capfd, monkeypatch):
    monkeypatch.setattr(module, "DEFAULT", "not downloaded")
    assert main([]) == 0
    out, err = capfd.readouterr()
    assert out == MLA
    assert "`bash scripts/download_deepseek_v3.sh` gets it): using DeepSeek-V3-Tiny" in err
    assert re.search(r"DeepSeek-V3-Tiny: 4\.\d MB of weights in bfloat16 on \w+.*, 0.9 kB of cache per token\n", err)
    assert "The word is MLA. The question is what it is.\n" in err and "</think>" not in err and "drafts" not in err


def test_speculative_gives_the_same_text_and_says_how_many_drafts_were_right(capfd):
    for arguments in (["-p", "What is MLA?"], ["-p", "What is a router?", "--no-thinking"], ["-p", "What is 34 + 52?"]):
        assert main(["-m", str(TINY), *arguments]) == 0
        plain, thought = capfd.readouterr()
        assert main(["-m", str(TINY), "--speculative", *arguments]) == 0
        out, err = capfd.readouterr()
        assert out == plain
        counts = re.search(r"tok/s · (\d+) of (\d+) drafts accepted \((\d+)%\)\n$", err)
        accepted, drafted, share = map(int, counts.groups())
        assert accepted <= drafted and share == round(100 * accepted / drafted)
        assert thought.splitlines()[1:-1] == err.splitlines()[1:-1]  # what was thought, too


def test_a_seed_repeats_a_sampled_answer(capfd):
    answers = []
    for _ in range(2):
        assert main(["-m", str(TINY), "--speculative", "-t", "1.5", "--seed", "4", "-n", "30", "-p", "Hello!"]) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1]


def test_thinking_adds_up_and_no_thinking_does_not_think(capfd):
    assert main(["-m", str(TINY), "--thinking", "-p", "What is 38 + 45?"]) == 0
    out, err = capfd.readouterr()
    assert out == "83\n" and "8 + 5 + 0 = 13, write 3, carry 1.\n" in err
    assert main(["-m", str(TINY), "--no-thinking", "-p", "What is RoPE?"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("RoPE turns pairs") and "The question" not in err


def test_experts_of_both_the_model_and_the_layer_that_drafts_are_shown(capfd):
    assert main(["-m", str(TINY), "-p", "What is MLA?", "--show-experts"]) == 0
    plain = re.findall(r"^layer +(\d) │[ ░▒▓█]{8}│ busiest +\d\.\d  idle +\d$", capfd.readouterr().err, re.M)
    assert main(["-m", str(TINY), "-p", "What is MLA?", "--show-experts", "--speculative"]) == 0
    drafting = re.findall(r"^layer +(\d) │[ ░▒▓█]{8}│ busiest +\d\.\d  idle +\d$", capfd.readouterr().err, re.M)
    assert plain == ["1", "2", "3", "4"] and drafting == ["1", "2", "3", "4", "5"]


def test_a_conversation_keeps_what_is_the_same_and_drafts_go_on(capfd, monkeypatch):
    lines = ["What is MLA?", "What is RoPE?", "What is 34 + 52?"]
    texts = []
    for flags in ([], ["--speculative"]):
        given = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt="": next(given, "/exit"))
        assert main(["-m", str(TINY), "--chat", *flags]) == 0
        texts.append(capfd.readouterr())
    assert texts[0].out == texts[1].out and texts[0].out.startswith(MLA)
    prompts = [int(n) for n in re.findall(r"^prompt (\d+) tokens", texts[0].err, re.M)]
    assert len(prompts) == 3 and max(prompts) < 60  # the second and third question, not all that was said before
    assert texts[1].err.count("drafts accepted") == 3


# R1's, whose prompt opens the thought, and V3's, which knows none.
ALWAYS = ("{{'<｜User｜>'}}{{ content.split('</think>')[-1] }}"
          "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}")
NEVER = "{{'<｜User｜>'}}{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"


@pytest.mark.parametrize("template, flag, message", [
    (ALWAYS, "--no-thinking", "always thinks; leave out --no-thinking"),
    (NEVER, "--thinking", "never thinks; leave out --thinking")])
def test_formats_that_always_or_never_think(tmp_path, capfd, template, flag, message):
    folder = variant(tmp_path / "other", tokenizer_config={"chat_template": template})
    assert main(["-m", str(folder), "-p", "What is MLA?", flag]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err


def test_a_thought_that_the_prompt_has_opened_goes_to_standard_error(tmp_path, capfd, monkeypatch):
    folder = variant(tmp_path / "R1", tokenizer_config={"chat_template": ALWAYS})
    tokenizer = module.Tokenizer.from_checkpoint(folder)
    end = tokenizer.control_ids["</think>"]
    ids = [*tokenizer.encode("I was thinking."), end, *tokenizer.encode("\n\nRoPE turns.")]
    monkeypatch.setattr(module, "generate", lambda *_, **__: iter(ids))
    assert main(["-m", str(folder), "-p", "What is MLA?"]) == 0
    out, err = capfd.readouterr()
    assert out == "RoPE turns.\n" and "\nI was thinking.\n" in err


def test_a_base_checkpoint_continues_text_after_one_bos(tmp_path, capfd, monkeypatch):
    folder = variant(tmp_path / "Base")
    (folder / "tokenizer_config.json").write_text("{}")
    seen, generate = [], module.generate
    monkeypatch.setattr(module, "generate", lambda model, ids, **more: seen.append(ids) or generate(model, ids, **more))
    ask = ["-m", str(folder), "-p", "MLA stores", "-n", "5"]
    assert main(ask) == 0
    assert seen[0][0] == 2042 and 2042 not in seen[0][1:] and len(seen[0]) > 2
    assert "Base has no chat template" in capfd.readouterr().err
    assert main([*ask, "--thinking"]) == 2  # by its vocabulary it is DeepSeek-V3, which never thinks
    assert "never thinks; leave out --thinking" in capfd.readouterr().err
    assert main([*ask, "--no-thinking"]) == 0
    tokenizer = module.Tokenizer.from_checkpoint(folder, "deepseek-v3")
    assert tokenizer.chat([{"role": "user", "content": "MLA stores"}]) == seen[1]


@pytest.mark.parametrize("arguments, message", [
    (["-m", "DeepSeek-V9"], "neither a folder nor a checkpoint"),
    (["-m", str(ROOT / "checkpoints/Qwen3-Tiny")], "a dense Qwen3 model; run it with"),
    (["--speculate"], "unrecognized arguments: --speculate; --help lists the flags"),
    (["-m", str(TINY), "-n", "5000"], "exceed the context of 2048 tokens")])
def test_a_mistake_gets_one_sentence_and_exit_code_2(capfd, arguments, message):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and err.startswith("deepseek_v3: ") and message in err and err.count("\n") == 1


def test_drafting_is_refused_where_there_is_no_layer_for_it(tmp_path, capfd):
    folder = variant(tmp_path / "None", config={"num_nextn_predict_layers": 0})
    assert main(["-m", str(folder), "--speculative"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err == (
        "deepseek_v3: this checkpoint's draft layer cannot be used (config.json announces 0 draft layers, the files "
        "hold 1, one is expected); leave out --speculative\n")


def test_the_picture_in_the_reference_is_this_one(capfd):
    assert main(["-m", str(TINY), "--show-experts", "-p", "What is MLA?"]) == 0
    page = (ROOT / "deepseek_v3/REFERENCE.md").read_text()
    drawn, shown = (re.findall(r"^ *(layer +\d .*)$", text, re.M) for text in (capfd.readouterr().err, page))
    assert len(drawn) == len(shown) == 4
    # Another processor may round a token to another expert.
    assert sum(a == b for ours, theirs in zip(drawn, shown) for a, b in zip(ours, theirs)) >= 0.9 * len("".join(drawn))


@pytest.mark.ahead
def test_as_a_process():
    command = [sys.executable, "-m", "deepseek_v3.main", "-m", str(TINY), "-p", "What is MLA?", "--speculative"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, MLA)
    assert "drafts accepted" in done.stderr and "Warning" not in done.stderr
