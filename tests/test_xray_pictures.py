"""The pictures of the lessons: sound SVG, drawn from the numbers beside them, and those come from real runs again."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.xray import pictures
from scripts.xray.drawings import percent
from scripts.xray.pictures import DRAW

SVG = "{http://www.w3.org/2000/svg}"
ROOT = Path(__file__).parents[1]
NUMBERS = json.loads(pictures.NUMBERS.read_text(encoding="utf-8"))
# Processors round differently: a chance moves a little, and a router's near-tie may fall to the other side.
TOLERANCE = {"attention": 0.02, "lens": 0.03, "clocks": 1e-5, "yarn": 1e-5, "experts": 0.06, "lengths": 0.02,
             "looks": 0.02, "pairs": 0.05, "gates": 0.02, "heat": 0.001,
             "moe_layer": 0.02, "moe_learns": 0.002, "moe_routes": 0.02, "moe_batch": 0.02,
             "rope_breaks": 0.02, "bias_and_groups": 0.01, "mtp": 0.02, "acceptance": 0.01, "fp8": 0.002,
             "forms": 1e-6, "sum": 0.03}


def differences(kept, made, where: str = "") -> list[tuple[str, float]]:
    """Every number of two equally built values: (where it stands, how far they are apart); anything else is equal."""
    if isinstance(kept, dict):
        assert kept.keys() == made.keys(), where
        return [one for key in kept for one in differences(kept[key], made[key], f"{where}.{key}")]
    if isinstance(kept, list):
        assert len(kept) == len(made), where
        return [one for i, pair in enumerate(zip(kept, made)) for one in differences(*pair, f"{where}[{i}]")]
    if isinstance(kept, float) and isinstance(made, float):
        return [(where, abs(kept - made))]
    assert kept == made, where
    return []


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
    assert set(re.findall(r"https?://[^\"<\s]+", written.decode())) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("name", DRAW)
def test_the_numbers_are_those_of_a_run(name, capfd):
    made = json.loads(json.dumps(pictures.measures()[name]()))  # a tuple is a list in the file
    for where, apart in differences(NUMBERS[name], made):
        assert apart <= TOLERANCE.get(name, 0), f"{name}{where} is {apart} from the kept one"


def test_the_mask_of_the_picture_is_the_rule():
    """Written down by hand: a token sees what was read before it, and no padding but itself."""
    mask = NUMBERS["mask"]
    assert mask["after"] == [[int(s <= 4 + t) for s in range(7)] for t in range(3)]
    assert mask["batch"][1] == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_the_cache_of_the_picture_is_counted_as_in_the_papers():
    """arXiv:2405.04434, table 1: 2 n_h d_h, 2 n_g d_h, d_c + d_R values a token and layer."""
    values, sizes = NUMBERS["cache"]["values"], NUMBERS["cache"]["bytes"]
    assert values == {"multi-head": 128 * (192 + 128), "grouped": 2 * 8 * 128, "latent": 512 + 64}
    assert all(sizes[name] == 2 * 61 * count for name, count in values.items())


def test_every_picture_is_shown_by_a_page_with_a_text_in_its_place():
    shown = {}
    for page in [ROOT / "README.md", *ROOT.glob("[!.]*/README.md"), *ROOT.glob("scripts/*/README.md")]:
        for text, name in re.findall(r"!\[([^\]]*)\]\([^)]*xray/pictures/(\w+)\.svg\)", page.read_text("utf-8")):
            shown.setdefault(name, []).append(text)
    assert shown.keys() == DRAW.keys()
    assert all(len(text) > 40 for texts in shown.values() for text in texts)


@pytest.mark.parametrize("share, said", [(0, "0 %"), (1, "100 %"), (0.9985, "> 99 %"), (0.99, "99 %"),
                                         (0.004, "< 1 %"), (0.5, "50 %")])
def test_nothing_is_rounded_to_all_or_nothing(share, said):
    assert percent(share) == said


@pytest.mark.parametrize("words", [["owl"], ["--draw", "owl"], ["--size", "3"]])
def test_what_cannot_be_asked_for_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        pictures.main(words)
    assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_a_picture_without_numbers_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    monkeypatch.setattr(pictures, "NUMBERS", tmp_path / "numbers.json")
    assert pictures.main(["--draw", "lens"]) == 2
    assert "run without --draw" in capsys.readouterr().err
