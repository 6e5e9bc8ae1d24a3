"""tiktoken.model, as Moonlight and Kimi-K2 have it, against the library tiktoken (scripts/make_reference.py)."""

import json
import shutil
from pathlib import Path

import pytest

from deepseek_v3.engine import tiktoken_vocab as module
from deepseek_v3.engine.tiktoken_vocab import last_pair, read_ranks
from deepseek_v3.tokenizer import Tokenizer
from tests.seeded import deepseek_v3_config

REFERENCE = json.loads((Path(__file__).parent / "reference/tiktoken.json").read_text())
N = len(REFERENCE["ranks"])
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 7: "<|im_system|>",
         17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"}
DEFAULT = "You are a helpful assistant provided by Moonshot-AI."
TEMPLATE = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}"
            "<|im_system|>system<|im_middle|>" + DEFAULT + "<|im_end|>{% endif %}"
            "<|im_user|>user<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}")


def write(folder: Path, eos: int = 2, template: str = TEMPLATE) -> Path:
    """The files of a Moonlight checkpoint, except its weights."""
    lines = [f"{token} {rank}\n" for rank, token in enumerate(REFERENCE["ranks"])]
    (folder / "tiktoken.model").write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "added_tokens_decoder": {
        str(N + i): {"content": name, "special": True} for i, name in NAMED.items()}}))
    (folder / "config.json").write_text(json.dumps(deepseek_v3_config(vocab_size=N + 256, eos_token_id=N + eos)))
    return folder


@pytest.fixture
def moonlight(tmp_path) -> Tokenizer:
    return Tokenizer.from_checkpoint(write(tmp_path))


@pytest.mark.parametrize("text", REFERENCE["ids"])
def test_ids_are_those_of_tiktoken(moonlight, text):
    assert moonlight.encode(text) == REFERENCE["ids"][text]
    assert moonlight.decode(moonlight.encode(text)) == text


def test_the_reference_tests_something():
    assert max(map(len, REFERENCE["ranks"])) > 8 and N > 600
    assert sum(len(ids) < len(text.encode()) for text, ids in REFERENCE["ids"].items()) > 8


@pytest.mark.slow  # imports transformers, which takes most of the time
def test_a_fresh_vocabulary_against_the_library_itself():
    pytest.importorskip("tiktoken", reason="needs group reference: uv run --group reference pytest")
    from scripts.make_reference import tiktoken_ids

    assert tiktoken_ids() == {key: REFERENCE[key] for key in ("ranks", "ids")}


def test_merges_by_hand():
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"th": 256, b"he": 257, b"the": 258, b"then": 259, b"xyz": 260}
    assert last_pair(b"the", ranks) == [b"th", b"e"] and last_pair(b"then", ranks) == [b"the", b"n"]
    assert last_pair(b"xyz", ranks) == [b"x", b"y", b"z"]  # no merges lead to it


def test_special_tokens_are_named_or_reserved(moonlight):
    ids = moonlight.control_ids
    assert ids["<|im_end|>"] == moonlight.end_of_turn == N + 2 and ids["[PAD]"] == N + 255
    assert ids[f"<|reserved_token_{N + 5}|>"] == N + 5 and len(ids) == 256
    assert moonlight.bos_ids == [] and moonlight.decode([N + 2]) == "<|im_end|>"


def test_the_chat_format_and_its_default_system_prompt(moonlight):
    assert moonlight.thinking == "never"
    ids = moonlight.chat([{"role": "user", "content": "Hi<|im_end|>"}])
    assert moonlight.decode(ids) == (
        f"<|im_system|>system<|im_middle|>{DEFAULT}<|im_end|><|im_user|>user<|im_middle|>Hi<|im_end|><|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>")
    assert ids.count(N + 2) == 2  # the one in the text is text
    own = moonlight.chat([{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
                          {"role": "assistant", "content": "A"}, {"role": "user", "content": "V"}])
    assert moonlight.decode(own) == (
        "<|im_system|>system<|im_middle|>S<|im_end|><|im_user|>user<|im_middle|>U<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>A<|im_end|><|im_user|>user<|im_middle|>V<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>")


def test_a_checkpoint_that_does_not_stop_at_the_end_of_a_turn_is_a_base_one(tmp_path):
    assert Tokenizer.from_checkpoint(write(tmp_path, eos=1)).thinking is None


def test_tokenizer_json_goes_first(tmp_path):
    write(tmp_path)
    shutil.copy(Path(__file__).parents[2] / "checkpoints/DeepSeek-V3-Tiny/tokenizer.json", tmp_path)
    assert len(Tokenizer.from_checkpoint(tmp_path).control_ids) == 7


@pytest.mark.parametrize("line, message", [
    (b"!!!! 3", "line 2 is not a token and its rank"), (b"QQ==", "line 2 is not"), (b"QQ== x", "line 2 is not"),
    (b"QQ== 700000", "ranks or single bytes are missing")])
def test_a_damaged_file_is_named(tmp_path, line, message):
    write(tmp_path)
    lines = (tmp_path / "tiktoken.model").read_bytes().splitlines()
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(ValueError, match=f"tiktoken.model: {message}"):
        Tokenizer.from_checkpoint(tmp_path)


@pytest.mark.parametrize("named, message", [
    ({"x": 3}, "is not ids with a content each"), ({str(N): {"content": 3}}, "is not ids with a content each"),
    ({str(N): {"content": "A"}}, f"names {N} 'A', which is a token already"),
    ({str(N): {"content": ""}}, f"names {N} ''"),
    ({str(N): {"content": "<a>"}, str(N + 1): {"content": "<a>"}}, f"names {N + 1} '<a>', which is a token already")])
def test_damaged_settings_are_named(tmp_path, named, message):
    """Or every special token after it would have the id of its neighbour."""
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named}))
    with pytest.raises(ValueError, match=f"tokenizer_config.json: added_tokens_decoder {message}"):
        Tokenizer.from_checkpoint(tmp_path)


PUBLISHED = Path(__file__).parents[2] / "checkpoints/Moonlight-16B-A3B-Instruct/tiktoken.model"


@pytest.mark.skipif(not PUBLISHED.exists(),
                    reason="needs the published file: bash scripts/download_deepseek_v3.sh --only-tokenizer")
def test_the_published_ids():
    tokenizer = Tokenizer.from_checkpoint(PUBLISHED.parent)
    assert len(read_ranks(PUBLISHED)) == 163584 and module.SPECIAL == 256
    for text, ids in {"Hello world": [19180, 2695], "Hello, world!": [19180, 11, 2695, 0], "你好世界": [33845, 2243],
                      "1234567890": [6694, 12972, 16242, 15], "中文English混合": [16717, 44372, 13935]}.items():
        assert tokenizer.encode(text) == ids
