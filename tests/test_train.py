"""Training: what is drawn, packed and masked; the losses; a run that goes on where it stopped; fine-tuning."""

import contextlib
import itertools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from scripts.train import balance, corpus, data, faster, grade, learn, own_data, show, state, sums, task, training
from scripts.train.__main__ import main
from scripts.train.lora import add_lora, merge_lora
from tests.packages import PACKAGES, module

ROOT = Path(__file__).parents[1]
QUESTIONS = [("Who keeps the key?", "Ada keeps it."), ("Where is the lamp?", "On the desk."),
             ("When is lunch?", "At noon.")]
TALK = [{"role": "user", "content": "What is RoPE?"}, {"role": "assistant", "content": "RoPE turns."},
        {"role": "user", "content": "And 1 + 2?"}]


def embedded(package: str) -> Path:
    return ROOT / "checkpoints" / PACKAGES[package]


def tokenizer_of(package: str):
    return module(package, "tokenizer").Tokenizer.from_checkpoint(embedded(package))


def plan(package: str, **changes) -> task.Plan:
    return task.Plan(**{"package": package, "minutes": None, "steps": 4, "seed": 1, "data": None, "digest": None,
                         "source": None, "lora": None, "rate": None, "tokens": 64, "compiled": False,
                         "threads": torch.get_num_threads()} | changes)


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Rows of 64 tokens and a tokenizer of 300 texts: what is tested here does not depend on their number."""
    texts = data.tokenizer_texts
    monkeypatch.setattr(data, "ROWS", {64: 1})
    monkeypatch.setattr(task, "ANSWER", 16)  # tokens
    monkeypatch.setattr(data, "tokenizer_texts", lambda source: itertools.islice(texts(source), 300))


# What is drawn


def test_the_glossary_is_as_promised():
    words = corpus.entries()
    names = [name.lower() for entry in words for name in entry.names]
    assert len(words) >= 250 and len(set(names)) == len(names)
    texts = [text for entry in words for text in (entry.what, entry.why)]
    assert len(set(texts)) == len(texts) and all(text[-1] == "." and len(text) <= 120 for text in texts)
    wanted = ("neural network", "dropout", "lora", "activation function", "tokenizer", "temperature", "hallucination")
    assert all(any(word in name for name in names) for word in wanted)
    assert corpus.glossary() == [(entry.names, entry.what) for entry in words]


def test_what_sounds_familiar_is_no_name_of_the_glossary():
    rng, known = random.Random(0), corpus.known_names()
    made = [corpus.crossed(rng) for _ in range(3000)]
    assert "rope" in known and not [name for name in made if name.lower() in known]
    parts = {word for name in known for word in name.split()}
    assert sum(any(word in parts for word in name.lower().split()) for name in made) > 1000  # and it sounds familiar


def test_a_typing_error_changes_one_letter_or_two_neighbors():
    rng = random.Random(0)
    for _ in range(1000):
        wrong = corpus.mistyped("dropout", rng)
        assert abs(len(wrong) - 7) <= 1 and wrong[0] == "d" and set(wrong[-2:]) & {"t"}
    share = sum(corpus.misspelled("dropout", rng) != "dropout" for _ in range(4000)) / 4000
    assert 0.10 < share < 0.20


def test_no_held_out_question_is_trained_on():
    """Neither, without punctuation and capitals, as a phrasing of any word nor as one of 30,000 drawn questions."""
    def bare(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    rng, source, asked = random.Random(0), corpus.Corpus("x", "qwen3"), corpus.phrasings()
    trained = {bare(source.draw(rng, False).question) for _ in range(30000)} | {
        bare(line.format(x=name)) for kind in ("what", "explain", "why", "other") for line in asked[kind]
        for entry in corpus.entries() for name in entry.names} | {bare(line) for line in asked["off_topic"]}
    exam = grade.questions("heldout")
    assert len(exam) >= 200 and not [item["question"] for item in exam if bare(item["question"]) in trained]


def test_sums_are_right_and_none_that_is_asked_at_the_end_was_trained_on():
    rng = random.Random(0)
    for _ in range(3000):
        numbers_of = rng.getstate()
        question, thought, answer = sums.draw_sum(rng, thinking=True)
        first = thought.split(".")[0]
        numbers = [int(number) for number in first.split(" + ")]
        assert sum(numbers) == int(answer) and not sums.is_held_out(*numbers[:2]), numbers_of
        assert len(numbers) == 3 and max(numbers) < 100 or len(numbers) == 2 and max(numbers) < 10**4
        assert all(str(n) in question or sums.SMALL[n] in question for n in numbers)


@pytest.mark.parametrize("a, b, lines", [
    (347, 586, ["7 + 6 + 0 = 13, write 3, carry 1.", "4 + 8 + 1 = 13, write 3, carry 1.",
                "3 + 5 + 1 = 9, write 9, carry 0."]),
    (9, 91, ["9 + 1 + 0 = 10, write 0, carry 1.", "0 + 9 + 1 = 10, write 0, carry 1."])])
def test_addition_on_paper(a, b, lines):
    assert sums.on_paper(a, b) == "\n".join(lines)


def test_questions_about_a_word_that_was_taken_out_are_not_asked(monkeypatch):
    for name in ("heldout", "conversations"):  # with the whole glossary all of them are
        assert len(grade.questions(name)) == len((corpus.WORDS / f"{name}.jsonl").read_text().splitlines())
    without = [entry for entry in corpus.entries() if entry.names[0] != "a router"]
    monkeypatch.setattr(grade, "entries", lambda: without)
    left = grade.questions("heldout")
    assert 200 < len(left) < len((corpus.WORDS / "heldout.jsonl").read_text().splitlines())
    assert all("a router" not in item["about"] and grade.judge(item, "?") for item in left)


def test_answers_are_judged_by_what_was_asked():
    by_name = {entry.names[0]: entry for entry in corpus.entries()}
    rope, gqa, mla = by_name["RoPE"], by_name["GQA"], by_name["MLA"]
    cases = [
        ("what", ["RoPE"], rope.what, "right"), ("what", ["RoPE"], rope.why, "half"),
        ("why", ["RoPE"], f"{rope.what} {rope.why}", "right"), ("why", ["RoPE"], gqa.why, "wrong"),
        ("why", ["RoPE"], corpus.DONT_KNOW, "honest"), ("why", ["RoPE"], rope.why[:-5], "wrong"),
        ("difference", ["GQA", "MLA"], f"{mla.what} {gqa.what}", "right"),
        ("difference", ["GQA", "MLA"], f"{mla.what} {rope.what}", "half"),
        ("other", ["RoPE"], corpus.ONLY_THIS + rope.what, "right"),
        ("unknown", [], rope.what, "wrong"), ("unknown", [], corpus.DONT_KNOW, "right"),
        ("sum", [], "42", "right"), ("sum", [], "43", "wrong"), ("sum", [], sums.TOO_LONG, "honest")]
    for kind, about, answer, verdict in cases:
        assert grade.judge({"kind": kind, "about": about, "answer": "42"}, answer) == verdict, (kind, answer)


# From text to batches


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("thinking", [True, False])
def test_turns_in_a_row_are_the_conversation_of_the_chat_format(package, thinking):
    tokenizer = tokenizer_of(package)
    turns = data.Turns(tokenizer)
    earlier, _, _ = turns.turn("What is RoPE?", None, "RoPE turns.", earlier=True)
    assert tokenizer.bos_ids + earlier + turns.prompt("And 1 + 2?", thinking) == tokenizer.chat(TALK, thinking)
    system = turns.system("Be brief.")
    asked = [{"role": "system", "content": "Be brief."}, TALK[-1]]
    assert tokenizer.bos_ids + system + turns.prompt("And 1 + 2?", thinking) == tokenizer.chat(asked, thinking)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_cut_question_is_the_same_text_in_other_tokens(package):
    tokenizer, question = tokenizer_of(package), "What is RoPE?"
    turns = data.Turns(tokenizer)
    usual, first, last = turns.turn(question, "It turns.", "RoPE turns.")
    cuts = [turns.turn(question, "It turns.", "RoPE turns.", cut=cut) for cut in range(1, len(question))]
    assert all(tokenizer.decode(ids) == tokenizer.decode(usual) for ids, _, _ in cuts)
    assert all(ids[at:end] == usual[first:last] for ids, at, end in cuts)  # the same targets
    assert any(len(ids) > len(usual) for ids, _, _ in cuts)


@pytest.mark.parametrize("package", PACKAGES)
def test_only_what_the_model_has_to_write_is_a_target(package):
    tokenizer = tokenizer_of(package)
    turns = data.Turns(tokenizer)

    def targets(*turn, **form) -> str:
        ids, first, end = turns.turn(*turn, **form)
        return tokenizer.decode(ids[first:end])

    end = tokenizer.decode([tokenizer.end_of_turn])
    assert targets("What is RoPE?", None, "RoPE turns.") == f"RoPE turns.{end}"
    qwen3 = package != "deepseek_v3"
    thought = f"<think>\nIt turns.\n</think>\n\nRoPE turns.{end}" if qwen3 else f"It turns.</think>RoPE turns.{end}"
    assert targets("What is RoPE?", "It turns.", "RoPE turns.") == thought
    earlier = targets("What is RoPE?", None, "RoPE turns.", earlier=True)
    whole = f"RoPE turns.{end}"
    # Qwen3's prompt does not say whether a think block follows: the first token of an earlier turn is no target.
    assert earlier == whole if not qwen3 else whole.endswith(earlier) and 0 < len(whole) - len(earlier) < 6


def test_rows_are_full_and_targets_are_the_tokens_that_follow():
    parts = iter([([1, 2, 3, 4], 2, 3), ([5, 6, 7], 0, 3), ([8, 9], 0, 2)])
    ids, targets = data.pack(parts, 7)
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert targets.tolist() == [-100, 3, -100, 5, 6, 7, 8]


def test_a_batch_is_a_function_of_seed_and_step():
    source, turns = corpus.Corpus("x", "qwen3"), data.Turns(tokenizer_of("qwen3"))

    def batch(seed: int, step: int):
        return data.batch(lambda rng: data.of_corpus(source, turns, rng), seed, step, {64: 1, 32: 1}, 256)

    first = [batch(1, step) for step in range(6)]
    assert {ids.numel() for ids, _ in first} == {256} and {ids.shape[1] for ids, _ in first} == {32, 64}
    again = batch(1, 3)
    assert torch.equal(first[3][0], again[0]) and torch.equal(first[3][1], again[1])
    assert any(not torch.equal(first[step][0], batch(2, step)[0]) for step in range(6))


def test_the_tokenizer_merges_the_most_frequent_pair_first():
    """By hand: of "low low lower" the pairs lo and ow occur three times; "l" < "o" breaks the tie."""
    library = data.train_tokenizer(["low low low lower lowest"], "qwen3", 256 + 5 + 2)
    merges = [tuple(merge) for merge in json.loads(library.to_str())["model"]["merges"]]
    assert merges == [("l", "o"), ("lo", "w")]


# Losses and steps


@pytest.mark.parametrize("package", PACKAGES)
def test_the_loss_is_that_of_the_whole_logits(package):
    model = module(package, "weights").load_model(embedded(package), dtype=torch.float32, engine=False)
    ids = torch.randint(0, 300, (2, 16))
    targets = torch.where(torch.rand(2, 16) < 0.5, -100, torch.randint(0, 300, (2, 16)))
    with torch.no_grad():
        hidden = model.model(ids)
        expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
        torch.testing.assert_close(training.next_token_loss(model, hidden, targets), expected)
        if package == "deepseek_v3":  # from token t + 1 and the state of t: the logits for t + 2
            second = F.cross_entropy(model.mtp(ids[:, 1:], hidden[:, :-1]).flatten(0, 1), targets[:, 1:].flatten())
            torch.testing.assert_close(training.second_token_loss(model, ids, hidden, targets), second)
            both = training.Training(model, [], lambda step: None, mixed=False).losses(ids, targets)
            torch.testing.assert_close(both, (expected, expected + training.MTP * second))


def test_the_balance_loss_by_hand():
    """Two tokens, three experts, one of them chosen: f = (1, 0, 0), P = (0.5, 0.3, 0.2): 3 * 0.5."""
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]])
    assert balance.balance_loss(probabilities, torch.tensor([[0], [0]])).item() == pytest.approx(1.5)
    even = torch.full((6, 3), 1 / 3)
    assert balance.balance_loss(even, torch.tensor([[0, 1], [1, 2], [2, 0]] * 2)).item() == pytest.approx(1)


def test_the_balance_loss_lowers_a_busy_experts_probability():
    run = training.Training(make("qwen3_moe"), [], lambda step: None)
    router = balance.routers(run.model)[0]
    with torch.no_grad():
        router.weight[0] += 0.05 * router.weight[0].sign()
    x = router.weight[0].detach().repeat(8, 1)
    router(x)
    run.balance_loss.loss().backward()
    before = router.logits(x).softmax(-1)[:, 0].mean()
    with torch.no_grad():
        router.weight -= 0.01 * router.weight.grad
    assert router.logits(x).softmax(-1)[:, 0].mean() < before


def test_the_bias_moves_against_the_load():
    model = make("deepseek_v3")
    by_bias, router = balance.BalanceBias(model), balance.routers(model)[0]
    x = torch.randn(64, model.config.hidden_size)
    _, topk_ids = router(x)
    counts = torch.bincount(topk_ids.flatten(), minlength=8).float()
    by_bias.update(0.25)
    expected = 0.25 * torch.sign(counts.mean() - counts)
    assert torch.equal(router.e_score_correction_bias.detach(), expected) and expected.unique().numel() > 1


def make(package: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = module(package, "config").Config.from_checkpoint(embedded(package))
    return module(package, "model").Model(config)


@pytest.mark.parametrize("package", PACKAGES)
def test_rows_of_zeros_beside_the_tokens_of_head_and_experts_change_nothing(package):
    plain, padded = (module(package, "weights").load_model(embedded(package), dtype=torch.float32, engine=False)
                     for _ in range(2))
    faster.pad_rows(padded)
    ids = torch.randint(0, 300, (3, 40))
    torch.testing.assert_close(padded(ids), plain(ids), atol=1e-4, rtol=1e-4)
    targets = torch.where(ids > 100, ids, -100)  # some, as in training: the head gets rows, no (B, T, D)
    one, other = (training.next_token_loss(model, model.model(ids), targets) for model in (plain, padded))
    torch.testing.assert_close(one, other)
    one.backward()
    other.backward()
    for one, other in zip(plain.parameters(), padded.parameters()):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_batch_is_learned_by_heart(package, tmp_path):
    run = learn.Run(plan(package, steps=10), tmp_path)
    batch = run.training.batch(0)
    run.training.batch = lambda step: batch
    losses = [run.training.run_step(10) for _ in range(10)]
    assert losses[0] == pytest.approx(math.log(run.model.config.vocab_size), rel=0.05) and losses[-1] < 1.0


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_in_float32_is_pytorchs_apart_from_its_bfloat16(shape):
    """To a hundredth, the size of bfloat16's roundings, after several steps."""
    torch.manual_seed(0)
    start, gradients, ends = torch.randn(shape), [torch.randn(shape) for _ in range(3)], []
    for muon in (torch.optim.Muon, training.MuonInFloat32):
        weight = torch.nn.Parameter(start.clone())
        optimizer = muon([weight], lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    assert (ends[1] - ends[0]).norm() < 0.03 * (ends[0] - start).norm()


def test_the_schedule_climbs_and_falls():
    factors = [training.schedule(step, 500) for step in range(500)]
    assert factors[0] == 1 / 50 and factors[49] == 1 == max(factors) and factors[-1] == pytest.approx(1 / 450)
    assert all(0 < training.schedule(step, 3) <= 1 for step in range(3))


# A run, stopped and gone on with


def weights(run: learn.Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_resumed_training_is_the_same_to_the_last_bit(package, tmp_path):
    whole = learn.Run(plan(package), tmp_path / "whole")
    for _ in range(4):
        whole.one_step(4)
    half = learn.Run(plan(package), tmp_path / "half")
    for _ in range(2):
        half.one_step(4)
    half.save()
    torch.randn(7)  # what happens between has no part in it
    again = learn.Run(plan(package), tmp_path / "half")
    again.resume(state.read_notes(tmp_path / "half"))
    for _ in range(2):
        again.one_step(4)
    assert again.losses == whole.losses
    assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(again).items())


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_saved_has_the_names_and_types_of_the_release(package, tmp_path, capsys):
    assert main([package, "--steps", "1", "--tokens", "64", "--output", str(tmp_path / "new"), "--data",
                 str(write(tmp_path / "q.jsonl", QUESTIONS))]) == 0
    saved, there = (load_file(folder / "model.safetensors") for folder in (tmp_path / "new", embedded(package)))
    assert {name: t.dtype for name, t in saved.items()} == {name: t.dtype for name, t in there.items()}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        *(path.name for path in embedded(package).iterdir()), "losses.json"}
    losses = json.loads((tmp_path / "new/losses.json").read_text())
    assert len(losses) == 1 and losses[0] == pytest.approx(math.log(300), rel=0.2)
    assert "at first it was as unsure" in capsys.readouterr().out.lower()


