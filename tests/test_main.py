"""The command line, as all packages have it: flags, folders, pipes, commands. A package's own flags: in its folder."""

import builtins
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qwen3.engine import arguments as shared
from scripts.train import corpus
from tests.packages import PACKAGES, module

ROOT = Path(__file__).parents[1]
TINY = ROOT / "checkpoints/Qwen3-Tiny"


def folder_of(package: str) -> Path:
    return ROOT / "checkpoints" / PACKAGES[package]


def seen_by_generate(monkeypatch, package: str, ids=()) -> list[tuple[list[int], dict]]:
    """(prompt ids, settings) of each call; `ids` are the answer."""
    seen = []

    def generate(model, prompt, **settings):
        seen.append((prompt, settings))
        return iter(ids)

    monkeypatch.setattr(module(package, "main"), "generate", generate)
    return seen


@pytest.mark.parametrize("package", PACKAGES)
def test_an_answer_ends_with_its_turn_whatever_the_config_says(package, monkeypatch, tmp_path):
    """If its files name no stop token of a turn, a checkpoint that converses would write the next question too."""
    folder = shutil.copytree(folder_of(package), tmp_path / "One")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        values.pop("eos_token_id", None)
        (folder / name).write_text(json.dumps(values))
    seen = seen_by_generate(monkeypatch, package)
    assert module(package, "main").main(["-m", str(folder), "-p", "x"]) == 0
    assert seen[0][1]["stop_ids"] == {module(package, "tokenizer").Tokenizer.from_checkpoint(folder).end_of_turn}


@pytest.mark.parametrize("package", PACKAGES)
def test_new_sampling_flags_reach_generate(package, monkeypatch):
    main, conversation = module(package, "main"), module(package, "engine.conversation")
    seen = seen_by_generate(monkeypatch, package)
    checked = []
    monkeypatch.setattr(conversation, "check_request", lambda *_, **settings: checked.append(settings))
    flags = ["--min-p", "0.1", "--repetition-penalty", "1.05", "--presence-penalty", "-0.5"]
    expected = {"min_p": 0.1, "repetition_penalty": 1.05, "presence_penalty": -0.5}
    assert main.main(["-m", str(folder_of(package)), "-p", "x", *flags]) == 0
    assert seen[0][1].items() >= expected.items() and checked[0].items() >= expected.items()


@pytest.mark.parametrize("flag", ["-k", "--top-p", "--min-p", "--seed"])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_flag_that_does_nothing_without_sampling_says_so(package, flag, capfd, monkeypatch):
    seen_by_generate(monkeypatch, package)
    main, name = module(package, "main").main, PACKAGES[package]
    for temperature, said in (([], True), (["-t", "0"], True), (["-t", "1"], False)):
        assert main(["-m", name, "-p", "x", flag, "1", *temperature]) == 0
        assert (f"note: {flag}: without effect at temperature 0" in capfd.readouterr().err) == said


def test_flags_that_do_nothing_are_said_in_one_line_and_penalties_do_something(capfd, monkeypatch):
    seen_by_generate(monkeypatch, "qwen3")
    main = module("qwen3", "main").main
    assert main(["-m", str(TINY), "-p", "x", "-k", "5", "--seed", "1", "--repetition-penalty", "1.1"]) == 0
    assert "note: -k, --seed: without effect at temperature 0" in capfd.readouterr().err
    assert main(["-m", str(TINY), "-p", "x", "--repetition-penalty", "1.1", "--presence-penalty", "0.5"]) == 0
    assert "without effect" not in capfd.readouterr().err


def test_cut_off_says_why(capfd, monkeypatch):
    main = module("qwen3", "main")
    monkeypatch.setattr(main, "generate", lambda model, ids, *, max_new_tokens, **_: iter([5] * max_new_tokens))
    for flags, said in ((["-n", "2"], "cut off after 2 tokens; -n allows more\n"),
                        ([], ": the context of 2048 tokens is full\n")):
        assert main.main(["-m", str(TINY), "-p", "a " * 1000, *flags]) == 0
        err = capfd.readouterr().err
        assert "cut off after " in err and said in err


def test_notes_of_config_and_tokenizer_are_said(capfd, monkeypatch, tmp_path):
    seen_by_generate(monkeypatch, "qwen3")
    main = module("qwen3", "main")
    tokenizer = main.Tokenizer.from_checkpoint(TINY)
    tokenizer.notes = ["of the tokenizer"]
    monkeypatch.setattr(main.Tokenizer, "from_checkpoint", lambda folder, **_: tokenizer)
    folder = shutil.copytree(TINY, tmp_path / "Tiny")
    (folder / "generation_config.json").write_text('{"stop_strings": ["x"]}')
    assert main.main(["-m", str(folder), "-p", "x"]) == 0
    err = capfd.readouterr().err
    assert "note: of the tokenizer\n" in err and "note: generation_config.json: stop_strings are not used here" in err


