"""What released checkpoints really contain: stray buffers, fused experts, FP8 in many spellings, other models' files.

Values come from what does not run here: the same numbers stored in the plain way, or formulas computed step by step.
"""

import copy
import functools
import io
import json
import pickle
import re
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.packages import PACKAGES, module
from tests.seeded import (
    PROMPT, deepseek_v3_config, qwen3_config, qwen3_moe_config, seeded_tensor, shapes_of, write_checkpoint)

IDS = torch.tensor([PROMPT])
CONFIGS = {"qwen3": qwen3_config, "qwen3_moe": qwen3_moe_config, "deepseek_v3": deepseek_v3_config}
OTHERS = json.loads((Path(__file__).parent / "other_configs.json").read_text())
MIXTURES = ["qwen3_moe", "deepseek_v3"]


@pytest.fixture(params=PACKAGES)
def package(request) -> str:
    return request.param


def write(folder: Path, package: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A small checkpoint with an untied head."""
    return write_checkpoint(folder, CONFIGS[package](**{"tie_word_embeddings": False} | changes), dtype)


def logits(package: str, folder: Path, **how) -> torch.Tensor:
    with torch.inference_mode():
        return module(package, "weights").load_model(folder, **how)(IDS)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def shard(folder: Path, tensors: dict[str, torch.Tensor], index: bool = True,
          pattern: str = "model-{:05}-of-00003.safetensors") -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {name: pattern.format(i % 3 + 1) for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))


def is_one_sentence(error: pytest.ExceptionInfo, folder: Path) -> bool:
    said = str(error.value).replace(str(folder), "folder")
    return len(said) < 300 and "\n" not in said


# Buffers

BUFFERS = {"self_attn.rotary_emb.inv_freq": torch.ones(7), "self_attn.rotary_emb.cos_cached": torch.ones(3, 2),
           "self_attn.k_scale": torch.ones(()), "self_attn.v_scale": torch.ones(1), "position_ids": torch.arange(5),
           "surplus": torch.empty(0, 4)}


@pytest.mark.parametrize("indexed", [False, True])
def test_buffers_are_passed_over_and_change_neither_logits_nor_memory(tmp_path, package, indexed):
    """Moonlight and Kimi-K2 hold (hidden_size / heads / 2,) float32 in each layer, whatever the rotary part's size."""
    folder = write(tmp_path / "made", package, torch.bfloat16, torch_dtype="bfloat16")
    weights = module(package, "weights")
    before, size = logits(package, folder), weights.bytes_in_memory(folder)
    strays = {f"model.layers.{i}.{name}": tensor.clone() for i in range(3) for name, tensor in BUFFERS.items()}
    tensors = tensors_of(folder) | strays
    shard(folder, tensors) if indexed else save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(package, folder), before) and weights.bytes_in_memory(folder) == size


