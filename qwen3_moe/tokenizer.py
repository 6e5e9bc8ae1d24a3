"""2. Text <-> token ids, and the format of a conversation.

Text becomes UTF-8 bytes, bytes become tokens by byte-pair encoding (BPE; Sennrich et al., arXiv:1508.07909).
The merging is done by the `tokenizers` library from the checkpoint's tokenizer.json; what is ours is the
chat format, decoding as the tokens come, and one rule:

    Control tokens are put in by this file and never read out of text.

A user who types "<|im_end|>" gets the pieces of that text, "<", "|", "im", ..., and cannot end a turn.

A checkpoint carries its chat format as a Jinja template, a program. It is never executed: the three published
ones differ in the line that opens the answer, and it is enough to recognise which one it is.

    hybrid         enable_thinking is a variable       <|im_start|>assistant\\n   [<think>\\n\\n</think>\\n\\n when off]
    Thinking-2507  always thinks                       <|im_start|>assistant\\n<think>\\n
    Instruct-2507  never thinks                        <|im_start|>assistant\\n
"""

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain, dropwhile, islice
from pathlib import Path

import tokenizers

from .config import Config, read_json

IM_START, IM_END, THINK, END_THINK = "<|im_start|>", "<|im_end|>", "<think>", "</think>"


class Control(str):
    """The name of a control token, as opposed to text that is spelled alike."""


class Tokenizer:
    """`thinking` says what the chat format allows: "switch", "always", "never"; None for a Base checkpoint."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, thinking: str | None):
        self.thinking = thinking
        # The same BPE without the added tokens: for it, "<|im_end|>" is text like any other.
        self.text = tokenizers.Tokenizer(tokenizer.model)
        self.text.normalizer, self.text.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}
        self.control_ids = {content: id for id, content in added.items()}
        self.end_of_turn = self.control_ids.get(IM_END)
        self.bos_ids: list[int] = []  # Qwen3 has no token that stands before any text
        to_byte = {character: byte for byte, character in enumerate(byte_alphabet())}
        self.bytes_of = {id: content.encode() for id, content in added.items()}
        for token, id in tokenizer.get_vocab(with_added_tokens=False).items():
            self.bytes_of.setdefault(id, bytes(to_byte[character] for character in token))

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> "Tokenizer":
        """Read tokenizer.json, and the chat format from tokenizer_config.json or chat_template.jinja.

        Raises FileNotFoundError or ValueError naming the file that is missing, damaged or of another kind.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; it holds the vocabulary, download the checkpoint again")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text("utf-8", "replace"))
            # An answer ends with a control token; a checkpoint that does not stop at <|im_end|> never learned turns.
            # (The Base checkpoints ship the chat template all the same.)
            stops = Config.from_checkpoint(directory).eos_token_id
            im_end = tokenizer.token_to_id(IM_END)
            thinking = None if im_end is None or (stops and im_end not in stops) else read_chat_format(directory)
            return cls(tokenizer, thinking)
        except (ValueError, OSError):
            raise
        except KeyError as error:
            raise ValueError(f"{path}: not a byte-level vocabulary, it contains {error}") from None
        except Exception as error:  # the library raises a bare Exception for every kind of damage
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from None

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids. Adds nothing; control tokens spelled in the text stay text."""
        # Bytes of a command line that are no UTF-8 come from Python as surrogates, which are no text.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return self.text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text, control tokens written out. Bytes that are no UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as the ids come, in pieces that can be printed.

        A character of several bytes may be split over tokens; its bytes are held until it is whole, and what
        is left of one at the end becomes U+FFFD. Ids that the vocabulary does not have (the embedding of the
        published checkpoints has more rows) give nothing.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            if piece := utf8.decode(self.bytes_of.get(id, b"")):
                yield piece
        if piece := utf8.decode(b"", final=True):
            yield piece

    def chat(self, messages: list[dict[str, str]], thinking: bool = True) -> list[int]:
        """A conversation -> ids, up to and with the header of the assistant's next turn.

        Messages are {"role": "system" | "user" | "assistant", "content": text}, an assistant's with its
        reasoning before </think> in the content or apart as "reasoning_content". `thinking` matters only
        where the checkpoint has the switch. Raises ValueError for a Base checkpoint and for other roles.
        """
        if self.thinking is None:
            raise ValueError("this is a Base checkpoint: it continues plain text and has learned no conversation")
        parts: list[str] = []
        users = [i for i, message in enumerate(messages) if check_message(message) == "user"
                 and not (message["content"].startswith("<tool_response>") and message["content"].endswith("</tool_response>"))]
        for i, message in enumerate(messages):
            content = message["content"]
            parts += [Control(IM_START), message["role"] + "\n"]
            if message["role"] == "assistant" and self.thinking != "never":
                reasoning, content = split_reasoning(message)
                # Reasoning is kept only for what follows the last question: earlier answers were given, and
                # how they were found would fill the context.
                if users and i > users[-1] and (reasoning or i == len(messages) - 1):
                    parts += [Control(THINK), "\n" + reasoning.strip("\n") + "\n", Control(END_THINK), "\n\n"]
                    content = content.lstrip("\n")
            parts += [content, Control(IM_END), "\n"]
        parts += [Control(IM_START), "assistant\n"]
        if self.thinking == "always":
            parts += [Control(THINK), "\n"]
        elif self.thinking == "switch" and not thinking:
            parts += [Control(THINK), "\n\n", Control(END_THINK), "\n\n"]
        return self.join(parts)

    def join(self, parts: list[str]) -> list[int]:
        """Ids of text and control tokens in turn; neighbouring texts are merged first, since BPE sees across them."""
        ids, text = [], ""
        for part in parts:
            if isinstance(part, Control):
                if part not in self.control_ids:
                    raise ValueError(f"the vocabulary has no {part}, which the chat format needs")
                ids += self.encode(text) + [self.control_ids[part]]
                text = ""
            else:
                text += part
        return ids + self.encode(text)


def dropping_newlines(pieces: Iterator[str]) -> Iterator[str]:
    """The same without the newlines at the beginning, which are the chat format's."""
    pieces = dropwhile(lambda piece: not piece.strip("\n"), pieces)
    return chain((piece.lstrip("\n") for piece in islice(pieces, 1)), pieces)