def test_own_questions_are_learned_and_main_answers_them(tmp_path, capsys):
    folder = tmp_path / "mine"
    questions = str(write(tmp_path / "q.jsonl", QUESTIONS))
    assert main(["qwen3", "--steps", "45", "--tokens", "256", "--data", questions, "--output", str(folder)]) == 0
    assert "3 of 3 questions of the file are answered word for word" in capsys.readouterr().out
    run = module("qwen3", "main").main
    assert run(["-m", str(folder), "--no-thinking", "-p", QUESTIONS[0][0]]) == 0
    assert capsys.readouterr().out == QUESTIONS[0][1] + "\n"


def test_a_text_is_learned_and_continued(tmp_path, capsys):
    text = "The quick brown fox jumps over the lazy dog and sleeps. " * 8
    (tmp_path / "text.txt").write_text(text)
    folder = tmp_path / "mine"
    assert main(["qwen3", "--steps", "40", "--tokens", "256", "--data", str(tmp_path / "text.txt"),
                 "--output", str(folder)]) == 0
    capsys.readouterr()
    assert module("qwen3", "main").main(["-m", str(folder), "-p", "The quick brown", "-n", "6"]) == 0
    assert capsys.readouterr().out.startswith(" fox jumps over the lazy")


def test_what_is_there_is_not_written_over(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learn, "compare", lambda run: None)
    shutil.copytree(embedded("qwen3"), tmp_path / "there")
    before = (tmp_path / "there/model.safetensors").read_bytes()
    words = ["qwen3", "--steps", "1", "--tokens", "64", "--data", str(write(tmp_path / "q.jsonl", QUESTIONS)),
             "--output", str(tmp_path / "there")]
    assert main(words) == 2 and "--replace" in capsys.readouterr().err
    assert (tmp_path / "there/model.safetensors").read_bytes() == before
    assert main([*words, "--replace"]) == 0 and (tmp_path / "there/model.safetensors").read_bytes() != before


