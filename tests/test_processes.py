"""The program in several processes: who reads and speaks, how they end, and that none is left."""

import contextlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.packages import PACKAGES
from tests.ranks import ALONE, ROOT
from tests.warm import DEVNULL, PIPE, start

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="/proc"), pytest.mark.ahead]
QUESTION = "What is RoPE?"
ANSWER = "RoPE turns pairs of values in every query and key by angles that grow with the position.\n"


class Run:
    """`torchrun` or processes that were started by hand, and all of their children."""

    def __init__(self, words: list[str], stdin=DEVNULL, **variables: str):
        self.mark = uuid.uuid4().hex
        self.process = start(words, stdin=stdin, env=os.environ | ALONE | variables | {"TEST_MARK": self.mark})

    def end(self, typed: str | None = None, timeout: float = 120) -> tuple[int, str, str]:
        """(code, standard output, standard error), when it has ended by itself."""
        try:
            out, err = self.process.communicate(typed, timeout=timeout)
            return self.process.returncode, out, err
        finally:
            self.kill()

    def begin(self, seconds: float = 60) -> "Run":
        """Wait until something comes out."""
        try:
            assert select.select([self.process.stdout], [], [], seconds)[0] and os.read(self.process.stdout.fileno(), 1)
        except AssertionError:
            self.kill()
            pytest.fail(self.process.stderr.read())
        return self

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def children(self) -> list[int]:
        """All processes that are alive, torchrun among them."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_dead = (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                is_own = path.name == str(self.process.pid) or self.mark.encode() in (path / "environ").read_bytes()
                if is_own and not is_dead:
                    found.append(int(path.name))
        return found

    def rank(self, number: int) -> int:
        return next(one for one in self.children() if f"\0RANK={number}\0".encode() in
                    b"\0" + Path(f"/proc/{one}/environ").read_bytes() + b"\0")

    def kill(self) -> None:
        for one in self.children():
            with contextlib.suppress(OSError):
                os.kill(one, signal.SIGKILL)


def sentences(err: str) -> list[str]:
    """What the program says itself; torchrun adds more."""
    return [line for line in err.splitlines() if line.startswith(("qwen3: ", "qwen3, rank"))]


def torchrun(*words: str, ranks: int = 2, **more) -> Run:
    return Run(["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *words], **more)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def by_hand(words: list[str], rank: int, port: int, world: int = 2, stdin=DEVNULL, **variables: str) -> Run:
    """One of several processes, as srun and mpirun start them."""
    return Run(words, stdin, **{"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
               | variables)


def all_by_hand(words: list[str], typed: str | None = None, ranks: int = 2) -> tuple[list, list, list]:
    """(Codes, standard outputs, standard errors) of all of them."""
    port = free_port()
    runs = [by_hand(words, rank, port, ranks, PIPE if rank == 0 else DEVNULL) for rank in range(ranks)]
    ended = [run.end(typed) for run in runs]
    return tuple(map(list, zip(*ended)))


def talkative(folder: Path) -> Path:
    """The embedded Qwen3 without stop tokens, which goes on to the end of its context."""
    shutil.copytree(ROOT / "checkpoints/Qwen3-Tiny", folder)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        values.pop("eos_token_id", None)
        (folder / name).write_text(json.dumps(values))
    return folder


def goes_on(tmp_path: Path) -> list[str]:
    return ["-m", "qwen3.main", "-m", str(talkative(tmp_path / "Tiny")), "-p", "RoPE", "--chat-format", "plain", "-n",
            "1900"]


def test_questions_come_from_the_first_process_and_answers_go_out_of_it():
    """Two questions by pipe, and the end of the input instead of /exit: all are told."""
    run = torchrun("-m", "qwen3.main", "-m", "Qwen3-Tiny", "--chat", stdin=PIPE)
    code, out, err = run.end(f"{QUESTION}\n/clear {QUESTION}")
    assert (code, out) == (0, ANSWER * 2), err
    assert err.count("Ctrl-C ends the program") == 1 and err.count("the share of one of 2 processes") == 1


@pytest.mark.slow
@pytest.mark.parametrize("package, words, stdin", [
    ("qwen3", ["-p", QUESTION, "-t", "1", "--seed", "7"], ""), ("qwen3_moe", ["-t", "1", "--seed", "7"], QUESTION),
    ("deepseek_v3", ["-p", "-", "--speculative", "--show-experts"], QUESTION)])
def test_the_answers_are_those_of_one_process(package, words, stdin):
    words = ["-m", f"{package}.main", "-m", PACKAGES[package], "--dtype", "float32", *words]
    alone = Run(words, stdin=PIPE).end(stdin)
    codes, (out, nothing), (err, _) = all_by_hand(words, stdin)
    assert (codes, out, nothing) == ([0, 0], alone[1], "") and alone[0] == 0 and len(out) > 20, err
    pictures = [[line for line in text.splitlines() if line.startswith("layer")] for text in (err, alone[2])]
    assert pictures[0] == pictures[1] and bool(pictures[0]) == ("--show-experts" in words)


@pytest.mark.slow
def test_the_command_of_the_page_prints_what_stands_below_it():
    page = (ROOT / "scripts/parallel/README.md").read_text()
    command, shown = re.search(r"^uv run torchrun (.*qwen3\.main.*)\n```\n```text\n(.*\n)```$", page, re.M).groups()
    code, out, err = Run(["-m", "torch.distributed.run", *shlex.split(command)]).end()
    assert (code, out) == (0, shown), err


@pytest.mark.slow
def test_a_mistake_is_said_once_and_before_torchrun_speaks():
    code, out, err = torchrun("-m", "qwen3.main", "--nonsense").end()
    assert code == 1 and out == ""
    assert sentences(err) == ["qwen3: unrecognized arguments: --nonsense; --help lists the flags"]
    assert err.index("--nonsense; --help") < err.index("Traceback")


@pytest.mark.slow
@pytest.mark.parametrize("ranks, words, sentence", [
    (2, ["-m", "Qwen3-Tiny", "-p", "x", "--plain"], "qwen3: the lesson's own code runs in one process, and there are"),
    (3, ["-m", "Qwen3-Tiny", "-p", "x"], "qwen3: 3 processes cannot share 6 query heads and 2 key heads; start up to")])
def test_a_mistake_of_all_is_said_by_one(ranks, words, sentence):
    begun = time.monotonic()
    codes, outs, errs = all_by_hand(["-m", "qwen3.main", *words], ranks=ranks)
    said = sentences("".join(errs))
    assert codes[0] == 2 and 0 not in codes and set(outs) == {""} and said == sentences(errs[0]) and len(said) == 1
    assert said[0].startswith(sentence) and len(said[0]) < 300 and time.monotonic() - begun < 60


@pytest.mark.slow
def test_who_reads_the_answer_may_leave(tmp_path):
    """As `head` does: no error, and no process left."""
    with torchrun(*goes_on(tmp_path)).begin() as run:
        run.process.stdout.close()
        assert run.process.wait(20) == 0 and run.children() == []
        assert "Traceback" not in run.process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["answering", "waiting for a question"])
def test_ctrl_c_ends_all(tmp_path, what):
    if what == "answering":
        run = torchrun(*goes_on(tmp_path))
    else:
        run = torchrun("-m", "qwen3.main", "-m", "Qwen3-Tiny", "--chat", stdin=PIPE)
        run.process.stdin.write(f"{QUESTION}\n")
        run.process.stdin.flush()
    with run.begin():
        while what != "answering" and "tok/s" not in run.process.stderr.readline():  # after the answer
            pass
        run.process.send_signal(signal.SIGINT)
        run.process.wait(5)
        assert run.children() == []


@pytest.mark.slow
@pytest.mark.parametrize("who", ["torchrun", "rank 0"])
def test_whoever_is_killed_takes_all_along(tmp_path, who):
    """And one of the others says so. (For rank 1: tests/test_batch_file.py.)"""
    with torchrun(*goes_on(tmp_path)).begin() as run:
        os.kill(run.process.pid if who == "torchrun" else run.rank(int(who[-1])), signal.SIGKILL)
        run.process.wait(10)
        until = time.monotonic() + 5
        while run.children() and time.monotonic() < until:
            time.sleep(0.2)
        assert run.children() == []
        said = sentences(run.process.stderr.read())
        assert who == "torchrun" or [line.partition(": another process has ended")[0] for line in said] == [
            "qwen3, rank 1"]


# One process in trouble

SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from qwen3.engine import processes, terminal
terminal.start()
from qwen3 import main
first = os.environ.get("RANK") == "0"
{trouble}
terminal.program(main.main)
"""