def check_message(message: dict[str, str]) -> str:
    """The role, if the message is one that can be written down."""
    role = message.get("role")
    if role not in ("system", "user", "assistant") or "tool_calls" in message:
        raise ValueError(f"a message has role {role!r}; known are system, user and assistant, without tool calls")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"the content of a message of role {role!r} is not text")
    return role


def split_reasoning(message: dict[str, str]) -> tuple[str, str]:
    """(reasoning, answer) of an assistant's message, with the published template's trimming of newlines."""
    content, reasoning = message["content"], message.get("reasoning_content")
    if isinstance(reasoning, str):
        return reasoning, content
    if END_THINK not in content:
        return "", content
    before, after = content.split(END_THINK)[0], content.split(END_THINK)[-1]
    return before.rstrip("\n").split(THINK)[-1].lstrip("\n"), after.lstrip("\n")


def read_chat_format(directory: Path) -> str:
    """Which of the published formats the checkpoint's template is: "switch", "always" or "never"."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        template = path.read_text(encoding="utf-8", errors="replace")
    else:
        path = directory / "tokenizer_config.json"
        template = read_json(path).get("chat_template")
    if not isinstance(template, str):
        raise ValueError(f"{path}: has no chat_template, so the format of a conversation is unknown")
    opening = template.rpartition("add_generation_prompt")[2]  # what is written where the answer begins
    if IM_START in opening and "enable_thinking" in opening:
        return "switch"
    if IM_START in opening and END_THINK not in opening:
        return "always" if THINK in opening else "never"
    raise ValueError(f"{path}: the chat template is none of the three that are known here")


def byte_alphabet() -> str:
    """The 256 characters that byte-level BPE writes bytes with, byte 0 first.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 and up, so that a vocabulary file
    shows no control characters: a space is "Ġ", a newline "Ċ" (GPT-2, Radford et al. 2019, section 2.2).
    """
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in shown else next(others)) for byte in range(256))
