"""The process that runs a learner's code: python -m scripts.practice.worker PACKAGE FOLDER SECONDS NAME …

For each exercise one line of JSON goes to the standard output that it was started with. What the code itself prints
goes nowhere, and where it printed is told. A loop without end is ended by a thread that watches; a crash ends the
process, which the parent sees. With the name "answer" the learner's whole package answers a question.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .exercises import PACKAGES, ROOT, of

QUESTION = "What is RoPE?"
MEMORY = 6 << 30  # bytes that the process may allocate; a list that grows without end shall not stop the machine
CHECKS = {"qwen3": "checks_qwen3", "qwen3_moe": "checks_qwen3_moe", "deepseek_v3": "checks_deepseek_v3"}


class Ear:
    """Standard output while a learner's code runs: remembers the first text and the line that printed it."""

    def __init__(self, folder: Path):
        self.folder, self.text, self.place = str(folder), "", ""

    def write(self, text: str) -> int:
        if len(self.text) < 60:
            self.text += str(text)[:60]
        if not self.place and str(text).strip():
            self.place = place_of(sys._getframe(1), self.folder)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def note(self) -> str:
        if not self.text.strip():
            return ""
        return f"it prints{f' ({self.place})' if self.place else ''}: {' '.join(self.text.split())[:40]!r}"


def place_of(frame, folder: str) -> str:
    """"layers.py, line 12": the innermost line of the learner's that is running; "" where none is."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(folder):
            return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        frame = frame.f_back
    return ""


def watch(folder: str, seconds: float, tell) -> None:
    """End the process when the learner's code is running for so long without a pause."""
    main, since = threading.main_thread().ident, None
    while True:
        time.sleep(min(0.2, seconds / 5))
        place = place_of(sys._current_frames().get(main), folder)
        since = (since or time.monotonic()) if place else None
        if since and time.monotonic() - since > seconds:
            tell({"state": "wrong", "text": f"{place}: still running after {seconds:g} seconds; a loop without end?"})
            os._exit(3)


def check(package: str, name: str, folder: Path) -> tuple[str, str]:
    """("right" | "not written" | "wrong", what to say)."""
    from . import graft, judge

    exercise = of(package)[name]
    path = folder / exercise.file
    checks = importlib.import_module(f"{__package__}.{CHECKS[package]}").CHECKS
    try:
        module = graft.graft(package, exercise, path)
        judge.judge(checks[name], module, graft.real_module(package, exercise.file), path)
        return "right", ""
    except graft.Off as off:
        return "wrong", str(off)
    except judge.NotWritten:
        return "not written", ""


@contextlib.contextmanager
def quiet(folder: Path) -> Iterator[Ear]:
    ear, streams = Ear(folder), (sys.stdout, sys.stderr)
    sys.stdout = sys.stderr = ear
    try:
        yield ear
    finally:
        sys.stdout, sys.stderr = streams


def judged(package: str, name: str, folder: Path) -> dict:
    """One exercise, with what it printed."""
    with quiet(folder) as ear:
        state, text = check(package, name, folder)
    text = f"{text}; {note}" if (note := ear.note()) and text else note or text
    return {"state": state, "text": text if len(text) < 400 else text[:397] + "..."}


def load(name: str, folder: Path):
    """A folder as the package of that name; what it imports of itself is in the folder."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def answer_of(name: str, checkpoint: Path) -> str:
    """What a loaded package answers: its own parts alone, in float32, the likeliest token each time."""
    part = {one: importlib.import_module(f"{name}.{one}") for one in ("config", "tokenizer", "weights", "generate")}
    tokenizer = part["tokenizer"].Tokenizer.from_checkpoint(checkpoint)
    config = part["config"].Config.from_checkpoint(checkpoint)
    model = part["weights"].load_model(checkpoint, dtype="float32", engine=False)
    more = {"speculative": True} if hasattr(config, "num_nextn_predict_layers") else {}  # drafts are exercises too
    ids = part["generate"].generate(model, tokenizer.chat([{"role": "user", "content": QUESTION}], thinking=False),
                                    max_new_tokens=100, stop_ids=config.eos_token_id, **more)
    return tokenizer.decode(ids).strip()


def answered(package: str, folder: Path) -> dict:
    """The learner's package under the package's own name, so that nothing of ours can run in its place."""
    checkpoint = ROOT / "checkpoints" / PACKAGES[package]
    with quiet(folder) as ear:
        try:
            load(package, folder)
            mine = answer_of(package, checkpoint)
        except (Exception, SystemExit) as error:  # whatever a learner's package does
            frame, places = error.__traceback__, []
            while frame is not None:
                if frame.tb_frame.f_code.co_filename.startswith(str(folder)):
                    places.append(f"{Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno}: ")
                frame = frame.tb_next
            first, *_ = str(error).splitlines() or [""]
            return {"state": "wrong", "text": f"{places[-1] if places else ''}{type(error).__name__}: {first[:150]}"}
        load("the_package", ROOT / package)
        ours = answer_of("the_package", checkpoint)
    return {"state": "right" if mine == ours else "other", "text": mine, "ours": ours, "note": ear.note()}


def main() -> None:
    package, folder, seconds, *names = sys.argv[1:]
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # for what prints without Python's sys.stdout
    os.dup2(nowhere, 2)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    current = ""

    def tell(found: dict) -> None:
        try:
            print(json.dumps({"name": current, **found}), file=pipe, flush=True)
        except (OSError, ValueError):  # nobody listens any more
            os._exit(1)

    import torch  # before the watch

    sys.dont_write_bytecode = True  # nothing appears in the learner's folder; torch's own may be kept
    torch.set_num_threads(1)
    threading.Thread(target=watch, args=(str(Path(folder)), float(seconds), tell), daemon=True).start()
    for current in names:
        tell({"state": "begun"})
        tell(answered(package, Path(folder)) if current == "answer" else judged(package, current, Path(folder)))
    pipe.flush()
    os._exit(0)  # threads that a learner's code began do not hold it up


if __name__ == "__main__":
    main()
