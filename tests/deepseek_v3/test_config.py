"""What is new in the config: ranks, heads of two parts, groups, and which other models are refused by name."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_v3.config import Config
from deepseek_v3.model import Model
from deepseek_v3.moe import DeepSeekMoE
from tests.seeded import deepseek_v3_config

HERE = Path(__file__).parent
PUBLISHED = json.loads((HERE / "published_configs.json").read_text())


def read(folder: Path, config: dict) -> Config:
    (folder / "config.json").write_text(json.dumps(config))
    return Config.from_checkpoint(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(tmp_path, name):
    values = PUBLISHED[name]["config"]
    config = read(tmp_path, values)
    for field in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                  "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
                  "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace", "num_nextn_predict_layers",
                  "rms_norm_eps", "rope_theta", "moe_intermediate_size"):
        assert getattr(config, field) == values[field], field
    assert config.rope_interleave and not config.tie_word_embeddings and config.dtype == torch.bfloat16
    assert config.weight_block_size == ((128, 128) if "quantization_config" in values else None)
    assert config.context_length == values["max_position_embeddings"]
    yarn = values.get("rope_scaling")
    assert (config.rope_scaling is None) == (yarn is None)
    if yarn:
        assert all(getattr(config.rope_scaling, field) == value for field, value in yarn.items() if field != "type")


@pytest.fixture(scope="module")
def shapes_of(tmp_path_factory):
    """shapes_of(name of a release, layers) -> the shapes of our model's parameters, with all layers or so many."""
    @functools.cache
    def shapes_of(name: str, layers: int | None = None) -> dict[str, torch.Size]:
        config = read(tmp_path_factory.mktemp("config"), PUBLISHED[name]["config"])
        with torch.device("meta"):
            model = Model(config if layers is None else replace(config, num_hidden_layers=layers))
        return {name: parameter.shape for name, parameter in model.named_parameters()}
    return shapes_of


@pytest.mark.parametrize("name", [pytest.param("DeepSeek-V3", marks=pytest.mark.slow), "Moonlight-16B-A3B-Instruct"])
def test_models_have_the_published_size(shapes_of, name):
    sizes = {n: shape.numel() for n, shape in shapes_of(name).items()}
    second = sum(size for n, size in sizes.items() if n.startswith("model.layers.61."))
    assert sum(sizes.values()) - second == PUBLISHED[name]["parameters"]
    assert second == PUBLISHED[name].get("second", 0)


def test_deepseek_v3_has_the_published_size_from_its_first_layers(shapes_of):
    """Layers 3 to 60 are alike; building the 45,000 matrices of all takes seconds."""
    published = PUBLISHED["DeepSeek-V3"]
    four, five = (shapes_of("DeepSeek-V3", layers) for layers in (4, 5))
    second = sum(shape.numel() for n, shape in four.items() if n.startswith("model.layers.4."))
    four, five = (sum(shape.numel() for shape in shapes.values()) for shapes in (four, five))
    assert four + (five - four) * (61 - 4) - second == published["parameters"] and second == published["second"]
    assert published["config"]["num_hidden_layers"] == 61


