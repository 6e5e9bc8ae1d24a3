"""Write reference values with transformers: uv run --group reference python -m scripts.make_reference PACKAGE

For small random checkpoints of odd shapes, for the embedded checkpoint and for a full shape (Qwen3-0.6B, or two
layers of Qwen3-30B-A3B or of DeepSeek-V3).
The weights come from tests/seeded.py; only results are committed, under tests/<package>/reference/.
"""

import argparse
import base64
import itertools
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = {"qwen3": "Qwen3-Tiny", "qwen3_moe": "Qwen3-MoE-Tiny", "deepseek_v3": "DeepSeek-V3-Tiny"}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.make_reference",
                                     description="Write reference values with transformers.")
    parser.add_argument("package", choices=TINY)
    parser.add_argument("--only", choices=["small", "tiny", "full", "tiktoken", "packed"],
                        help="leave the others as they are")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]  # also when called as scripts/make_reference.py
    ARGUMENTS = parse()  # before the imports, which take seconds and a group of their own

try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, Qwen2MoeConfig
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f"make_reference: {error.name} is missing; start it with: uv run --group reference python -m "
          "scripts.make_reference", file=sys.stderr)
    sys.exit(2)

from tests.packed import RELEASES, quantised, write
from tests.seeded import CASES, FAR, FULL, LONG_PROMPT, PROMPT, write_case, write_checkpoint

