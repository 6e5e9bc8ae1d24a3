"""scripts/download_*.sh as a user starts them, against a hub on the loopback address. test_hub.py: what hubs do."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.deepseek_v3.test_tiktoken_vocab import N, write as write_moonlight
from tests.hub import COMMIT, Hub
from tests.packages import PACKAGES, module
from tests.seeded import deepseek_v3_config, qwen3_config, qwen3_moe_config, write_checkpoint

ROOT = Path(__file__).parents[1]
TINY = ROOT / "checkpoints/Qwen3-Tiny"
NAMES = {"qwen3": "Qwen3-0.6B", "qwen3_moe": "Qwen3-30B-A3B", "deepseek_v3": "Moonlight-16B-A3B-Instruct"}
OWNERS = {"qwen3": "Qwen", "qwen3_moe": "Qwen", "deepseek_v3": "moonshotai"}
CONFIGS = {"qwen3": qwen3_config(vocab_size=2048), "qwen3_moe": qwen3_moe_config(vocab_size=2048),
           "deepseek_v3": deepseek_v3_config(num_nextn_predict_layers=0)}
pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="needs sh")


def publish(folder: Path, package: str) -> Path:
    """A checkpoint, with files that nobody needs."""
    folder.mkdir()
    if package == "deepseek_v3":  # tiktoken.model instead of tokenizer.json
        write_moonlight(folder)
        write_checkpoint(folder, CONFIGS[package] | {"vocab_size": N + 256, "eos_token_id": N + 2}, torch.bfloat16)
    else:
        write_checkpoint(folder, CONFIGS[package], torch.bfloat16)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(TINY / name, folder)
    (folder / "README.md").write_text("not needed")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    return folder


def stand_in_for_uv(path: Path, root: Path) -> None:
    """A program that runs this Python for `uv run --project root python`, and nothing else."""
    path.write_text(f'#!/bin/sh\n[ "$1 $2 $3 $4" = "run --project {root} python" ] || exit 99\n'
                    f'shift 4\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)


class Clone:
    """A fresh clone with a hub of its own; `uv run` is stood in for by this Python, so that no network is asked."""

    def __init__(self, root: Path, package: str = "qwen3"):
        self.name, self.script = NAMES[package], root / f"scripts/download_{package}.sh"
        self.root, self.published = root, publish(root / "published", package)
        self.hub = Hub(self.published, f"{OWNERS[package]}/{self.name}")
        self.folder = root / "checkpoints" / self.name
        shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "bin").mkdir()
        stand_in_for_uv(root / "bin/uv", root)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "UV_"))}
        self.environment = inherited | {
            "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(root / "home"), "NO_PROXY": "127.0.0.1"}

    def __enter__(self) -> "Clone":
        return self

    def __exit__(self, *_) -> None:
        self.hub.close()

    def start(self, *arguments: str, shell: str = "sh", folder: Path = ROOT) -> subprocess.Popen:
        return subprocess.Popen([shell, str(self.script), *arguments], env=self.environment, cwd=folder, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                # A shell that runs tests in the background has it ignored, and it is inherited.
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))

    def run(self, *arguments: str, **more) -> tuple[int, str, str]:
        process = self.start(*arguments, **more)
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err
        return process.returncode, out, err


@pytest.fixture
def clone(tmp_path):
    with Clone(tmp_path) as clone:
        yield clone


ahead = pytest.mark.ahead(clone=Clone)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_whole_download_is_loaded_and_run(tmp_path, package):
    clone = Clone(tmp_path, package)
    code, out, err = clone.run(shell="bash" if package == "qwen3" else "sh", folder=clone.root)
    assert code == 0, err
    assert out == f"uv run python -m {package}.main -m {clone.name}\n"
    assert "setting up first" in err and "running it takes about" in err
    wanted = {".verified.json", *os.listdir(clone.published)} - {"README.md", "pytorch_model.bin"}
    assert sorted(os.listdir(clone.folder)) == sorted(wanted)
    assert all(COMMIT in path for _, path, *_ in clone.hub.log if "/resolve/" in path)
    load_model, generate = module(package, "weights").load_model, module(package, "generate").generate
    tokenizer = module(package, "tokenizer").Tokenizer.from_checkpoint(clone.folder)
    prompt = tokenizer.chat([{"role": "user", "content": "Hello!"}])
    model, same = load_model(clone.folder), load_model(clone.published)
    assert list(generate(model, prompt, max_new_tokens=3)) == list(generate(same, prompt, max_new_tokens=3))
    clone.hub.close()


@ahead
def test_the_command_that_is_printed_is_right_in_every_folder(clone, tmp_path):
    (elsewhere := tmp_path / "else where").mkdir()
    (clone.root / ".venv").mkdir()
    code, out, err = clone.run("qwen3-0.6b", folder=elsewhere)
    assert code == 0 and "setting up" not in err
    words = shlex.split(out)
    assert words[:3] == ["uv", "run", "--directory"] and Path(words[3]) == clone.root
    assert words[4:] == ["python", "-m", "qwen3.main", "-m", "Qwen3-0.6B"]


@ahead
def test_ctrl_c_in_the_middle_and_the_second_time_only_the_rest_is_sent(clone):
    clone.hub.stall_after = 50_000
    process = clone.start()
    assert clone.hub.stalled.wait(60)
    deadline = time.monotonic() + 30  # sent is not yet written
    while time.monotonic() < deadline:
        if any(part.stat().st_size for part in clone.folder.glob("*.safetensors.*.part")):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "run this again and it goes on" in err and "Traceback" not in err
    assert not (clone.folder / "model.safetensors").exists() and not (clone.folder / "config.json").exists()
    clone.hub.stall_after = None
    clone.hub.go_on.set()
    clone.hub.log.clear()
    assert clone.run()[0] == 0
    (wanted,) = [wanted for _, path, wanted, _ in clone.hub.log if path.endswith("model.safetensors")]
    assert int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) >= 10_000
    published = clone.published / "model.safetensors"
    assert (clone.folder / "model.safetensors").read_bytes() == published.read_bytes()


@ahead
@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_wrong_has_a_final_name(clone, tmp_path, times):
    (published := tmp_path / "random").mkdir()
    made = random.Random(0)
    for name in (*(f"model-{i}-of-3.safetensors" for i in (1, 2, 3)), "tokenizer.json", "config.json"):
        (published / name).write_bytes(made.randbytes(1000 if name == "config.json" else 300_000))
    clone.hub.close()
    clone.hub = Hub(published, "Qwen/Qwen3-0.6B")
    clone.environment["HF_ENDPOINT"] = clone.hub.url
    clone.hub.speed, before = 200_000, 0
    for _ in range(times):
        process = clone.start()
        deadline = time.monotonic() + 30
        while not clone.hub.log and time.monotonic() < deadline:  # it has begun
            time.sleep(0.01)
        time.sleep(made.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        clone.hub.log.clear()
        there = {path.name: path for path in clone.folder.iterdir()} if clone.folder.exists() else {}
        for name in {path.name for path in published.iterdir()} & set(there):
            assert there[name].read_bytes() == (published / name).read_bytes(), name
        assert "config.json" not in there or all((clone.folder / path.name).exists() for path in published.iterdir())
        size = sum(path.stat().st_size for name, path in there.items() if not name.startswith("."))
        assert size >= before  # what came is kept
        before = size
    assert 0 < before
    clone.hub.speed = None
    assert clone.run()[0] == 0
    assert all((clone.folder / path.name).read_bytes() == path.read_bytes() for path in published.iterdir())


@ahead
def test_two_at_the_same_time(clone):
    clone.hub.stall_after = 50_000
    first = clone.start()
    assert clone.hub.stalled.wait(60)
    code, _, err = clone.run()
    assert code == 2 and "Qwen3-0.6B is being downloaded already" in err
    assert err.count("\n") == 2  # with the note on set-up
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=30)
    clone.hub.stall_after = None
    clone.hub.go_on.set()
    assert clone.run()[0] == 0  # a killed one leaves no lock


@ahead
def test_a_reader_of_the_list_may_leave_and_standard_error_may_be_closed(clone):
    command = f'set -o pipefail; sh "{clone.script}" --list 2>/dev/null | true; sh "{clone.script}" --nonsense 2>&-'
    done = subprocess.run(["bash", "-c", command], env=clone.environment, capture_output=True, text=True)
    assert done.stderr == done.stdout == "" and done.returncode == 2


@ahead
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_one_line_of_progress_on_a_terminal(clone, terminal):
    import pty
    controller, handle = pty.openpty()
    clone.environment |= {"TERM": terminal, "NO_COLOR": "1", "COLUMNS": "60"}
    clone.hub.speed = 500_000
    process = subprocess.Popen(["sh", str(clone.script)], env=clone.environment, stdout=subprocess.DEVNULL,
                               stderr=handle)
    os.close(handle)
    seen = b""
    try:
        while piece := os.read(controller, 4096):
            seen += piece
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0 and b"\x1b" not in seen
    lines = re.findall(rb"\r([^\r\n]*of [^\r\n]* %[^\r\n]*)", seen)
    assert bool(lines) == (terminal == "xterm") and all(len(line) < 60 for line in lines)
    os.close(controller)


def test_the_scripts_are_one_but_for_names():
    def common(package: str) -> list[str]:
        return (ROOT / f"scripts/download_{package}.sh").read_text().replace(f"start.sh\" {package} ", "").splitlines()

    assert common("qwen3") == common("qwen3_moe") == common("deepseek_v3") and len(common("qwen3")) == 2


@ahead
def test_without_uv(clone):
    (clone.root / "bin/uv").unlink()
    for name in ("dirname", "sh"):
        (clone.root / "bin" / name).symlink_to(shutil.which(name))
    clone.environment["PATH"] = str(clone.root / "bin")
    code, _, err = clone.run()
    assert code == 2 and err == "download: uv is missing; get it with 'pip install uv'\n"