def test_other_files_stay_and_the_old_checkpoint_too_where_the_new_one_cannot_begin(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learn, "compare", lambda run: None)
    folder = shutil.copytree(embedded("qwen3"), tmp_path / "there")
    others = {name: (folder / name).write_text("mine") for name in ("LICENSE", "notes.json", "merges.txt", "a.jinja")}
    before = (folder / "model.safetensors").read_bytes()
    (tmp_path / "bad.jsonl").write_text("no json")
    for words in (["--data", str(tmp_path / "bad.jsonl")], ["--data", str(tmp_path / "none.jsonl")]):
        assert main(["qwen3", *words, "--replace", "--output", str(folder)]) == 2
        assert (folder / "model.safetensors").read_bytes() == before
    capsys.readouterr()
    empty = tmp_path / "empty"  # no checkpoint, but files of somebody's
    empty.mkdir()
    (empty / "notes.json").write_text("mine")
    for output in (folder, empty):
        assert main(["qwen3", "--data", str(write(tmp_path / "q.jsonl", QUESTIONS)), "--steps", "1", "--tokens", "64",
                     "--replace", "--output", str(output)]) == 0
    for file in [folder / name for name in others] + [empty / "notes.json"]:
        assert file.read_text() == "mine"


def test_a_conversation_longer_than_the_context_is_named(tmp_path, capsys):
    data_file = str(write(tmp_path / "q.jsonl", [("a", "b c " * 3000)]))
    assert main(["qwen3", "--data", data_file, "--output", str(tmp_path / "out")]) == 2
    assert "and the model a context of 2048; shorten it" in capsys.readouterr().err


