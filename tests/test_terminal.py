"""The terminal, without torch: printing, typing at a pseudo-terminal, pipes, closed streams, errors as sentences."""

import contextlib
import io
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen3.engine import terminal

ROOT = Path(__file__).parents[1]
MARKS = {"<think>": 1, "</think>": 2}
unix = pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals and signals")


class Words:
    """A tokenizer whose ids above 2 are the words given to it."""

    def __init__(self, thinking="switch"):
        self.thinking, self.control_ids, self.words = thinking, MARKS, []

    def ids(self, *pieces: str) -> list[int]:
        self.words += [piece for piece in pieces if piece not in MARKS]
        return [MARKS.get(piece) or self.words.index(piece) + 3 for piece in pieces]

    def stream(self, ids):
        for id in ids:
            yield {1: "<think>", 2: "</think>"}.get(id) or self.words[id - 3]


@pytest.mark.parametrize("prompt, pieces, answer, thought", {
    "no thought": ([], ["\n\n", "A", " b\n"], "A b\n", ""),
    "a thought": ([], ["<think>", "\n", "T", "\n", "</think>", "\n\n", "A"], "A", "T\n\n"),
    "newlines before it": ([], ["\n", " \n", "<think>", "\n", "T", "</think>", "\n\n", "A"], "A", "T\n"),
    "a second one": ([], ["<think>", "T", "</think>", "A", "\n", "<think>", "U", "</think>", "\n", "B"],
                     "A\nB", "T\nU\n"),
    "a second one in a line": ([], ["A", "<think>", "U", "</think>", "\n", "B"], "A\nB", "U\n"),
    "an empty one": ([], ["<think>", "\n\n", "</think>", "\n\n", "A"], "A", ""),
    "closed and never opened": ([], ["</think>", "\n\n", "A", "</think>", "B"], "AB", ""),
    "never closed": ([], ["<think>", "\n", "T"], "", "T\n"),
    "opened by the prompt": (["<think>", "\n"], ["T", "</think>", "\n", "A"], "A", "T\n"),
    "opened and closed by it": (["<think>", "\n\n", "</think>", "\n\n"], ["A"], "A", ""),
    "an indented answer": ([], ["\n", "  ", "x = 1"], "  x = 1", ""),
    "only blanks": ([], ["\n", " "], "", ""),
}.values())
def test_reasoning_is_never_part_of_the_answer(capsys, prompt, pieces, answer, thought):
    words = Words()
    prompt_ids = words.ids("question", *prompt)
    assert terminal.show_answer(words, prompt_ids, iter(words.ids(*pieces))) == answer
    assert capsys.readouterr() == (answer + "\n", thought)


