"""Writes reference values with transformers: uv run --group reference python scripts/make_reference.py qwen3

For small random checkpoints of odd shapes, for the embedded checkpoint and for the full shape of Qwen3-0.6B.
The weights come from tests/seeded.py; only results are committed, under tests/<package>/reference/.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.seeded import LONG_PROMPT, PROMPT, QWEN3_0_6B, QWEN3_CASES, qwen3_config, write_checkpoint  # noqa: E402

NEW_TOKENS = 16
# Greedy tokens are worth comparing only where the two best logits are further apart than rounding.
LEAST_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.02}
TINY_QUESTIONS = ["What is RoPE?", "What is the KV cache?", "What is 347 + 586?", "Who are you?"]


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[list[int], float]:
    """(new tokens, least gap between the best and the second-best logit); without a cache, the plain definition."""
    ids, gap = list(prompt), float("inf")
    for _ in range(count):
        best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt):], gap


def small_cases(folder: Path) -> tuple[dict, dict]:
    answers, tensors = {}, {}
    for name, changes in QWEN3_CASES.items():
        path = write_checkpoint(folder / name, qwen3_config(**changes))
        entry = answers[name] = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            short = str(dtype).removeprefix("torch.")
            for length, prompt in (("short", PROMPT), ("long", LONG_PROMPT)):
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
                tensors[f"{name}.{length}.{short}"] = logits[-len(PROMPT):].clone()
                tokens, gap = greedy(model, prompt, NEW_TOKENS)
                entry[f"{length}.{short}"] = {"tokens": tokens, "gap": gap}
                if gap < LEAST_GAP[dtype]:
                    entry[f"{length}.{short}"]["tokens"] = None
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


def full_shape(folder: Path) -> dict:
    """Qwen3-0.6B's shape with seeded weights: greedy tokens, and the five best logits after the prompt."""
    path = write_checkpoint(folder / "full", QWEN3_0_6B, torch.bfloat16, std=0.04)
    answers = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        prompt = [token * 1009 for token in PROMPT]
        tokens, gap = greedy(model, prompt, 6)
        with torch.inference_mode():
            best = model(torch.tensor([prompt]), use_cache=False).logits[0, -1].float().topk(5)
        answers[str(dtype).removeprefix("torch.")] = {"prompt": prompt, "tokens": tokens, "gap": gap,
                                                      "best": best.indices.tolist(), "logits": best.values.tolist()}
        del model
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description="Write reference values with transformers.")
    parser.add_argument("package", choices=["qwen3"])
    parser.add_argument("--only", choices=["small", "tiny", "full"], help="leave the others as they are")
    arguments = parser.parse_args()
    out = ROOT / "tests" / arguments.package / "reference"
    out.mkdir(parents=True, exist_ok=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    wanted = [arguments.only] if arguments.only else ["small", "tiny", "full"]
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), {}
        if "small" in wanted:
            answers, tensors = small_cases(folder)
            save_file(tensors, out / "logits.safetensors", metadata=versions)
            results["small"] = {"cases": answers, "config_of_transformers": written_by_transformers(folder)}
        if "tiny" in wanted:
            results["tiny"] = {"answers": tiny(ROOT / "checkpoints/Qwen3-Tiny")}
        if "full" in wanted:
            results["full"] = full_shape(folder)
    for what, values in results.items():
        (out / f"{what}.json").write_text(json.dumps({"made_with": versions} | values, indent=1) + "\n")


if __name__ == "__main__":
    main()
