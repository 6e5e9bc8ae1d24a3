"""The command line: in this process where that is enough, as a process for pipes, terminals, signals and exit codes."""

import builtins
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3 import main as module
from qwen3 import tokenizer as tokens
from qwen3.engine import conversation, sizes
from qwen3.main import main
from tests.qwen3.test_weights import FP8, quantise

ROOT = Path(__file__).parents[2]
TINY = ROOT / "checkpoints/Qwen3-Tiny"
ROPE = "RoPE turns pairs of values in every query and key by angles that grow with the position.\n"
SPEED = r"prompt \d+ tokens, [\d,]+ tok/s · answer \d+ tokens, [\d,.]+ tok/s · reads [\d.]+ [GM]B/s of weights\n"


def variant(folder: Path, files: dict[str, dict], template: tuple[str, str] = ("", "")) -> Path:
    """The embedded checkpoint with some fields, or a part of its chat template, changed."""
    shutil.copytree(TINY, folder)
    for file, changes in files.items():
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if template[0]:
        settings["chat_template"] = settings["chat_template"].replace(*template)
    path.write_text(json.dumps(settings))
    return folder


SWITCH = """{%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}"""


@pytest.fixture
def base(tmp_path) -> Path:
    end_of_text = {"eos_token_id": 0}
    return variant(tmp_path / "Base", {"generation_config.json": end_of_text, "config.json": end_of_text})


def test_the_answer_goes_to_standard_output_and_nothing_else_does(capfd):
    assert main(["-m", "Qwen3-Tiny", "-p", "What is RoPE?"]) == 0
    out, err = capfd.readouterr()
    assert out == ROPE
    assert re.search(r"Qwen3-Tiny: 3.6 MB of weights in bfloat16 on \w+.*, 1.3 kB of cache per token\n", err)
    assert "The word is RoPE. The question is what it is.\n" in err and re.search(SPEED, err) and "\033" not in err


def test_thinking_is_shown_apart_and_adds_up(capfd):
    assert main(["-m", str(TINY), "--thinking", "-p", "What is 347 + 586?"]) == 0
    out, err = capfd.readouterr()
    assert out == "933\n"
    assert ("7 + 6 + 0 = 13, write 3, carry 1.\n4 + 8 + 1 = 13, write 3, carry 1.\n"
            "3 + 5 + 1 = 9, write 9, carry 0.\n") in err


def test_without_thinking_it_only_answers(capfd):
    assert main(["-m", str(TINY), "--no-thinking", "-p", "What is RoPE?"]) == 0
    out, err = capfd.readouterr()
    assert out == ROPE and "question" not in err


def test_fp8_on_a_cpu_is_expanded_where_it_fits_and_said_to_be_slow_where_not(capfd, monkeypatch, tmp_path):
    folder = variant(tmp_path / "Tiny-FP8", {"config.json": {"quantization_config": FP8}})
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    loaded, real = [], module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a, **more: loaded.append(real(*a, **more)) or loaded[-1])
    expanded = r"3\.6 MB of weights in bfloat16 on cpu \(expanded from FP8, .* --dtype fp8 keeps it: 2\.\d MB\),"
    kept = r"2\.\d MB of weights in FP8 on cpu \(slow there"
    for flags, free, expected, dtype in (
            ([], 1e9, expanded, torch.bfloat16),
            (["--dtype", "bfloat16"], 1e9, "in bfloat16 on cpu,", torch.bfloat16),
            (["--dtype", "fp8"], 1e9, kept + ", as --dtype fp8 asks", torch.float8_e4m3fn),
            ([], 4e6, kept + r"; in bfloat16 it would take 3\.6 MB, more than", torch.float8_e4m3fn)):
        monkeypatch.setattr(sizes, "free_memory", lambda device: int(free))
        assert main(["-m", str(folder), "-p", "What is RoPE?", "--no-thinking", "-n", "99", "-d", "cpu", *flags]) == 0
        out, err = capfd.readouterr()
        assert out == ROPE and re.search(expected, err)
        assert loaded[-1].model.layers[0].mlp.down_proj.weight.dtype == dtype
    assert main(["-m", "Qwen3-Tiny", "--dtype", "fp8"]) == 2
    assert "Qwen3-Tiny has no FP8 weights that --dtype fp8 could keep; leave it out" in capfd.readouterr().err


