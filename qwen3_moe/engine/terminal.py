"""The terminal: what is printed where, what is typed, and how an error becomes one sentence.

Only the answer goes to standard output; notes, progress and reasoning go to standard error. A stream may be closed,
full or unable to write a character, and none of that is a reason for a traceback. No stream is replaced and no setting
of the process is changed, except in `start` and `program`, which run only where this program is the process.
torch is not imported here: that takes seconds, and Ctrl-C should leave quietly then too.
"""

import os
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import NoReturn, TextIO

from . import processes

PACKAGE = __name__.partition(".")[0]
THINK, END_THINK = "<think>", "</think>"
PASTE = 0.05  # seconds: lines that follow faster were pasted
GRACE = 0.5  # seconds after an answer in which Ctrl-C was meant for the answer


# Printing
def write(stream: TextIO | None, text: str, errors: str = "replace") -> None:
    """Print now; what the stream's encoding lacks becomes "?", and a closed standard stream (None) takes everything."""
    if stream is not None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, errors).decode(encoding))
        stream.flush()


def note(text: str = "", end: str = "\n") -> None:
    with suppress(OSError, ValueError):  # a full disk or a closed file: then nobody reads notes
        write(sys.stderr, text + end, "backslashreplace")


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def takes_escapes(stream: TextIO | None) -> bool:
    """Whether escape codes may be written there; https://no-color.org has the variable."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def progress(what: str) -> Callable[[int, int], None]:
    """`show(done, total)`: a line that overwrites itself and disappears at the end; nothing without a terminal."""
    def show(done: int, total: int) -> None:
        if is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb":
            columns = shutil.get_terminal_size().columns - 1
            empty = "\033[K" if takes_escapes(sys.stderr) else " " * columns + "\r"
            note(f"\r{what} {done:,}/{total:,}"[:columns + 1] if done < total else f"\r{empty}", end="")
    return show


def show_answer(tokenizer, prompt_ids: list[int], ids: Iterator[int]) -> str:
    """Print an answer as it is generated, reasoning apart and dim; return the answer without reasoning.

    Newlines around <think> and </think> belong to the chat format. An empty think block is not shown.
    """
    dim, plain = ("\033[2m", "\033[0m") if takes_escapes(sys.stderr) else ("", "")
    answer, blank, shown = "", "", False  # blank: what the segment begins with, until it is known whether more comes
    was_thinking = None
    try:
        for thinking, piece in segments(tokenizer, prompt_ids, ids):
            if thinking != was_thinking:
                if shown and was_thinking:
                    note(plain)
                was_thinking, blank, shown = thinking, "", False
            if not shown:
                blank += piece
                if not blank.strip():
                    continue
                piece = blank.lstrip("\n") if thinking or not answer or answer.endswith("\n") else blank
                note(dim if thinking else "", end="")
                shown = True
            if thinking:
                note(piece, end="")
            else:
                answer += piece
                write(sys.stdout, piece)
    finally:
        if shown and was_thinking:
            note(plain)
    write(sys.stdout, "\n")
    return answer


def segments(tokenizer, prompt_ids: list[int], ids: Iterator[int]) -> Iterator[tuple[bool, str]]:
    """(Is it reasoning?, text) in pieces; in a conversation <think> and </think> separate the two."""
    think, end = (tokenizer.control_ids.get(mark) for mark in (THINK, END_THINK))
    if tokenizer.thinking is None:
        think = end = None
    tail = prompt_ids[-3:]  # some formats end the prompt with <think>, or that and a newline
    thinking, mark = think is not None and think in tail and end not in tail, -1

    def segment() -> Iterator[int]:
        nonlocal mark
        mark = -1
        for id in ids:
            if id in (think, end):
                mark = id
                return
            yield id

    while True:
        for piece in tokenizer.stream(segment()):
            yield thinking, piece
        if mark == -1:
            return
        thinking = mark == think


# Typing
class Questions:
    """What a user types in a conversation. Several pasted lines are one question; a pipe gives one question a line."""

    def __init__(self, stands_alone: Callable[[str], bool]):
        self.stands_alone = stands_alone  # is a line a command, though it came together with others?
        self.typed = is_terminal(sys.stdin)
        self.readline: ModuleType | None = None
        self.prompt = "> " if self.typed or is_terminal(sys.stdout) else ""
        if self.typed and is_terminal(sys.stdout):
            with suppress(ImportError):
                import readline  # arrow keys and history in input(), where the system has it
                self.readline = readline
                if takes_escapes(sys.stdout):  # the terminal then says where a paste begins and ends
                    readline.parse_and_bind("set enable-bracketed-paste on")
        self.text, self.ahead, self.answered, self.warned = "", "", 0.0, False

    def read(self) -> str:
        """The next question or command; EOFError at the end, KeyboardInterrupt where Ctrl-C should leave."""
        while True:
            try:
                return self.read_lines()
            except KeyboardInterrupt:
                if not self.typed or self.should_leave():
                    raise

    def read_lines(self) -> str:
        """A line, and all that was pasted with it, up to a line that stands alone."""
        self.text, self.ahead = self.ahead, ""
        if not self.text:
            self.text = self.line(self.prompt)
        while self.typed and not self.stands_alone(self.text) and self.more_follows():
            try:
                line = self.line("")
            except EOFError:
                break
            if self.stands_alone(line):
                self.ahead = line
                break
            self.text += f"\n{line}"
        text, self.text, self.warned = self.text, "", False
        return text if "\n" in text.strip() else text.strip()  # the first line of code may be indented

    def more_follows(self) -> bool:
        try:
            return bool(select.select([sys.stdin], [], [], PASTE)[0])
        except (OSError, ValueError):  # Windows asks only sockets
            return False

    def line(self, prompt: str) -> str:
        """One line from the terminal or a pipe. Raises EOFError at the end."""
        if self.typed and not is_terminal(sys.stdout):
            note(prompt, end="")
            prompt = ""
        if sys.stdin is None:
            raise EOFError
        if sys.stdout is None or sys.stderr is None:  # input() refuses to work then
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n")
        return input(prompt)

    def should_leave(self) -> bool:
        """Ctrl-C clears a line that was begun, and leaves at an empty one."""
        begun = self.text or (self.readline.get_line_buffer() if self.readline else None)
        self.text, warned = "", self.warned
        late = time.monotonic() - self.answered < GRACE
        if begun or (begun == "" and not late) or warned:
            note("")
            self.warned = False
            return not begun
        self.warned = True  # without readline nobody knows whether the line was empty
        note("\nthe answer had ended already; Ctrl-C once more leaves" if late else "\nCtrl-C once more leaves")
        return False


# Ending
def start() -> None:
    """Before torch is imported: Ctrl-C leaves quietly, and no file gets the number of a closed standard stream."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    processes.be_quiet()
    sys.excepthook = cannot_start


