"""scripts/download_*.sh against a hub on the loopback address."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.hub import COMMIT, Hub
from tests.packages import PACKAGES, module
from tests.deepseek_v3.test_tiktoken_vocab import N, write as write_moonlight
from tests.seeded import deepseek_v3_config, qwen3_config, qwen3_moe_config, write_checkpoint

ROOT = Path(__file__).parents[1]
TINY = ROOT / "checkpoints/Qwen3-Tiny"
NAMES = {"qwen3": "Qwen3-0.6B", "qwen3_moe": "Qwen3-30B-A3B", "deepseek_v3": "Moonlight-16B-A3B-Instruct"}
OWNERS = {"qwen3": "Qwen", "qwen3_moe": "Qwen", "deepseek_v3": "moonshotai"}
NAME = NAMES["qwen3"]
CONFIGS = {  # of more than the 10 MB that the library takes at a time
    "qwen3": qwen3_config(vocab_size=1024, hidden_size=512, intermediate_size=2048),
    "qwen3_moe": qwen3_moe_config(vocab_size=1024, hidden_size=512, moe_intermediate_size=256),
    "deepseek_v3": deepseek_v3_config(hidden_size=512, intermediate_size=2048, num_nextn_predict_layers=0),
}
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def published_each(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each package, with files that nobody needs."""
    folders = {package: tmp_path_factory.mktemp(package) for package in PACKAGES}
    for package, folder in folders.items():
        if package == "deepseek_v3":  # tiktoken.model instead of tokenizer.json
            write_moonlight(folder)
            write_checkpoint(folder, CONFIGS[package] | {"vocab_size": N + 256, "eos_token_id": N + 2}, torch.bfloat16)
        else:
            write_checkpoint(folder, CONFIGS[package], torch.bfloat16)
            for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
                shutil.copy(TINY / name, folder)
        (folder / "README.md").write_text("not needed")
        (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    return folders


@pytest.fixture
def published(published_each) -> Path:
    return published_each["qwen3"]


class Place:
    """A fresh clone with a hub of its own; `uv run` is stood in for by this Python, so that no network is asked."""

    def __init__(self, root: Path, published: Path, package: str = "qwen3"):
        self.name, self.script = NAMES[package], f"scripts/download_{package}.sh"
        self.root, self.hub, self.folder = root, Hub(published, f"{OWNERS[package]}/{self.name}"), root / "checkpoints" / self.name
        for part in ("scripts", "bin"):
            (root / part).mkdir()
        shutil.copy(ROOT / self.script, root / "scripts")
        (root / "bin/uv").write_text(f'#!/bin/sh\n[ "$1 $2 $3" = "run --quiet python" ] || exit 99\nshift 3\nexec "{sys.executable}" "$@"\n')
        (root / "bin/uv").chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
            "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_ENDPOINT": self.hub.url, "HF_HOME": str(root / "home")}

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", str(self.root / self.script), *arguments], env=self.environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err
        return process.returncode, out, err

    def transfers(self) -> list[tuple[str, str | None]]:
        """(file, range) of every file that was sent."""
        return [(path.rpartition("/")[2], wanted) for method, path, wanted in self.hub.log if method == "GET" and "/resolve/" in path]


@pytest.fixture
def place(tmp_path, published):
    place = Place(tmp_path, published)
    yield place
    place.hub.server.shutdown()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_whole_download_is_loaded_and_run(tmp_path, published_each, package):
    published = published_each[package]
    place = Place(tmp_path, published, package)
    code, out, err = place.run()
    assert code == 0, err
    assert out == f"uv run python -m {package}.main -m {place.name}\n"
    assert sorted(os.listdir(place.folder)) == sorted(set(os.listdir(published)) - {"README.md", "pytorch_model.bin"})
    assert all(COMMIT in path for _, path, _ in place.hub.log if "/resolve/" in path)
    load_model, generate = module(package, "weights").load_model, module(package, "generate").generate
    prompt = module(package, "tokenizer").Tokenizer.from_checkpoint(place.folder).chat([{"role": "user", "content": "Hello!"}])
    model, same = load_model(place.folder), load_model(published)
    assert list(generate(model, prompt, max_new_tokens=3)) == list(generate(same, prompt, max_new_tokens=3))

    # Again: all is there and whole, nothing is sent. One file damaged on the disk: only that one.
    place.hub.log.clear()
    assert place.run(f"{OWNERS[package]}/{place.name}")[0] == 0 and place.transfers() == []
    name = "tiktoken.model" if package == "deepseek_v3" else "tokenizer.json"
    tokens = (place.folder / name).read_bytes()
    (place.folder / name).write_bytes(tokens[:-1] + b" ")
    assert place.run("--revision", "v1")[0] == 0
    assert [file for file, _ in place.transfers()] == [name]
    assert (place.folder / name).read_bytes() == tokens
    place.hub.server.shutdown()


