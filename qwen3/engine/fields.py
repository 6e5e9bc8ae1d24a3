"""The fields of a JSON file, each read as the type that it must have; an error names file, field and what is wrong."""

import json
import math
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SPELLINGS = {"half": "float16", "float": "float32", "auto": None}  # what transformers reads besides


class Fields:
    """The fields of one JSON object. Every method raises ValueError."""

    def __init__(self, path: Path, values: dict):
        self.path, self.values = path, values
        self.notes: list[str] = []  # what is passed over, to be said on standard error

    def get(self, name: str, default=None):
        value = self.values.get(name)
        return default if value is None else value

    def required(self, name: str, default=None):
        value = self.get(name, default)
        if value is None:
            raise ValueError(f"{self.path}: the field {name} is missing")
        return value

    def number(self, name: str, default: float | None = None, zero: bool = False) -> float:
        value = self.required(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < 2**31 or not (value or zero):
            raise ValueError(f"{self.path}: {name} is {short(value)}, expected a positive number")
        return float(value)

    def signed(self, name: str, most: float) -> float:
        value = self.required(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -most <= value <= most:
            raise ValueError(f"{self.path}: {name} is {short(value)}, expected a number from -{most} to {most}")
        return float(value)

    def integer(self, name: str, default: int | None = None, zero: bool = False) -> int:
        value = self.number(name, default, zero)
        if value != int(value):
            raise ValueError(f"{self.path}: {name} is {short(value)}, expected a whole number")
        return int(value)

    def object(self, name: str) -> "Fields":
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, "expected an object")
        return Fields(self.path, value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self.required(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {name} is {short(value)}, expected true or false")
        return value

    def default(self, name: str, value: object) -> None:
        """Take `value` where the file does not say."""
        if self.get(name) is None and value is not None:
            self.values[name] = value

    def check_every(self, name: str, layers: int, wanted: object, why: str) -> None:
        """A list with an entry for each layer. The error shows the first that is not the wanted one, not the list."""
        given = self.get(name)
        if not isinstance(given, list):
            self.refuse(name, f"expected a list with an entry for each layer; {why}")
        if len(given) != layers:
            raise ValueError(f"{self.path}: {name} has {len(given)} entries for {layers} layers")
        for layer, entry in enumerate(given):
            if entry != wanted:
                raise ValueError(f"{self.path}: {name} says {short(entry)} for layer {layer}: {why}")

    def dtype(self) -> torch.dtype | None:
        """`dtype` or `torch_dtype`; None where the file has neither, and the tensors decide."""
        name = "dtype" if self.get("dtype") is not None else "torch_dtype"
        value = self.get(name)
        spelled = value.removeprefix("torch.") if isinstance(value, str) else value
        spelled = SPELLINGS.get(spelled, spelled) if isinstance(spelled, str) else spelled
        if spelled is not None and str(spelled) not in DTYPES:
            self.refuse(name, f"expected one of {', '.join(DTYPES)}")
        return DTYPES.get(spelled)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...] | None:
        """One id or a list of them; None where the file has none."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for id in ids:
            if type(id) is not int or id < 0:
                raise ValueError(f"{self.path}: {name} is {short(id)}: expected token ids below {vocab_size}")
        if beyond := [id for id in ids if id >= vocab_size]:
            outside = f"is outside the vocabulary of {vocab_size} and not used"
            self.notes.append(f"{self.path.name}: {name} {short(beyond[0])} {outside}")
        return None if value is None else tuple(id for id in ids if id < vocab_size)

    def refuse(self, name: str, why: str):
        raise ValueError(f"{self.path}: {plain(name)} is {short(self.values.get(name))}: {why}")


def check_off(fields: Fields, off: dict[str, tuple]) -> None:
    """ValueError for the first field that is switched on. `off`: the values that switch each one off."""
    for name, values in off.items():
        value = fields.get(name)
        is_off = any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)
        if value is not None and not is_off:
            only = f"only {' and '.join(map(str, values)).lower()} is known" if values else "it is not computed here"
            fields.refuse(name, only)


def short(value: object, most: int = 60) -> str:
    """A value, shortened to fit into a sentence."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**most:
        return f"a number of {math.floor(math.log10(abs(value))) + 1} digits"
    text = repr(value)
    return text if len(text) <= most else text[:most - 1] + "…"


def one_line(error: Exception, most: int = 120) -> str:
    """A library's message on one line, shortened to fit into a sentence."""
    return " ".join(str(error).split())[:most]


def plain(name: str) -> str:
    """A name from a file, to fit into a sentence: short, on one line, without quotes."""
    return short(name, 100)[1:].rstrip("'\"")


def read_json(path: Path) -> dict:
    """A JSON object from a file; FileNotFoundError or ValueError naming the file otherwise."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint's folder has one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({one_line(error)})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values