def test_bare_it_asks_a_question_of_its_own_of_the_best_model_there_is(capfd, monkeypatch, tmp_path):
    shutil.copytree(TINY, tmp_path / "Qwen3-Tiny")
    monkeypatch.setattr(module, "CHECKPOINTS", tmp_path)
    assert main([]) == 0
    out, err = capfd.readouterr()
    assert out == ROPE
    assert "Qwen3-0.6B is not downloaded (`bash scripts/download_qwen3.sh` gets it): using Qwen3-Tiny" in err
    shutil.copytree(TINY, tmp_path / "Qwen3-0.6B")
    assert main(["-p", "Hello!"]) == 0
    assert "Qwen3-0.6B: " in capfd.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["-m", "Qwen3-7B"], "Qwen3-7B: neither a folder nor a checkpoint (there: "),
    (["-m", str(ROOT / "tests")], "config.json: no such file"),
    (["-n", "-3"], "max_new_tokens is -3"),
    (["-n", "5000"], "exceed the context of 2048 tokens"),
    (["-p", "a " * 3000], "exceed the context of 2048 tokens"),
    (["-t", "-1"], "temperature is -1.0"),
    (["-k", "-1"], "top_k is -1"),
    (["--top-p", "2"], "top_p is 2.0"),
    (["-d", "abacus"], "device 'abacus' is not usable here; `-d cpu` always is"),
    (["--seed", str(2**64)], "seed is 18446744073709551616"),
    (["-m", "x" * 5000], "File name too long"),
    (["--chat", "-p", "x"], "--chat asks for its questions itself"),
])
def test_a_mistake_gets_one_sentence_and_exit_code_2(capfd, arguments, message):
    assert main((["-m", "Qwen3-Tiny"] if "-m" not in arguments else []) + arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("qwen3: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [
    ["--foo"], ["-n", "many"], ["--thinking", "--no-thinking"], ["--dtype", "int3"], ["-p"]])
