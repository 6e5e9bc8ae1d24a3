"""One program under measurement, in a process of its own: python -m scripts.benchmark.contender '{"who": "ours", …}'

The benchmark starts two of these and asks them in turn. Each line on standard input is a task as JSON, each line on
standard output its result. The first result needs no task: the first token of a prompt of 32. Several processes may
share a model (scripts/parallel/README.md); then the first of them is asked, and all do the task.
"""

import json
import os
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from .machine import synchronize


def anonymous_memory() -> int:
    """Bytes that no file backs: the mapped weights are not counted."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0


class Peak:
    """The most anonymous memory while something runs, looked at every 5 ms."""

    def __enter__(self) -> "Peak":
        self.most, self.done = anonymous_memory(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, anonymous_memory())

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()


class Sums:
    """How many sums over the ranks there were, and the time of this rank in them, with its waiting for the others."""

    def __init__(self, device: torch.device):
        self.device, self.took, self.all_reduce = device, [], dist.all_reduce
        dist.all_reduce = self.timed

    def now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # when the GPU has come here, not when it was told to
        event.record()
        return event

    def timed(self, tensor: torch.Tensor, **more) -> None:
        start = self.now()
        self.all_reduce(tensor, **more)
        self.took.append((start, self.now()))

    def take(self) -> tuple[float, int]:
        """(seconds, how many) since this was asked last; what was computed has to be there already."""
        took, self.took = self.took, []
        if self.device.type == "cuda":
            return sum(start.elapsed_time(end) for start, end in took) / 1000, len(took)
        return sum(end - start for start, end in took), len(took)


class Ours:
    """A package of this project as a program to be measured; `without` leaves a trick out."""

    def __init__(self, folder: str, device: str, package: str, without: str | None = None, compiled: bool = False):
        if without:
            from .tricks import leave_out

            leave_out(without, package)
        self.processes = import_module(f"{package}.engine.processes")
        self.processes.join()
        if self.processes.ranks() > 1:
            device = self.processes.device_of(device)
        self.generate = import_module(f"{package}.generate")
        self.model = import_module(f"{package}.weights").load_model(folder, device)
        self.vocabulary, self.device = self.model.config.vocab_size, torch.device(device)
        self.flags = {"compiled": True} if compiled else {}
        # Compiled, they are parts of a graph, where no clock is.
        self.sums = Sums(self.device) if self.processes.ranks() > 1 and not compiled else None

    def take_sums(self) -> tuple[float, int]:
        """(seconds, how many) in the prompt or token that is done now."""
        return self.sums.take() if self.sums else (0.0, 0)

    def ids(self, prompt: list[int], count: int) -> list[int]:
        return list(self.generate.generate(self.model, prompt, max_new_tokens=count, **self.flags))

    def token_times(self, context: int, count: int) -> list[float]:
        """Seconds for each of `count` tokens after `context` others, which are random numbers in the cache."""
        cache = self.generate.new_cache(self.model, context + count + 1)
        for tensor in cache.tensors:
            tensor.normal_(generator=torch.Generator(self.device).manual_seed(0))
        self.in_sums = []
        self.take_sums()  # of what was before
        cache.length, times, last = context, [], time.perf_counter()
        for _ in self.generate.generate(self.model, [1] * (context + 1), max_new_tokens=count, cache=cache,
                                        **self.flags):
            times.append(time.perf_counter() - last)
            self.in_sums.append(self.take_sums())
            last = time.perf_counter()
        return times

    def sum_alone(self, count: int = 200) -> dict:
        """Seconds that a sum of one token's activations takes, one after the other."""
        if self.processes.ranks() == 1:
            return {}
        x = torch.zeros(1, 1, self.model.config.hidden_size, device=self.device)
        all_reduce = self.sums.all_reduce if self.sums else dist.all_reduce
        for warm in (True, False):
            start = time.perf_counter()
            for _ in range(20 if warm else count):
                all_reduce(x)
            synchronize(self.device)
        return {"seconds": (time.perf_counter() - start) / count, "bytes": x.nbytes}

    def speculation(self, context: int, count: int) -> dict:
        """Tokens a second without drafts and with them, and how many tokens a step of the main model gave."""
        prompt = torch.randint(self.vocabulary, (context,), generator=torch.Generator().manual_seed(1)).tolist()
        acceptance, seconds = import_module("deepseek_v3.speculative").Acceptance(), {}
        for name, flags in (("plain", {}), ("drafting", {"speculative": True, "acceptance": acceptance})):
            times, start = [], None
            for _ in self.generate.generate(self.model, prompt, max_new_tokens=count, **flags):
                start = start or time.perf_counter()  # the first token is the prompt's
                times.append(time.perf_counter() - start)
            seconds[name] = (len(times) - 1) / times[-1]
        return seconds | {"tokens_per_step": 1 + acceptance.accepted / max(1, acceptance.drafted)}

    def batch(self, context: int, rows: int, longest: int) -> dict:
        """Tokens a second of 12 * rows answers of 10 to `longest` tokens: in slices of `rows` prompts, and refilled."""
        chance, count = torch.Generator().manual_seed(1), 12 * rows
        limits = torch.linspace(min(10, longest), longest, count).long()
        limits = limits[torch.randperm(count, generator=chance)].tolist()
        prompts = torch.randint(self.vocabulary, (count, context), generator=chance).tolist()
        continuous = import_module(f"{self.generate.__package__}.engine.continuous")
        every, seconds = [continuous.Request(*both) for both in zip(prompts, limits)], {}
        start = time.perf_counter()
        for first in range(0, count, rows):
            some = slice(first, first + rows)
            self.generate.generate_batch(self.model, prompts[some], max_new_tokens=max(limits[some]))
        seconds["slices"] = time.perf_counter() - start
        start = time.perf_counter()
        for _ in continuous.continuous_batch(self.model, every, rows=rows, capacity=context + longest):
            pass
        seconds["continuous"] = time.perf_counter() - start
        return {name: sum(limits) / spent for name, spent in seconds.items()}


