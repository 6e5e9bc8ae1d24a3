"""Loading what is new: FP8 as the release stores it, the draft layer with its copies, or without any of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_v3.generate import generate
from deepseek_v3.speculative import Acceptance
from deepseek_v3.weights import bytes_in_memory, check_memory, load_model
from tests.qwen3.test_weights import FP8, quantise
from tests.packages import force_form
from tests.seeded import PROMPT, deepseek_v3_config, deepseek_v3_shapes, seeded_tensor, write_case, write_checkpoint


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def fp8_checkpoint(folder, D=200, F=136, dtype="bfloat16"):
    """Ragged blocks both ways, unless asked for others; as in the release, router, norms, embedding, eh_proj and head
    are not quantised."""
    config = deepseek_v3_config(hidden_size=D, moe_intermediate_size=F, kv_lora_rank=140, q_lora_rank=150,
                                torch_dtype=dtype, quantization_config=FP8)
    tensors = {}
    for name, shape in deepseek_v3_shapes(config).items():
        if "_proj" in name and "eh_proj" not in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(seeded_tensor(name, shape, 0.1))
    return write_checkpoint(folder, config, getattr(torch, dtype), **tensors)


def test_fp8_gives_the_tokens_of_the_expanded_weights_in_both_forms_of_attention(tmp_path):
    folder = fp8_checkpoint(tmp_path)
    kept, expanded = load_model(folder), load_model(folder, dtype="bfloat16")
    absorbed = {p.dtype for name, p in kept.named_parameters() if "kv_b_proj.weight" in name}
    assert absorbed == {torch.float8_e4m3fn, torch.float32}
    assert {p.dtype for name, p in expanded.named_parameters() if not name.endswith("_bias")} == {torch.bfloat16}
    ids = torch.tensor([PROMPT])
    for absorb in (False, True, None):
        for model in (kept, expanded):
            for layer in model.model.layers:
                force_form(layer.self_attn, absorb)
        with torch.inference_mode():
            assert torch.equal(kept(ids), expanded(ids))
            drafts = [model.mtp(ids[:, 1:], model.model(ids)[:, :-1]) for model in (kept, expanded)]
            assert torch.equal(*drafts)
    tokens = list(generate(kept, PROMPT, max_new_tokens=12))
    assert tokens == list(generate(expanded, PROMPT, max_new_tokens=12)) and len(set(tokens)) > 1
    assert bytes_in_memory(folder) == sum(p.nbytes for p in kept.parameters())
    assert bytes_in_memory(folder, "bfloat16") == sum(p.nbytes for p in expanded.parameters())


def with_copies(folder, **changes: torch.Tensor) -> None:
    tensors = tensors_of(folder)
    copies = {"model.layers.3.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
              "model.layers.3.shared_head.head.weight": tensors["lm_head.weight"].clone()}
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file(tensors | copies | changes, folder / "model.safetensors")


def test_the_copies_in_the_release_are_not_loaded_twice(tmp_path):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    plain, ids = load_model(folder), torch.tensor([PROMPT])
    size = bytes_in_memory(folder)
    with torch.inference_mode():  # before the file changes under it
        expected = plain.mtp(ids, plain.model(ids))
    with_copies(folder)
    model = load_model(folder)
    assert bytes_in_memory(folder) == size == sum(p.nbytes for p in model.parameters())
    with torch.inference_mode():
        assert torch.equal(model.mtp(ids, model.model(ids)), expected)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def runs_without_drafts(folder: Path, why: str) -> None:
    """The main model's logits are as ever; only drafting is refused, with the reason."""
    whole = load_model(write_case(folder.parent / "whole", "deepseek_v3", "yarn"))
    model = load_model(folder)
    assert torch.equal(model(torch.tensor([PROMPT])), whole(torch.tensor([PROMPT])))
    assert model.config.num_nextn_predict_layers == 0 and why in model.config.no_drafts
    assert bytes_in_memory(folder) == sum(p.nbytes for p in model.parameters())
    with pytest.raises(ValueError, match="leave out --speculative"):
        generate(model, PROMPT, max_new_tokens=2, speculative=True)


@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"])
def test_a_draft_layer_for_another_head_is_not_used(tmp_path, name):
    folder = write_case(tmp_path / "made", "deepseek_v3", "yarn")
    with_copies(folder, **{name.replace(".", "__"): torch.ones(131, 40)})
    runs_without_drafts(folder, f"{name} differs from")


def test_a_draft_layer_that_is_not_whole_is_not_used(tmp_path):
    for i, gone in enumerate(("eh_proj.weight", "mlp.gate.e_score_correction_bias")):
        folder = write_case(tmp_path / f"made{i}", "deepseek_v3", "yarn")
        tensors = {name: tensor for name, tensor in tensors_of(folder).items() if name != f"model.layers.3.{gone}"}
        save_file(tensors, folder / "model.safetensors")
        runs_without_drafts(folder, f"{gone} is missing")
    save_file(tensors | {"model.layers.3.surprise.weight": torch.ones(2)}, folder / "model.safetensors")
    runs_without_drafts(folder, "")


