"""The answers that deepseek_v3/README.md folds away: its own code, asked once more."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "deepseek_v3/README.md").read_text("utf-8")
PROSE = " ".join(PAGE.split())


@pytest.fixture(scope="module")
def page():
    """What the page's blocks leave behind."""
    namespace: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S):
            exec(block, namespace)
    return namespace


def test_attention_adds_more_than_the_mlp_or_the_experts_in_each_layer(page):
    x = page["W"]["model.embed_tokens.weight"][page["ids"]]
    for i in range(5):
        w = page["of_layer"](i)
        between = x + page["attention"](page["rms_norm"](x, w("input_layernorm")), w)
        after = page["layer"](x, i)
        attention, rest = (between - x)[-1].norm(), (after - between)[-1].norm()
        assert attention > rest
        x = after
    assert "its part is 10.1 long in the last one, that of the experts 2.9" in PROSE
    assert attention == pytest.approx(10.1, abs=0.1) and rest == pytest.approx(2.9, abs=0.1)


def test_a_bias_in_the_weight_favors_the_idle_expert(page):
    scores = (page["token"] @ page["w1"]("mlp.gate").T).sigmoid()[0]
    bias, chosen = page["w1"]("mlp.gate.e_score_correction_bias"), [6, 1, 7]
    right, wrong = ((1.5 * some[chosen] / some[chosen].sum()).tolist() for some in (scores, scores + bias))
    assert "Expert 7: 0.26 instead of 0.11" in PROSE
    assert (wrong[2], right[2]) == (pytest.approx(0.26, abs=0.01), pytest.approx(0.11, abs=0.01))


def test_fewer_drafts_are_kept_at_temperature_3(page):
    acceptance = page["Acceptance"]()
    list(page["generate"](page["model"], page["prompt"], max_new_tokens=30, stop_ids=page["c"].eos_token_id,
                          speculative=True, acceptance=acceptance, temperature=3.0, seed=0))
    assert "8 of 21. At temperature 3" in PROSE
    assert acceptance.drafted > 15 and 4 <= acceptance.accepted <= 12  # drawn: another processor may part early
