"""--batch: every answer is that of a single run, whatever shares the batch, and whatever stops the program."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import warm
from tests.packages import PACKAGES, module
from tests.test_generate import made
from tests.test_processes import all_by_hand, sentences, torchrun

ROOT = Path(__file__).parents[1]
WAYS = [{}, {"temperature": 0.8, "top_k": 7}, {"temperature": 1.1, "top_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.0, "min_p": 0.02, "presence_penalty": 0.5}, {"repetition_penalty": 1.3}]


@pytest.fixture(scope="module", params=PACKAGES)
def package(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(package) -> torch.nn.Module:
    return made(package)


def requests(package: str, count: int, longest: int = 30, most: int = 40, below: int = 60) -> list:
    """Prompts of all lengths, settings and seeds; the same ones each time."""
    chance, make = random.Random(5), module(package, "engine.continuous").Request
    return [make([chance.randrange(below) for _ in range(chance.randrange(1, longest))], chance.randrange(most),
                 WAYS[i % len(WAYS)] | {"seed": i}, i) for i in range(count)]


def alone(package: str, model: torch.nn.Module, request, stop_ids=()) -> list[int]:
    return list(module(package, "generate").generate(model, request.prompt_ids, max_new_tokens=request.max_new_tokens,
                                                     stop_ids=stop_ids, **request.sampling))


def together(package: str, model: torch.nn.Module, every: list, rows: int, stop_ids=()) -> dict[int, tuple]:
    """index -> (ids, why it ended)"""
    capacity, found, tokens = max(len(one.prompt_ids) + one.max_new_tokens for one in every), {}, 0
    for count, ended in module(package, "engine.continuous").continuous_batch(
            model, iter(every), rows=rows, capacity=capacity, stop_ids=stop_ids):
        tokens += count
        for row in ended:
            assert row.request.index not in found
            found[row.request.index] = row.ids, row.end
    assert len(found) == len(every) and tokens >= sum(len(ids) for ids, _ in found.values())
    return found


# Continuous batching

def test_each_answer_is_the_one_of_a_single_run(package, model):
    every, stops = requests(package, 16, most=24), {5, 6}
    found = together(package, model, every, 5, stops)
    for one in every:
        ids, end = found[one.index]
        assert ids == alone(package, model, one, stops), one
        assert end == ("length" if len(ids) == one.max_new_tokens else "stop")
    assert {end for _, end in found.values()} == {"length", "stop"}


@pytest.mark.parametrize("rows", [1, 9])
def test_so_it_is_with_one_row_and_with_more_rows_than_prompts_and_in_chunks(package, monkeypatch, rows):
    model, every = made(package, engine=False), requests(package, 6, most=15)
    expected = [alone(package, model, one) for one in every]
    for name in ("generate", "engine.continuous"):
        monkeypatch.setattr(module(package, name), "PREFILL_CHUNK", 13)
    assert [ids for _, (ids, _) in sorted(together(package, model, every, rows).items())] == expected


def test_prompts_are_read_together_as_far_as_a_chunk_allows(package, model, monkeypatch):
    continuous, read = module(package, "engine.continuous"), []
    prefill = continuous.prefill
    monkeypatch.setattr(continuous, "PREFILL_CHUNK", 60)
    monkeypatch.setattr(continuous, "prefill", lambda model, ids, cache: read.append(tuple(ids.shape)) or prefill(
        model, ids, cache))
    lengths = [20, 20, 20, 20, 61, 1, 30, 30]
    every = [continuous.Request([1] * length, 1, {}, i) for i, length in enumerate(lengths)]
    together(package, model, every, 8)
    assert read == [(3, 20), (1, 20), (1, 61), (2, 30), (1, 30)]


def test_a_row_that_is_no_number_ends_alone_and_leaves_nothing_behind(package):
    model = made(package)
    model.model.embed_tokens.weight.data[60] = torch.nan
    every = requests(package, 12, most=9)
    for one in every[::4]:
        one.prompt_ids[-1], one.max_new_tokens = 60, 9
    found = together(package, model, every, 3)
    assert all(found[one.index] == ([], "error") for one in every[::4])
    for one in every:
        ids, end = found[one.index]
        if one.index % 4 and 60 not in ids:  # after 60 of its own, a row ends as well
            assert (ids, end) == (alone(package, model, one), "length")


def test_memory_stays_flat(package, model, monkeypatch):
    """One cache for all prompts; beside it only that of the prompts that are being read."""
    continuous, made_caches = module(package, "engine.continuous"), []
    new_cache = continuous.new_cache

    def noticed(*arguments):
        made_caches.append(new_cache(*arguments))
        return made_caches[-1]

    monkeypatch.setattr(continuous, "new_cache", noticed)
    monkeypatch.setattr(continuous, "PREFILL_CHUNK", 64)
    every = requests(package, 200, longest=9, most=4)
    pointers, capacity = set(), max(len(one.prompt_ids) + one.max_new_tokens for one in every)
    for _ in continuous.continuous_batch(model, iter(every), rows=4, capacity=capacity):
        pointers.add(made_caches[0].tensors[0].data_ptr())
        del made_caches[1:]
    assert len(pointers) == 1 and made_caches[0].capacity == capacity
    assert made_caches[0].tensors[0].shape[1] == 4


def test_a_masked_slot_may_hold_anything_at_first(package, model, monkeypatch):
    """Memory that nobody has written may hold NaN, and 0 times NaN is NaN."""
    continuous = module(package, "engine.continuous")
    new_cache = continuous.new_cache

    def dirty(*arguments):
        cache = new_cache(*arguments)
        for tensor in cache.tensors:
            tensor.fill_(torch.nan)
        return cache

    monkeypatch.setattr(continuous, "new_cache", dirty)
    monkeypatch.setattr(continuous, "CLEARED", 7)
    every = requests(package, 6, most=15)
    found = together(package, model, every, 4)
    assert [found[one.index][0] for one in every] == [alone(package, model, one) for one in every]


# The command

QUESTIONS = ["What is RoPE?", "What is 347 + 586?", "What is a token?", "Why do we need the KV cache?",
             "What is attention?", "What is 12 + 9?", "What is a router?"]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_prompts(folder: Path, count: int = 7, **more) -> Path:
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": QUESTIONS[i % 7], "id": f"q{i}"} | more) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def batch(package: str, *flags: str | Path, dtype: str = "float32") -> int:
    folder = ROOT / "checkpoints" / PACKAGES[package]
    return module(package, "main").main(["-m", str(folder), "--dtype", dtype, *map(str, flags)])


def test_answers_are_those_of_single_runs_in_the_order_of_the_file(package, tmp_path, capfd):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join([
        '{"prompt": "What is RoPE?", "id": 7, "metadata": {"gold": [1]}}', "", '"What is 347 + 586?"\r',
        '{"prompt": "What is a token?", "temperature": 1.2, "seed": 11, "top_p": 0.95}',
        '{"messages": [{"role": "user", "content": "What is RoPE?"}], "max_new_tokens": 3, "id": "é\u2028"}',
        '{"prompt": "What is attention?", "temperature": 1.5, "top_k": 0, "repetition_penalty": 1.1}']))
    assert batch(package, "--batch", prompts, "-o", out, "--seed", "3", "--batch-size", "2") == 0
    printed, said = capfd.readouterr()
    assert printed == "" and "5 answers, " in said and "1 cut off" in said and f"; {out}\n" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]
    found = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
    assert [one["index"] for one in found] == [0, 1, 2, 3, 4]
    assert [one.get("id") for one in found] == [7, None, None, "é\u2028", None]
    assert found[0]["metadata"] == {"gold": [1]} and "metadata" not in found[1]
    assert [one["finish_reason"] for one in found] == ["stop", "stop", "stop", "length", "stop"]
    assert found[0]["prompt_crc32"] == found[3]["prompt_crc32"] != found[1]["prompt_crc32"]
    assert found[1]["answer"] == "933" and "write 3" in found[1]["thought"] and found[2]["seed"] == 11
    ways = [[], [], ["-t", "1.2", "--top-p", "0.95"], ["-n", "3"],
            ["-t", "1.5", "-k", "0", "--repetition-penalty", "1.1"]]
    questions = ["What is RoPE?", "What is 347 + 586?", "What is a token?", "What is RoPE?", "What is attention?"]
    for one, question, way in zip(found, questions, ways, strict=True):
        assert batch(package, "-p", question, "--seed", one["seed"], *way) == 0
        printed, said = capfd.readouterr()
        assert printed == one["answer"] + "\n", question
        assert f"prompt {one['prompt_tokens']} tokens" in said and f"answer {one['new_tokens']} tokens" in said
        assert one["thought"] in said


def test_standard_input_and_output(tmp_path, capfd, monkeypatch):
    prompts, out = write_prompts(tmp_path), tmp_path / "answers.jsonl"
    flags = ["--seed", "1", "--batch-size", "3", "-t", "1", "-n", "30"]
    assert batch("qwen3", "--batch", prompts, "-o", out, *flags) == 0
    capfd.readouterr()
    for more in ([], ["-o", "-"]):
        with prompts.open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert batch("qwen3", "--batch", "-", *flags, *more) == 0
        printed, said = capfd.readouterr()
        assert printed == out.read_text() and "7 answers, " in said


def test_a_text_file_has_a_prompt_a_line(tmp_path, capfd):
    prompts = tmp_path / "prompts.TXT"
    prompts.write_bytes("\ufeffWhat is RoPE?\r\n\n{\"prompt\": 1}\n".encode())
    assert batch("qwen3", "--batch", prompts, "-n", "2") == 0
    first, second = map(json.loads, capfd.readouterr().out.splitlines())
    assert first["prompt_tokens"] == 12 and second["index"] == 1 and second["new_tokens"] == 2
    assert batch("qwen3", "--batch", prompts, "-n", "0") == 0
    assert [json.loads(line)["new_tokens"] for line in capfd.readouterr().out.splitlines()] == [0, 0]


def test_seeds_are_of_a_prompt_alone():
    """Two prompts, or two runs, share no seed; and it does not depend on what else is in the file."""
    seed_of = module("qwen3", "engine.prompts").seed_of
    assert len({seed_of(seed, index) for seed in range(30) for index in range(30)}) == 900
    assert seed_of(3, 0) == 3138127451 and 0 <= seed_of(-2**63, 10**9) < 2**32  # written down, so that it stays


def test_a_system_prompt_of_a_line_wins(tmp_path, capfd):
    prompts, crcs = tmp_path / "prompts.jsonl", []
    brief, question = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is RoPE?"})
    prompts.write_text("\n".join(json.dumps(line) for line in (
        {"messages": [brief, question]}, {"messages": [question]}, {"prompt": "What is RoPE?"})))
    for flags in ([], ["--system", "Be brief."], ["--system", "Be long."]):
        assert batch("qwen3", "--batch", prompts, "-n", "1", *flags) == 0
        crcs.append([json.loads(line)["prompt_crc32"] for line in capfd.readouterr().out.splitlines()])
    (with_, without, _), both, long = crcs
    assert crcs[0] == [with_, without, without] and both == [with_] * 3 and long[0] == with_ != long[1] == long[2]


# Stopped, torn, begun otherwise

@pytest.fixture
def stopped(tmp_path, monkeypatch, capfd):
    """A run of 7 prompts that Ctrl-C has stopped after 3 answers."""
    journal = module("qwen3", "engine.journal")
    real, count = journal.Journal.write, [0]

    def write(self, values):
        if "index" in values:
            count[0] += 1
            if count[0] == 4:
                raise KeyboardInterrupt
        real(self, values)

    with monkeypatch.context() as patched:
        patched.setattr(journal.Journal, "write", write)
        assert go_on(tmp_path) == 130
    said = capfd.readouterr().err
    assert said.endswith("3 of 7 answers are kept; the same command goes on\n\n")
    assert not (tmp_path / "answers.jsonl").exists() and len(lines_of(tmp_path / "answers.jsonl.part0")) == 4
    return tmp_path


def go_on(folder: Path, *flags: str) -> int:
    prompts = folder / "prompts.jsonl"
    return batch("qwen3", "--batch", prompts if prompts.exists() else write_prompts(folder), "-o",
                 folder / "answers.jsonl", "--batch-size", "3", "-t", "1", "-n", "9", *flags)


def run_whole(tmp_path, seed: int) -> str:
    (tmp_path / "whole").mkdir()
    assert batch("qwen3", "--batch", write_prompts(tmp_path / "whole"), "-o", tmp_path / "whole/answers.jsonl", "-t",
                 "1", "-n", "9", "--seed", seed) == 0
    return (tmp_path / "whole/answers.jsonl").read_text()


@pytest.mark.parametrize("torn", [0, 1, "journal", "finished"])
def test_the_same_command_goes_on_where_it_was_stopped(stopped, capfd, torn):
    """Also where the end of a line is missing, all lines are, or only the journal was not removed."""
    part = stopped / "answers.jsonl.part0"
    raw = part.read_bytes()
    seed = json.loads(raw.split(b"\n")[0])["settings"]["seed"]
    if torn == "journal":
        part.write_bytes(raw[:40])
        seed = None
    elif torn != "finished":
        part.write_bytes(raw[:-torn or None])
    if torn == "finished":
        (stopped / "answers.jsonl").write_text("of an earlier run, or this one's")
    assert go_on(stopped) == 0
    said = capfd.readouterr().err
    left = {0: 3, 1: 2, "finished": 3}.get(torn)
    assert (f"going on: {left} of 7 prompts have their answers\n" in said) == (left is not None)
    assert f"{7 - (left or 0)} answers, " in said
    found = (stopped / "answers.jsonl").read_text()
    if seed is not None:
        assert found == run_whole(stopped, seed)
    assert [json.loads(line)["id"] for line in found.splitlines()] == [f"q{i}" for i in range(7)]
    assert not part.exists()
    assert go_on(stopped) == 2
    assert "answers.jsonl is there already; name another file, or" in capfd.readouterr().err
    assert (stopped / "answers.jsonl").read_text() == found
    assert go_on(stopped, "--restart") == 0


@pytest.mark.parametrize("flags, said", [
    (["-t", "0.5"], "temperature was 1.0 and is 0.5 now"), (["-n", "8"], "max_new_tokens was 9 and is 8 now"),
    (["--seed", "1"], "seed was "), (["--no-thinking"], "thinking was True and is False now"),
    (["--system", "x"], "system was None and is 'x' now"), (["--plain"], "plain was False and is True now"),
    (["-m", "DeepSeek"], "model was 'Qwen3-Tiny' and is 'Other' now"), ([], "the file of prompts has changed")])
def test_a_run_does_not_go_on_with_other_prompts_or_settings(stopped, capfd, flags, said):
    before = (stopped / "answers.jsonl.part0").read_bytes()
    if flags[:1] == ["-m"]:
        shutil.copytree(ROOT / "checkpoints/Qwen3-Tiny", stopped / "Other")
        flags = ["-m", str(stopped / "Other")]
    if not flags:
        write_prompts(stopped, 6)
    assert go_on(stopped, *flags) == 2
    sentence = capfd.readouterr().err.splitlines()[-1]
    assert said in sentence and "--restart" in sentence and len(sentence) < 300
    assert (stopped / "answers.jsonl.part0").read_bytes() == before
    assert go_on(stopped, *flags, "--restart") == 0
    assert f"{7 if flags else 6} answers, " in capfd.readouterr().err
    assert len(lines_of(stopped / "answers.jsonl")) == (7 if flags else 6)


def test_a_damaged_line_and_a_run_that_is_still_going_on_are_noticed(stopped, capfd, monkeypatch):
    part = stopped / "answers.jsonl.part0"
    raw = part.read_bytes()
    part.write_bytes(raw.replace(b'{"index": 0', b'{"indexx 0', 1))
    assert go_on(stopped) == 2
    assert "part0, line 2: damaged, or not of this program; `--restart`" in capfd.readouterr().err
    part.write_bytes(raw)
    monkeypatch.setattr(module("qwen3", "engine.journal"), "PATIENCE", 0)
    fcntl = pytest.importorskip("fcntl")
    with part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for flags in ([], ["--restart"]):
            assert go_on(stopped, *flags) == 2
            assert "answers.jsonl.part0: another run is writing there; wait for it" in capfd.readouterr().err
    assert part.read_bytes() == raw and go_on(stopped) == 0


# Refusals

def refused(capfd, monkeypatch, *flags, package: str = "qwen3") -> str:
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(module(package, "engine.batch_file"), "load_model", load)
    try:
        code = batch(package, *flags)
    except SystemExit as left:
        code = left.code
    out, err = capfd.readouterr()
    sentence = err.splitlines()[-1]
    assert code == 2 and out == "" and sentence.startswith(f"{package}: ") and len(sentence) < 300
    return sentence


@pytest.mark.parametrize("line, said", [
    ('{"prompt": "x"', "line 2: not valid JSON (Expecting ',' delimiter at column 15)"),
    ("What is RoPE?", "line 2: not valid JSON (Expecting value at column 1); prompts in plain text stand in a file n"),
    ("[1]", 'line 2: expected an object such as {"prompt": "…"}, or a text'), ("7", "line 2: expected an object"),
    ("{}", 'line 2: expected either "prompt" or "messages"'), ('{"id": 1}', 'line 2: expected either "prompt" or "mes'),
    ('{"prompt": "x", "messages": []}', 'line 2: expected either "prompt" or "messages"'),
    ('{"prompt": 7}', "line 2: prompt is 7, expected text"), ('{"prompt": " "}', "line 2: the prompt is empty"),
    ('""', "line 2: the prompt is empty"), ('{"messages": []}', "line 2: messages is empty"),
    ('{"messages": "x"}', "line 2: messages is 'x', expected a list"),
    ('{"messages": ["x"]}', "line 2: a message is 'x', expected an object with role and content"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "line 2: a message has role 'tool'; known are"),
    ('{"messages": [{"role": "user", "content": 3}]}', "line 2: "),
    ('{"prompt": "x", "max_tokens": 3}', "line 2: max_tokens is not known; keys are prompt, messages, id, seed"),
    ('{"prompt": "x", "seed": 1, "seed": 2}', "line 2: a key stands there twice"),
    ('{"prompt": "x", "id": 1.5}', "line 2: id is 1.5, expected text or a whole number"),
    ('{"prompt": "x", "id": true}', "line 2: id is True, expected text or a whole number"),
    ('{"prompt": "x", "id": "a"}', "line 2: the id 'a' is line 1's as well"),
    ('{"prompt": "x", "temperature": "hot"}', "line 2: temperature is 'hot', expected a number"),
    ('{"prompt": "x", "temperature": NaN}', "line 2: temperature is nan, expected 0 (greedy) or more"),
    ('{"prompt": "x", "top_k": 2.5}', "line 2: top_k is 2.5, expected a whole number"),
    ('{"prompt": "x", "top_p": true}', "line 2: top_p is True, expected a number"),
    ('{"prompt": "x", "top_p": 1.5}', "line 2: top_p is 1.5, expected more than 0"),
    ('{"prompt": "x", "seed": 1e3}', "line 2: seed is 1000.0, expected a whole number"),
    ('{"prompt": "x", "seed": 18446744073709551616}', "line 2: seed is 18446744073709551616, expected a number of 64"),
    ('{"prompt": "x", "max_new_tokens": -1}', "line 2: max_new_tokens is -1, expected 0 or more"),
    ('{"prompt": "x", "max_new_tokens": 5000}', "line 2: 9 prompt tokens and 5000 new ones exceed the context of 2048"),
    ('{"prompt": "' + "a " * 3000 + '"}', "prompt tokens and 1 new ones exceed the context of 2048 tokens"),
    ('{"prompt": "\\ud800"}', "line 2: the prompt is no text: it has half of a surrogate pair"),
    ("[" * 100000, "line 2: not valid JSON"), ('{"prompt": "' + "x" * 400, "line 2: not valid JSON"),
    ('{"' + "x" * 400 + '": 1}', "line 2: xxx"), ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "line 2: "),
])
def test_a_wrong_line_is_named_before_anything_is_loaded(tmp_path, capfd, monkeypatch, line, said):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f'{{"prompt": "What is RoPE?", "id": "a"}}\n{line}\n')
    sentence = refused(capfd, monkeypatch, "--batch", prompts, "-o", tmp_path / "answers.jsonl")
    assert sentence.startswith(f"qwen3: {prompts}, line 2: ") and said in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_all_wrong_lines_are_numbered(tmp_path, capfd, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"good"\n' + "bad\n" * 3 + '\n"good"\n' + "bad\n" * 6)
    sentence = refused(capfd, monkeypatch, "--batch", prompts)
    assert ", line 2: not valid JSON" in sentence and sentence.endswith("(lines 3, 4, 7, 8, 9, … are wrong too)")
    prompts.write_bytes(b'"good"\n"\xff"\n')
    assert f"{prompts}, line 2: not UTF-8" in refused(capfd, monkeypatch, "--batch", prompts)
    prompts.write_text("\n \n")
    assert f"{prompts} holds no prompt; write one a line" in refused(capfd, monkeypatch, "--batch", prompts)


def test_a_base_checkpoint_continues_text(tmp_path, capfd, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"RoPE turns"\n')
    assert batch("qwen3", "--batch", prompts, "--chat-format", "plain", "-n", "5") == 0
    assert json.loads(capfd.readouterr().out)["prompt_tokens"] < 8
    prompts.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    said = refused(capfd, monkeypatch, "--batch", prompts, "--chat-format", "plain")
    assert said.endswith('line 1: Qwen3-Tiny is a Base checkpoint, which continues text; give a "prompt"')


def test_what_does_not_go_together_gets_one_sentence(tmp_path, capfd, monkeypatch):
    prompts = write_prompts(tmp_path)
    for flag, said in (("--chat", "nobody is there"), ("--compile", "for a single sequence"),
                       ("-px", "--prompt does not go with --batch: the prompts are in the file")):
        assert said in refused(capfd, monkeypatch, "--batch", prompts, flag)
    for flag, package in (("--speculative", "deepseek_v3"), ("--show-experts", "qwen3_moe")):
        assert f"{flag} does not go with --batch: " in refused(capfd, monkeypatch, "--batch", prompts, flag,
                                                               package=package)
    for flags in (["-o", "x"], ["--batch-size", "3"], ["--data-parallel", "2"], ["--restart"]):
        assert "goes with --batch FILE; --help lists the flags" in refused(capfd, monkeypatch, "-p", "x", *flags)
    for flags, said in ((["--batch-size", "0"], "--batch-size is 0, expected 1 or more"),
                        (["--data-parallel", "-1"], "--data-parallel is -1, expected 1 or more"),
                        (["-o", tmp_path], f"-o {tmp_path}: expected a file in a folder that exists"),
                        (["-o", tmp_path / "no/x"], "expected a file in a folder that exists"),
                        (["-o", prompts], "is the file of prompts; name another"),
                        (["--restart"], "--restart is for answers in a file"),
                        (["--data-parallel", "2"], "--data-parallel needs a file for the answers"),
                        (["--seed", 2**64], "seed is 18446744073709551616"),
                        (["-d", "x"], "device 'x' is not usable here"), (["-t", "-1"], "temperature is -1.0"),
                        (["--batch-size", 10**9], "needs"), (["-n", "5000"], "line 1: 12 prompt tokens and 5000 new")):
        assert said in refused(capfd, monkeypatch, "--batch", prompts, *flags), flags
    assert "no/x: the prompts cannot be read (No such file or directory)" in refused(
        capfd, monkeypatch, "--batch", tmp_path / "no/x")
    assert f"{tmp_path}: the prompts cannot be read (Is a directory)" in refused(
        capfd, monkeypatch, "--batch", tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input: the prompts cannot be read" in refused(capfd, monkeypatch, "--batch", "-")
    assert "-d cpu:0 is a single device" in refused(
        capfd, monkeypatch, "--batch", prompts, "-o", tmp_path / "x", "--data-parallel", "2", "-d", "cpu:0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun with one process is none
    assert refused(capfd, monkeypatch, "--batch", prompts, "-o", prompts)


def test_fewer_prompts_at_a_time_where_memory_is_short(tmp_path, capfd, monkeypatch):
    memory = module("qwen3", "engine.sizes")
    job_module = module("qwen3", "engine.batch_file")
    monkeypatch.setattr(memory, "free_memory", lambda device: 30_000_000)
    sizes, real = [], job_module.continuous_batch
    monkeypatch.setattr(job_module, "continuous_batch",
                        lambda *a, rows, **more: sizes.append(rows) or real(*a, rows=rows, **more))
    prompts = write_prompts(tmp_path, 8)
    assert batch("qwen3", "--batch", prompts, "-n", "1500") == 0
    assert sizes == [4]  # 2.6 kB a token in float32, 1,520 tokens a row, and a row for what is being read
    assert len(capfd.readouterr().out.splitlines()) == 8
    assert batch("qwen3", "--batch", prompts, "-n", "1500", "--batch-size", "16") == 2
    assert "Qwen3-Tiny needs" in capfd.readouterr().err
    others = ["no room", None]  # another, which shares the model, has room for half as many
    monkeypatch.setattr(job_module, "of_all", lambda error: [error, others.pop(0)])
    assert batch("qwen3", "--batch", prompts, "-n", "2") == 0 and sizes[1:] == [4] and others == []
    others.append("Qwen3-Tiny needs more there")
    assert batch("qwen3", "--batch", prompts, "-n", "2", "--batch-size", "2") == 2 and others == []
    assert "qwen3: Qwen3-Tiny needs more there" in capfd.readouterr().err


def test_the_line_of_progress(monkeypatch, capsys):
    progress = module("qwen3", "engine.progress")
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress(1200, 200)
    for _ in range(30):
        now[0] += 10
        shown.count(640, [type("Row", (), {"end": "length"})])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and lines[0] == "206/1,200 answers · 64 tok/s · 2 h 46 min left"
    monkeypatch.setattr(progress, "is_terminal", lambda _: True)
    now[0] += 10
    shown.show()
    shown.clear()
    assert capsys.readouterr().err.startswith("\r230/1,200 answers · ")
    assert "30 answers, 19,200 tokens" in shown.summary() and "30 cut off" in shown.summary()
    assert [progress.duration(s) for s in (0.4, 99, 100, 3599, 3600, 90000)] == [
        "0 s", "99 s", "2 min", "1 h 0 min", "1 h 0 min", "25 h 0 min"]


# Several processes

def command(package: str, *flags: str | Path) -> list[str]:
    return ["-m", f"{package}.main", "-m", str(ROOT / "checkpoints" / PACKAGES[package]), "--dtype", "float32", "-t",
            "1", "--seed", "5", "-n", "30", *map(str, flags)]


def started(words: list[str]) -> warm.Program:
    return warm.start(words, env=os.environ | {"OMP_NUM_THREADS": "1"})


def children(process: warm.Program) -> list[int]:
    lists = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    return [int(number) for one in lists for number in one.split()]


def answered(out: Path) -> int:
    return sum(path.read_bytes().count(b'\n{"index"') for path in out.parent.glob(f"{out.name}.part*"))


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.mark.ahead
def test_two_replicas_share_a_file(tmp_path):
    prompts, out = write_prompts(tmp_path, 14), tmp_path / "two.jsonl"
    process = started(command("qwen3", "--batch", prompts, "-o", out, "--data-parallel", "2", "-t", "0", "-n", "90"))
    printed, said = process.communicate(timeout=100)
    assert process.returncode == 0 and printed == "" and "14 answers, " in said, said
    found = lines_of(out)
    assert [one["id"] for one in found] == [f"q{i}" for i in range(14)]
    assert [one["answer"] for one in found[1::7]] == ["933"] * 2 and found[5]["answer"] == "21"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "two.jsonl"]


def test_each_replica_gets_a_gpu_of_its_own(monkeypatch):
    replicas = module("qwen3", "engine.replicas")

    def job(asked: str | None, device: str) -> SimpleNamespace:
        arguments = SimpleNamespace(device=asked)
        return SimpleNamespace(conversation=SimpleNamespace(arguments=arguments),
                               find_room=lambda processes: (torch.device(device), None, 64))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = replicas.find_place(job(None, "cuda"), 2)
    assert [str(replicas.own_gpu(place, number)[0]) for number in (0, 1)] == ["cuda:0", "cuda:1"]
    place = replicas.find_place(job("cpu", "cpu"), 9)
    assert replicas.own_gpu(place, 5) == (torch.device("cpu"), None, 64)
    for asked, device, count, said in ((None, "cuda", 3, "3 replicas want a GPU each, and this machine has 2 for cuda"),
                                       (None, "mps", 2, "this machine has 1 for mps; try --data-parallel 1, or `-d c"),
                                       ("cuda:1", "cuda:1", 2, "-d cuda:1 is a single device, and each replica needs")):
        with pytest.raises(ValueError, match=re.escape(said)):
            replicas.find_place(job(asked, device), count)


@pytest.mark.slow
def test_torchrun_starts_replicas_too(tmp_path, capfd, package="deepseek_v3"):
    prompts, out = write_prompts(tmp_path, 30), tmp_path / "two.jsonl"
    words = command(package, "--batch", prompts, "-o", out, "--data-parallel", "2")
    process = started(["-m", "torch.distributed.run", "--nproc-per-node", "2", *words])
    printed, said = process.communicate(timeout=100)
    assert process.returncode == 0 and printed == "" and said.count("30 answers, ") == 1, said
    assert batch(package, "--batch", prompts, "-o", tmp_path / "one.jsonl", "-t", "1", "--seed", "5", "-n",
                 "30") == 0
    assert out.read_text() == (tmp_path / "one.jsonl").read_text()
    codes, _, said = all_by_hand([*words, "--restart", "--data-parallel", "3"])
    assert codes == [2, 2] and "".join(said).count(f"{package}: torchrun has started 2 processes: with "
                                                   "--data-parallel 2 each answers a part") == 1


@pytest.mark.slow
def test_processes_that_share_a_model_answer_as_one_does(tmp_path, capfd):
    """Also where one is killed and the same command goes on, now with the prompts from a pipe."""
    ways = {}, {"temperature": 0}, {"repetition_penalty": 1.2, "top_k": 9}
    lines = [json.dumps({"prompt": QUESTIONS[i % 7]} | ways[i % 3]) for i in range(32)]
    prompts, out, one = (tmp_path / name for name in ("prompts.jsonl", "answers.jsonl", "one.jsonl"))
    prompts.write_text("\n".join(lines))
    words = command("qwen3", "-o", out, "--batch-size", "4")
    with torchrun(*words, "--batch", str(prompts)) as run:
        wait_for(lambda: answered(out) > 9)
        os.kill(run.rank(1), signal.SIGKILL)
        assert run.process.wait(20) != 0
        wait_for(lambda: run.children() == [], 5)
        said = run.process.stderr.read()
    assert " of 32 answers are kept; the same command goes on\n" in said
    assert [line.partition(": another process has ended")[0] for line in sentences(said)] == ["qwen3"], said
    left = 32 - answered(out)
    assert 0 < left <= 22 and not out.exists()
    codes, printed, said = all_by_hand([*words, "--batch", "-"], prompts.read_text())
    assert codes == [0, 0] and printed == ["", ""] and "".join(said).count(f"\n{left} answers, ") == 1, said
    assert batch("qwen3", "--batch", prompts, "-o", one, "-t", "1", "--seed", "5", "-n", "30") == 0
    assert out.read_text() == one.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("package, replicas, count, stops", [
    ("qwen3", "1", 200, "kill kill kill kill Ctrl-C"), ("qwen3", "2", 400, "kill kill kill replica Ctrl-C"),
    ("deepseek_v3", "2", 100, "replica Ctrl-C")])
def test_kills_lose_nothing_and_nothing_is_done_twice(tmp_path, package, replicas, count, stops, capfd):
    """Kills of the program alone (its replicas end by themselves), of one replica first, and Ctrl-C."""
    prompts, out = write_prompts(tmp_path, count), tmp_path / "answers.jsonl"
    words = command(package, "--batch", prompts, "-o", out, "--data-parallel", replicas)
    before = 0
    for number, stop in enumerate(stops.split()):
        process = started(words)
        wait_for(lambda: process.poll() is not None or answered(out) >= before + count // 8)
        if process.poll() is not None and number > 2:  # a quick machine has answered all
            before = count
            break
        assert process.poll() is None, process.communicate()
        own = children(process)
        assert len(own) == (2 if replicas == "2" else 0)
        if stop == "replica":
            os.kill(own[0], signal.SIGKILL)
            now = answered(out)
            wait_for(lambda: answered(out) > now + 5)  # the other goes on
        process.send_signal(signal.SIGINT if stop == "Ctrl-C" else signal.SIGKILL)
        _, said = process.communicate(timeout=30)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in own), 10)
        if stop == "Ctrl-C":
            assert process.returncode == 130 and "answers are kept; the same command goes on" in said
        before = answered(out)
        if number % 2:
            with next(out.parent.glob(f"{out.name}.part*")).open("ab") as file:
                file.write(b'{"index": 999, "answer": "torn')
    process = started(words)
    if one_more := package == "qwen3" and replicas == "2" and before < count:
        wait_for(lambda: answered(out) > before + 9)
        os.kill(children(process)[1], signal.SIGKILL)  # what it has begun is answered by another
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0 and f"\n{count - before:,} answers, " in said
    assert ("(exit code -9)" in said) == one_more, said
    found = lines_of(out)
    assert [one["index"] for one in found] == list(range(count)) == [int(one["id"][1:]) for one in found]
    assert list(tmp_path.glob("*.part*")) == []
    assert batch(package, "--batch", prompts, "-o", tmp_path / "one.jsonl", "-t", "1", "--seed", "5", "-n",
                 "30") == 0
    assert out.read_text() == (tmp_path / "one.jsonl").read_text()


@pytest.mark.slow
def test_the_benchmark_compares_with_slices(capsys, monkeypatch):
    from scripts.benchmark import machine
    from scripts.benchmark.__main__ import main

    monkeypatch.setattr(machine, "matrix_rate", lambda *_: (1e12, torch.float32))
    monkeypatch.setattr(machine, "read_bandwidth", lambda *_: 1e9)
    assert main(["-m", "Qwen3-Tiny", "--rounds", "1", "--patience", "0", "--batch", "2", "--answers", "12"]) == 0
    out = capsys.readouterr().out
    assert "24 answers of 10 to 12 tokens, 2 at a time: " in out
    assert " tok/s in slices, " in out and " refilled, " in out
    for flags, said in ((["--batch", "0"], "expected 1 or more"), (["--batch", "2", "--answers", "9999"], "context"),
                        (["--batch", "2", "--compile"], "--compile goes with the usual measurement")):
        assert main(["-m", "Qwen3-Tiny", *flags]) == 2
        assert said in capsys.readouterr().err