def cannot_start(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """One sentence, no traceback, where an import fails: a package is missing, damaged or too large for memory."""
    ours = (getattr(error, "name", None) or "").partition(".")[0] == PACKAGE
    if ours or not isinstance(error, (ImportError, OSError, MemoryError)):
        return sys.__excepthook__(kind, error, trace)
    hint = (f"`uv run python -m {PACKAGE}.main` installs what it needs" if isinstance(error, ModuleNotFoundError) else
            "memory is limited (`ulimit -v`), or a package has to be installed again")
    note(f"{PACKAGE}: cannot start: {one_line(error)[:160] or kind.__name__}; {hint}")
    os._exit(2)


def program(main: Callable[[], int]) -> NoReturn:
    """Run main() as the process: exit code 0, 2 or 130, and never a traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.excepthook = sys.__excepthook__
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer makes U+FFFD of bytes that are no text
    try:
        code = exit_code(processes.join) or main()
    except SystemExit as exit_:
        code = exit_.code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        complain(f"internal error, please report it with your command: {type(error).__name__}: {one_line(error)}"[:270])
        code = 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # Python would try again on its way out, complain, and exit with 120
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(processes.leave(code))


def complain(text: str, lost: bool = False) -> None:
    """Why the program ends, said by one process if there are several."""
    if (who := processes.who_speaks(lost)) is not None:
        note(f"{PACKAGE}{who}: {text}")


def exit_code(work: Callable[[], None]) -> int:
    """Do it; 0, or 2 with one sentence about what the user can mend, or 130 after Ctrl-C. Other errors are raised."""
    try:
        work()
        return 0
    except BrokenPipeError:  # whoever reads the answer has left, as `head` does
        return processes.dismiss()
    except KeyboardInterrupt:
        note("")
        return 130
    except Exception as error:
        if (text := sentence(error)) is None:
            raise
        complain(text, processes.is_lost(error))
        return 2


MEMORY = re.compile("out of memory|allocate memory|not enough memory|alloc_failed|bad[_ ]alloc|tried to allocate", re.I)
DEVICE = re.compile(r"\b(cuda|cudnn|cublas\w*|cusolver\w*|nccl|hip|rocm|mps|metal|xpu|nvidia|accelerator)\b"
                    r"|device ordinal|device-side", re.I)


def sentence(error: Exception) -> str | None:
    """One sentence for what a user can mend: bad input, files, memory, the device. None for a fault of the program."""
    text, kind = one_line(error), type(error)
    if processes.is_lost(error):
        return "another process has ended, or cannot be reached; its own message, if it left one, says why"
    if isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, OSError)) and MEMORY.search(text)):
        size = re.search(r"tried to allocate ([\d.,]+ ?\w+)", text, re.I)
        return (f"memory ran out{f': {size[1]} more were needed' if size else ''}; try a smaller -n, --dtype bfloat16, "
                "a smaller checkpoint or another device")
    if isinstance(error, OSError) and error.strerror:  # without a name it is a stream, such as standard output
        text = f"{error.filename}: {error.strerror}" if error.filename else f"cannot write or read ({error.strerror})"
    if isinstance(error, (ValueError, OSError)):
        text = text if len(text) < 280 else re.sub(r"\S{81,}", lambda value: f"{value[0][:38]}…{value[0][-40:]}", text)
        return text if len(text) < 280 else f"{text[:279]}…"
    if kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile does not work here ({text[:160]}); leave it out"
    if isinstance(error, (RuntimeError, AssertionError, NotImplementedError)) and DEVICE.search(text):
        return f"the device failed ({text[:160]}); `-d cpu` always works"
    return None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
