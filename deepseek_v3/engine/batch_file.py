"""--batch: a file of prompts in, a file of answers out.

    prompts.jsonl ─ check every line ─> requests ─ continuous.py: rows that are refilled ─> journal ─> answers.jsonl
"""

import hashlib
import json
import secrets
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from zlib import crc32

import torch

from ..model import Model
from ..tokenizer import Tokenizer
from ..weights import load_model
from .continuous import Request, Row, continuous_batch
from .conversation import Conversation
from .journal import Journal, Place, answers_of, as_line, earlier_settings, finish, journals, restart
from .memory import find_device
from .progress import Progress, kept
from .processes import check_alike, of_all, on_first, rank, ranks
from .prompts import bad_lines, read_prompts, seed_of
from .requests import check_request
from .terminal import note, progress, segments, write

SIZES = {"cpu": 16, "cuda": 64}  # prompts at a time


class Job:
    """The prompts of a file as requests; `capacity` is the most tokens that one has with its answer."""

    def __init__(self, conversation: Conversation):
        self.conversation, self.name = conversation, conversation.arguments.batch
        self.prompts, self.digest = read_prompts(self.name)
        self.seed, self.capacity, self.crc = 0, 1, 0

    def check(self, show: Callable[[int, int], None]) -> "Job":
        """The job itself; ValueError names the lines that cannot be answered."""
        conversation, config, wrong = self.conversation, self.conversation.config, {}
        base = conversation.tokenizer.thinking is None
        check_request(config, [], 0, **conversation.sampling, seed=conversation.arguments.seed)
        for index, prompt in enumerate(self.prompts):
            show(index, len(self.prompts))
            try:
                if base and not prompt.is_text:
                    raise ValueError(f'{conversation.name} is a Base checkpoint, which continues text; give a "prompt"')
                request = self.request(index)
                check_request(config, [request.prompt_ids], request.max_new_tokens, **request.sampling)
                self.capacity = max(self.capacity, len(request.prompt_ids) + request.max_new_tokens)
                self.crc = crc32(repr(request).encode(), self.crc) if ranks() > 1 else 0
            except ValueError as error:
                wrong[prompt.line] = str(error)
        show(len(self.prompts), len(self.prompts))
        if wrong:
            raise bad_lines("standard input" if self.name == "-" else self.name, wrong)
        return self

    def request(self, index: int) -> Request:
        """Made when it is wanted: the ids of a million prompts would take gigabytes."""
        prompt = self.prompts[index]
        settings = {"seed": seed_of(self.seed, index), **prompt.settings}
        ids = self.conversation.encode(prompt.messages)
        limit = settings.pop("max_new_tokens", None)
        limit = self.conversation.new_tokens(ids) if limit is None else limit
        return Request(ids, limit, {**self.conversation.sampling, **settings}, index)

    def answer(self, row: Row) -> dict:
        """What is written for a row that has ended."""
        request, prompt = row.request, self.prompts[row.request.index]
        thought, answer = split_answer(self.conversation.tokenizer, request.prompt_ids, row.ids)
        used, full = len(request.prompt_ids) + len(row.ids), self.conversation.config.context_length
        given = {"id": prompt.id, "thought": thought or None, "metadata": prompt.metadata}
        given = {key: value for key, value in given.items() if value is not None}
        ids = b"".join(id.to_bytes(4, "little") for id in request.prompt_ids)
        return {"index": request.index} | given | {
            "answer": answer, "finish_reason": "context" if row.end == "length" and used >= full else row.end,
            "prompt_tokens": len(request.prompt_ids), "new_tokens": len(row.ids), "seed": request.sampling["seed"],
            "prompt_crc32": f"{crc32(ids):08x}"}

    def settings(self) -> dict:
        """Everything that an answer depends on, so that a run goes on only as it was begun."""
        asked, conversation = self.conversation.arguments, self.conversation
        files = [(path.name, path.stat().st_size) for kind in ("*.safetensors", "*.json")
                 for path in sorted(conversation.folder.glob(kind))]
        config = (conversation.folder / "config.json").read_bytes()
        return {"prompts": self.digest, "model": conversation.name,
                "files of the model": hashlib.sha256(json.dumps(files).encode() + config).hexdigest(),
                "seed": self.seed, "max_new_tokens": asked.max_new_tokens, **conversation.sampling,
                "system": conversation.system, "thinking": conversation.thinking,
                "chat format": conversation.tokenizer.format, "dtype": asked.dtype, "plain": asked.plain}

    def say(self, notes: Iterable[str]) -> None:
        """What the user should know; flags without effect are not for prompts with settings of their own."""
        conversation = self.conversation
        own = any("temperature" in prompt.settings for prompt in self.prompts)
        for text in (*notes, *((*conversation.config.notes, *conversation.tokenizer.notes) if own else
                               conversation.notes())):
            note(f"note: {text}")

    def run(self, model: Model, indices: Iterable[int], rows: int, write: Callable[[dict], None] | None,
            count: Callable[[int, list[Row]], None]) -> None:
        """Answer these prompts; `write` takes each answer, `count` each step's tokens and the rows that ended.

        Processes that share the model all do the same, and the first one writes.
        """
        requests = (self.request(index) for index in indices)
        for tokens, ended in continuous_batch(model, requests, rows=rows, capacity=self.capacity,
                                              stop_ids=self.conversation.stop_ids):
            for row in ended if write else ():
                write(self.answer(row))
            count(tokens, ended)

    def find_room(self, processes: int = 1) -> tuple[torch.device, str | None, int]:
        """(device, dtype, how many prompts at a time): what --batch-size says, or as many as memory has room for.

        Of processes that share the model, the one with the least room decides.
        """
        conversation, wanted = self.conversation, self.conversation.arguments.batch_size
        device = find_device(conversation.arguments.device)
        check_alike("device, command and prompts", (device.type, conversation.arguments.dtype, wanted, self.crc))
        size = min(SIZES.get(device.type, SIZES["cpu"]), len(self.prompts)) if wanted is None else wanted
        while True:  # all ranks together: what is asked of all within find_room is asked as often on each
            room, error = None, None
            try:  # a row more, for the prompt that is being read
                room = conversation.find_room((size + 1) * self.capacity, processes)
            except ValueError as refusal:
                error = str(refusal)
            errors = [one for one in of_all(error) if one]
            if not errors:
                return *room, size
            if wanted is not None or size == 1:
                raise ValueError(error or errors[0])
            size //= 2