class Transformers:
    """transformers with its defaults: SDPA, and a cache that grows."""

    def __init__(self, folder: str, device: str, **_):
        transformers = sys.modules["transformers"]
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(folder)
        dtype = config.dtype or torch.bfloat16
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.vocabulary, self.device = self.model.config.vocab_size, torch.device(device)

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, cache=None) -> tuple[torch.Tensor, object]:
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)[:, None], out.past_key_values

    def ids(self, prompt: list[int], count: int) -> list[int]:
        (token, cache), out = self.step(torch.tensor([prompt], device=self.device)), []
        while True:
            out.append(int(token))
            if len(out) == count:
                return out
            token, cache = self.step(token, cache)

    def token_times(self, context: int, count: int) -> list[float]:
        """As Ours.token_times, in seconds."""
        _, probe = self.step(torch.ones(1, 1, dtype=torch.int64, device=self.device))
        cache = type(probe)(config=self.model.config)
        for layer, one in enumerate(probe.layers):
            cache.update(*(torch.randn(*x.shape[:2], context, x.shape[3], device=self.device).to(x.dtype)
                           for x in (one.keys, one.values)), layer)
        token, times = torch.ones(1, 1, dtype=torch.int64, device=self.device), []
        for _ in range(count):
            start = time.perf_counter()
            token, cache = self.step(token, cache)
            int(token)
            times.append(time.perf_counter() - start)
        return times


def median(times: list):
    return sorted(times)[len(times) // 2]


def typical(times: list[float], in_sums: list[tuple[float, int]]) -> dict:
    """The one that took the median time, and its sums over the ranks, if there were any."""
    seconds, (spent, count) = median(list(zip(times, in_sums or [(0.0, 0)] * len(times))))
    return {"seconds": seconds} | ({"in_sums": spent, "sums": count} if count else {})


def work(program, task: dict) -> dict:
    """One task of one program -> what was measured: seconds, bytes or ids."""
    seeded = torch.Generator().manual_seed(0)
    prompt = torch.randint(program.vocabulary, (task["context"] or 1,), generator=seeded).tolist()
    take_sums = getattr(program, "take_sums", lambda: (0.0, 0))
    if task["do"] == "ids":
        return {"ids": program.ids(prompt, task["count"])}
    if task["do"] == "sum":
        return program.sum_alone()
    if task["do"] == "prefill":
        times, in_sums = [], []
        for _ in range(max(1, min(3, 2048 // len(prompt)))):
            take_sums()  # of what was before
            with Peak() as peak:
                start = time.perf_counter()
                program.ids(prompt, 1)
                synchronize(program.device)
                times.append(time.perf_counter() - start)
            in_sums.append(take_sums())
        return {"anonymous": peak.most} | typical(times, in_sums)
    if task["do"] == "decode":
        # Without the first two steps, which allocate buffers and may compile.
        times = program.token_times(task["context"], task["count"] + 2)[2:]
        return typical(times, getattr(program, "in_sums", [])[2:])
    if task["do"] == "batch":
        return program.batch(task["context"], task["rows"], task["count"])
    return program.speculation(task["context"], task["count"])


def main() -> None:
    how = json.loads(sys.argv[1])
    if threads := how.pop("threads"):
        torch.set_num_threads(threads)
    out = os.fdopen(os.dup(1), "w")  # what a library prints must not come between the results
    os.dup2(2, 1)
    who = how.pop("who")
    import_module("transformers" if who == "transformers" else f"{how['package']}.main")
    before = anonymous_memory()
    loading = time.perf_counter()
    program = (Transformers if who == "transformers" else Ours)(**how)
    loaded = time.perf_counter()
    memory = anonymous_memory() - before
    program.ids([1] * 32, 1)
    started = {"load": loaded - loading, "first": time.perf_counter() - loading, "anonymous": memory}
    print(json.dumps(started), file=out, flush=True)
    together = import_module(f"{how['package']}.engine.processes")
    while line := together.on_first(sys.stdin.readline):
        print(json.dumps(work(program, json.loads(line))), file=out, flush=True)
    together.leave(0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
