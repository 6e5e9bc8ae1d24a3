"""Loading what is new: experts in FP8, experts that are missing, the bytes of it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_moe.config import Config
from qwen3_moe.engine.experts import type_of_stacks
from qwen3_moe.engine.safetensors_reader import CheckpointFiles
from qwen3_moe.generate import generate
from qwen3_moe.moe import Experts
from qwen3_moe.weights import bytes_in_memory, load_model
from tests.packages import stack_on_the_cpu
from tests.qwen3.test_weights import FP8, quantise
from tests.seeded import PROMPT, qwen3_moe_config, qwen3_shapes, seeded_tensor, write_case, write_checkpoint


def fp8_checkpoint(folder, D=200, F=136, dtype="bfloat16"):
    """Ragged blocks both ways, unless asked for others; the router stays as it is, as in the releases."""
    config = qwen3_moe_config(hidden_size=D, moe_intermediate_size=F, torch_dtype=dtype, quantization_config=FP8)
    tensors = {}
    for name, shape in qwen3_shapes(config).items():
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(seeded_tensor(name, shape, 0.1))
    return write_checkpoint(folder, config, getattr(torch, dtype), **tensors)


@pytest.mark.parametrize("stacked, D, F", [(False, 200, 136), (True, 200, 136), (True, 256, 128)])
def test_fp8_experts_give_the_tokens_of_the_expanded_ones(tmp_path, monkeypatch, stacked, D, F):
    if stacked:
        stack_on_the_cpu(monkeypatch, "qwen3_moe", one_kernel=False)
    folder = fp8_checkpoint(tmp_path, D, F)
    kept, expanded = load_model(folder), load_model(folder, dtype="bfloat16")
    experts = [p for name, p in kept.named_parameters() if ".experts." in name and name.endswith("_proj.weight")]
    assert len(experts) == 3 * 8 * 3 and {p.dtype for p in experts} == {torch.float8_e4m3fn}
    assert not any(p.requires_grad for p in experts) and all(p.requires_grad for p in expanded.parameters())
    assert not any(p.requires_grad for name, p in kept.named_parameters() if name.endswith("_scale_inv"))
    assert {p.dtype for p in expanded.parameters()} == {torch.bfloat16}
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert torch.equal(kept(ids), expanded(ids))
    # Ragged blocks of up would begin within one of gate.
    stacks = [part.gate_up for part in kept.modules() if isinstance(part, Experts)]
    assert [stack is not None for stack in stacks] == [stacked and F == 128] * 3
    tokens = list(generate(kept, PROMPT, max_new_tokens=12))
    assert tokens == list(generate(expanded, PROMPT, max_new_tokens=12)) and len(set(tokens)) > 1
    assert bytes_in_memory(folder) == sum(p.nbytes for p in kept.parameters())
    assert bytes_in_memory(folder, "bfloat16") == sum(p.nbytes for p in expanded.parameters())


def test_where_experts_are_stacked_and_in_which_type(tmp_path):
    cpu, gpu, bf16, fp8 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16, torch.float8_e4m3fn

    def stacked(folder, device, dtype=None):
        return type_of_stacks(Config.from_checkpoint(folder), CheckpointFiles(folder), device, dtype, bf16)

    plain = write_case(tmp_path, "qwen3_moe", "two_of_eight")
    whole, ragged = (fp8_checkpoint(tmp_path / str(F), 256, F) for F in (128, 136))
    assert {stacked(folder, cpu) for folder in (plain, whole, ragged)} == {None}
    assert [stacked(folder, gpu) for folder in (plain, whole, ragged)] == [bf16, fp8, None]
    assert [stacked(folder, gpu, "bfloat16") for folder in (plain, whole, ragged)] == [bf16, bf16, bf16]
    tensors = {name: value.clone() for name, value in load_file(whole / "model.safetensors").items()}
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    save_file(tensors | {name: tensors[name].to(bf16)}, whole / "model.safetensors")
    assert stacked(whole, gpu) is None  # or the one that is not FP8 would be rounded to it


@pytest.mark.parametrize("tensor, message", [
    ("model.layers.1.mlp.experts.3.up_proj.weight", "experts.3.up_proj.weight is missing from the checkpoint"),
    ("model.layers.2.mlp.gate.weight", "mlp.gate.weight is missing from the checkpoint"),
])
def test_an_expert_that_is_missing_is_named(tmp_path, tensor, message):
    folder = write_case(tmp_path, "qwen3_moe", "two_of_eight")
    tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items() if name != tensor}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_shared_expert_that_the_config_does_not_announce_is_refused(tmp_path):
    folder = write_case(tmp_path, "qwen3_moe", "two_of_eight")
    tensors = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    name = "model.layers.0.mlp.shared_expert_gate.weight"
    save_file(tensors | {name: torch.ones(1, 40)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is in the checkpoint, but the config has no place for it"):
        load_model(folder)