@pytest.mark.parametrize("flags, wanted", [
    ([], {}), (["--chat"], {"chat_format": "template"}), (["--no-thinking"], {"chat_format": "template"}),
    (["--system", "x"], {"chat_format": "template"}), (["--chat-format", "plain"], {"chat_format": "plain"}),
    (["--chat-format", "ChatML", "--chat"], {"chat_format": "ChatML"})])
def test_who_asks_for_a_conversation_wins_over_the_guess(monkeypatch, flags, wanted):
    conversation = module("qwen3", "engine.conversation")
    monkeypatch.setattr(conversation.Tokenizer, "from_checkpoint", lambda folder, chat_format=None: None)
    arguments = module("qwen3", "main").parse_arguments(flags)
    assert conversation.chat_format(arguments) == wanted


# Pipes

def ask(monkeypatch, stdin, *flags: str) -> tuple[int, list[str]]:
    """(exit code, the questions as the model got them)."""
    main = module("qwen3", "main")
    seen, tokenizer = seen_by_generate(monkeypatch, "qwen3"), main.Tokenizer.from_checkpoint(TINY)
    monkeypatch.setattr(sys, "stdin", stdin)
    code = main.main(["-m", str(TINY), *flags])
    return code, [tokenizer.decode(ids).partition("user\n")[2].partition("<|im_end|>")[0] for ids, _ in seen]


def pipe(data: bytes) -> io.TextIOWrapper:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return open(read, encoding="utf-8")