NEW_TOKENS = 16
# Greedy tokens are compared only while the two best logits are further apart than rounding: logits here reach 6, and
# between 4 and 8 bfloat16 has steps of 0.03.
LEAST_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.07}
TINY_QUESTIONS = ["What is RoPE?", "What is a router?", "What is 347 + 586?", "Who are you?"]
TIKTOKEN_TEXTS = [
    "Hello world", "MLA stores one small latent vector", "  two  spaces\n\n\nand\r\nlines ", "12345 + 678", "你好世界",
    "中文English混合", "日本語のテキスト", "it's I'LL don't", "café CAFÉ ÉCOLE", "def f(x):\n    return x", "😀👩‍👩‍👧", "",
    "a xqzjkvx and xqzjkvxq", "ǅ ª º ʰ", "한국어", "\t\ttabs", "1234567890"]


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """New tokens up to the first near-tie; without a cache."""
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
    experts = {"experts_implementation": "eager"} if "num_experts" in config or "n_routed_experts" in config else {}
    if not config.get("shared_expert_intermediate_size"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **experts)
    # transformers' Qwen3-MoE has no shared expert: its attention is joined with the sparse block of its Qwen2-MoE.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype, **experts)
    block = Qwen2MoeConfig(**{name: config[name] for name in (
        "hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "shared_expert_intermediate_size", "hidden_act")}, experts_implementation="eager")
    for layer in model.model.layers:
        layer.mlp = Qwen2MoeSparseMoeBlock(block).to(dtype)
    tensors = load_file(path / "model.safetensors")
    for i in range(config["num_hidden_layers"]):
        stack_experts(tensors, f"model.layers.{i}.mlp.experts", config["num_experts"])
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def stack_experts(tensors: dict[str, torch.Tensor], name: str, E: int) -> None:
    """Experts one by one, as in files, -> the two tensors that transformers keeps them in."""
    def stack(kind: str) -> torch.Tensor:
        return torch.stack([tensors.pop(f"{name}.{e}.{kind}_proj.weight") for e in range(E)])

    tensors[f"{name}.gate_up_proj"] = torch.cat([stack("gate"), stack("up")], 1)
    tensors[f"{name}.down_proj"] = stack("down")


@torch.inference_mode()
def second_token(path: Path, model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """Logits of the MTP module, put together from transformers' own parts: (T - 1, V)."""
    config, last = model.config, f"model.layers.{model.config.num_hidden_layers}."
    layer = MtpLayer(config, modeling.DeepseekV3DecoderLayer, modeling.DeepseekV3RMSNorm,
                     config.num_hidden_layers).to(model.dtype)
    tensors = {name.removeprefix(last): tensor for name, tensor in load_file(path / "model.safetensors").items()
               if name.startswith(last)}
    stack_experts(tensors, "mlp.experts", config.n_routed_experts)
    for name in list(tensors):
        if not name.startswith(("enorm", "hnorm", "eh_proj")):
            new = "post_norm.weight" if name == "shared_head.norm.weight" else f"mtp_block.{name}"
            tensors[new] = tensors.pop(name)
    layer.load_state_dict(tensors, strict=True)
    for module in layer.modules():
        if hasattr(module, "e_score_correction_bias"):
            bias = tensors["mtp_block.mlp.gate.e_score_correction_bias"]
            module.e_score_correction_bias = torch.nn.Buffer(bias.float())
    ids = torch.tensor([prompt])
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    embedded, positions = model.model.embed_tokens(ids[:, 1:]), torch.arange(len(prompt) - 1)[None]
    mask = torch.full((1, 1, len(prompt) - 1, len(prompt) - 1), -torch.inf, dtype=model.dtype).triu(1)
    out = layer(embedded, hidden, model.model.rotary_emb(embedded, positions), mask, positions, None)
    return model.lm_head(out)[0]


def small_cases(folder: Path, package: str) -> tuple[dict, dict]:
    """(Greedy tokens, logits) of each small random checkpoint, by prompt and type."""
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
                if json.loads((path / "config.json").read_text()).get("num_nextn_predict_layers"):
                    second = second_token(path, model, prompt)
                    tensors[f"{name}.{length}.{short}.second"] = second[-len(PROMPT):].clone()
    return answers, tensors


def written_by_transformers(folder: Path) -> dict:
    """The config.json of the newer generation, as it is written for the case with YaRN."""
    model = AutoModelForCausalLM.from_pretrained(folder / "yarn", dtype=torch.float32)
    model.save_pretrained(folder / "resaved")
    return json.loads((folder / "resaved/config.json").read_text())


def rotary() -> dict:
    """Cosines and sines of DeepSeek-V3's positions from the first to the last, by transformers."""
    published = json.loads((ROOT / "tests/deepseek_v3/published_configs.json").read_text())["DeepSeek-V3"]["config"]
    config = DeepseekV3Config(**{name: value for name, value in published.items() if name != "quantization_config"})
    positions = [0, 1, 2, 77, 1000, 4095, 4096, 4097, 20000, 65537, 131071, 163839]
    cos, sin = modeling.DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.tensor([positions]))
    return {"positions": positions, "cos": cos[0, :, :32].tolist(), "sin": sin[0, :, :32].tolist()}


def tiktoken_ids() -> dict:
    """A small vocabulary in the form of tiktoken.model, and what the library tiktoken makes of texts with it."""
    import tiktoken
    from tiktoken._educational import SimpleBytePairEncoding

    from deepseek_v3.engine.tiktoken_vocab import PIECES
    from scripts.train.corpus import GLOSSARY_TEXT

    # Python's regex has no && in a class; a negative lookahead in front of the class means the same.
    pattern = PIECES
    for kinds in (r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"):
        pattern = pattern.replace(rf"[{kinds}&&[^\p{{Han}}]]", rf"(?:(?!\p{{Han}})[{kinds}])")
    text = GLOSSARY_TEXT + "你好世界，你好。中文English混合 1234567890 it's I'LL café" * 9
    ranks = SimpleBytePairEncoding.train(text, vocab_size=700, pat_str=pattern).mergeable_ranks
    ranks[b" xqzjkvx"] = len(ranks)  # no merges lead to it, and tiktoken takes a piece that is a token whole
    library = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return {"ranks": [base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.get)],
            "ids": {text: library.encode_ordinary(text) for text in TIKTOKEN_TEXTS}}


def tiny(folder: Path) -> dict:
    """The embedded checkpoint: rendered prompts and greedy answers of transformers, by question and mode."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    answers = {}
    for question in TINY_QUESTIONS:
        for thinking in (True, False):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True,
                enable_thinking=thinking, thinking=thinking)
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
        if package == "deepseek_v3" and dtype == torch.float32:
            with torch.inference_mode():
                # The mask is given: without it, a jump in the positions is taken for the start of another text.
                far = model(torch.tensor([prompt]), position_ids=torch.tensor([FAR]),
                            attention_mask=torch.ones(1, len(FAR)), use_cache=False).logits[0]
            answers["far"] = {"prompt": prompt, "logits": far[:, ::64].tolist()}
        del model
    return answers


def packed_logits(folder: Path, package: str) -> dict[str, torch.Tensor]:
    """Of checkpoints in compressed-tensors' format: release -> logits in float32, by transformers with that library.

    It unpacks experts into the type of their scales, whatever is asked for; everything else is computed in float32.
    """
    logits = {}
    for release in (release for release in RELEASES if release.startswith("compressed")):
        if "act order" in release or "zero points" in release:  # given up by the library; not loaded by transformers
            continue
        model = load(write(folder / release, package, release), torch.float32)
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        with torch.inference_mode():
            logits[release] = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    return logits


def packed_matrices() -> dict[str, torch.Tensor]:
    """What compressed-tensors stores for a matrix, and what it makes of that again: "bits group type symmetric …"."""
    from compressed_tensors.compressors import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors = {}
    for bits, group, dtype, symmetric in itertools.product((4, 8), (32, 96), (torch.bfloat16, torch.float16),
                                                           (True, False)):
        q, scale, zero, _, meant = quantised("matrix", (20, 96), bits, group, dtype, symmetric)
        size, strategy = (group, "group") if group < 96 else (None, "channel")
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, group_size=size, strategy=strategy)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        state = {"weight": meant.to(dtype), "weight_scale": scale,
                 "weight_zero_point": (zero - 2 ** (bits - 1)).to(torch.int8)}
        stored = Compressor.compress(state, scheme)
        stored = {leaf: tensor for leaf, tensor in stored.items() if leaf != "weight_zero_point" or not symmetric}
        found = Compressor.decompress(stored, scheme)["weight"]
        name = f"{bits} {group} {str(dtype).removeprefix('torch.')} {'symmetric' if symmetric else 'zero_points'}"
        tensors |= {f"{name} {leaf}": tensor.contiguous() for leaf, tensor in (stored | {"weight": found}).items()}
    return tensors


def main(arguments: argparse.Namespace) -> None:
    out = ROOT / "tests" / arguments.package / "reference"
    out.mkdir(parents=True, exist_ok=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    wanted = [arguments.only] if arguments.only else ["small", "tiny", "full", "packed"]
    if arguments.package == "deepseek_v3" and not arguments.only:
        wanted.append("tiktoken")
    with tempfile.TemporaryDirectory() as name:
        folder, results = Path(name), {}
        if "small" in wanted:
            answers, tensors = small_cases(folder, arguments.package)
            save_file(tensors, out / "logits.safetensors", metadata=versions)
            results["small"] = {"cases": answers, "config_of_transformers": written_by_transformers(folder)}
            if arguments.package == "deepseek_v3":
                results["small"] |= {"rotary": rotary()}
        if "tiktoken" in wanted:
            results["tiktoken"] = tiktoken_ids()
        if "tiny" in wanted:
            results["tiny"] = {"answers": tiny(ROOT / "checkpoints" / TINY[arguments.package])}
        if "packed" in wanted:
            import compressed_tensors

            tensors = packed_logits(folder, arguments.package) | (
                packed_matrices() if arguments.package == "qwen3" else {})
            save_file(tensors, out / "packed.safetensors",
                      metadata=versions | {"compressed-tensors": compressed_tensors.__version__})
        if "full" in wanted:
            results["full"] = full_shape(folder, arguments.package)
    for what, values in results.items():
        (out / f"{what}.json").write_text(json.dumps({"made_with": versions} | values, indent=1) + "\n")


if __name__ == "__main__":
    main(ARGUMENTS)