def script(tmp_path: Path, trouble: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT), trouble=trouble))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("trouble, sentence", {  # the first and the last by torchrun
    "one has no memory": (
        "import torch\ndef full(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 "
        "GiB')\nif not first: main.load_model = full", "qwen3, rank 1: memory ran out: 2.00 GiB more were needed"),
    "one lacks the files": ("if not first: sys.argv[2] = 'elsewhere'", "qwen3, rank 1: elsewhere: neither a folder"),
    "one has others": (
        "if not first: sys.argv[2] = {other!r}", "qwen3: rank 1 has not the checkpoint of rank 0; start the same"),
    "one has another question": ("if not first: sys.argv[4] = 'Who?'", "qwen3: rank 1 has not the device and command"),
    "one has another flag": (
        "path = sys.argv[0] + '.txt'\nfirst and open(path, 'w').write('x')\nsys.argv[3:] = ['--batch', path, '-n', "
        "'2' if first else '3']", "qwen3: rank 1 has not the device, command and prompts of rank 0; start the same"),
    "one has a fault": (
        "if not first: main.load_model = lambda *_, **__: 1 / 0", "qwen3, rank 1: internal error, please report it"),
}.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_process_in_trouble_speaks_and_all_end(tmp_path, trouble, sentence):
    code, said = sentence
    other = shutil.copytree(ROOT / "checkpoints/Qwen3-Tiny", tmp_path / "Qwen3-Tiny")
    tensors = {name: tensor.float() for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    begun = time.monotonic()
    code = code.format(other=str(other)) if "{other" in code else code
    words = [script(tmp_path, code), "-m", "Qwen3-Tiny", "-p", QUESTION]
    if trouble in ("one has no memory", "one has a fault"):
        run = torchrun(*words)
        code, out, err = run.end()
        assert (code, out) == (1, "") and run.children() == []
    else:
        codes, outs, errs = all_by_hand(words)
        assert 0 not in codes and outs == ["", ""]
        err = "".join(errs)
    lines = sentences(err)
    assert len(lines) == 1 and lines[0].startswith(said) and time.monotonic() - begun < 60, err


# Started by hand, as srun and mpirun do it

def machine(tmp_path: Path, rank: int, port: int, patience: int = 120, **variables: str) -> Run:
    """One of two processes, each on a machine of its own as far as it knows."""
    words = [script(tmp_path, f"processes.TO_COME = {patience}"), "-m", "Qwen3-Tiny", "-p", QUESTION]
    return by_hand(words, rank, port, **{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} | variables)


@pytest.mark.slow
def test_two_machines_without_torchrun(tmp_path):
    port = free_port()
    runs = [machine(tmp_path, rank, port) for rank in range(2)]
    (code, out, err), (other, nothing, quiet) = (run.end() for run in runs)
    assert (code, other) == (0, 0) and out == ANSWER and nothing == "", err
    assert "Tiny" in err and "Tiny" not in quiet


@pytest.mark.slow
@pytest.mark.parametrize("rank, sentence", [
    (0, "qwen3: only 1 of 2 processes came within 3 seconds; start them on all machines, with the same --nnodes"),
    (1, "qwen3, rank 1: rank 0 was not found at 127.0.0.1, port ")])
def test_a_machine_that_is_missing_is_not_waited_for_for_ever(tmp_path, rank, sentence):
    code, out, err = machine(tmp_path, rank, free_port(), patience=3).end(timeout=60)
    said = sentences(err)
    assert code == 2 and out == "" and len(said) == 1 and said[0].startswith(sentence) and len(said[0]) < 300, err


@pytest.mark.slow
def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("0.0.0.0", 0)) as server:
        code, out, err = machine(tmp_path, 0, server.getsockname()[1], patience=5).end(timeout=60)
    said = sentences(err)
    assert code == 2 and out == "" and len(said) == 1 and "is taken on this machine; --master-port" in said[0], err


@pytest.mark.slow
@pytest.mark.parametrize("variables, sentence", [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE and RANK, which say how many processes there are"),
    ({"RANK": "2"}, "WORLD_SIZE and RANK, which say how many processes there are"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set, which says where the processes meet")])
def test_variables_that_make_no_world(tmp_path, variables, sentence):
    code, out, err = machine(tmp_path, 0, free_port(), patience=3, **variables).end(timeout=60)
    said = sentences(err)
    assert code == 2 and out == "" and len(said) == 1 and sentence in said[0], err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_only_the_signal_of_torchrun_ends_a_process_slowly():
    """Ctrl-C, where a training handles it, lets the step and the saving come to their ends."""
    code = ("import os, signal, sys, time; from qwen3.engine import processes; processes.GRACE = 0.1\n"
            "processes.end_slowly(); signal.signal(signal.SIGINT, lambda *_: None)\n"
            "os.kill(os.getpid(), signal.SIGINT); time.sleep(0.6); print('alive', flush=True)\n"
            "os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)")
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, timeout=60)
    assert ended.stdout == "alive\n" and ended.returncode == 128 + signal.SIGTERM
