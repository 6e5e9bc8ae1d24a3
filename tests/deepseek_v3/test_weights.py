"""Loading what is new: FP8 as the release stores it, the layer behind the last with its copies, or without any of it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_v3.generate import Acceptance, generate
from deepseek_v3.weights import bytes_in_memory, check_memory, load_model
from tests.qwen3.test_weights import FP8, quantise
from tests.seeded import PROMPT, deepseek_v3_config, deepseek_v3_shapes, seeded_tensor, write_case, write_checkpoint


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def fp8_checkpoint(folder, D=200, F=136, dtype="bfloat16"):
    """Ragged blocks both ways, unless asked for others; router, norms, embedding, eh_proj and head as they are, as in the release."""
    config = deepseek_v3_config(hidden_size=D, moe_intermediate_size=F, kv_lora_rank=140, q_lora_rank=150, torch_dtype=dtype,
                                quantization_config=FP8)
    tensors = {}
    for name, shape in deepseek_v3_shapes(config).items():
        if "_proj" in name and "eh_proj" not in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(seeded_tensor(name, shape, 0.1))
    return write_checkpoint(folder, config, getattr(torch, dtype), **tensors)


def test_fp8_gives_the_tokens_of_the_expanded_weights_in_both_forms_of_attention(tmp_path):
    folder = fp8_checkpoint(tmp_path)
    kept, expanded = load_model(folder), load_model(folder, dtype="bfloat16")
    assert {p.dtype for name, p in kept.named_parameters() if "kv_b_proj.weight" in name} == {torch.float8_e4m3fn, torch.float32}
    assert {p.dtype for name, p in expanded.named_parameters() if not name.endswith("_bias")} == {torch.bfloat16}
    ids = torch.tensor([PROMPT])
    for absorb in (False, True, None):
        for model in (kept, expanded):
            for layer in model.model.layers:
                layer.self_attn.absorb = absorb
        with torch.inference_mode():
            assert torch.equal(kept(ids), expanded(ids))
            assert torch.equal(kept.mtp(ids[:, 1:], kept.model(ids)[:, :-1]), expanded.mtp(ids[:, 1:], expanded.model(ids)[:, :-1]))
    tokens = list(generate(kept, PROMPT, max_new_tokens=12))
    assert tokens == list(generate(expanded, PROMPT, max_new_tokens=12)) and len(set(tokens)) > 1
    assert bytes_in_memory(folder) == sum(p.nbytes for p in kept.parameters())
    assert bytes_in_memory(folder, "bfloat16") == sum(p.nbytes for p in expanded.parameters())


def with_copies(folder, **changes: torch.Tensor) -> None:
    tensors = tensors_of(folder)
    copies = {"model.layers.3.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
              "model.layers.3.shared_head.head.weight": tensors["lm_head.weight"].clone()}
    save_file(tensors | copies | {name.replace("__", "."): tensor for name, tensor in changes.items()}, folder / "model.safetensors")


def test_the_copies_in_the_release_are_not_loaded_twice(tmp_path):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    plain, ids = load_model(folder), torch.tensor([PROMPT])
    size = bytes_in_memory(folder)
    with_copies(folder)
    model = load_model(folder)
    assert bytes_in_memory(folder) == size == sum(p.nbytes for p in model.parameters())
    with torch.inference_mode():
        assert torch.equal(model.mtp(ids, model.model(ids)), plain.mtp(ids, plain.model(ids)))


@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"])
def test_a_copy_that_is_none_is_refused(tmp_path, name):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    with_copies(folder, **{name.replace(".", "__"): torch.ones(131, 40)})
    with pytest.raises(ValueError, match=f"{name} differs from .*, of which it should be a copy"):
        load_model(folder)


def test_without_the_layer_behind_the_last_the_model_runs_and_does_not_draft(tmp_path):
    """As transformers writes it, or a conversion to bfloat16; the config announces the layer all the same."""
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    expected = list(generate(load_model(folder), PROMPT, max_new_tokens=9))
    save_file({name: tensor for name, tensor in tensors_of(folder).items() if "layers.3." not in name}, folder / "model.safetensors")
    model = load_model(folder)
    assert model.config.num_nextn_predict_layers == 0 and len(model.model.layers) == 3
    assert list(generate(model, PROMPT, max_new_tokens=9)) == expected
    with pytest.raises(ValueError, match="no layer that predicts a second token; leave out --speculative"):
        generate(model, PROMPT, max_new_tokens=9, speculative=True)
    assert check_memory(folder, torch.device("cpu"), None, 10, 100)


@pytest.mark.parametrize("gone", ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.gate.e_score_correction_bias",
                                  "model.layers.1.mlp.shared_experts.up_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight"])
def test_a_part_of_it_that_is_missing_is_named(tmp_path, gone):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    save_file({name: tensor for name, tensor in tensors_of(folder).items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{gone} is missing from the checkpoint"):
        load_model(folder)


def test_a_layer_that_the_config_does_not_announce_is_refused(tmp_path):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match=r"model.layers.3.* is in the checkpoint, but the config has no place for it"):
        load_model(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_drafts(tmp_path, dtype):
    for name in ("yarn", "three_groups", "half_split", "dense_but_for_the_draft"):
        model = load_model(write_case(tmp_path / name, "deepseek_v3", name), dtype=dtype)
        acceptance = Acceptance()
        tokens = list(generate(model, PROMPT, max_new_tokens=10, speculative=True, acceptance=acceptance))
        assert len(tokens) == 10 and acceptance.drafted >= 5
        if dtype == "float32":
            assert tokens == list(generate(model, PROMPT, max_new_tokens=10))


@pytest.mark.parametrize("changes, message", [({"num_hidden_layers": 10**8}, "100000000 layers and 8 experts"),
                                              ({"n_routed_experts": 4 * 10**7}, "3 layers and 40000000 experts")])
def test_numbers_without_end_are_refused_before_anything_is_built(tmp_path, changes, message):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"config.json asks for {message}, the files hold"):
        load_model(folder)
