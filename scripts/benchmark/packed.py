"""Time matmuls with packed weights against bfloat16, in turn: python -m scripts.benchmark.packed.

Each shape is timed for one row, as in decoding, and for a prompt's rows. The ratio is of times in the same round: what
slows one slows the other. The matrices of a round are more than a cache holds.
"""

import argparse
import statistics
import sys
import time

SHAPES = [(4096, 1024), (6144, 1024), (1024, 3072), (9728, 2560), (768, 2048), (151936, 1024)]  # out, in
AT_LEAST = 256e6  # bytes of bfloat16 matrices in a round


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark.packed",
                                     description="Time matmuls with packed weights against bfloat16.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512], metavar="N", help="default 1 8 512")
    parser.add_argument("--group", type=int, default=32, metavar="N", help="columns that share a scale; default 32")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default 7")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as PyTorch chooses")
    return parser.parse_args(words)


def measure(O: int, I: int, rows: int, group: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a matmul in each round, by kind of weight."""
    import torch

    from qwen3.engine import int4

    copies = max(int(AT_LEAST // (2 * O * I)), 1)
    x = torch.randn(rows, I).bfloat16()
    plain = [torch.randn(O, I).bfloat16() for _ in range(copies)]
    packed = {}
    for kind, values, scales in (("int4", torch.randint(0, 16, (O, I), dtype=torch.uint8), I // group),
                                 ("int8", torch.randint(-128, 128, (O, I), dtype=torch.int8), 1)):
        zero = values.new_full((O, scales), 8 if kind == "int4" else 0)
        one = int4.pack(int4.Integers(values, torch.rand(O, scales).bfloat16(), zero, I // scales))
        packed[kind] = [one._replace(values=one.values.clone()) for _ in range(copies)]
    runs = {"bfloat16": lambda i: x @ plain[i].T} | {
        kind: (lambda i, matrices=matrices: matrices[i].matmul(x)) for kind, matrices in packed.items()}
    times = {kind: [] for kind in runs}
    with torch.inference_mode():
        for number in range(rounds + 1):  # the first warms up
            for kind, run in runs.items():
                begin = time.perf_counter()
                for i in range(copies):
                    run(i)
                if number:
                    times[kind].append((time.perf_counter() - begin) / copies)
    return times


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"{torch.get_num_threads()} threads; times as fast as bfloat16, median of {arguments.rounds} rounds")
    print(f"{'out':>7}{'in':>6}{'rows':>6}{'bfloat16 µs':>13}{'int4':>8}{'int8':>8}")
    for O, I in SHAPES:
        for rows in arguments.rows:
            times = measure(O, I, rows, arguments.group, arguments.rounds)
            ratios = [statistics.median(b / t for b, t in zip(times["bfloat16"], times[kind]))
                      for kind in ("int4", "int8")]
            print(f"{O:>7}{I:>6}{rows:>6}{statistics.median(times['bfloat16']) * 1e6:>13.0f}"
                  f"{ratios[0]:>8.2f}{ratios[1]:>8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
