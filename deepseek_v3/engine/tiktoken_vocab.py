"""tiktoken.model, in which Moonlight and Kimi-K2 keep their vocabulary -> a tokenizer of the `tokenizers` library.

Each line is `base64(bytes of a token) rank`: the file lists tokens and not merges. tiktoken joins, again and again, the
two neighbours whose joined bytes have the lowest rank. So the merge that makes a token is the last pair left when its
own bytes are joined using lower ranks only:

    b"the", if "th" and "he" are tokens with th < he:    t h e  ->  th e      the merge is (th, e)
"""

import base64
import binascii
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from .fields import read_json

# The published pre-tokenizer (pat_str): runs of Han, words with a leading sign, digits by three, signs, white space.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SIGN = r"[^\r\n\p{L}\p{N}]?"
PIECES = "|".join([
    r"[\p{Han}]+", rf"{SIGN}{UPPER}*{LOWER}+{ENDING}", rf"{SIGN}{UPPER}+{LOWER}*{ENDING}",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
SPECIAL = 256  # ids after the ranks; those that tokenizer_config.json does not name are reserved


def read_tiktoken(path: Path, alphabet: str) -> tokenizers.Tokenizer:
    """The vocabulary at `path`, with the special tokens that tokenizer_config.json beside it names.

    `alphabet` are the 256 characters that stand for bytes. Raises ValueError naming a damaged file.
    """
    ranks = read_ranks(path)

    def spelled(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [tuple(map(spelled, last_pair(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = [pair for pair in merges if len(pair) == 2]
    # ignore_merges: tiktoken takes a piece that is a token whole, even one that no merges lead to.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    settings = path.with_name("tokenizer_config.json")
    named = read_json(settings).get("added_tokens_decoder", {}) if settings.is_file() else {}
    try:
        names = {int(id): token["content"] for id, token in named.items()}
        names = {id: names.get(id, f"<|reserved_token_{id}|>") for id in range(len(ranks), len(ranks) + SPECIAL)}
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{settings}: added_tokens_decoder is not ids with a content each") from None
    # The library numbers them by itself; a name that it has already, or none at all, would shift all that follow.
    for id, name in names.items():
        if tokenizer.token_to_id(name) != id:
            raise ValueError(f"{settings}: added_tokens_decoder names {id} {name!r}, which is a token already")
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """bytes of each token -> its rank, which is its id."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}: line {number} is not a token and its rank; download it again") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{path}: ranks or single bytes are missing; download it again")
    return ranks


def last_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that join into `token`; other than two where lower ranks do not lead to it."""
    parts, limit = [token[i:i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, limit) for left, right in zip(parts, parts[1:])]
        lowest = min(joined)
        if lowest >= limit:
            break
        i = joined.index(lowest)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
