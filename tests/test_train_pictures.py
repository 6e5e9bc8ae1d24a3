"""The pictures of the training lesson: sound SVG, with a text in their place, drawn from the numbers beside them."""

import json
import re
from xml.etree import ElementTree

import pytest

from scripts.train import pictures
from scripts.train.draw import DRAW

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = json.loads(pictures.NUMBERS.read_text(encoding="utf-8"))


def test_each_picture_is_there_with_its_numbers():
    assert NUMBERS.keys() == DRAW.keys()
    assert {path.stem for path in pictures.FOLDER.glob("*.svg")} == DRAW.keys()


@pytest.mark.parametrize("name", DRAW)
def test_a_picture_is_sound_small_alone_and_drawn_from_its_numbers(name):
    written = (pictures.FOLDER / f"{name}.svg").read_bytes()
    assert written == DRAW[name](NUMBERS[name]).encode()
    assert len(written) < 60_000
    root = ElementTree.fromstring(written)
    assert root.tag == f"{SVG}svg" and root.get("viewBox").split()[2] == "720"
    assert len(root.find(f"{SVG}title").text) > 10 and len(root.find(f"{SVG}desc").text) > 50
    assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text
    text = written.decode()
    assert not re.search(r"href|url\(|@import|<script|<image|<foreignObject", text)
    assert set(re.findall(r"https?://[^\"<\s]+", text)) == {"http://www.w3.org/2000/svg"}  # the name of the format
    assert "nan" not in re.findall(r"[a-z]+", " ".join(re.findall(r' (?:d|x|y|cx|cy|width|height)="([^"]*)"', text)))


def test_losses_of_a_whole_run_are_drawn_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    monkeypatch.setattr(pictures, "NUMBERS", tmp_path / "numbers.json")
    losses = tmp_path / "losses.json"
    losses.write_text(json.dumps([8 * 0.99**i for i in range(700)]))
    assert pictures.main(["--losses", str(losses)]) == 0
    kept, drawn = json.loads(pictures.NUMBERS.read_text()), (tmp_path / "loss.svg").read_bytes()
    assert kept.keys() == {"loss"} and kept["loss"]["steps"] == 700 and len(kept["loss"]["losses"]) == 300
    assert pictures.main(["--draw"]) == 0 and (tmp_path / "loss.svg").read_bytes() == drawn
    for text in ("[3, 3]", "[5, 0, 0.00002, 0]", "[99, 1e-9]"):  # any list
        losses.write_text(text)
        assert pictures.main(["--losses", str(losses)]) == 0
        ElementTree.parse(tmp_path / "loss.svg")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[1, -1]", "[1, NaN]", "[1, Infinity]", '["1", 2]', "[true, 2]",
                                  f"[1, 1{'0' * 400}]", "[" * 100_000, None])
def test_other_losses_are_refused_in_one_sentence(tmp_path, text, capsys):
    path = tmp_path / "losses.json"
    if text is not None:
        path.write_text(text)
    assert pictures.main(["--losses", str(path)]) == 2
    said = capsys.readouterr().err
    assert "--losses takes" in said and said.count("\n") == 1 and len(said) < 300 + len(str(path))


@pytest.mark.parametrize("words", [["owl"], ["loss"], ["bias", "--losses", "x"], ["--draw", "--losses", "x"]])
def test_what_cannot_be_asked_for_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        pictures.main(words)
    assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err