@pytest.mark.parametrize("layers", [4, pytest.param(61, marks=pytest.mark.slow)])
def test_the_shapes_of_the_release(shapes_of, layers):
    """facts of the FP8 release: every tensor of a dense layer, a sparse layer and the MTP module after the last."""
    shapes = shapes_of("DeepSeek-V3", layers)
    for layer in (0, 3, layers):
        for name, shape in {
            "self_attn.q_a_proj": (1536, 7168), "self_attn.q_a_layernorm": (1536,), "self_attn.q_b_proj": (24576, 1536),
            "self_attn.kv_a_proj_with_mqa": (576, 7168), "self_attn.kv_a_layernorm": (512,),
            "self_attn.kv_b_proj": (32768, 512), "self_attn.o_proj": (7168, 16384),
            "input_layernorm": (7168,), "post_attention_layernorm": (7168,),
        }.items():
            assert shapes[f"model.layers.{layer}.{name}.weight"] == shape
    assert shapes["model.layers.2.mlp.gate_proj.weight"] == (18432, 7168)
    assert shapes["model.layers.3.mlp.gate.weight"] == (256, 7168)
    assert shapes["model.layers.3.mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes[f"model.layers.{layers - 1}.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.3.mlp.shared_experts.up_proj.weight"] == (2048, 7168)
    assert shapes[f"model.layers.{layers}.eh_proj.weight"] == (7168, 14336)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        assert shapes[f"model.layers.{layers}.{name}.weight"] == (7168,)
    shapes = shapes_of("Moonlight-16B-A3B-Instruct")
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (3072, 2048)
    assert shapes["model.layers.1.mlp.shared_experts.gate_proj.weight"] == (2816, 2048)
    assert not any("q_a" in name for name in shapes) and "model.layers.27.enorm.weight" not in shapes


def test_the_generation_that_transformers_5_writes_says_the_same(tmp_path):
    newer = json.loads((HERE / "reference/small.json").read_text())["config_of_transformers"]
    assert "rope_theta" not in newer and "rope_scaling" not in newer  # else this would test nothing
    assert read(tmp_path, newer) == read(tmp_path, deepseek_v3_config())


@pytest.mark.parametrize("dense, sparse", [(0, [0, 1, 2]), (1, [1, 2]), (3, []), (9, [])])
def test_the_first_layers_are_dense(tmp_path, dense, sparse):
    model = Model(read(tmp_path, deepseek_v3_config(first_k_dense_replace=dense, num_nextn_predict_layers=0)))
    assert [i for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, DeepSeekMoE)] == sparse


YARN = deepseek_v3_config()["rope_scaling"]
REFUSED = {
    "V2": ({"model_type": "deepseek_v2"},
           "model_type is 'deepseek_v2': this folder holds a DeepSeek-V2 model, whose router is a softmax"),
    "V3.2": ({"model_type": "deepseek_v32"}, "a DeepSeek-V3.2 model, whose attention is sparse"),
    "a distilled Qwen2": ({"model_type": "qwen2"},
                          r"a Qwen2 model \(biases, no QK-Norm\), as many of DeepSeek-R1-Distill are"),
    "a distilled Llama": ({"model_type": "llama"}, "a Llama model, as two of DeepSeek-R1-Distill are"),
    "Qwen3": ({"model_type": "qwen3"}, "run it with `python -m qwen3.main`"),
    "another": ({"model_type": "mixtral"},
                "only 'deepseek_v3', 'kimi_k2', 'glm4_moe_lite', 'joyai_llm_flash' run here"),
    "a softmax": ({"scoring_func": "softmax"}, 'scoring_func is \'softmax\': only "sigmoid" is known'),
    "another choice": ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
    "experts in every other layer": ({"moe_layer_freq": 2}, "moe_layer_freq is 2: only 1 is known"),
    "biases": ({"attention_bias": True}, "attention_bias is True: only false is known"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "fewer key heads": ({"num_key_value_heads": 1}, "num_key_value_heads is 1: only 3 is known"),
    "a head size": ({"head_dim": 20}, "head_dim is 20: only 8 is known"),
    "two numbers of experts": ({"num_local_experts": 9}, "num_local_experts is 9: only 8 is known"),
    "odd rotation": ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7: expected an even number"),
    "uneven groups": ({"n_group": 3}, "n_group is 3: the 8 experts do not make groups of one size"),
    "groups of one": ({"n_group": 8, "topk_group": 4}, "n_group is 8: the 8 experts do not make groups"),
    "more groups than there are": ({"topk_group": 5}, "topk_group is 5: there are only 4 groups"),
    "more active than allowed": ({"num_experts_per_tok": 5},
                                 "num_experts_per_tok is 5: only 4 experts are left to choose from"),
    "no rank": ({"kv_lora_rank": None}, "the field kv_lora_rank is missing"),
    "no factor": ({"routed_scaling_factor": None}, "the field routed_scaling_factor is missing"),
    "a rank of zero": ({"q_lora_rank": 0}, "q_lora_rank is 0, expected a positive number"),
    "another rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not known"),
    "a field of YaRN": ({"rope_scaling": YARN | {"mystery": 1}}, "'mystery' is not a field of YaRN"),
    "4-bit weights": ({"quantization_config": {"quant_method": "modelopt"}}, "quant_method 'modelopt' is not known"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_would_be_computed_wrongly_is_refused_with_file_and_field(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}") as error:
        read(tmp_path, deepseek_v3_config(**changes))
    assert "\n" not in str(error.value)
