"""config.json -> Config: every published file, both generations of names, and what is refused by name."""

import json
from pathlib import Path

import pytest
import torch

from qwen3.config import Config, Yarn
from qwen3.model import Model
from tests.seeded import qwen3_config

HERE = Path(__file__).parent
PUBLISHED = json.loads((HERE / "published_configs.json").read_text())
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [151645, 151643]}
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read(folder: Path, config: dict, generation: dict | None = None) -> Config:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return Config.from_checkpoint(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_models_of_the_published_size(tmp_path, name):
    values = PUBLISHED[name]["config"]
    config = read(tmp_path, values, SAMPLING)
    for field in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        assert getattr(config, field) == values[field]
    assert config.dtype == torch.bfloat16 and config.rope_scaling is None
    assert config.context_length == values["max_position_embeddings"]
    assert config.weight_block_size == ((128, 128) if "FP8" in name else None)
    with torch.device("meta"):
        model = Model(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]["parameters"]


def test_the_generation_that_transformers_5_writes_says_the_same(tmp_path):
    newer = json.loads((HERE / "reference/small.json").read_text())["config_of_transformers"]
    older = qwen3_config(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
    assert "rope_theta" not in newer and "torch_dtype" not in newer  # else this would test nothing
    assert read(tmp_path, newer) == read(tmp_path, older)


def test_sampling_defaults_and_stop_ids_come_from_the_generation_config(tmp_path):
    config = read(tmp_path, PUBLISHED["Qwen3-0.6B"]["config"], SAMPLING)
    assert (config.temperature, config.top_k, config.top_p) == (0.6, 20, 0.95)
    assert config.eos_token_id == (151645, 151643)


def test_without_a_generation_config_the_config_decides_and_decoding_is_greedy(tmp_path):
    config = read(tmp_path, PUBLISHED["Qwen3-8B-Base"]["config"])
    assert (config.temperature, config.top_k, config.top_p) == (0.0, None, None)
    assert config.eos_token_id == (151643,)
    assert read(tmp_path, qwen3_config()).eos_token_id == ()


def test_yarn_as_qwen_documents_it(tmp_path):
    config = read(tmp_path, PUBLISHED["Qwen3-8B"]["config"] | {"rope_scaling": QWEN_YARN})
    assert config.rope_scaling == Yarn(4.0, 32768)
    assert config.context_length == 131072


def test_a_stop_id_beyond_the_vocabulary_can_never_come_and_is_noted(tmp_path):
    config = read(tmp_path, qwen3_config(eos_token_id=[5, 131]))
    assert config.eos_token_id == (5,)
    assert config.notes == ("config.json: eos_token_id 131 is outside the vocabulary of 131 and not used",)


REFUSED = {
    "another rope type": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling.*llama3"),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.*dynamic"),
    "newer names": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}},
                    "rope_parameters.*linear"),
    "yarn field": ({"rope_scaling": QWEN_YARN | {"surprise": 1}}, "rope_scaling.*surprise"),
    "yarn without factor": ({"rope_scaling": {"rope_type": "yarn"}}, "no factor"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
                       "use_sliding_window"),
    "sliding layers": ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "moe": ({"model_type": "qwen3_moe"}, "model_type.*mixture of experts.*qwen3_moe.main"),
    "qwen2": ({"model_type": "qwen2"}, "model_type.*Qwen2"),
    "llama": ({"model_type": "llama"}, "model_type.*llama"),
    "quantisation": ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantization_config: bits 3"),
    "other blocks": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64]}}, "weight_block_size"),
    "dtype": ({"torch_dtype": "int8"}, "torch_dtype.*int8"),
    "missing": ({"head_dim": None}, "head_dim is missing"),
    "negative": ({"hidden_size": -1}, "hidden_size.*-1"),
    "fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers.*2.5"),
    "text": ({"rms_norm_eps": "small"}, "rms_norm_eps.*small"),
    "heads": ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
    "odd head": ({"head_dim": 9}, "head_dim 9 is odd"),
    "both spellings of rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": QWEN_YARN},
        "rope_scaling .*rope_parameters is there too"),
    "rope is no object": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn': expected an object"),
    "rope theta": ({"rope_theta": 1.0}, "rope_theta is 1.0: expected more than 1"),
    "yarn original": ({"rope_scaling": QWEN_YARN | {"original_max_position_embeddings": 0.5}},
                      "original_max_position_embeddings is 0.5"),
    "window by default": ({"use_sliding_window": True, "sliding_window": ..., "max_window_layers": 1},
                          "use_sliding_window"),
    "window layers as text": ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": "2"},
                              "max_window_layers is '2'"),
    "layer types": ({"layer_types": 5}, "layer_types is 5"),
    "quantisation is no object": ({"quantization_config": "fp8"}, "quantization_config is 'fp8': expected an object"),
    "dtype is a list": ({"torch_dtype": ["bfloat16"]}, "torch_dtype"),
    "type is a list": ({"model_type": ["qwen3"]}, "model_type"),
    "true as text": ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
    "huge": ({"vocab_size": 10**30}, "vocab_size"),
    "stop as text": ({"eos_token_id": "5"}, "eos_token_id is '5': expected token ids below 131"),
    "stop is true": ({"eos_token_id": True}, "eos_token_id"),
}


@pytest.mark.parametrize("changes, message", [
    ({"temperature": "0.6"}, "temperature is '0.6'"), ({"temperature": -1}, "temperature is -1"),
    ({"top_k": 2.5}, "top_k is 2.5"), ({"top_p": 2}, "top_p is 2: expected at most 1"),
    ({"do_sample": "no"}, "do_sample is 'no'"), ({"eos_token_id": -1}, "eos_token_id is -1")])
def test_sampling_defaults_that_make_no_sense_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"generation_config.json: .*{message}"):
        read(tmp_path, PUBLISHED["Qwen3-0.6B"]["config"], SAMPLING | changes)


def test_the_original_length_of_yarn_may_stand_outside(tmp_path):
    """transformers 5 gives it precedence there."""
    config = read(tmp_path, qwen3_config(rope_scaling=QWEN_YARN, original_max_position_embeddings=64))
    assert config.rope_scaling.original_max_position_embeddings == 64


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_would_be_computed_wrongly_is_refused_with_file_and_field(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}") as error:
        read(tmp_path, {name: value for name, value in qwen3_config(**changes).items() if value is not ...})
    assert "\n" not in str(error.value)


def test_a_window_that_is_switched_off_is_no_window(tmp_path):
    read(tmp_path, qwen3_config(sliding_window=64, use_sliding_window=False))
    read(tmp_path, qwen3_config(sliding_window=64, use_sliding_window=True, max_window_layers=3))


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        Config.from_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        Config.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        Config.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        Config.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: expected a JSON object"):
        Config.from_checkpoint(tmp_path)


def test_the_table_of_the_readme_has_the_published_numbers():
    rows = {cells[0]: cells[1:] for line in (HERE.parents[1] / "qwen3/README.md").read_text().splitlines()
            if line.startswith("| Qwen3-") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 9}
    assert set(rows) == {"Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B"}
    for name, cells in rows.items():
        c = PUBLISHED[name]["config"]
        per_token = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"] * 2
        assert cells == [
            str(c["num_hidden_layers"]), str(c["hidden_size"]),
            f"{c['num_attention_heads']} / {c['num_key_value_heads']}", str(c["intermediate_size"]),
            "tied" if c["tie_word_embeddings"] else "own", f"{PUBLISHED[name]['parameters']:,}",
            f"{per_token // 1024} KiB", f"{per_token * 32768 / 2**30:.1f} GiB"]
