"""How a checkpoint says that its weights are integers of four or eight bits: AWQ, GPTQ, compressed-tensors.

What cannot be computed exactly is refused by name: activations that are rounded to integers, other numbers of bits, and
other orders of the bits than those of packed_formats.py. Which layers are left as they are, the tensors say themselves.
"""

from collections.abc import Callable

from .fields import Fields

PACKED = "pack-quantized"
# What is known of the values of a field; None stands for one that is absent.
AWQ = {"bits": (None, 4), "w_bit": (None, 4), "version": (None, "gemm", "GEMM"), "zero_point": (None, True)}
GPTQ = {"bits": (4, 8), "checkpoint_format": (None, "gptq", "gptq_v2"), "format": (None, "gptq", "gptq_v2"),
        "pack_dtype": (None, "int32"), "is_marlin_format": (None, False), "rotation": (None,)}
WEIGHTS = {"num_bits": (4, 8), "type": ("int",), "symmetric": (None, True, False), "dynamic": (None, False),
           "strategy": ("group", "channel")}


def read_integers(q: Fields, refuse: Callable) -> dict[str, object] | None:
    """What config.json says of such weights: their format, and (1, columns that share a scale); None for others."""
    method = q.get("quant_method")
    if method == "awq":
        check(q, AWQ, refuse)
        return {"quantization": "awq", "weight_block_size": read_group(q, ("group_size", "q_group_size"), refuse)}
    if method == "gptq":
        check(q, GPTQ, refuse)
        said = q.get("checkpoint_format") or q.get("format") or "gptq"
        return {"quantization": said, "weight_block_size": read_group(q, ("group_size",), refuse)}
    groups = q.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    formats = {group.get("format") or q.get("format") for group in groups}
    if method != "compressed-tensors" or PACKED not in formats:
        return None
    if others := sorted(map(str, formats - {PACKED})):
        refuse("format", others[0], " beside pack-quantized")
    sizes = set()
    for group in groups:
        weights = Fields(q.path, group.get("weights") if isinstance(group.get("weights"), dict) else {})
        check(weights, WEIGHTS, refuse, "weights ")
        for activations in ("input_activations", "output_activations"):
            if group.get(activations) is not None:
                refuse(activations, group[activations])
        sizes.add(read_group(weights, ("group_size",), refuse))
    return {"quantization": method, "weight_block_size": sizes.pop() if len(sizes) == 1 else None}


def check(fields: Fields, known: dict[str, tuple], refuse: Callable, whose: str = "") -> None:
    for name, values in known.items():
        found = fields.get(name)
        if not any(type(found) is type(value) and found == value for value in values):  # 1 is not True
            refuse(whose + name, found)


def read_group(fields: Fields, names: tuple[str, ...], refuse: Callable) -> tuple[int, int] | None:
    """(1, columns that share a scale); None where all of a row do, and where it is not said."""
    for name in names:
        size = fields.get(name)
        if size is not None and (type(size) is not int or not (size == -1 or 0 < size < 2**31)):
            refuse(name, size)
        if size is not None and size > 0:
            return 1, size
    return None