def test_a_wrong_flag_too(capfd, arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    out, err = capfd.readouterr()
    assert error.value.code == 2 and out == "" and err.count("\n") == 1 and "--help lists the flags" in err


def test_a_model_that_does_not_fit_is_refused_with_both_figures(capfd, monkeypatch):
    monkeypatch.setattr(sizes, "free_memory", lambda device: 3_700_000)
    assert main(["-m", "Qwen3-Tiny", "-p", "Hi", "-n", "1000"]) == 2
    assert re.search(r"needs 3\.6 MB for weights and 1\.3 MB for the cache of 1,01\d tokens, but \w+ has 3\.7 MB free",
                     capfd.readouterr().err)


def test_an_answer_that_is_cut_off_says_so(capfd):
    assert main(["-m", "Qwen3-Tiny", "--no-thinking", "-n", "2", "-p", "What is RoPE?"]) == 0
    out, err = capfd.readouterr()
    assert ROPE.startswith(out.strip()) and "cut off after 2 tokens; -n allows more" in err
    assert main(["-m", "Qwen3-Tiny", "-n", "0", "-p", "What is RoPE?"]) == 0
    assert capfd.readouterr().out.strip() == ""


def test_sampling_defaults_are_the_checkpoints_and_flags_override_them(capfd, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(module, "generate", lambda model, ids, **settings: seen.append(settings) or iter(()))
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    folder = variant(tmp_path / "Sampling", {"generation_config.json": sampling})
    for arguments, expected in [([], (0.6, 20, 0.95, None)),
                                (["-t", "0", "-k", "0", "--top-p", "1", "--seed", "4"], (0, 0, 1.0, 4))]:
        assert main(["-m", str(folder), "-p", "x", *arguments]) == 0
        assert tuple(seen[-1][name] for name in ("temperature", "top_k", "top_p", "seed")) == expected
    assert "this checkpoint suggests -t 0.6" in capfd.readouterr().err
    assert seen[-1]["stop_ids"] == {json.loads((TINY / "config.json").read_text())["eos_token_id"], 2043}


def test_a_seed_repeats_an_answer(capfd):
    answers = []
    for seed in ("1", "1", "2"):
        main(["-m", "Qwen3-Tiny", "--no-thinking", "-p", "Hm", "-t", "3", "-n", "30", "--seed", seed])
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_a_base_checkpoint_continues_text_unless_a_conversation_is_asked_for(capfd, base, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "generate", lambda model, ids, **settings: seen.append((ids, settings)) or iter(()))
    assert main(["-m", str(base), "-p", "Once upon"]) == 0
    ids, settings = seen[0]
    tokenizer = module.Tokenizer.from_checkpoint(TINY)
    assert tokenizer.encode("Once upon") == ids and settings["stop_ids"] == {0}
    wanted = "Base stops at 0 as a Base checkpoint does, so its chat template is not used; --chat, "
    assert wanted in capfd.readouterr().err
    assert main(["-m", str(base), "--thinking", "-p", "Once upon"]) == 0  # who asks for a conversation gets one
    ids, settings = seen[1]
    assert ids == tokenizer.chat([{"role": "user", "content": "Once upon"}])
    assert settings["stop_ids"] == {0, tokenizer.end_of_turn}
    assert "as a Base checkpoint does" not in capfd.readouterr().err
    assert main(["-m", str(base), "--chat-format", "plain", "--chat"]) == 2
    assert "--chat does not go with --chat-format plain, which continues text" in capfd.readouterr().err
    assert main(["-m", str(base), "-p", ""]) == 2
    assert "a prompt is empty" in capfd.readouterr().err


def test_variants_without_the_switch_refuse_it(capfd, tmp_path):
    never = variant(tmp_path / "Instruct", {}, (SWITCH, ""))
    always = variant(tmp_path / "Thinking", {}, ("assistant\\n' }}\n    " + SWITCH, "assistant\\n<think>\\n' }}"))
    assert main(["-m", str(never), "--thinking"]) == 2
    assert "Instruct never thinks; leave out --thinking" in capfd.readouterr().err
    assert main(["-m", str(always), "--no-thinking"]) == 2
    assert "Thinking always thinks; leave out --no-thinking" in capfd.readouterr().err
    assert main(["-m", str(always), "-p", "What is RoPE?", "-n", "40"]) == 0  # the thought has no opening of its own
    out, err = capfd.readouterr()
    assert "The word is RoPE." in err and out == ROPE


def test_weights_that_do_not_match_are_reported_in_one_sentence(capfd, tmp_path):
    folder = variant(tmp_path / "Wrong", {"config.json": {"num_hidden_layers": 6}})
    assert main(["-m", str(folder), "-p", "x"]) == 2
    wanted = "model.layers.5.input_layernorm.weight (and 10 more) is missing from the checkpoint\n"
    assert wanted in capfd.readouterr().err


# Conversations

def converse(monkeypatch, *lines: str | type[BaseException]) -> tuple[int, list[tuple[list[int], int]]]:
    """Type the lines; return the exit code, and (prompt ids, tokens already in the cache) of each answer."""
    script, seen, generate = iter(lines), [], module.generate

    def type_line(prompt: str = "") -> str:
        line = next(script, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    def spy(model, ids, *, cache, **settings):
        seen.append((ids, cache.length))
        return generate(model, ids, cache=cache, **settings)

    monkeypatch.setattr(builtins, "input", type_line)
    monkeypatch.setattr(module, "generate", spy)
    return main(["-m", "Qwen3-Tiny", "--chat", "--no-thinking"]), seen


def test_a_conversation_has_history_and_computes_only_what_is_new(capfd, monkeypatch):
    code, seen = converse(monkeypatch, "Hello!", "What is RoPE?", "", "/clear", "What is RoPE?")
    out = capfd.readouterr().out.splitlines(keepends=True)
    assert code == 0 and len(out) == 3 and out[1] == out[2] == ROPE
    (first, none), (second, reused), (third, again) = seen
    tokenizer = module.Tokenizer.from_checkpoint(TINY)
    assert out[0].strip() in tokenizer.decode(second) and none == 0
    # With thinking off, history has no empty think block: all before the first answer's header is reused.
    header = len(tokenizer.join([tokens.THINK]))
    assert second[:reused] == first[:reused] and 0 < reused and reused >= len(first) - header - 4
    assert out[0].strip() not in tokenizer.decode(third) and again > 0


def test_the_commands(capfd, monkeypatch):
    code, seen = converse(monkeypatch, "/system Be brief.", "Hello!", "/think", "Hello!", "/no_think", "/what",
                          "/system", "Bye", "/exit", "x")
    out, err = capfd.readouterr()
    tokenizer = module.Tokenizer.from_checkpoint(TINY)
    texts = [tokenizer.decode(ids) for ids, _ in seen]
    assert code == 0 and len(texts) == 3
    assert texts[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n") and texts[0].endswith("</think>\n\n")
    assert texts[1].endswith("<|im_start|>assistant\n") and not texts[2].startswith("<|im_start|>system")
    assert "/what is not known: /clear forgets" in err


def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(capfd, monkeypatch):
    printed = conversation.show_answer
    times = []

    def interrupted(tokenizer, prompt_ids, ids):
        times.append(1)
        if len(times) == 2:
            next(ids), next(ids)
            raise KeyboardInterrupt
        return printed(tokenizer, prompt_ids, ids)

    monkeypatch.setattr(conversation, "show_answer", interrupted)
    code, seen = converse(monkeypatch, "Hello!", "What is GQA?", "What is RoPE?", KeyboardInterrupt)
    out, err = capfd.readouterr()
    assert code == 130 and "stopped; the question is forgotten" in err
    assert out.endswith(ROPE)  # from a cache that the stopped answer had begun to fill
    assert "GQA" not in module.Tokenizer.from_checkpoint(TINY).decode(seen[2][0])


def test_a_cache_that_was_cut_when_ctrl_c_came_is_no_trouble(capfd, monkeypatch):
    """Between the cut and the answer: then the cache holds fewer tokens than are remembered."""
    answers, answer = [], conversation.Conversation.answer

    def spy(self, ids):
        answers.append(1)
        if len(answers) == 2:
            self.cache.truncate(5)
        return answer(self, ids)

    monkeypatch.setattr(conversation.Conversation, "answer", spy)
    code, seen = converse(monkeypatch, "Hello!", "What is RoPE?")
    assert code == 0 and capfd.readouterr().out.endswith(ROPE)


def test_a_conversation_that_outgrows_the_context_says_so_and_goes_on(capfd, monkeypatch):
    code, seen = converse(monkeypatch, "a " * 3000, "What is RoPE?")
    out, err = capfd.readouterr()
    assert code == 0 and out == ROPE and "exceed the context of 2048 tokens; /clear starts a new conversation" in err


# As processes

COMMAND = [sys.executable, "-m", "qwen3.main", "-m", "Qwen3-Tiny"]



def test_a_closed_standard_input_ends_a_conversation(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["-m", "Qwen3-Tiny", "--chat"]) == 0
    assert "A conversation" in capfd.readouterr().err


def test_a_terminal_without_unicode_gets_question_marks(capfd, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["-m", "Qwen3-Tiny", "--no-thinking", "-t", "9", "--seed", "1", "-n", "60", "-p", "Hm"]) == 0
    assert b"?" in out.buffer.getvalue() and "codec" not in capfd.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's full disk")
def test_a_full_disk_is_said_in_one_sentence(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert main(["-m", "Qwen3-Tiny", "-p", "What is RoPE?"]) == 2
    assert "qwen3: cannot write or read (No space left on device)\n" in capfd.readouterr().err
    monkeypatch.undo()


LONG = [*COMMAND, "--no-thinking", "-p", "Hm", "-t", "5", "-n", "2000", "-d", "cpu", "--seed", "1"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.ahead
def test_ctrl_c_leaves_cleanly():
    process = subprocess.Popen(LONG, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.ahead
def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(LONG, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 0 and b"Traceback" not in err and b"Exception" not in err


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
@pytest.mark.ahead
def test_as_a_process_whose_answer_goes_into_a_pipe_and_whose_progress_is_shown_on_a_terminal_and_removed():
    ours, theirs = os.openpty()
    process = subprocess.Popen([*COMMAND, "-p", "What is RoPE?"], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # how Linux says that the other side has closed
        pass
    assert process.stdout.read().decode() == ROPE and process.wait() == 0
    assert b"\rloading tensor 1/57" in shown and b"\r\033[K" in shown and b"\033[2mThe word is RoPE." in shown
