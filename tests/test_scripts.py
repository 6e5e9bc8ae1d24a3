"""scripts/README.md names every command, and every command answers --help."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_download import stand_in_for_uv

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
COMMANDS = re.findall(r"^\| `([^`]+)` \| .+ \|$", (SCRIPTS / "README.md").read_text(), re.M)


def name_of(command: str) -> str:
    """What a command starts: scripts/x.sh, scripts.x, or scripts.folder.x."""
    return re.search(r"scripts/\w+\.sh|(?<=-m )scripts(\.\w+)+", command)[0]


def test_the_readme_names_each_command_once():
    modules = [path.stem for path in SCRIPTS.glob("*.py") if path.stem != "__init__"]
    modules += [path.parent.name for path in SCRIPTS.glob("*/__main__.py")]
    modules += [f"{path.parent.name}.{path.stem}" for path in SCRIPTS.glob("*/*.py")
                if f'prog="python -m scripts.{path.parent.name}.{path.stem}"' in path.read_text("utf-8")]
    there = [f"scripts/{path.name}" for path in SCRIPTS.glob("*.sh")] + [f"scripts.{module}" for module in modules]
    assert sorted(map(name_of, COMMANDS)) == sorted(there)
    assert all(command.startswith(("uv run ", "bash ")) for command in COMMANDS)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_each_command_answers_help(tmp_path):
    """All at the same time. None waits for torch, so that this takes a second."""
    stand_in_for_uv(tmp_path / "uv", ROOT)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    running = {}
    for command in COMMANDS:
        words = shlex.split(command)
        start = words if words[0] == "bash" else [sys.executable, *words[words.index("-m"):]]
        running[command] = subprocess.Popen([*start, "--help"], cwd=ROOT, env=environment, text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for command, process in running.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.startswith("usage: ") and "Traceback" not in err, (command, err)
        assert name_of(command) in out.splitlines()[0] or name_of(command) == "scripts.download"  # which names the .sh
