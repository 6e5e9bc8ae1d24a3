"""What is new in the config: where experts are, how many, how wide, and how they are weighed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen3_moe.config import Config
from qwen3_moe.model import Model
from qwen3_moe.moe import Experts, SparseMoeBlock
from tests.seeded import QWEN3_MOE_CASES, qwen3_moe_config

HERE = Path(__file__).parent
PUBLISHED = json.loads((HERE / "published_configs.json").read_text())
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
       "modules_to_not_convert": ["lm_head"]}


def read(folder: Path, config: dict) -> Config:
    (folder / "config.json").write_text(json.dumps(config))
    return Config.from_checkpoint(folder)


SHAPES = ["Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder-480B-A35B-Instruct"]  # the others have one of these


@pytest.mark.parametrize("quantised", [False, True], ids=["bfloat16", "FP8"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(tmp_path, name, quantised):
    values = PUBLISHED[name]["config"] | ({"quantization_config": FP8} if quantised else {})
    config = read(tmp_path, values)
    for field in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "head_dim",
                  "rope_theta"):
        assert getattr(config, field) == values[field]
    assert config.shared_expert_intermediate_size == 0
    assert all(map(config.is_sparse, range(config.num_hidden_layers)))
    assert config.weight_block_size == ((128, 128) if quantised else None) and config.dtype == torch.bfloat16
    assert PUBLISHED[name]["parameters"] in {PUBLISHED[shape]["parameters"] for shape in SHAPES}


def size_of(config: Config) -> int:
    with torch.device("meta"):
        model = Model(config)
    assert not any("shared_expert" in name for name, _ in model.named_parameters())
    return sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_models_have_the_published_size(tmp_path, name):
    assert size_of(read(tmp_path, PUBLISHED[name]["config"])) == PUBLISHED[name]["parameters"]


@pytest.mark.parametrize("name", SHAPES)
def test_large_models_have_the_published_size_from_one_layer_and_two(tmp_path, name):
    """All layers are alike; building up to 36,000 matrices takes seconds."""
    config = read(tmp_path, PUBLISHED[name]["config"])
    one, two = (size_of(replace(config, num_hidden_layers=layers)) for layers in (1, 2))
    assert all(map(config.is_sparse, range(config.num_hidden_layers)))
    assert one + (two - one) * (config.num_hidden_layers - 1) == PUBLISHED[name]["parameters"]


def test_the_generation_that_transformers_5_writes_says_the_same(tmp_path):
    newer = json.loads((HERE / "reference/small.json").read_text())["config_of_transformers"]
    assert "num_experts" not in newer and "rope_theta" not in newer  # else this would test nothing
    assert read(tmp_path, newer) == read(tmp_path, qwen3_moe_config(**QWEN3_MOE_CASES["yarn"]))


@pytest.mark.parametrize("step, dense, sparse", [
    (1, [], [0, 1, 2, 3, 4, 5]), (2, [], [1, 3, 5]), (3, [], [2, 5]), (2, [3], [1, 5]), (1, [0, 5], [1, 2, 3, 4])])
def test_which_layers_have_experts(tmp_path, step, dense, sparse):
    config = read(tmp_path, qwen3_moe_config(num_hidden_layers=6, decoder_sparse_step=step, mlp_only_layers=dense))
    model = Model(config)
    assert [i for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, SparseMoeBlock)] == sparse
    assert all(len(module) == 8 for module in model.modules() if isinstance(module, Experts))


def test_a_head_size_that_transformers_leaves_out_is_the_hidden_size_over_the_heads(tmp_path):
    config = {name: value for name, value in qwen3_moe_config(hidden_size=48).items() if name != "head_dim"}
    assert read(tmp_path, config).head_dim == 8
    with pytest.raises(ValueError, match="the field head_dim is missing"):
        read(tmp_path, config | {"hidden_size": 40})


REFUSED = {
    "more active than there are": ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts"),
    "no experts": ({"num_experts": None}, "the field num_experts is missing"),
    "two numbers of experts": ({"num_local_experts": 9},
                               "num_local_experts is 9: num_experts is there too and differs"),
    "not said whether normalised": ({"norm_topk_prob": None}, "the field norm_topk_prob is missing"),
    "normalised as text": ({"norm_topk_prob": "no"}, "norm_topk_prob is 'no', expected true or false"),
    "layers as text": ({"mlp_only_layers": "0"}, "mlp_only_layers is '0': expected a list"),
    "negative shared expert": ({"shared_expert_intermediate_size": -4}, "shared_expert_intermediate_size is -4"),
    "biases by another name": ({"qkv_bias": True}, "qkv_bias is True: only false is known"),
    "no QK-Norm": ({"use_qk_norm": False}, "use_qk_norm is False: only true is known"),
    "dense": ({"model_type": "qwen3"},
              "model_type is 'qwen3': this folder holds a dense Qwen3 model; run it with `python -m qwen3.main`"),
    "qwen2": ({"model_type": "qwen2_moe"}, "model_type.*Qwen2-MoE"),
    "deepseek": ({"model_type": "deepseek_v3"}, "model_type.*deepseek_v3.main"),
    "another": ({"model_type": "mixtral"}, "only model_type 'qwen3_moe'"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_would_be_computed_wrongly_is_refused_with_file_and_field(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}") as error:
        read(tmp_path, qwen3_moe_config(**changes))
    assert "\n" not in str(error.value)


def test_the_table_of_the_readme_has_the_published_numbers():
    rows = {cells[0]: cells[1:] for line in (HERE.parents[1] / "qwen3_moe/README.md").read_text().splitlines()
            if line.startswith("| Qwen3-") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 9}
    assert set(rows) == {"Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder-480B-A35B"}
    for name, cells in rows.items():
        published = PUBLISHED[name if name in PUBLISHED else f"{name}-Instruct"]
        c, total = published["config"], published["parameters"]
        expert = 3 * c["hidden_size"] * c["moe_intermediate_size"]
        active = total - c["num_hidden_layers"] * (c["num_experts"] - c["num_experts_per_tok"]) * expert
        per_token = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] * 2
        assert cells == [
            str(c["num_hidden_layers"]), str(c["hidden_size"]),
            f"{c['num_attention_heads']} / {c['num_key_value_heads']}",
            f"{c['num_experts']} / {c['num_experts_per_tok']}", str(c["moe_intermediate_size"]), f"{total:,}",
            f"{active:,}", f"{per_token // 1024} KiB"]
