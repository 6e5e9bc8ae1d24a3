"""Writes reference values with transformers: uv run --group reference python scripts/make_reference.py PACKAGE

For small random checkpoints of odd shapes, for the embedded checkpoint and for a full shape (Qwen3-0.6B, or two
layers of Qwen3-30B-A3B).
The weights come from tests/seeded.py; only results are committed, under tests/<package>/reference/.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.seeded import CASES, FULL, LONG_PROMPT, PROMPT, write_case, write_checkpoint  # noqa: E402

NEW_TOKENS = 16
# Greedy tokens are worth comparing only as long as the two best logits are further apart than rounding: logits here
# reach 6, and between 4 and 8 a bfloat16 moves in steps of 0.03.
LEAST_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.07}
TINY = {"qwen3": "Qwen3-Tiny", "qwen3_moe": "Qwen3-MoE-Tiny"}
TINY_QUESTIONS = ["What is RoPE?", "What is a router?", "What is 347 + 586?", "Who are you?"]


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """New tokens up to the first close call; without a cache, the plain definition."""
    ids = list(prompt)
    for _ in range(count):
        best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().topk(2)
        if float(best.values[0] - best.values[1]) < LEAST_GAP[model.dtype]:
            break
        ids.append(int(best.indices[0]))
    return ids[len(prompt):]


def load(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A checkpoint as transformers' model, experts one by one (its grouped kernel wants widths in multiples of 8)."""
    config = json.loads((path / "config.json").read_text())
    experts = {"experts_implementation": "eager"} if "num_experts" in config else {}
    if not config.get("shared_expert_intermediate_size"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **experts)
    # Its Qwen3-MoE has no shared expert: its attention is put together with the sparse block of its Qwen2-MoE.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype, **experts)
    block = Qwen2MoeConfig(**{name: config[name] for name in (
        "hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "shared_expert_intermediate_size", "hidden_act")}, experts_implementation="eager")
    for layer in model.model.layers:
        layer.mlp = Qwen2MoeSparseMoeBlock(block).to(dtype)
    tensors = load_file(path / "model.safetensors")
    for i in range(config["num_hidden_layers"]):
        def stack(kind: str) -> torch.Tensor:
            return torch.stack([tensors.pop(f"model.layers.{i}.mlp.experts.{e}.{kind}_proj.weight")
                                for e in range(config["num_experts"])])
        tensors[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat([stack("gate"), stack("up")], 1)
        tensors[f"model.layers.{i}.mlp.experts.down_proj"] = stack("down")
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def small_cases(folder: Path, package: str) -> tuple[dict, dict]:
    answers, tensors = {}, {}
    for name in CASES[package]:
        path = write_case(folder / name, package, name)
        entry = answers[name] = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = load(path, dtype)
            short = str(dtype).removeprefix("torch.")
            for length, prompt in (("short", PROMPT), ("long", LONG_PROMPT)):
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
                tensors[f"{name}.{length}.{short}"] = logits[-len(PROMPT):].clone()
                entry[f"{length}.{short}"] = greedy(model, prompt, NEW_TOKENS)
    return answers, tensors


def written_by_transformers(folder: Path) -> dict:
    """The config.json of the newer generation, as it is written for the case with YaRN."""
    model = AutoModelForCausalLM.from_pretrained(folder / "yarn", dtype=torch.float32)
    model.save_pretrained(folder / "resaved")
    return json.loads((folder / "resaved/config.json").read_text())


def tiny(folder: Path) -> dict:
    """The embedded checkpoint: rendered prompts and greedy answers of transformers, by question and mode."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    answers = {}
    for question in TINY_QUESTIONS:
        for thinking in (True, False):
            text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                                 add_generation_prompt=True, enable_thinking=thinking)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            out = model.generate(torch.tensor([ids]), max_new_tokens=100, do_sample=False)[0].tolist()
            answers[f"{question} {'thinking' if thinking else 'direct'}"] = {"prompt": ids, "new": out[len(ids):]}
    return answers


def full_shape(folder: Path, package: str) -> dict:
    """A published shape with seeded weights: greedy tokens, and the five best logits after the prompt."""
    config, spread = FULL[package]
    path = write_checkpoint(folder / "full", config, torch.bfloat16, std=0.04)
    answers = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load(path, dtype)
        prompt = [token * spread for token in PROMPT]
        tokens = greedy(model, prompt, 6)
        with torch.inference_mode():
            best = model(torch.tensor([prompt]), use_cache=False).logits[0, -1].float().topk(5)
        answers[str(dtype).removeprefix("torch.")] = {
            "prompt": prompt, "tokens": tokens, "best": best.indices.tolist(), "logits": best.values.tolist()}
        del model
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description="Write reference values with transformers.")
    parser.add_argument("package", choices=CASES)
    parser.add_argument("--only", choices=["small", "tiny", "full"], help="leave the others as they are")
    arguments = parser.parse_args()
    out = ROOT / "tests" / arguments.package / "reference"
    out.mkdir(parents=True, exist_ok=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    wanted = [arguments.only] if arguments.only else ["small", "tiny", "full"]
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), {}
        if "small" in wanted:
            answers, tensors = small_cases(folder, arguments.package)
            save_file(tensors, out / "logits.safetensors", metadata=versions)
            results["small"] = {"cases": answers, "config_of_transformers": written_by_transformers(folder)}
        if "tiny" in wanted:
            results["tiny"] = {"answers": tiny(ROOT / "checkpoints" / TINY[arguments.package])}
        if "full" in wanted:
            results["full"] = full_shape(folder, arguments.package)
    for what, values in results.items():
        (out / f"{what}.json").write_text(json.dumps({"made_with": versions} | values, indent=1) + "\n")


if __name__ == "__main__":
    main()
