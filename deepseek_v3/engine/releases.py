"""What to do where a checkpoint does not fit in memory: get it in fewer bits, or make that."""

from pathlib import Path

from .arguments import name_of
from .memory import gigabytes
from .terminal import PACKAGE

# Published by Qwen itself, beside the release in bfloat16 (and in FP8, which a CPU is slow at): name -> its bits.
PUBLISHED = {
    "Qwen3-0.6B-GPTQ-Int8": "int8", "Qwen3-1.7B-GPTQ-Int8": "int8",
    "Qwen3-4B-AWQ": "int4", "Qwen3-8B-AWQ": "int4", "Qwen3-14B-AWQ": "int4", "Qwen3-32B-AWQ": "int4",
    "Qwen3-30B-A3B-GPTQ-Int4": "int4", "Qwen3-235B-A22B-GPTQ-Int4": "int4",
}
FORMATS = ("-AWQ", "-GPTQ-Int4", "-GPTQ-Int8")


def in_fewer_bits(folder: Path, room: int, sizes: dict[str, int]) -> str | None:
    """How to have this checkpoint in fewer bits, in words; None where it would not fit then either.

    sizes: "int4" and "int8" -> the bytes of memory that it would take so, rounded here; published ones differ little.
    """
    name = name_of(folder)
    base, fits = name.removesuffix("-FP8"), {kind: size for kind, size in sizes.items() if size <= room}
    for release in (base + format for format in FORMATS):
        if (kind := PUBLISHED.get(release)) in fits:
            return (f"`bash scripts/download_{PACKAGE}.sh {release}` gets it in {kind[3:]} bits, which fit "
                    f"({gigabytes(fits[kind])})")
    if "int4" in fits:
        known = name if folder.parent.name == "checkpoints" else folder
        return (f"`uv run python -m scripts.quantize {known}` rounds it to 4 bits, which fit "
                f"({gigabytes(fits['int4'])})")
    return None