def test_plain_text_has_no_reasoning(capsys):
    words = Words(thinking=None)
    assert terminal.show_answer(words, words.ids("x"), iter(words.ids("a", "<think>", "b"))) == "a<think>b"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("variables, escapes", [
    ({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": ""}, True),
    ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_no_color_and_a_dumb_terminal_get_no_escape_codes(monkeypatch, capsys, variables, escapes):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    words = Words()
    terminal.show_answer(words, words.ids("q"), iter(words.ids("<think>", "T", "</think>", "A")))
    show = terminal.progress("loading")
    show(1, 2), show(2, 2)
    assert ("\033" in screen.getvalue()) == escapes and "T" in screen.getvalue()
    assert ("loading 1/2" in screen.getvalue()) == (variables["TERM"] != "dumb")


def test_progress_stays_in_one_line_of_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    terminal.progress("reading prompt token")(1000, 2000)
    assert len(screen.getvalue().lstrip("\r")) < 20


def test_a_name_that_is_no_text_can_be_printed(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    terminal.note("\udcff")
    terminal.write(sys.stdout, "\udcff")
    assert (sys.stderr.buffer.getvalue(), sys.stdout.buffer.getvalue()) == (rb"\udcff" + b"\n", b"?")


# Errors

class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize("error, expected", [
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7"),
     "memory ran out: 2.00 GiB more were needed"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 40000 bytes. Error code 12 (Cannot allocate memory)"),
     "memory ran out: 40000 bytes more were needed"),
    (RuntimeError("unable to mmap 65 bytes from file <x>: Cannot allocate memory (12)"), "memory ran out; try"),
    (OSError(12, "Cannot allocate memory"), "memory ran out; try"),
    (MemoryError(), "memory ran out; try"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), "memory ran out; try"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "memory ran out; try"),
    (AssertionError("Torch not compiled with CUDA enabled"), "the device failed (Torch not compiled"),
    (RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be"),
     "the device failed (CUDA error: invalid device ordinal CUDA"),
    (RuntimeError("CUDA error: device-side assert triggered"), "the device failed"),
    (NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device"),
     "the device failed"),
    (RuntimeError("Found no NVIDIA driver on your system"), "the device failed"),
    (ValueError("top_k is -1,\nexpected 1 or more"), "top_k is -1, expected 1 or more"),
    (ValueError("x" * 5000), "x" * 38 + "…" + "x" * 40),
    (ValueError("word " * 100), "word word"),
    (OSError(28, "No space left on device"), "cannot write or read (No space left on device)"),
    (FileNotFoundError(2, "No such file or directory", "/a/b"), "/a/b: No such file or directory"),
])
def test_what_a_user_can_mend_is_one_sentence(error, expected):
    text = terminal.sentence(error)
    assert expected in text and len(text) < 300 and "\n" not in text


def test_a_sentence_that_is_cut_says_so():
    assert terminal.sentence(ValueError("word " * 100)).endswith("…")


def test_a_fault_of_the_program_stays_visible():
    def fail():
        raise error

    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"), KeyError("x"),
                  AssertionError("")):
        assert terminal.sentence(error) is None
        with pytest.raises(type(error)):
            terminal.exit_code(fail)


START = "import sys\nfrom qwen3.engine import terminal\nterminal.start()\n"


def run_program(body: str, shell: str = "") -> subprocess.CompletedProcess:
    """A main() with this body, as the process; `shell` redirects."""
    code = f"{START}def main():\n    {body}\nterminal.program(main)"
    return subprocess.run(f"exec {sys.executable} -c '{code}' {shell}", shell=True, cwd=ROOT, capture_output=True,
                          text=True)


@unix
@pytest.mark.ahead
@pytest.mark.parametrize("fails, code, message", [
    ("import torch_", 2, "qwen3: cannot start: No module named torch_; `uv run python -m qwen3.main` installs what it "
     "needs\n"),
    ("raise ImportError(\"libtorch.so: failed to map segment\")", 2, "qwen3: cannot start: libtorch.so: failed to map "
     "segment; memory is limited (`ulimit -v`), or a package has to be installed again\n"),
    ("raise MemoryError", 2, "qwen3: cannot start: MemoryError; memory is"),
    ("from qwen3.engine.terminal import nothing", 1, "Traceback"), ("1 / 0", 1, "Traceback")])
def test_an_import_that_fails_is_one_sentence(fails, code, message):
    done = subprocess.run([sys.executable, "-c", START + fails], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.replace("'", "").startswith(message)


@unix
@pytest.mark.ahead
@pytest.mark.parametrize("body, code, message", [
    ("raise RuntimeError(chr(10).join([str(7), str(8)]))", 2,
     "qwen3: internal error, please report it with your command: RuntimeError: 7 8\n"),
    ("return terminal.exit_code(lambda: int(\"x\"))", 2, "qwen3: invalid literal for int() with base 10: x\n"),
    ("raise KeyboardInterrupt", 130, ""), ("sys.exit(2)", 2, ""), ("return 0", 0, "")])
def test_a_process_ends_with_0_2_or_130_and_without_a_traceback(body, code, message):
    done = run_program(body)
    assert (done.returncode, done.stderr.replace("'", "")) == (code, message)


WRITES = """return terminal.exit_code(lambda: [
        terminal.note(str(1)), terminal.write(sys.stdout, str(2)), terminal.note(str(3))])"""


@unix
@pytest.mark.ahead
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's full disk")
@pytest.mark.parametrize("shell, code, out, err", [
    ("2>/dev/full", 0, "2", ""), ("2>&-", 0, "2", ""), (">&-", 0, "", "1\n3\n"), ("<&-", 0, "2", "1\n3\n"),
    ("<&- >&- 2>&-", 0, "", ""), (">/dev/full", 2, "", "1\nqwen3: cannot write or read (No space left on device)\n")])
def test_closed_and_full_streams_are_no_reason_for_a_traceback(shell, code, out, err):
    done = run_program(WRITES, shell)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@unix
@pytest.mark.ahead
def test_a_reader_that_leaves_is_no_reason_for_a_traceback():
    done = run_program(WRITES, "| :")
    assert done.stdout == "" and done.stderr in ("1\n", "1\n3\n")  # it may leave before or after the answer


# Typing

TALK = """
from qwen3.engine import terminal
terminal.signal.signal(2, terminal.signal.default_int_handler)
questions = terminal.Questions(lambda line: line in ("/exit", "/clear"))
while True:
    text = questions.read()
    print("[%s]" % text.replace(chr(10), "|"), flush=True)
    questions.answered = terminal.time.monotonic() - AGO
"""


class Terminal:
    """A process at a pseudo-terminal of 40 columns."""

    def __init__(self, ago: float = 9, command: list[str] | None = None, **variables: str):
        import fcntl
        import termios
        self.ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 40, 0, 0))
        environment = {**os.environ, "TERM": "xterm", **variables}
        command = [sys.executable, *(command or ["-c", TALK.replace("AGO", str(ago))])]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
                                        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        self.shown = b""
        self.wait_for(b"> ")

    def wait_for(self, text: bytes) -> None:
        end = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.ours], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.ours, 4096)
                except OSError:
                    break
        assert text in self.shown, self.shown

    def type(self, keys: bytes, answer: bytes) -> None:
        self.shown = b""
        if keys == b"\x03":
            time.sleep(0.2)  # readline has to be waiting: a signal a moment earlier is seen with the next key only
        os.write(self.ours, keys)
        self.wait_for(answer)
        if answer.startswith(b"["):
            self.wait_for(b"> ")


