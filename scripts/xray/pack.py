"""How texts and numbers are written for the page: tokens that can be seen, numbers in few bytes."""

import ctypes
import unicodedata
from base64 import b64encode

import torch
from torch import Tensor


def visible(text: str | bytes) -> str:
    """A text in which nothing is hidden: control, bidirectional and zero-width characters are spelled ⟨U+202E⟩.

    Bytes that are no whole character, as in a token that holds half of one, are spelled ⟨E2 96⟩. Space, newline and
    tab stay: the page shows them as · ⏎ ⇥.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            return "⟨" + " ".join(f"{byte:02X}" for byte in text) + "⟩"
    hidden = {c for c in text if c not in " \n\t" and unicodedata.category(c)[0] in "CZ"}  # controls, separators
    return "".join(f"⟨U+{ord(c):04X}⟩" if c in hidden else c for c in text)


class Words:
    """What each id that occurs on the page stands for; `words(id)` notes it and hands the id on."""

    def __init__(self, tokenizer):
        self.tokenizer, self.table = tokenizer, {}

    def __call__(self, id: int) -> int:
        if id not in self.table:
            self.table[id] = visible(self.tokenizer.bytes_of.get(id, b""))
        return id


def packed(values: Tensor) -> str:
    """A tensor's bytes, row by row, in base64; numbers of several bytes begin with the lowest, as JavaScript's do."""
    values = values.cpu().contiguous()
    return b64encode(ctypes.string_at(values.data_ptr(), values.nbytes) if values.numel() else b"").decode()


def roots(shares: Tensor) -> Tensor:
    """Shares from 0 to 1 as bytes of their roots, so that small ones keep their digits: share = (byte / 255)²."""
    return (shares.clamp(0, 1).sqrt() * 255).round().to(torch.uint8)


def fine_roots(shares: Tensor) -> Tensor:
    """The same in two bytes, where a share is compared with one that was computed once more."""
    return (shares.clamp(0, 1).sqrt() * 65535).round().to(torch.int32).to(torch.uint16)


def small_numbers(values: Tensor, digits: int = 4) -> list:
    """As nested lists of rounded numbers."""
    return [round(value, digits) for value in values.tolist()] if values.ndim == 1 else [
        small_numbers(one, digits) for one in values]
