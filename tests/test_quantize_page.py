"""scripts/quantize/README.md: its numbers are those that were measured, its pictures are drawn from them, it is short.

What its code blocks print is compared by tests/test_readmes.py.
"""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from qwen3.engine import rounding
from scripts.parallel import plan
from scripts.quantize import drawings, measure, pictures, sizes
from tests.test_pages import paragraphs, sentences, words

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "scripts/quantize/README.md").read_text("utf-8")
NUMBERS = json.loads(pictures.NUMBERS.read_text(encoding="utf-8"))
MODELS, SHOWN = NUMBERS["answers"]["models"], ("16", "8", "4", "3", "2")
SVG = "{http://www.w3.org/2000/svg}"


def row(begin: str) -> list[str]:
    """The cells of the page's table row that begins so."""
    return [cell.strip() for cell in re.search(rf"^\| {re.escape(begin)} \|(.+)\|$", PAGE, re.M)[1].split("|")]


def test_it_is_read_in_an_hour():
    long = [sentence for sentence in sentences(PAGE) if len(words(sentence)) > 30]
    assert len(long) <= 1 and len(words(" ".join(paragraphs(PAGE)))) <= 2050, long


def test_the_tables_show_what_was_measured():
    search = [[f"{100 * share:.1f} %" if share > 0.01 else f"{100 * share:.2f} %" for share in shares]
              for shares in zip(*NUMBERS["errors"]["search"]["qwen3"].values())]
    assert [row("the largest weight over 3, 7 or 127"), row("searched")] == search
    for package, lines in MODELS.items():
        name = drawings.NAMES[package]
        for kind, words_ in (("sums", "sums, thinking"), ("glossary", "glossary"), ("own words", "in own words")):
            assert row(f"{name}: {words_}") == [f"{100 * lines[bits][kind]:.3g} %" for bits in SHOWN]
        assert row(f"{name}: loss") == [f"{lines[bits]['loss']:.3f}" for bits in SHOWN]
    kinds = NUMBERS["answers"]["kinds"]
    assert row("all in 16 bits")[0] == f"{MODELS['qwen3']['16']['loss']:.3f}"
    assert [row(f"`{kind}`")[0] for kind in kinds] == [f"{loss:.3f}" for loss in kinds.values()]


def test_what_the_text_says_of_the_numbers_is_so():
    errors = {bits: {group: point[0] for group, point in zip(NUMBERS["errors"]["groups"], points)}
              for bits, points in NUMBERS["errors"]["errors"].items()}
    for bits in ("3", "4", "5"):
        assert 0.4 < errors[str(int(bits) + 1)][32] / errors[bits][32] < 0.55  # each bit halves it
        assert errors[bits]["row"] < errors[bits]["matrix"] / 1.9
        assert 0.7 < errors[bits][8] / errors[bits][32] < 0.8  # 8 for 32 gain a quarter
    largest, searched = NUMBERS["errors"]["search"]["qwen3"]["3"]
    assert 0.75 < searched / largest < 0.85
    for lines in MODELS.values():
        assert all(abs(lines["4"][kind] - lines["16"][kind]) <= 0.05 for kind in ("sums", "glossary", "own words"))
        assert all(lines["2"][kind] <= 0.05 for kind in ("sums", "glossary", "own words"))
        assert lines["3"]["loss"] > 1.1 * lines["16"]["loss"] and lines["4"]["loss"] < 1.1 * lines["16"]["loss"]
    kinds = NUMBERS["answers"]["kinds"]
    assert max(kinds, key=kinds.get) == "v_proj"


def test_pictures_are_sound_drawn_from_their_numbers_and_shown():
    assert NUMBERS.keys() == drawings.DRAW.keys() == {path.stem for path in pictures.FOLDER.glob("*.svg")}
    for name, draw in drawings.DRAW.items():
        written = (pictures.FOLDER / f"{name}.svg").read_bytes()
        assert written == draw(NUMBERS[name]).encode() and len(written) < 60_000
        root = ElementTree.fromstring(written)
        assert root.get("viewBox").split()[2] == "720" and len(root.find(f"{SVG}desc").text) > 50
        assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text
        assert len(re.search(rf"!\[([^\]]*)\]\(pictures/{name}\.svg\)", PAGE)[1]) > 40


@pytest.mark.parametrize("package", measure.EMBEDDED)
def test_it_is_rounded_as_the_engine_does_it(package):
    W = next(W for W in measure.matrices(package) if W.shape[1] % 32 == 0)
    q, scale = rounding.round_matrix(W, 4, 32)
    made = measure.round_and_back(W, 4, 32)
    assert torch.equal(made, q * scale.float().repeat_interleave(32, 1))
    assert torch.equal(measure.round_and_back(W[:, :40], 4, 32)[:, :32], made[:, :32])  # the last group is shorter
    for bits in measure.BITS:
        (largest, _), (searched, stored) = (measure.error([W], bits, 32, one) for one in (False, True))
        assert searched < largest and stored == bits + 0.5


def test_the_bytes_are_those_of_the_plan_and_of_what_is_written():
    for name in ("qwen3-0.6b", "qwen3-30b-a3b"):
        assert sizes.sizes(name, 16) == plan.sizes(name)[1]
    W = torch.randn(48, 448)
    for bits in (4, 8):
        written = rounding.packed_tensors(W, bits, 32)
        assert sizes.bytes_of(48, 448, bits) == written["weight_packed"].nbytes + written["weight_scale"].nbytes


@pytest.mark.parametrize("words_", [["owl"], ["--draw", "owl"], ["--size", "3"]])
def test_what_cannot_be_asked_for_is_refused(words_, capsys):
    with pytest.raises(SystemExit) as ended:
        pictures.main(words_)
    assert ended.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_errors_and_losses_come_out_again():
    assert measure.outlier() == NUMBERS["outlier"]
    made = json.loads(json.dumps(measure.errors()))
    assert made["groups"] == NUMBERS["errors"]["groups"]
    for what in ("errors", "search"):
        flat = [torch.tensor([*numbers[what].values()] if what == "errors" else
                             [[*each.values()] for each in numbers[what].values()])
                for numbers in (made, NUMBERS["errors"])]
        assert torch.allclose(*flat, rtol=1e-3)
    for package, lines in MODELS.items():
        for bits in (4, 3) if package == "qwen3" else (3,):
            one = measure.examinee(package, bits)
            assert abs(measure.loss(one.model, one.tokenizer) / lines[str(bits)]["loss"] - 1) < 0.05


@pytest.mark.slow
def test_answers_come_out_again():
    found = measure.asked(measure.examinee("qwen3", 3), measure.COUNT)
    assert all(abs(share - MODELS["qwen3"]["3"][kind]) <= 0.05 for kind, share in found.items())