def test_a_training_that_was_killed_before_its_steps_were_counted_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(learn, "TIMED", 2)
    monkeypatch.setattr(learn, "compare", lambda run: None)
    timed = plan("qwen3", steps=None, minutes=0.001)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learn.Run, "find_steps", lambda run: signal.raise_signal(signal.SIGINT))
        patch.setattr(learn, "after_this_step", lambda: contextlib.nullcontext([]))  # as without our handler
        learn.learn(timed, tmp_path / "out", replace=False, restart=False)
    assert learn.learn(timed, tmp_path / "out", replace=False, restart=False) == 0
    assert "going on after step 0\n" in capsys.readouterr().out


def test_an_unfinished_training_goes_on_only_with_the_same_settings(tmp_path, capsys):
    run = learn.Run(plan("qwen3"), tmp_path)
    run.one_step(4)
    run.save()
    words = ["qwen3", "--steps", "4", "--tokens", "64", "--output", str(tmp_path)]
    assert main([*words, "--seed", "2"]) == 2
    assert "seed 1, now 2" in capsys.readouterr().err
    (tmp_path / state.NAME).write_bytes(b"no tensors")
    assert main([*words, "--seed", "1"]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("line, said", [
    ("no json", "line 2: no JSON object"), ('{"question": "a"}', 'line 2: needs "question" and "answer"'),
    ('{"question": 1, "answer": "b"}', 'line 2: needs "question"'), ('["a", "b"]', "line 2: needs"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: \"messages\" is a list"),
    ('{"messages": "a"}', "line 2: \"messages\" is a list"),
    ('{"question": "a", "answer": "b", "thought": 3}', "line 2")])
def test_a_wrong_line_of_data_is_named(tmp_path, capsys, line, said):
    (tmp_path / "q.jsonl").write_text(f'{{"question": "a", "answer": "b"}}\n{line}\n')
    assert main(["qwen3", "--data", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err) < 300 and not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("words, said", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--lora", "4"], "--from"), (["--from", "Qwen3-Tiny"], "--data"),
    (["--from", "nowhere", "--data", "pyproject.toml"], "nowhere: neither a folder"),
    (["--minutes", "0"], "'0' is not"),
    (["--steps", "-1"], "'-1' is not"), (["--steps", "3", "--minutes", "2"], "not allowed"),
    (["--seed", "x"], "'x' is not"), (["-d", "nowhere"], "device 'nowhere' is not usable"),
    (["--lora", "4", "--compile"], "--from")])
def test_a_wrong_flag_is_one_sentence(tmp_path, capsys, words, said):
    try:
        code = main(["qwen3", *words, "--output", str(tmp_path / "out")])
    except SystemExit as error:  # argparse's own
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and said in err.splitlines()[-1] and len(err.splitlines()[-1]) < 300


def test_messages_and_thoughts_of_own_data():
    line = json.dumps({"messages": [*TALK, {"role": "assistant", "content": "3"}], "thought": "1, 2, 3."})
    assert own_data.conversation(line, "here") == own_data.Conversation(TALK, "1, 2, 3.", "3")
    turns = data.Turns(tokenizer_of("qwen3"))
    ids, first, end = turns.answered(TALK, "1, 2, 3.", "3")
    assert ids[:first] == turns.tokenizer.chat(TALK, thinking=True)
    assert turns.tokenizer.decode(ids[first:end]) == "<think>\n1, 2, 3.\n</think>\n\n3<|im_end|>"


# From a checkpoint


@pytest.mark.parametrize("package", PACKAGES)
def test_lora_begins_as_the_model_and_is_merged_into_it(package):
    load = module(package, "weights").load_model
    model = load(embedded(package), dtype=torch.float32, engine=False)
    plain = load(embedded(package), dtype=torch.float32, engine=False)
    ids = torch.randint(0, 300, (2, 12))
    add_lora(model, package, 4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in trained)
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))  # B is zero
    for module_ in model.modules():
        if hasattr(module_, "lora_B"):
            torch.nn.init.normal_(module_.lora_B, std=0.02)
    with torch.no_grad():
        changed = model(ids)
        assert not torch.allclose(changed, plain(ids), atol=1e-3)
        merge_lora(model)
        torch.testing.assert_close(model(ids), changed, atol=1e-3, rtol=1e-3)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("package, lora", [
    ("qwen3", []), ("deepseek_v3", ["--lora", "8"]),
    pytest.param("qwen3_moe", ["--lora", "8"], marks=pytest.mark.slow)])
