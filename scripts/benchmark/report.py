"""What was measured against what arithmetic expects: bytes, operations, tables."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median

import torch

from . import shapes


@dataclass(frozen=True)
class Work:
    """What a checkpoint asks of a machine, by arithmetic alone."""

    package: str
    file_bytes: int  # all weights, as stored
    weight_bytes: int  # read for one token
    cache_bytes: int  # read for one token, for each token before it
    matrix_values: int  # weights that multiply one token of a prompt, without the head
    attention_operations: int  # for one query and one key, of all layers
    context_length: int  # tokens at most

    @staticmethod
    def of(folder: Path) -> "Work":
        """The work of a checkpoint's token, computed from config and headers."""
        package = shapes.package_of(folder)
        sizes = import_module(f"{package}.engine.sizes")
        config = import_module(f"{package}.config").Config.from_checkpoint(folder)
        files = import_module(f"{package}.engine.safetensors_reader").CheckpointFiles(folder)
        with torch.device("meta"):
            model = import_module(f"{package}.model").Model(config).to(sizes.compute_dtype(config, files, None))
        stored, expanded = sizes.bytes_per_token(model), model.model.norm.weight.dtype.itemsize
        if config.quantization:  # fewer bytes for a weight in the matrices of the layers, which are nearly all
            head = model.lm_head.weight.nbytes
            outside = head + (0 if config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes)
            kept, whole = (sizes.bytes_in_memory(folder, dtype) - outside for dtype in (None, "bfloat16"))
            share = 1 / expanded if config.quantization == "fp8" else kept / whole
            values, stored = (stored - head) // expanded, head + int((stored - head) * share)
        else:
            values = stored // expanded - config.vocab_size * config.hidden_size
        key, value = ((config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim) if package == "deepseek_v3"
                      else (config.head_dim, config.head_dim))
        return Work(package, sizes.bytes_in_memory(folder), stored,
                    sizes.cache_bytes_per_token(config, model.model.norm.weight.dtype), values,
                    2 * config.num_hidden_layers * config.num_attention_heads * (key + value), config.context_length)

    def bytes_of_a_token(self, context: int) -> int:
        return self.weight_bytes + context * self.cache_bytes

    def operations_of_a_prompt(self, tokens: int) -> int:
        """Each token times each weight, and each token with itself and those before it."""
        return 2 * self.matrix_values * tokens + self.attention_operations * tokens * (tokens + 1) // 2


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def ratios(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """(median, least, most) of the rounds' own ratios ours/theirs: what slows a round slows both."""
    each = sorted(one / other for one, other in zip(ours, theirs))
    return median(each), each[0], each[-1]


def rates(results: dict, label: str, name: str) -> list[float]:
    """Tokens a second, of each round."""
    what, context = label.split()
    return [(int(context) if what == "prefill" else 1) / one["seconds"] for one in results[label][name]]


def table(work: Work, results: dict, limits: dict, peer: str | None) -> list[str]:
    """The lines of the table: ours, the machine's limit, and the peer with the ratio."""
    other = f"{peer[-24:]:>25}   ratio (least-most)" if peer else ""
    lines = [f"{'':24}{'ours':>15}{'limit':>15}{'reached':>9}{other}"]

    def line(what: str, ours: list[float], theirs: list[float] | None, form: Callable[[float], str],
             limit: float | None = None) -> None:
        text = f"{what:24}{form(median(ours)):>15}"
        text += f"{form(limit):>15}{median(ours) / limit:>9.0%}" if limit else f"{'':24}"
        if theirs and all(theirs):
            text += f"{form(median(theirs)):>25}   " + "{:.2f} ({:.2f}-{:.2f})".format(*ratios(ours, theirs))
        lines.append(text.rstrip())

    def both(label: str, field: str) -> tuple[list[float], list[float] | None]:
        of = {name: [one[field] for one in every] for name, every in results[label].items()}
        return of["ours"], of.get(peer)

    line("loading", *both("start", "load"), "{:.2f} s".format)
    line("… to first token", *both("start", "first"), "{:.2f} s".format)
    line("… with all imports", *both("start", "seconds"), "{:.2f} s".format)
    line("memory beside the file", *both("start", "anonymous"), size)
    for label in results:
        what, *context = label.split()
        if what in ("prefill", "decode"):
            n = int(context[0])
            limit = (n * limits["operations"] / work.operations_of_a_prompt(n) if what == "prefill"
                     else limits["bytes"] / work.bytes_of_a_token(n))
            theirs = rates(results, label, peer) if peer else None
            line(label, rates(results, label, "ours"), theirs, "{:.1f} tok/s".format, limit)
            if what == "prefill":
                line("  memory beside the file", *both(label, "anonymous"), size)
    return lines


def shared(results: dict, alone: str, ranks: str, backend: str) -> list[str]:
    """One process beside several that share the model, and what these spend in the sums of a prompt or a token."""
    lines = [f"{'':16}{alone:>17}{ranks:>17}   {'ratio (least-most)':22}{'sums':>5}{'time in them':>21}"]
    for label in results:
        if label.split()[0] not in ("prefill", "decode"):
            continue
        mine, theirs = (rates(results, label, name) if name in results[label] else [] for name in (ranks, alone))
        text = f"{label:16}" + (f"{median(theirs):>11,.1f} tok/s" if theirs else f"{'-':>17}")
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(*ratios(mine, theirs)) if theirs else ""
        text += f"{median(mine):>11,.1f} tok/s   {ratio:22}"
        if "sums" in (last := results[label][ranks][-1]):
            spent = [one["in_sums"] for one in results[label][ranks]]
            share = median([one["in_sums"] / one["seconds"] for one in results[label][ranks]])
            text += f"{last['sums']:>5}{1000 * median(spent):>12,.2f} ms, {share:>4.0%}"
        lines.append(text.rstrip())
    every = results["sum 0"][ranks]
    time = 1e6 * median([one["seconds"] for one in every])
    return [*lines, "", f"A sum of {every[0]['bytes'] / 1e3:.1f} kB, as of one token, takes {time:,.0f} µs by itself "
            f"({backend}).", "The time in sums is that of the first rank, which waits there for slower ones."]


def growth(work: Work, results: dict, limits: dict) -> list[str]:
    """What a token costs by context, as a table and a plot: time against the bytes that it reads."""
    times = {int(label.split()[1]): 1000 * median([one["seconds"] for one in every["ours"]])
             for label, every in results.items() if label.startswith("decode")}
    first = min(times)
    lines = ["context     ms/token   bytes/token   if only the bytes of the cache were added"]
    scale = 48 / max(times.values())
    for context, ms in times.items():
        read = work.bytes_of_a_token(context)
        expected = times[first] + 1000 * (read - work.bytes_of_a_token(first)) / limits["bytes"]
        bar = "█" * round(ms * scale)
        at = round(expected * scale)
        bar = bar.ljust(at) [:at] + "│" + bar[at + 1:]
        lines.append(f"{context:>7}{ms:>13.1f}{size(read):>14}{expected:>8.1f} ms  {bar}")
    return lines