@contextlib.contextmanager
def terminals(_: Path) -> Iterator[Callable[..., Terminal]]:
    started = []

    def start(*arguments, **variables) -> Terminal:
        started.append(Terminal(*arguments, **variables))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.ours)


@pytest.fixture
def at_terminal(tmp_path):
    with terminals(tmp_path) as start:
        yield start


@unix
@pytest.mark.ahead(at_terminal=terminals)
def test_pasted_lines_are_one_question_and_ctrl_c_clears_a_line(at_terminal):
    screen = at_terminal()
    screen.type(b"one\n", b"[one]")
    # As terminals without bracketed paste do it.
    screen.type(b"def f(x):\n    return x\n\nf(1)\n", b"[def f(x):|    return x||f(1)]")
    screen.type(b"\033[200~a\rb\rc\033[201~\r", b"[a|b|c]")
    screen.type(b"one\n/clear\n", b"[/clear]")  # typed ahead: a command is not part of a question
    screen.type(b"a line that is longer than forty columns, and goes on\n",
                b"[a line that is longer than forty columns")
    screen.type(b"half", b"half")
    screen.type(b"\x03", b"> ")
    screen.type(b"whole\n", b"[whole]")
    screen.type(b"half", b"half")
    screen.type(b"\x03", b"> ")
    time.sleep(0.2)
    os.write(screen.ours, b"\x03")
    assert screen.process.wait(timeout=60) == -signal.SIGINT or screen.process.returncode in (1, 130)


@unix
@pytest.mark.ahead(at_terminal=terminals)
def test_ctrl_c_a_moment_after_an_answer_does_not_leave(at_terminal):
    screen = at_terminal(-9)  # the answer ended just now, however slow this machine is
    screen.type(b"one\n", b"[one]")
    screen.type(b"\x03", b"the answer had ended already; Ctrl-C once more leaves")
    screen.type(b"two\n", b"[two]")
    screen.type(b"\x03", b"once more leaves")
    screen.wait_for(b"> ")
    time.sleep(0.2)
    os.write(screen.ours, b"\x03")
    assert screen.process.wait(timeout=60)


@unix
@pytest.mark.ahead(at_terminal=terminals)
def test_a_dumb_terminal_can_be_typed_at(at_terminal):
    screen = at_terminal(TERM="dumb")
    assert b"\033" not in screen.shown
    screen.type(b"a\nb\n", b"[a|b]")
    assert b"\033" not in screen.shown


@unix
@pytest.mark.ahead(at_terminal=terminals)
def test_a_conversation_at_a_terminal(at_terminal):
    flags = ["-m", "Qwen3-Tiny", "-d", "cpu", "--chat", "-t", "9", "--seed", "1"]
    screen = at_terminal(command=["-m", "qwen3.main", *flags])
    assert b"/help" in screen.shown and b"\rloading tensor 1/57" in screen.shown
    screen.type(b"Hm\n", b"\033[2m" if b"\033[2m" in screen.shown else b"\n")
    time.sleep(0.3)
    screen.type(b"\x03", b"stopped; the question is forgotten")
    screen.wait_for(b"> ")
    screen.type(b"/system\n", b"> ")
    screen.type(b"/clear\n/think\n/nothing\n", b"/nothing is not known")
    time.sleep(0.5)
    screen.type(b"half", b"half")
    screen.type(b"\x03", b"> ")
    os.write(screen.ours, b"quit\n")
    screen.wait_for(b"quit")
    assert screen.process.wait(timeout=60) == 0 and b"Traceback" not in screen.shown