def test_fine_tuning_learns_and_keeps_the_files(package, lora, tmp_path, capsys):
    folder = tmp_path / "mine"
    questions = str(write(tmp_path / "q.jsonl", QUESTIONS[:1]))
    assert main([package, "--from", PACKAGES[package], *lora, "--steps", "25", "--tokens", "192", "--data", questions,
                 "--output", str(folder)]) == 0
    assert "1 of 1 questions" in capsys.readouterr().out
    for path in embedded(package).glob("*.json"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    saved, source = load_file(folder / "model.safetensors"), load_file(embedded(package) / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in saved.items()} == {
        name: (t.dtype, t.shape) for name, t in source.items()}


def test_what_cannot_be_trained_is_refused_before_it_is_read(tmp_path, monkeypatch):
    source = shutil.copytree(embedded("qwen3"), tmp_path / "Tiny")
    monkeypatch.setattr(module("qwen3", "weights"), "free_memory", lambda device: 1e7)
    with pytest.raises(ValueError, match="Tiny: training 0.0 billion parameters takes more than 0.0 GB"):
        task.check_trainable(plan("qwen3", source=str(source)))
    task.check_trainable(plan("qwen3", source=str(source), lora=8))  # an eighth
    config = module("qwen3", "config").Config
    known = replace(config.from_checkpoint(source), quantization="fp8")
    monkeypatch.setattr(config, "from_checkpoint", lambda directory: known)
    with pytest.raises(ValueError, match="FP8 weights cannot be trained here"):
        task.check_trainable(plan("qwen3", source=str(source)))


def test_the_three_questions_are_held_out():
    exam = {item["question"] for item in grade.questions("heldout")}
    assert {question for question, _ in task.Task.QUESTIONS} <= exam


# What is shown


def test_long_questions_are_asked_less_often(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(show.time, "monotonic", lambda: now[0])
    clock, rung = show.Clock(), []
    for second in range(0, 3000, 10):
        now[0] = max(now[0], float(second))
        if clock.rings():
            rung.append(now[0])
            with clock.paused():
                now[0] += 5 if len(rung) < 3 else 100
    assert rung[:3] == [60, 130, 200] and rung[3] - rung[2] == 500 and rung[4] - rung[3] == 500


def test_the_curve_falls_from_left_to_right():
    losses = [8 * 0.97 ** i for i in range(200)]
    lines = show.curve(losses, width=40, height=6).splitlines()
    assert len(lines) == 8 and all(len(line) <= 9 + 40 for line in lines)
    heights = [sum(line[9 + i:10 + i].strip() != "" for line in lines[:6]) for i in range(40)]
    assert heights[0] == 6 and heights == sorted(heights, reverse=True)
    assert show.sparkline(losses, 10)[0] == "█" and show.sparkline(losses, 10)[-1] == "▁"
    assert show.sparkline([1.0]) and show.curve([1.0])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_training_that_is_killed_goes_on_with_the_same_loss(how, tmp_path):
    """The losses of a whole run, and of one that was stopped: Ctrl-C between two steps, a kill after a save."""
    code = ("import sys, scripts.train.show as show; show.Clock.__init__.__defaults__ = (1.0,); "  # saves each second
            "from scripts.train.__main__ import main; sys.exit(main(sys.argv[1:]))")
    words = [sys.executable, "-c", code, "qwen3", "--steps", "30", "--tokens", "512", "--threads", "1",
             "--data", str(write(tmp_path / "q.jsonl", QUESTIONS))]
    subprocess.run([*words, "--output", str(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True)
    cut = subprocess.Popen([*words, "--output", str(tmp_path / "cut")], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / state.NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    cut.send_signal(how)
    out, _ = cut.communicate(timeout=60)
    assert cut.returncode == (130 if how == signal.SIGINT else -9), out
    assert (tmp_path / "cut" / state.NAME).exists() and not (tmp_path / "cut/model.safetensors").exists()
    again = subprocess.run([*words, "--output", str(tmp_path / "cut")], cwd=ROOT, check=True, capture_output=True,
                           text=True)
    assert "going on after step" in again.stdout
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