@pytest.mark.parametrize("announced, layers, why", [
    (0, 1, "announces 0 draft layers, the files hold 1"), (None, 1, "announces 0"),
    (1, 2, "announces 1 draft layers, the files hold 2"), (2, 2, "announces 2")])
def test_draft_layers_that_are_not_announced_or_more_than_one_are_not_used(tmp_path, announced, layers, why):
    """transformers 5.24 ignores them; a superfluous weight anywhere else stays an error."""
    folder = write_case(tmp_path / "made", "deepseek_v3", "yarn")
    change_config(folder, num_nextn_predict_layers=announced)
    tensors = tensors_of(folder)
    more = {name.replace("layers.3.", "layers.4."): tensor.clone() for name, tensor in tensors.items()
            if "layers.3." in name and layers == 2}
    save_file(tensors | more, folder / "model.safetensors")
    runs_without_drafts(folder, why)
    save_file(tensors | {"model.layers.1.surprise.weight": torch.ones(2)}, folder / "model.safetensors")
    message = "model.layers.1.surprise.weight is in the checkpoint, but the config has no place for it"
    for engine in (True, False):
        with pytest.raises(ValueError, match=message):
            load_model(folder, engine=engine)


def test_a_number_of_layers_that_is_too_small_is_said(tmp_path):
    """Only draft layers may follow the last one without a word; a model cut short would be silently wrong."""
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    assert load_model(folder).config.notes == ()
    change_config(folder, num_hidden_layers=2)
    note = "the files hold layer 2 and config.json has only 2 layers (num_hidden_layers): it is not used"
    assert load_model(folder).config.notes == (note,)


def test_without_the_draft_layer_the_model_runs_and_does_not_draft(tmp_path):
    """As transformers writes it, or a conversion to bfloat16; the config announces the layer all the same."""
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    expected = list(generate(load_model(folder), PROMPT, max_new_tokens=9))
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if "layers.3." not in name}
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder)
    assert model.config.num_nextn_predict_layers == 0 and len(model.model.layers) == 3
    assert list(generate(model, PROMPT, max_new_tokens=9)) == expected
    with pytest.raises(ValueError, match="no layer that predicts a second token; leave out --speculative"):
        generate(model, PROMPT, max_new_tokens=9, speculative=True)
    assert check_memory(folder, torch.device("cpu"), None, 10, 100)


@pytest.mark.parametrize("gone", ["model.layers.1.mlp.shared_experts.up_proj.weight",
                                  "model.layers.0.self_attn.kv_b_proj.weight"])
def test_a_part_of_the_model_that_is_missing_is_named(tmp_path, gone):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if name != gone}
    save_file(tensors, folder / "model.safetensors")
    for engine in (True, False):
        with pytest.raises(ValueError, match=f"{gone} is missing from the checkpoint"):
            load_model(folder, engine=engine)


@pytest.mark.parametrize("name", ["yarn", "three_groups", "half_split", "dense_but_for_the_draft"])
def test_every_kind_drafts_and_the_lesson_alone_drafts_the_same(tmp_path, name):
    folder, ids = write_case(tmp_path, "deepseek_v3", name), torch.tensor([PROMPT])
    for dtype, tolerance in ("float32", 1e-5), ("bfloat16", 0.1):
        models, drafts, texts = [load_model(folder, dtype=dtype, engine=engine) for engine in (True, False)], [], []
        for model in models:
            acceptance = Acceptance()
            texts.append(list(generate(model, PROMPT, max_new_tokens=10, speculative=True, acceptance=acceptance)))
            assert len(texts[-1]) == 10 and acceptance.drafted >= 5
            with torch.inference_mode():  # both from one model's states, since a rounding may change an expert there
                drafts.append(model.mtp(ids[:, 1:], models[0].model(ids)[:, :-1]).float())
            if dtype == "float32":
                assert texts[-1] == texts[0] == list(generate(model, PROMPT, max_new_tokens=10))
        assert (drafts[0] - drafts[1]).abs().max() <= tolerance * drafts[0].abs().max()


@pytest.mark.parametrize("changes, message", [
    ({"num_hidden_layers": 10**8}, "100000000 layers and 8 experts"),
    ({"n_routed_experts": 4 * 10**7}, "3 layers and 40000000 experts")])
def test_numbers_without_end_are_refused_before_anything_is_built(tmp_path, changes, message):
    folder = write_case(tmp_path, "deepseek_v3", "yarn")
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=f"config.json asks for {message}, the files hold"):
        load_model(folder)