def test_ctrl_c_in_the_middle_and_the_second_time_only_the_rest_is_sent(place, published):
    place.hub.cut_after = 15_000_000
    process = place.start()
    assert place.hub.stalled.wait(60)
    deadline = time.monotonic() + 30  # sent is not yet written
    while not any(part.stat().st_size for part in place.folder.glob("*.safetensors.*.part")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "run this again and it goes on" in err and "Traceback" not in err
    assert not (place.folder / "model.safetensors").exists()
    place.hub.cut_after = None
    place.hub.go_on.set()
    place.hub.log.clear()
    assert place.run()[0] == 0
    ((file, wanted),) = place.transfers()
    assert file == "model.safetensors" and int(re.fullmatch(r"bytes=(\d+)-.*", wanted)[1]) >= 10_000_000
    assert (place.folder / file).read_bytes() == (published / file).read_bytes()


def test_a_damaged_file_is_named_and_deleted(place):
    place.hub.damage = "model.safetensors"
    code, out, err = place.run()
    assert code == 1 and out == "" and f"{NAME}/model.safetensors came damaged" in err
    assert not (place.folder / "model.safetensors").exists() and (place.folder / "config.json").exists()
    place.hub.damage = None
    assert place.run()[0] == 0


def test_a_name_that_does_not_exist(place):
    code, out, err = place.run("Qwen3-7B")
    assert code == 2 and out == "" and "Qwen3-7B is not a published dense Qwen3; there are Qwen3-0.6B, Qwen3-1.7B" in err
    assert place.hub.log == []
    code, _, err = place.run("Qwen3-8B")  # known, but this hub does not have it
    assert code == 1 and f"{place.hub.url} has no Qwen/Qwen3-8B" in err


def test_the_list_of_the_mixtures_of_experts(tmp_path, published_each):
    place = Place(tmp_path, published_each["qwen3_moe"], "qwen3_moe")
    code, out, _ = place.run("--list")
    assert code == 0 and len(out.splitlines()) == 17 and re.search(r"^Qwen3-30B-A3B +61.1 GB$", out, re.M)
    code, _, err = place.run("Qwen3-0.6B")
    assert code == 2 and "Qwen3-0.6B is not a published Qwen3-MoE; there are Qwen3-30B-A3B, " in err
    place.hub.server.shutdown()


def test_large_ones_ask_first(tmp_path, published_each):
    place = Place(tmp_path, published_each["deepseek_v3"], "deepseek_v3")
    code, out, _ = place.run("--list")
    assert code == 0 and re.search(r"^Moonlight-16B-A3B-Instruct +31.9 GB$", out, re.M) and re.search(r"^DeepSeek-R1 +688.6 GB$", out, re.M)
    for name in ("DeepSeek-V3", "deepseek-ai/DeepSeek-R1", "moonshotai/Kimi-K2-Instruct"):
        code, out, err = place.run(name)
        assert code == 2 and out == "" and re.search(r"has (688.6|1029.2) GB; add --yes", err) and place.hub.log == []
    code, _, err = place.run("DeepSeek-V3", "--yes")
    assert code == 1 and "has no deepseek-ai/DeepSeek-V3" in err  # asked for, and not on this hub
    for name in ("deepseek-ai/Moonlight-16B-A3B", "DeepSeek-R1-Distill-Qwen-7B"):
        assert place.run(name)[0] == 2
    place.hub.server.shutdown()


def test_the_scripts_are_one_but_for_names():
    """From the imports to the end; what differs stands between PACKAGE and NEEDED."""
    def common(package: str) -> str:
        text = (ROOT / f"scripts/download_{package}.sh").read_text()
        head, rest = text[text.index("import argparse"):].split("PACKAGE, DEFAULT", 1)
        return (head + rest[rest.index("NEEDED"):]).replace(f"download_{package}.sh", "download.sh")

    assert len({common(package) for package in PACKAGES}) == 1


def test_a_reader_of_the_list_may_leave(place):
    command = f'bash "{place.root / place.script}" --list | true'
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], env=place.environment, capture_output=True, text=True)
    assert done.stderr == ""


def test_flags(place):
    code, out, _ = place.run("--list")
    assert code == 0 and len(out.splitlines()) == 21 and re.search(r"^Qwen3-0.6B +1.5 GB$", out, re.M)
    code, _, err = place.run("--lst")
    assert code == 2 and err.count("\n") == 1
    code, _, err = place.run("--revision", "v9")
    assert code == 2 and "has no revision v9" in err


def test_the_token_is_sent_along(place):
    place.hub.token = "secret"
    code, _, err = place.run()
    assert code == 1 and "HF_TOKEN does not allow it" in err
    place.environment["HF_TOKEN"] = "secret"
    assert place.run()[0] == 0


def test_no_network_at_all(place):
    place.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the discard port: nobody listens
    code, out, err = place.run()
    assert code == 1 and out == "" and "cannot get Qwen/Qwen3-0.6B from http://127.0.0.1:9" in err and err.count("\n") == 1