def split_answer(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> tuple[str, str]:
    """(thought, answer), the answer with the white space that terminal.show_answer prints."""
    parts: list[list] = []  # [is it reasoning?, text]
    for thinking, piece in segments(tokenizer, prompt_ids, iter(ids)):
        if parts and parts[-1][0] == thinking:
            parts[-1][1] += piece
        else:
            parts.append([thinking, piece])
    texts = {True: "", False: ""}
    for thinking, text in parts:
        if text.strip():
            first = thinking or not texts[False] or texts[False].endswith("\n")
            texts[thinking] += text.lstrip("\n") if first else text
    return texts[True].strip("\n"), texts[False]


def answer_file(conversation: Conversation, notes: Iterable[str]) -> None:
    """--batch. What can be refused is refused before the weights are loaded."""
    from .replicas import launched, run_replicas, take_part  # which build on this file

    replicas = conversation.arguments.data_parallel or 1
    if launched() > 1 and ranks() == 1:
        return take_part(conversation, notes)
    job = Job(conversation).check(progress("checking prompt"))
    job.say(notes)
    output = on_first(lambda: find_output(job))
    if output is None:
        if replicas > 1:
            raise ValueError("--data-parallel needs a file for the answers: -o FILE")
        return to_standard_output(job)
    if replicas > 1:
        return run_replicas(job, output, replicas)
    to_file(job, output)


def to_file(job: Job, output: Path) -> None:
    """Each answer into the journal when it ends. Only the first process reads and writes there."""
    answered = on_first(lambda: set(resume(job, output)))
    job.seed = on_first(lambda: job.seed)
    journal = Journal(output, 0, job.settings()) if rank() == 0 else None
    try:
        left = [index for index in range(len(job.prompts)) if index not in answered]
        shown = Progress(len(job.prompts), len(answered))
        if left:
            device, dtype, rows = job.find_room()
            model = load(job, device, dtype, progress("loading tensor"))
            if ranks() > 1:  # Ctrl-C ends all processes before one could say it
                note("each answer is kept when it ends: after Ctrl-C the same command goes on")
            shown = Progress(len(job.prompts), len(answered))
            with kept(shown):
                job.run(model, left, rows, journal and journal.write, shown.count)
        if journal:
            merge(job, output)
    finally:
        if journal:
            journal.close()
    note(f"{shown.summary()}; {output}")


def load(job: Job, device: torch.device, dtype: str | None, show: Callable[[int, int], None] | None) -> Model:
    conversation = job.conversation
    return load_model(conversation.folder, device, dtype, show, engine=not conversation.arguments.plain)


def find_output(job: Job) -> Path | None:
    """Where the answers go, None for standard output; ValueError for what cannot be a file there."""
    name, output = job.conversation.arguments.output, None
    if name not in (None, "-"):
        output = Path(name).expanduser()
        if output.is_dir() or not output.parent.is_dir():
            raise ValueError(f"-o {name[:120]}: expected a file in a folder that exists")
        if job.name != "-" and output.resolve() == Path(job.name).expanduser().resolve():
            raise ValueError(f"-o {name[:120]} is the file of prompts; name another")
    elif job.conversation.arguments.restart:
        raise ValueError("--restart is for answers in a file: -o FILE")
    return output


def resume(job: Job, output: Path) -> dict[int, Place]:
    """The answers of an earlier run, with which this one goes on; it then has that one's seed."""
    arguments = job.conversation.arguments
    if arguments.restart:
        restart(output)
    elif output.exists() and not journals(output):
        raise ValueError(f"{output} is there already; name another file, or answer all prompts anew with --restart")
    job.seed = arguments.seed
    if job.seed is None:
        job.seed = earlier_settings(output).get("seed", secrets.randbits(32))
    places = answers_of(output, job.settings())
    if places:
        note(f"going on: {len(places):,} of {len(job.prompts):,} prompts have their answers")
    return places


def merge(job: Job, output: Path) -> None:
    """All answers into one file."""
    places = answers_of(output, job.settings())
    if missing := len(job.prompts) - len(places):
        raise ValueError(f"{missing:,} of {len(job.prompts):,} answers are missing beside {output}; the same command "
                         "goes on (on several machines, all must see that folder)")
    finish(output, places)


def to_standard_output(job: Job) -> None:
    """Answers in order, each as soon as those before it are there. Nothing is kept for another run."""
    arguments, waiting, following = job.conversation.arguments, {}, 0
    job.seed = on_first(lambda: secrets.randbits(32) if arguments.seed is None else arguments.seed)
    device, dtype, rows = job.find_room()
    model, shown = load(job, device, dtype, progress("loading tensor")), Progress(len(job.prompts), 0)

    def put(answer: dict) -> None:
        nonlocal following
        waiting[answer["index"]] = answer
        while following in waiting:
            shown.clear()
            write(sys.stdout, as_line(waiting.pop(following)).decode())
            following += 1

    try:
        job.run(model, range(len(job.prompts)), rows, put if rank() == 0 else None, shown.count)
    finally:
        shown.clear()
    note(shown.summary())