class Typed(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("flags", [[], ["-p", "-"]])
@pytest.mark.parametrize("data, question", [
    (b"What is GQA?\n", "What is GQA?"), (b"a\n\nb\r\n", "a\n\nb"), (b"a\xffb", "a\ufffdb"), (b"\xef\xbb\xbfa", "a"),
    (b"  x  ", "  x  ")])
def test_a_question_comes_through_a_pipe(monkeypatch, flags, data, question):
    assert ask(monkeypatch, pipe(data), *flags) == (0, [question])


def test_what_is_no_pipe_is_not_read(monkeypatch, capfd, tmp_path):
    question = module("qwen3", "main").DEFAULT_PROMPT
    refused = "qwen3: standard input holds no question; write one there, or ask it with -p\n"
    with open(os.devnull) as null:
        for stdin in (None, null, Typed("never"), pipe(b"")):
            assert ask(monkeypatch, stdin) == (0, [question])
            assert f'asking "{question}"' in capfd.readouterr().err
        for stdin, flags in ((None, ["-p", "-"]), (null, ["-p", "-"]), (pipe(b""), ["-p", "-"]), (pipe(b"\n \n"), [])):
            assert ask(monkeypatch, stdin, *flags) == (2, [])
            assert capfd.readouterr().err == refused
    assert ask(monkeypatch, pipe(b"never"), "-p", "asked") == (0, ["asked"])
    assert ask(monkeypatch, io.StringIO("of a program\n")) == (0, ["of a program"])
    path = tmp_path / "q"
    path.write_text("from a file\n")
    with open(path) as file:
        assert ask(monkeypatch, file) == (0, ["from a file"])


# Folders

@pytest.mark.parametrize("package", PACKAGES)
def test_the_embedded_checkpoint_says_what_to_ask(package, capfd, monkeypatch, tmp_path):
    """By whatever name it is found, and no other checkpoint says it."""
    seen_by_generate(monkeypatch, package)
    main, name = module(package, "main"), PACKAGES[package]
    monkeypatch.setattr(main, "DEFAULT", "Moonlight-16B-A3B-Instruct")  # the longest, and not downloaded
    monkeypatch.setattr(main, "CHECKPOINTS", tmp_path)
    shutil.copytree(folder_of(package), tmp_path / name)
    shutil.copytree(folder_of(package), tmp_path / "mine")
    for model, said in (([], 1), (["-m", name], 1), (["-m", f"{tmp_path}/mine/../{name}/"], 1), (["-m", "mine"], 0)):
        assert main.main(["-p", "x", *model]) == 0
        notes = [line for line in capfd.readouterr().err.splitlines() if 'ask "What is RoPE?"' in line]
        assert len(notes) == said
        assert all(name in line and "420 words" in line and len(line) < 300 for line in notes)


def test_the_number_of_words_is_that_of_the_glossary():
    said = int(re.search(r"explains about (\d+) words", shared.ABOUT_EMBEDDED)[1])
    assert abs(len(corpus.glossary()) - said) < 10


DOWNLOAD = "bash scripts/download_x.sh"


def find(name: str | None, checkpoints: Path) -> tuple[Path, list[str]]:
    return shared.find_checkpoint(name, checkpoints, "Big", "Tiny", DOWNLOAD)


def checkpoint(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for file in files or ("config.json", "model.safetensors"):
        (folder / file).write_text("{}")
    return folder


@pytest.fixture
def no_cache(monkeypatch, tmp_path) -> Path:
    """A home without a Hugging Face cache."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("variable, below", [
    ("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
    ("HOME", ".cache/huggingface/hub")])
def test_owner_and_name_are_found_in_the_hugging_face_cache(no_cache, monkeypatch, variable, below):
    cache = no_cache / "home" / below
    if variable != "HOME":
        monkeypatch.setenv(variable, str(no_cache / "home"))
    model = cache / "models--Qwen--Qwen3-0.6B"
    old, new = (checkpoint(model / "snapshots" / commit) for commit in ("aaa", "bbb"))
    os.utime(old, (1, 1))
    assert find("Qwen/Qwen3-0.6B", no_cache)[0] == new  # no refs: the newest
    (model / "refs").mkdir()
    (model / "refs/main").write_text("aaa")
    assert all(find(name, no_cache)[0] == old for name in ("Qwen/Qwen3-0.6B", str(model), f"{model}/"))
    assert shared.name_of(old) == "Qwen3-0.6B"
    own = checkpoint(no_cache / "checkpoints/Qwen3-0.6B")
    assert find("Qwen/Qwen3-0.6B", no_cache / "checkpoints")[0] == own
    here = checkpoint(no_cache / "Qwen/Qwen3-0.6B")
    assert find("Qwen/Qwen3-0.6B", no_cache / "checkpoints")[0] == here


def test_home_trailing_slash_and_names(no_cache):
    folder = checkpoint(no_cache / "home/x")
    assert find("~/x", no_cache)[0] == find("home/x/", no_cache)[0] == folder == find("x", no_cache / "home")[0]


@pytest.mark.parametrize("name, wanted", [
    ("model.gguf", "model.gguf is a GGUF file, and this project reads safetensors"),
    ("Tiny/config.json", "is a file, and a checkpoint is a folder"),
    ("Qwen/Qwen3-9B", "Qwen/Qwen3-9B: neither a folder nor a checkpoint (there: Tiny); get a published one with "
                      f"`{DOWNLOAD} NAME`"),
    ("x" * 5000, "File name too long"), ("~nobody/x", "~nobody/x: neither a folder"), ("../x/..\0", "neither a folder"),
    ("a/" * 90, "neither a folder")])
def test_what_is_no_checkpoint_gets_one_sentence(no_cache, name, wanted):
    (no_cache / "model.gguf").write_text("GGUF")
    checkpoint(no_cache / "Tiny")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        find(name, no_cache)
    assert wanted in str(error.value) and len(str(error.value)) < 300


def test_the_default_is_used_only_when_it_is_whole(no_cache):
    big, tiny = no_cache / "Big", checkpoint(no_cache / "Tiny")
    folder, (note,) = find(None, no_cache)
    assert folder == tiny and note.startswith(f"Big is not downloaded (`{DOWNLOAD}` gets it): using Tiny")
    checkpoint(big, "config.json")
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    for file, content, whole in (
            ("model-1.safetensors.part", "", False), ("model-1.safetensors", "", False),
            ("model.safetensors.index.json", index, False), ("model-2.safetensors", "", False),
            ("model-1.safetensors.part", None, True)):
        (big / file).unlink() if content is None else (big / file).write_text(content)
        folder, notes = find(None, no_cache)
        assert (folder, not notes) == ((big, True) if whole else (tiny, False))
        assert whole or notes[0].startswith(f"the download of Big is not finished (`{DOWNLOAD}` goes on): using Tiny")
    (big / "model-2.safetensors").rename(big / "model-2.safetensors.part")
    with pytest.raises(ValueError, match="Big: its download is not finished; `bash scripts/download_x.sh Big` goes on"):
        find("Big", no_cache)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_folder_whose_name_is_no_utf8(tmp_path, capfd):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    shutil.copytree(TINY, folder)
    code = module("qwen3", "main").main(["-m", f"{folder}/", "-p", "What is RoPE?"])
    out, err = capfd.readouterr()
    assert "\\udcff\\udcfe" in err and (code, out[:4]) == (0, "RoPE"), err


# In conversations

def converse(monkeypatch, package: str, *lines: str, flags=()) -> tuple[int, list[str]]:
    """(exit code, the prompts) of a conversation in which each answer is "Hello!"."""
    main = module(package, "main")
    tokenizer = main.Tokenizer.from_checkpoint(folder_of(package))
    seen, given = seen_by_generate(monkeypatch, package, tokenizer.encode("Hello!")), iter(lines)

    def type_line(prompt: str = "") -> str:
        line = next(given, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", type_line)
    code = main.main(["-m", str(folder_of(package)), "--chat", *flags])
    return code, [tokenizer.decode(ids) for ids, _ in seen]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_question_after_a_command_is_asked(package, monkeypatch, capfd):
    code, prompts = converse(monkeypatch, package, "One", "/no_think What is the KV cache?", "Two", "/think Three",
                             "/clear Four", "/think", "/clear")
    assert code == 0 and len(prompts) == 5
    off = [prompt.rstrip().endswith("</think>") for prompt in prompts]
    assert off == [False, True, True, False, False]
    for prompt, question in zip(prompts, ("One", "What is the KV cache?", "Two", "Three", "Four")):
        assert question in prompt and "/" not in prompt.replace("</think>", "")
    assert "Three" not in prompts[4] and "Hello!" in prompts[3] and "Hello!" not in prompts[4]


def test_slashes_and_words_that_leave(monkeypatch, capfd):
    typed = ["/usr/bin is what?", "//think about it", "/nothink What?", "/help", "/exit now", "What is x? /no_think",
             "/* c */ int x;", "exit the loop"]
    code, prompts = converse(monkeypatch, "qwen3", *typed, "QUIT", "never")
    err = capfd.readouterr().err
    asked = ["/usr/bin is what?", "/think about it", "What is x? /no_think", "/* c */ int x;", "exit the loop"]
    assert code == 0
    assert [prompt.rpartition("user\n")[2].partition("<|im_end|>")[0] for prompt in prompts] == asked
    for said in ("/nothink is not known", "Several pasted lines are one question", "/exit takes no text"):
        assert said in err
    for word in ("exit", "quit", "/exit", "/quit", "Exit"):
        assert converse(monkeypatch, "qwen3", word, "never") == (0, [])


def test_a_switch_that_cannot_be_set_loses_no_question(monkeypatch, capfd):
    def choose(self, wanted):
        if wanted is not None:
            raise ValueError("always; x")
        self.thinking = True

    monkeypatch.setattr(module("qwen3", "engine.conversation").Conversation, "choose_thinking", choose)
    assert len(converse(monkeypatch, "qwen3", "/no_think One")[1]) == 1
    assert "qwen3: always\n" in capfd.readouterr().err


# Inside other programs

def test_in_a_thread_and_nothing_of_the_process_is_changed(monkeypatch, capfd):
    def settings() -> tuple:
        return signal.getsignal(signal.SIGINT), sys.stdin, sys.stdout, sys.stderr, sys.stdout.errors

    main, codes = module("qwen3", "main").main, []
    seen_by_generate(monkeypatch, "qwen3")
    before = settings()
    thread = threading.Thread(target=lambda: codes.append(main(["-m", str(TINY), "-p", "x"])))
    thread.start()
    thread.join()
    assert codes == [0] and before == settings()


@pytest.mark.parametrize("package", PACKAGES)
def test_memory_that_runs_out_in_an_answer_is_one_sentence(package, monkeypatch, capfd):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 70000 bytes.")

    monkeypatch.setattr(module(package, "main"), "generate", fail)
    assert module(package, "main").main(["-m", str(folder_of(package)), "-p", "x"]) == 2
    assert capfd.readouterr().err.endswith(
        f"{package}: memory ran out: 70000 bytes more were needed; try a smaller -n, --dtype bfloat16, a smaller "
        "checkpoint or another device\n")


@pytest.mark.ahead
def test_pytest_shows_names_when_it_is_asked():
    test = "tests/test_readmes.py::test_something_is_tested"
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    for flags, shown in ((["-v"], True), ([], False)):
        done = subprocess.run([sys.executable, "-m", "pytest", test, "-p", "no:cacheprovider", *flags], cwd=ROOT,
                              capture_output=True, text=True, env=environment)
        assert (f"{test} PASSED" in done.stdout) == shown and ("rootdir" in done.stdout) == shown, done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_a_terminal_is_told_once_how_to_see_inside(package, monkeypatch, capfd):
    main = module(package, "main")
    monkeypatch.setattr(main, "DEFAULT", "not downloaded")
    said = []
    for words in (["-p", "Hi", "-n", "2"], ["-m", PACKAGES[package], "-p", "Hi", "-n", "2"]):
        monkeypatch.setattr(module(package, "engine.conversation"), "is_terminal", lambda stream: True)
        assert main.main(words) == 0
        said.append(capfd.readouterr().err.splitlines()[-1])
        monkeypatch.setattr(module(package, "engine.conversation"), "is_terminal", lambda stream: False)
        assert main.main(words) == 0 and "scripts.xray" not in capfd.readouterr().err  # a pipe is not
    command = "see inside: uv run python -m scripts.xray{} -o page.html, with the flags of this run"
    assert said == [command.format(f" -m {PACKAGES[package]}"), command.format("")]
