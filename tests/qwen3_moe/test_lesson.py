"""The experiment with the routers that qwen3_moe/README.md proposes ends as its folded answer says."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "qwen3_moe/README.md").read_text("utf-8")


def test_which_experts_matters_more_than_how_many(monkeypatch):
    monkeypatch.chdir(ROOT)
    page: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.split("## 4. ")[0], re.M | re.S):
        exec(block, page)
    gates = [layer.mlp.gate for layer in page["model"].model.layers]

    def answer() -> str:
        ids = page["generate"](page["model"], page["ids"], max_new_tokens=100, stop_ids=page["c"].eos_token_id)
        return page["tokenizer"].decode(ids).rpartition("</think>")[2].strip()

    for experts in (1, 8, 2):
        for gate in gates:
            gate.num_experts_per_tok = experts
        assert answer() == "933"
    for gate in gates:
        gate.weight.data = gate.weight.data.roll(1, 0)
    assert "933" not in answer()
    for gate in gates:
        gate.weight.data = gate.weight.data.roll(-1, 0)
    assert answer() == "933"