@pytest.mark.parametrize("package", MIXTURES)
def test_a_stray_float32_table_does_not_count_in_the_memory_check(tmp_path, monkeypatch, package):
    folder, weights = write(tmp_path, package, torch.bfloat16, torch_dtype="bfloat16"), module(package, "weights")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(9)}
    save_file(tensors_of(folder) | table, folder / "model.safetensors")
    free = weights.bytes_in_memory(folder) * 8 // 10
    monkeypatch.setattr(module(package, "engine.sizes"), "free_memory", lambda device: free)
    assert "come from the disk when routed to" in weights.check_memory(folder, torch.device("cpu"), None, 10, 1000)


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.surprise.weight", "inv_freq"])
def test_a_superfluous_weight_is_an_error(tmp_path, package, name):
    folder = write(tmp_path, package)
    save_file(tensors_of(folder) | {name: torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is in the checkpoint, but the config has no place for it"):
        module(package, "weights").load_model(folder)


# Fused experts, shards

def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """(E, 2F, D) with gate's rows first, and (E, D, F): facts, transformers 5's conversion_mapping.py."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name or "input_scale" not in name}
    names = [name for name in out if ".experts.0.gate_proj." in name]
    for name in names:
        prefix, leaf = name.split("0.gate_proj.")
        E = sum(1 for other in tensors if re.fullmatch(re.escape(prefix) + r"\d+\.down_proj\." + leaf, other))
        gate, up, down = ([out.pop(f"{prefix}{e}.{part}.{leaf}") for e in range(E)]
                          for part in ("gate_proj", "up_proj", "down_proj"))
        leaf = leaf.removeprefix("weight")
        out[f"{prefix}gate_up_proj{leaf}"] = torch.stack([torch.cat(pair) for pair in zip(gate, up)])
        out[f"{prefix}down_proj{leaf}"] = torch.stack(down)
    return out


@pytest.mark.parametrize("package", MIXTURES)
@pytest.mark.parametrize("sharded", [False, True])
def test_fused_experts_are_views_of_the_file(tmp_path, package, sharded):
    folder = write(tmp_path, package)
    before, fused = logits(package, folder), fuse(tensors_of(folder))
    assert not any(".experts.0." in name for name in fused) and any("gate_up_proj" in name for name in fused)
    shard(folder, fused) if sharded else save_file(fused, folder / "model.safetensors")
    assert torch.equal(logits(package, folder), before)
    model = module(package, "weights").load_model(folder)
    expert = next(m for n, m in model.named_modules() if n.endswith("mlp.experts.3"))
    assert expert.up_proj.weight.untyped_storage().nbytes() == expert.up_proj.weight.nbytes


@pytest.mark.parametrize("package", MIXTURES)
def test_fused_fp8_experts_with_their_scales(tmp_path, package):
    folder = write_fp8(tmp_path, package, "block", hidden_size=128, moe_intermediate_size=128)
    before = logits(package, folder)
    save_file(fuse(tensors_of(folder)), folder / "model.safetensors")
    assert torch.equal(logits(package, folder), before)


@pytest.mark.parametrize("pattern", ["model-{:05}-of-00003.safetensors", "model-{}-of-3.safetensors"])
def test_shards_without_an_index(tmp_path, package, pattern):
    folder = write(tmp_path, package)
    before = logits(package, folder)
    shard(folder, tensors_of(folder), index=False, pattern=pattern)
    assert torch.equal(logits(package, folder), before)
    next(folder.glob("*2-of*")).unlink()
    wanted = "only 2 of 3 parts are there, and no model.safetensors.index.json; download it again"
    with pytest.raises(FileNotFoundError, match=wanted):
        module(package, "weights").load_model(folder)


# FP8

@functools.cache  # several spellings have the same numbers
def quantised(name: str, shape: tuple[int, int], kind: str, block: int) -> tuple[torch.Tensor, ...]:
    """(FP8 weights, scales, what they mean in float32), one scale for a tensor, a row or a block, by slices."""
    weight = seeded_tensor(name, shape, 0.1)
    O, I = shape
    rows, columns = {"tensor": (O, I), "row": (1, I), "block": (block, block)}[kind]
    scales = torch.ones(-(-O // rows), -(-I // columns))
    q, meant = torch.empty(O, I, dtype=torch.float8_e4m3fn), torch.empty(O, I)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            where = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
            # A power of two, so that E8M0 holds it too.
            scales[r, c] = 2.0 ** (weight[where].abs().max() / 448).log2().ceil()
            q[where] = (weight[where] / scales[r, c]).to(torch.float8_e4m3fn)
            meant[where] = q[where].float() * scales[r, c]
    return q, scales, meant


FINE = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
W8 = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(weights: dict, **more) -> dict:
    """As compressed-tensors writes it, with one group."""
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}} | more


FLOAT = {"format": "float-quantized"}
DYNAMIC_ROWS = compressed(W8 | {"strategy": "channel"}, **FLOAT, ignore=["lm_head"])
DYNAMIC_ROWS["config_groups"]["group_0"]["input_activations"] = {"dynamic": True, "strategy": "token"}
OF_QWEN = OTHERS["Qwen/Qwen3-32B-FP8-Static-PerTensor"]["config"]["quantization_config"]
SPELLINGS = {  # kind of scale, its shape in the file, its name, quantization_config
    "deepseek": ("block", None, "weight_scale_inv", FINE),
    "ue8m0": ("block", None, "weight_scale_inv", FINE | {"scale_fmt": "ue8m0"}),
    "small blocks": ("block", None, "weight_scale_inv", FINE | {"weight_block_size": [16, 16]}),
    "no method": ("block", None, "weight_scale_inv", {"weight_block_size": [128, 128]}),
    "static tensor": ("tensor", (), "weight_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
    "one number": ("tensor", (1,), "weight_scale_inv", {"quant_method": "fp8", "activation_scheme": "static"}),
    "qwen static": ("tensor", (), "weight_scale", OF_QWEN),
    "red hat dynamic": ("row", (-1, 1), "weight_scale", DYNAMIC_ROWS),
    "red hat blocks": ("block", None, "weight_scale",
                       compressed(W8 | {"strategy": "block", "block_structure": [128, 128]}, **FLOAT)),
    "modelopt": ("tensor", (), "weight_scale", {"quant_method": "modelopt", "quant_algo": "FP8",
                                                "kv_cache_scheme": {"num_bits": 8, "type": "float"}}),
    "modelopt blocks": ("block", "4d", "weight_scale", {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}),
    "fbgemm": ("row", (-1, 1), "weight_scale", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "flat rows": ("row", (-1,), "weight_scale", {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "beside": ("tensor", (), "weight_scale", ...),
}


def write_fp8(folder: Path, package: str, kind: str, spelling: str = "deepseek", plain: bool = False,
              **changes) -> Path:
    """Projections in FP8 with the scales of activations and cache that such files hold; plain: what they mean."""
    _, shape, name_of_scale, quantization = SPELLINGS[spelling]
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[package](**{"tie_word_embeddings": False, "hidden_size": 136, "torch_dtype": "float32"} | changes)
    tensors = {}
    for name, size in shapes_of(config).items():
        if "_proj" in name:
            q, scale, meant = quantised(name, size, kind, 16 if spelling == "small blocks" else 128)
            tensors[name] = meant if plain else q
            if not plain:
                if shape == "4d":
                    scale = scale[:, None, :, None].contiguous()
                elif shape is not None:
                    scale = scale.reshape(shape)
                scale = scale.to(torch.float8_e8m0fnu) if spelling == "ue8m0" else scale
                tensors[name.replace(".weight", f".{name_of_scale}")] = scale
                tensors[name.replace(".weight", ".input_scale")] = torch.ones(())
    if not plain:
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())
        if quantization is not ...:
            config["quantization_config"] = quantization
        else:
            quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
            (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return write_checkpoint(folder, config, **tensors)


@functools.cache
def logits_meant(package: str, kind: str, small: bool) -> torch.Tensor:
    """Of the numbers in float32, which are the same in several spellings."""
    spelling = "small blocks" if small else "deepseek"
    with tempfile.TemporaryDirectory() as folder:
        return logits(package, write_fp8(Path(folder), package, kind, spelling, plain=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fp8_is_what_its_scales_mean(tmp_path, package, spelling):
    kind = SPELLINGS[spelling][0]
    folder = write_fp8(tmp_path / "fp8", package, kind, spelling)
    meant = logits_meant(package, kind, spelling == "small blocks")
    model = module(package, "weights").load_model(folder)
    with torch.inference_mode():
        assert torch.equal(model(IDS), meant)
    assert torch.equal(logits(package, folder, dtype="float32"), meant)
    projections = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    assert projections and {p.dtype for p in projections} == {torch.float8_e4m3fn}
    assert module(package, "weights").bytes_in_memory(folder) == sum(p.nbytes for p in model.parameters())
    (note,) = model.config.notes
    assert "activations and cache stay in a wider type" in note and "(input_scale, k_scale not used)" in note


MLX = {"group_size": 64, "bits": 4}
W4, PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, {"format": "pack-quantized"}
UNREADABLE = {
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemv", "modules_to_not_convert": ["x" * 50] * 99},
    "awq, 3 bits": {"quant_method": "awq", "w_bit": 3, "q_group_size": 128, "version": "gemm"},
    "awq, symmetric": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": False},
    "gptq": {"quant_method": "gptq", "bits": 3, "desc_act": False},
    "gptq, 2 bits": {"quant_method": "gptq", "bits": 2, "group_size": 64, "checkpoint_format": "gptq_v2"},
    "gptq, no bits": {"quant_method": "gptq", "group_size": 128},
    "gptq, marlin": {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
    "gptq, rotated": {"quant_method": "gptq", "bits": 4, "group_size": 128, "rotation": "hadamard"},
    "gptq, groups of 0": {"quant_method": "gptq", "bits": 4, "group_size": 0},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, no method": {"load_in_4bit": True},
    "mlx": MLX,
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "int4": compressed(W4 | {"strategy": "tensor"}, **PACKED, ignore=["x" * 60] * 99),
    "int4 and integer activations": {"quant_method": "compressed-tensors", **PACKED, "config_groups": {"group_0": {
        "weights": W4, "input_activations": {"num_bits": 8, "type": "int", "dynamic": True}}}},
    "int4 and fp8": {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {
        "group_0": {"weights": W4, "format": "pack-quantized"},
        "group_1": {"weights": W8, "format": "float-quantized"}}},
    "int3": compressed(W4 | {"num_bits": 3}, **PACKED),
    "float4": compressed(W4 | {"type": "float"}, format="nvfp4-pack-quantized"),
    "int4, hadamard": compressed(W4, **PACKED, transform_config={"R1": {}}),
    "int8": compressed({"num_bits": 8, "type": "int"}, format="int-quantized"),
    "hadamard": compressed(W8, **FLOAT, transform_config={"R1": {}}),
    "sparse": compressed(W8, sparsity_config={"format": "sparse-24-bitmask"}),
    "e5m2": {"quant_method": "fp8", "fmt": "e5m2"},
    "blocks of one number": {"quant_method": "fp8", "weight_block_size": [128]},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_other_quantised_weights_are_refused_in_a_short_sentence(tmp_path, package, name):
    write(tmp_path, package, quantization_config=UNREADABLE[name], **({"quantization": MLX} if name == "mlx" else {}))
    with pytest.raises(ValueError, match="get (such a|the) release") as error:
        module(package, "weights").load_model(tmp_path)
    assert is_one_sentence(error, tmp_path)


# Other models and other files

RUNS = {"zai-org/GLM-4.7-Flash": "deepseek_v3", "Qwen/Qwen3-32B-FP8-Static-PerTensor": "qwen3",
        "Qwen/Qwen3-30B-A3B-FP8": "qwen3_moe", "Qwen/Qwen3-235B-A22B-FP8": "qwen3_moe",
        "nvidia/DeepSeek-V3.1-NVFP4": "deepseek_v3"}  # the last: its tensors tell


@pytest.mark.parametrize("name", OTHERS)
def test_real_configs_of_other_releases(tmp_path, package, name):
    (tmp_path / "config.json").write_text(json.dumps(OTHERS[name]["config"]))
    if "hf_quant_config" in OTHERS[name]:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(OTHERS[name]["hf_quant_config"]))
    if RUNS.get(name) == package:
        change_config(tmp_path, rope_theta=1e6)  # GLM's public copy is shortened
        assert module(package, "config").Config.from_checkpoint(tmp_path).vocab_size > 100_000
        return
    with pytest.raises(ValueError) as error:
        module(package, "config").Config.from_checkpoint(tmp_path)
    assert is_one_sentence(error, tmp_path)
    if "NVFP4" in name and OTHERS[name]["config"]["model_type"] == package:
        assert "NVFP4, 4 bits" in str(error.value)


NO_GENERATORS = {
    "classifier": ({"architectures": ["Qwen3ForSequenceClassification"]}, "a classifier, reward or reranking model"),
    "guard": ({"architectures": ["Qwen3ForGuardModel"]}, "a classifier, reward or reranking model"),
    "reward": ({"architectures": ["Qwen3ForRewardModel"]}, "a reward or reranking model"),
    "embedding": ({"architectures": ["Qwen3Model"]}, "an embedding model"),
    "eagle": ({"architectures": ["LlamaForCausalLMEagle3"]}, "a draft model"),
    "draft": ({"draft_vocab_size": 32000}, "a draft model"),
    "seeing": ({"vision_config": {"depth": 3}}, "a model of more than text"),
}


@pytest.mark.parametrize("changes, what", NO_GENERATORS.values(), ids=NO_GENERATORS)
def test_what_generates_no_text_is_said_to(tmp_path, package, changes, what):
    write(tmp_path, package, **changes)
    with pytest.raises(ValueError, match=what) as error:
        module(package, "weights").load_model(tmp_path)
    assert is_one_sentence(error, tmp_path)


def touch(name: str, text: str = "{}"):
    return lambda folder: (folder / name).write_text(text)


def add(name: str, tensor: torch.Tensor):
    return lambda folder: save_file(tensors_of(folder) | {name: tensor}, folder / "model.safetensors")


def without_prefix(folder: Path) -> None:
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors")


FOLDERS = {
    "lora": (touch("adapter_config.json"), "a LoRA adapter .*merge"),
    "sentence transformers": (touch("modules.json", "[]"), "an embedding or reranking"),
    "gguf": (lambda f: [p.unlink() for p in f.iterdir()] and touch("x.gguf")(f), "GGUF files, which llama.cpp runs"),
    "gguf with config": (lambda f: (f / "model.safetensors").rename(f / "x.gguf"), "only GGUF files"),
    "params.json": (lambda f: (f / "config.json").rename(f / "params.json"), "params.json and no config.json"),
    "score": (add("score.weight", torch.ones(1, 40)), "score.weight is the head of a classifier or reward model"),
    "value head": (add("v_head.summary.weight", torch.ones(1, 40)), "v_head.summary.weight is the head of"),
    "eagle": (add("d2t", torch.ones(3)), "d2t is part of a draft model"),
    "no prefix": (without_prefix, "lack 'model.'"),
}


@pytest.mark.parametrize("damage, what", FOLDERS.values(), ids=FOLDERS)
def test_folders_of_something_else_are_said_to_be(tmp_path, package, damage, what):
    damage(write(tmp_path, package))
    with pytest.raises((ValueError, FileNotFoundError), match=what) as error:
        module(package, "weights").load_model(tmp_path)
    assert is_one_sentence(error, tmp_path)


def test_fields_of_config_that_change_the_result_are_refused_by_name(tmp_path, package):
    for name, value in {
            "is_causal": False, "dual_chunk_attention_config": {"chunk_size": 262144}, "llama_4_scaling": {"beta": 0.1},
            "index_topk": 2048, "swiglu_limit": 7.0, "final_logit_softcapping": 30.0, "attn_output_gate": True,
            "use_qk_norm": False, "repetition_penalty": 1.05, "num_beams": 4,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}.items():
        write(tmp_path, package, **{name: value})
        with pytest.raises(ValueError, match=f"config.json: {name}") as error:
            module(package, "config").Config.from_checkpoint(tmp_path)
        assert is_one_sentence(error, tmp_path) and "['full" not in str(error.value)
    write(tmp_path, package, is_causal=True, dual_chunk_attention_config=None, swiglu_limit=None, use_qk_norm=True,
          repetition_penalty=1.0, num_beams=1, layer_types=["full_attention"] * 3, unsloth_version="2026.1",
          pretraining_tp=1, sliding_window=None)
    module(package, "config").Config.from_checkpoint(tmp_path)


# generation_config.json

def sampling_of(folder: Path, package: str, generation: dict):
    (write(folder, package) / "generation_config.json").write_text(json.dumps(generation))
    config = module(package, "config").Config.from_checkpoint(folder)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def test_what_generation_config_asks_for(tmp_path, package):
    coder = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    idle = {"max_length": 5, "max_new_tokens": 2048, "use_cache": False, "_from_model_config": True,
            "repetition_penalty": 1.0, "min_p": 0.0, "num_beams": 1, "suppress_tokens": None}
    for generation, expected in (
            (coder | {"do_sample": True, "pad_token_id": 1, "transformers_version": "4"}, coder),
            ({"do_sample": True, "top_k": -1, "min_p": 0.05, "presence_penalty": -1.5},
             {"temperature": 1.0, "min_p": 0.05, "presence_penalty": -1.5}),
            ({"do_sample": False, "temperature": 0.7, "min_p": 0.1, "repetition_penalty": 2.0},
             {"temperature": 0.0, "repetition_penalty": 2.0}),
            (idle, {"temperature": 0.0})):
        assert sampling_of(tmp_path, package, generation) == expected


TURNED_ON = {"no_repeat_ngram_size": 3, "num_beams": 4, "suppress_tokens": [1], "bad_words_ids": [[1]],
             "min_new_tokens": 5, "min_length": 3, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01,
             "forced_eos_token_id": 2, "begin_suppress_tokens": [2], "sequence_bias": {"(1,)": 2.0},
             "guidance_scale": 1.5, "encoder_repetition_penalty": 1.2, "penalty_alpha": 0.6, "top_h": 0.4,
             "watermarking_config": {"bias": 2.0}, "frequency_penalty": 0.5, "forced_bos_token_id": 1,
             "token_healing": True, "exponential_decay_length_penalty": [5, 1.1], "xtc_probability": 0.5,
             "num_beam_groups": 2, "dola_layers": "high"}
WRONG = {"repetition_penalty": 0, "min_p": 1.5, "presence_penalty": "1", "top_k": -2, "temperature": True}


@pytest.mark.parametrize("name, value", [*TURNED_ON.items(), *WRONG.items()])
def test_what_would_change_the_text_is_refused_by_name(tmp_path, package, name, value):
    with pytest.raises(ValueError, match=f"generation_config.json: {name} is ") as error:
        sampling_of(tmp_path, package, {"do_sample": True, name: value})
    assert is_one_sentence(error, tmp_path)


# RoPE and dtype

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_fields_of_yarn_that_change_nothing_and_both_objects_when_they_agree(tmp_path, package):
    read = module(package, "config").Config.from_checkpoint
    plain = read(write(tmp_path, package, rope_scaling=YARN)).rope_scaling
    idle = {"partial_rotary_factor": 1.0, "finetuned": True, "max_position_embeddings": 256, "attn_factor": 1.0}
    for changes in ({"rope_scaling": YARN | idle},
                    {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 1e4}}):
        assert read(write(tmp_path, package, **changes)).rope_scaling == plain
    for changes in ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
                    {"rope_scaling": YARN | {"factor": 2.0}, "rope_parameters": YARN | {"rope_theta": 1e4}},
                    {"rope_scaling": YARN | {"attn_factor": 0.9, "attention_factor": 0.9}}):
        with pytest.raises(ValueError, match="rope_scaling"):
            read(write(tmp_path, package, **changes))


def test_attn_factor_multiplies_what_yarn_puts_on_cos_and_sin(tmp_path, package):
    """DeepSeek-R1-0528-Qwen3-8B: 0.8782488562869419 is 1 / (0.1 ln 4 + 1), so that the factor is exactly 1."""
    def yarn(**changes: float) -> torch.Tensor:
        return logits(package, write(tmp_path, package, rope_scaling=YARN | changes))

    released, one, without = yarn(attn_factor=0.8782488562869419), yarn(attention_factor=1.0), yarn()
    assert torch.allclose(released, one, rtol=0, atol=1e-5 * float(one.abs().max()))
    assert not torch.allclose(without, one, atol=1e-2)


@pytest.mark.parametrize("spelled, dtype", [
    ("torch.bfloat16", torch.bfloat16), ("half", torch.float16), ("float", torch.float32), ("auto", None),
    ("torch.half", torch.float16)])
def test_types_are_read_as_transformers_reads_them(tmp_path, package, spelled, dtype):
    for name in ("torch_dtype", "dtype"):
        folder = write(tmp_path, package, torch_dtype=None)
        change_config(folder, **{name: spelled})
        assert module(package, "config").Config.from_checkpoint(folder).dtype == dtype
    model = module(package, "weights").load_model(folder)
    assert model.model.norm.weight.dtype == (dtype or torch.float32)


# Damaged files: the library's own verdict, and what is saved

def rewrite(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    text, body = change(header, body)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def overlap(header: dict, body: bytes) -> tuple[bytes, bytes]:
    a, b = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    header[a]["data_offsets"] = header[b]["data_offsets"]
    return json.dumps(header).encode(), body


def hole(header: dict, body: bytes) -> tuple[bytes, bytes]:
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0]:
            entry["data_offsets"] = [place + 4096 for place in entry["data_offsets"]]
    return json.dumps(header).encode(), body[:4096] + body


DAMAGED = {"overlap": overlap, "hole": hole, "after the end": lambda h, b: (json.dumps(h).encode(), b + b"\0" * 8),
           "a mark in front": lambda h, b: (b"\xef\xbb\xbf" + json.dumps(h).encode(), b),
           "metadata of numbers": lambda h, b: (json.dumps(h | {"__metadata__": {"a": 1}}).encode(), b),
           "twice": lambda h, b: (json.dumps(h).encode()[:-1] + b', "__metadata__": {}, "__metadata__": {}}', b)}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_what_the_library_refuses_is_refused(tmp_path, package, damage):
    path = write(tmp_path, package) / "model.safetensors"
    rewrite(path, damage)
    with pytest.raises(ValueError, match="truncated or damaged") as error:
        module(package, "weights").load_model(tmp_path)
    assert is_one_sentence(error, tmp_path)
    with pytest.raises(Exception):  # noqa: B017  the library's own verdict
        load_file(path)


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_file_too_large_for_the_library_is_checked_too(tmp_path, monkeypatch, damage):
    """It maps a file in a way that Linux refuses for one larger than memory."""
    reader = module("qwen3", "engine.safetensors_reader")
    monkeypatch.setattr(reader, "check_with_library", lambda path: None)
    rewrite(write(tmp_path, "qwen3") / "model.safetensors", damage)
    with pytest.raises(ValueError, match="truncated or damaged"):
        reader.CheckpointFiles(tmp_path)


def test_the_library_has_the_last_word(tmp_path, package):
    """A type that nobody knows, of a tensor that would be passed over."""
    path = write(tmp_path, package) / "model.safetensors"
    name = "model.layers.0.rotary_emb.inv_freq"
    save_file(tensors_of(tmp_path) | {name: torch.ones(4)}, path)
    rewrite(path, lambda header, body: (json.dumps(header | {name: header[name] | {"dtype": "F99"}}).encode(), body))
    with pytest.raises(ValueError, match="truncated or damaged"):
        module(package, "weights").load_model(tmp_path)


def test_a_grid_of_blocks_is_not_taken_for_rows():
    """(1, 3) is a grid for 3 x 384 in blocks of 128, though there are three rows too."""
    block_of = module("qwen3", "engine.quantized").block_of
    assert block_of((3, 384), (1, 3), (128, 128)) == (128, 128) == block_of((384, 3), (3, 1), (128, 128))
    assert block_of((3, 384), (3, 1), (128, 128)) == (1, 384) and block_of((3, 384), (2, 2), (128, 128)) is None
    assert block_of((3, 384), (), None) == (3, 384) and block_of((200, 300), (2, 1, 3, 1), None) == (128, 128)


@pytest.mark.parametrize("fp8", [False, True])
def test_saving_and_copying_write_the_numbers_and_nothing_else(tmp_path, package, fp8):
    folder = (write_fp8(tmp_path, package, "block") if fp8 else
              write(tmp_path, package, torch.bfloat16, torch_dtype="bfloat16"))
    model = module(package, "weights").load_model(folder)
    state, size = model.state_dict(), sum(p.nbytes for p in model.parameters())
    saved = io.BytesIO()
    torch.save(state, saved)
    assert size < len(saved.getvalue()) < size + 1000 * len(state)
    one = io.BytesIO()
    torch.save(model.model.norm.weight, one)
    assert len(one.getvalue()) < 3000
    pickled = pickle.dumps(model)
    assert size < len(pickled) < size + 1500 * sum(1 for _ in model.modules())
    with torch.inference_mode():
        for other in (copy.deepcopy(model), pickle.loads(pickled)):
            assert torch.equal(other(IDS), model(IDS))
    saved.seek(0)
    again = torch.load(saved, weights_only=True)
    assert set(again) == set(state)
    assert all(torch.equal(again[name].float(), state[name].float()) for name in state)


def test_freed_memory_heeds_ulimit_and_both_versions_of_cgroups(tmp_path, monkeypatch):
    memory = module("qwen3", "engine.memory")
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    for name, text in {"proc/self/cgroup": "4:memory:/a/b\n1:cpu:/\n0::/c/d\n",
                       "proc/self/status": "VmSize:\t 3000 kB\nVmData: 1000 kB\n",
                       "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  5000 kB\n",
                       "cgroup/memory/a/b/memory.limit_in_bytes": str((1 << 63) - 4096),
                       "cgroup/memory/a/b/memory.usage_in_bytes": "5",
                       "cgroup/memory/a/memory.limit_in_bytes": "9000000",
                       "cgroup/memory/a/memory.usage_in_bytes": "5000000",
                       "cgroup/memory/a/memory.stat": "total_inactive_file 1000000\n",
                       "cgroup/c/d/memory.max": "max\n", "cgroup/c/d/memory.current": "7"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.free_of_machine(proc) == 5000 * 1024
    assert memory.free_of_cgroup(proc, root) == 5_000_000
    (root / "c/memory.max").write_text("3000000")
    (root / "c/memory.current").write_text("1000000")
    assert memory.free_of_cgroup(proc, root) == 2_000_000
    limits = {"RLIMIT_AS": 4_000_000, "RLIMIT_DATA": memory.resource.RLIM_INFINITY}
    monkeypatch.setattr(memory.resource, "getrlimit", lambda which: next(
        (limit, limit) for name, limit in limits.items() if getattr(memory.resource, name) == which))
    assert memory.free_of_limits(proc) == 4_000_000 - 3000 * 1024
    assert memory.free_of_machine(tmp_path) is None and memory.free_of_cgroup(tmp_path, root) is None


def test_a_stop_id_outside_the_vocabulary_is_passed_over_with_a_note(package, tmp_path):
    folder = write(tmp_path / "x", package)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 10**6]}))
    config, _ = module(package, "weights").read_checkpoint(folder)
    assert config.eos_token_id == (5,)
    assert sum("eos_token_id 1000000 is outside the vocabulary" in note for note in config.notes) == 1


# Names of files and tensors

@pytest.mark.parametrize("prefix", ["language_model.", "_orig_mod.", "module.", "base_model.model."])
def test_names_of_a_wrapper_are_told(tmp_path, package, prefix):
    folder = write(tmp_path, package)
    save_file({prefix + name: tensor for name, tensor in tensors_of(folder).items()}, folder / "model.safetensors")
    wanted = f"its tensors are named {prefix}model.layers.0.input_layernorm.weight and not model.layers.0"
    with pytest.raises(ValueError, match=wanted) as error:
        module(package, "weights").load_model(folder)
    assert is_one_sentence(error, folder)


def test_an_adapter_within_the_file_is_told(tmp_path, package):
    folder = write(tmp_path, package)
    adapter = {"model.layers.0.self_attn.o_proj.lora_A.weight": torch.ones(2, 2)}
    save_file(tensors_of(folder) | adapter, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lora_A.weight is part of a LoRA adapter that was not merged"):
        module(package, "weights").load_model(folder)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.safetensors"])
def test_weights_in_another_file_are_told(tmp_path, package, name):
    folder = write(tmp_path, package)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(FileNotFoundError, match=f"has {name}, but neither model.safetensors nor") as error:
        module(package, "weights").load_model(folder)
    assert is_one_sentence(error, folder)


@pytest.mark.parametrize("target", ["blobs/gone", "model.safetensors"])
def test_a_link_to_nothing_or_to_itself_is_a_missing_part(tmp_path, package, target):
    folder = write(tmp_path, package)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(target)
    wanted = "model.safetensors: this part of the checkpoint is missing; download it again"
    with pytest.raises(FileNotFoundError, match=wanted):
        module(package, "weights").load_model(folder)


def test_an_optimizer_beside_shards_without_an_index(tmp_path, package):
    folder = write(tmp_path, package)
    before = logits(package, folder)
    shard(folder, tensors_of(folder), index=False)
    save_file({"x": torch.ones(2)}, folder / "optimizer-00001-of-00001.safetensors")
    assert torch.equal(logits(package, folder), before)


def test_an_index_may_name_a_buffer_that_is_not_there(tmp_path, package):
    folder = write(tmp_path, package)
    before = logits(package, folder)
    shard(folder, tensors_of(folder))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    assert torch.equal(logits(package, folder), before)


def test_float64_is_read(tmp_path, package):
    folder = write(tmp_path, package)
    before = logits(package, folder)
    save_file({name: tensor.double() for name, tensor in tensors_of(folder).items()}, folder / "model.safetensors")
    assert torch.equal(logits(package, folder), before)


@pytest.mark.parametrize("said", ["float32", None])
def test_a_tied_weight_may_be_stored_as_the_head(tmp_path, package, said):
    """transformers 5.24 loads it too."""
    folder = write(tmp_path, package, tie_word_embeddings=True, torch_dtype=said)
    before, tensors = logits(package, folder), tensors_of(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(package, folder), before)


@pytest.mark.parametrize("package", ["qwen3", "qwen3_moe"])
def test_null_key_value_heads_are_as_many_as_heads(tmp_path, package):
    """As transformers 5.24 reads it; a field that is missing is another thing."""
    folder = write(tmp_path, package, num_key_value_heads=6)
    before = logits(package, folder)
    change_config(folder, num_key_value_heads=None)
    assert torch.equal(logits(package, folder), before)
    change_config(folder, num_key_value_heads=...)
    with pytest.raises(ValueError, match="num_key_value_heads is missing"):
        logits(package, folder)


def test_small_things_in_configs(tmp_path, package):
    folder = write(tmp_path, package)
    before = logits(package, folder)
    change_config(folder, quantization_config={}, eos_token_id=[5, 10**6])
    (folder / "generation_config.json").write_text(json.dumps({"speculation_type": "mtp"}))
    assert torch.equal(logits(package, folder), before)
    for changes, said in (
            ({"architectures": ["Qwen3ForQuestionAnswering"]}, "this project runs text generators"),
            ({"model_type": "mixtral"}, "this project has no package for it, transformers or vLLM may run it"),
            ({"model_type": None}, "has no model_type")):
        change_config(folder, **changes)
        with pytest.raises(ValueError, match=said):
            logits(package, folder)
        change_config(folder, architectures=..., model_type=package)


@pytest.mark.parametrize("package", MIXTURES)
@pytest.mark.parametrize(("shape", "leaf"), [
    ((), "_scale"), ((1,), "_scale_inv"), ((8,), "_scale"), ((8, 1, 1), "_scale_inv")])
def test_fused_experts_with_one_scale_each_or_for_all(tmp_path, package, shape, leaf):
    folder = write(tmp_path, package)
    tensors = fuse(tensors_of(folder))
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        E = len(tensors[name])
        scale = torch.linspace(1 / 64, 1 / 32, E)[:E if shape[:1] == (8,) else 1]
        small = (tensors[name] / scale.view(-1, 1, 1)).to(torch.float8_e4m3fn)
        plain[name] = small.float() * scale.view(-1, 1, 1)
        tensors |= {name: small, name + leaf: scale.reshape(() if shape == () else (-1, *shape[1:])).clone()}
    save_file(plain, folder / "model.safetensors")
    before = logits(package, folder)
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    assert torch.equal(logits(package, folder, dtype="float32"), before)


@pytest.mark.parametrize("other", [False, True])
def test_a_draft_layer_whose_head_is_a_copy_in_fp8(tmp_path, other):
    folder = write(tmp_path, "deepseek_v3", num_nextn_predict_layers=1)
    tensors = tensors_of(folder)
    scale = torch.full((1,), 1 / 64)
    small = (tensors["lm_head.weight"] * 64).to(torch.float8_e4m3fn)
    tensors["lm_head.weight"] = small.float() / 64
    save_file(tensors, folder / "model.safetensors")
    before = logits("deepseek_v3", folder)
    for name in ("lm_head", "model.layers.3.shared_head.head"):
        factor = 2 if other and "shared" in name else 1
        tensors |= {f"{name}.weight": small.clone(), f"{name}.weight_scale_inv": scale * factor}
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    assert torch.equal(logits("deepseek_v3", folder, dtype="float32"), before)
    config = module("deepseek_v3", "weights").load_model(folder).config
    assert config.num_nextn_predict_layers == (0 if other else 1)
    assert ("differs" in config.no_drafts) == other
