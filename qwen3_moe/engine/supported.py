"""What is refused, and in which words: other models, other formats, and fields that would change the result unnoticed.

A checkpoint that runs gives the numbers that its authors mean. Everything else ends here, in one sentence that says
what the folder holds and where to go. Two lists decide: MODELS (by model_type) and CONFIG_OFF (fields of
config.json). The rest stands in architecture_fields.py, rope_fields.py, generation_fields.py and
quantization_fields.py.
"""

import re
from collections.abc import Collection
from pathlib import Path

from .architecture_fields import CHECKS
from .fields import Fields, check_off, plain, read_json, short
from .generation_fields import read_generation
from .quantization_fields import read_quantization
from .rope_fields import read_rope

# model_type -> the package that runs it.
PACKAGES = {"qwen3": "qwen3", "qwen3_moe": "qwen3_moe", "deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3",
            "glm4_moe_lite": "deepseek_v3", "joyai_llm_flash": "deepseek_v3"}
OURS = {"qwen3": "a dense Qwen3 model", "qwen3_moe": "a Qwen3-MoE model, a mixture of experts",
        "deepseek_v3": "a model of DeepSeek-V3's architecture"}
# Everything else, with what is different in it.
MODELS = {
    "qwen": "a Qwen1 model", "qwen2": "a Qwen2 model (biases, no QK-Norm), as many of DeepSeek-R1-Distill are",
    "qwen2_moe": "a Qwen2-MoE model (biases, no QK-Norm)", "qwen3_next": "a Qwen3-Next model (linear attention)",
    "qwen3_5": "a Qwen3.5 model (linear attention)", "qwen3_5_moe": "a Qwen3.5 mixture of experts (linear attention)",
    "qwen3_vl": "a Qwen3-VL model, which sees pictures",
    "qwen3_vl_moe": "a Qwen3-VL mixture of experts, which sees pictures",
    "qwen3_omni_moe": "a Qwen3-Omni model, which sees and hears",
    "deepseek_v2": "a DeepSeek-V2 model, whose router is a softmax",
    "deepseek_v32": "a DeepSeek-V3.2 model, whose attention is sparse",
    "deepseek_v4": "a DeepSeek-V4 model, whose attention is sparse and compressed",
    "deepseek_vl_v2": "a DeepSeek-VL2 model, which sees pictures", "kimi_k25": "a Kimi-K2.5 model, which sees pictures",
    "kimi_k3": "a Kimi-K3 model", "kimi_vl": "a Kimi-VL model, which sees pictures",
    "kimi_linear": "a Kimi-Linear model (linear attention)", "glm_moe_dsa": "a GLM-5 model, whose attention is sparse",
    "glm4_moe": "a GLM-4.5 model (grouped queries, no latents)", "glm4": "a GLM-4 model", "gpt_oss": "a gpt-oss model",
    "llama": "a Llama model, as two of DeepSeek-R1-Distill are", "mistral": "a Mistral model",
    "mistral3": "a Mistral-3 model",
}
GENERATORS = "ForCausalLM"
NO_GENERATOR = (  # what an architecture's name says -> what that is
    ("Eagle|Draft|DFlash|Medusa|Speculator|MTP", "a draft model, which only guesses for another one"),
    ("Reward|Ranking|Rerank|ProcessReward", "a reward or reranking model"),
    ("Classification|Regression|Guard|QuestionAnswering", "a classifier, reward or reranking model"),
    ("ConditionalGeneration", "a model of more than text"), ("Model$", "an embedding model"),
)
# Fields of config.json that change the result and are not computed here, with the values that switch them off.
CONFIG_OFF = {
    "is_causal": (True,), "dual_chunk_attention_config": (), "llama_4_scaling": (), "index_topk": (),
    "index_n_heads": (), "index_head_dim": (), "swiglu_limit": (), "swiglu_limits": (), "attn_logit_softcapping": (),
    "final_logit_softcapping": (), "logit_softcapping": (), "attention_chunk_size": (), "mlp_bias": (False,),
    "lm_head_bias": (False,), "attention_out_bias": (False,), "qkv_bias": (False,), "use_qk_norm": (True,),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,), "attention_multiplier": (),
    "scale_emb": (1,), "scale_depth": (), "dim_model_base": (), "logit_scale": (1,), "mup_width_multiplier": (1,),
    "attn_output_gate": (False,), "use_gated_attention": (False,), "head_wise_attn_output_gate": (False,),
    "elementwise_attn_output_gate": (False,), "attention_sink": (False,), "use_attention_sink": (False,),
    "add_attention_sink": (False,), "no_rope_layers": ([],), "no_rope_layer_interval": (0,), "rope_local_base_freq": (),
    "use_logn_attn": (False,), "use_dynamic_ntk": (False,), "compress_ratios": ([],), "hc_mult": (1,),
    "zero_expert_num": (0,), "is_encoder_decoder": (False,), "add_cross_attention": (False,), "pruned_heads": ({},),
    "use_bidirectional_attention": (False,), "full_attention_interval": (1,), "linear_num_value_heads": (0,),
    "sparse_attention_config": (), "engram_config": (), "ngram_vocab_size": (),
}
DRAFTS = ("draft_vocab_size", "eagle_config", "dflash_config", "speculators_config", "speculators_model_type",
          "medusa_num_heads")
SEEING = ("vision_config", "audio_config")


def read_supported(directory: str | Path, package: str, Yarn: type) -> tuple[Fields, dict, dict]:
    """(config.json in one spelling, how the weights are stored, what generation_config.json says), all of it checked.

    The last two have the names of Config's fields. What the package would compute wrongly is refused: raises
    FileNotFoundError without a folder or config.json, ValueError naming file and field.
    """
    directory = Path(directory)
    check_folder(directory)
    path = directory / "config.json"
    fields = Fields(path, read_json(path))
    check_model(fields, package)
    check_off(fields, CONFIG_OFF)
    generation, notes = read_generation(directory, fields)
    storage = read_quantization(fields, directory) | {"dtype": fields.dtype()}
    CHECKS[package](fields)
    fields.values |= read_rope(fields, Yarn)
    fields.notes += notes
    return fields, storage, generation


def check_folder(directory: Path) -> None:
    """What lies in the folder may say more than config.json, and sooner."""
    if directory.is_file():
        what = "a GGUF file, llama.cpp's format" if directory.suffix.lower() == ".gguf" else "a file"
        raise ValueError(f"{directory}: this is {what}; a folder with config.json and safetensors files is expected")
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    if (directory / "adapter_config.json").is_file():
        raise ValueError(f"{directory}: holds a LoRA adapter (adapter_config.json), which would be left out; "
                         "merge it into its base with peft's merge_and_unload() and save that, or take the adapter's "
                         "files away")
    if (directory / "modules.json").is_file() or (directory / "config_sentence_transformers.json").is_file():
        raise ValueError(f"{directory}: holds an embedding or reranking model of sentence-transformers, which gives "
                         "vectors or scores; this project runs text generators")
    if not (directory / "config.json").is_file():
        if any(directory.glob("*.gguf")):
            raise ValueError(f"{directory}: holds GGUF files, which llama.cpp runs; get the safetensors release "
                             "of the model")
        if (directory / "params.json").is_file():
            raise ValueError(f"{directory}: has params.json and no config.json: a release in Mistral's or Meta's own "
                             "format; get the one for transformers")


def check_model(fields: Fields, package: str) -> None:
    """ValueError for a checkpoint of another model, by model_type, architectures and what only others have."""
    kind = fields.get("model_type")
    runs = [name for name, its in PACKAGES.items() if its == package]
    if not isinstance(kind, str) or kind not in runs:
        if isinstance(kind, str) and kind in PACKAGES:
            ours = PACKAGES[kind]
            fields.refuse("model_type", f"this folder holds {OURS[ours]}; run it with `python -m {ours}.main`")
        what = MODELS.get(kind.removesuffix("_text")) if isinstance(kind, str) else None
        if what:
            fields.refuse("model_type", f"this folder holds {what}; this project has no package for it, "
                                        "transformers or vLLM run it")
        names = ", ".join(map(repr, runs))
        one = f"this package runs only model_type {names}" if len(runs) == 1 else f"only {names} run here"
        if kind is None:
            raise ValueError(f"{fields.path}: has no model_type, so it is no language model's of transformers; {one}")
        fields.refuse("model_type", f"{one}; this project has no package for it, transformers or vLLM may run it")
    names = fields.get("architectures", [])
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    for pattern, what in NO_GENERATOR:
        if re.search(pattern, name) and (GENERATORS not in name or pattern.startswith("Eagle")):
            raise ValueError(f"{fields.path}: architectures says {short(name)}, {what}; "
                             "this project runs text generators")
    for draft in DRAFTS:
        if fields.get(draft) is not None:
            raise ValueError(f"{fields.path}: {draft} is there: a draft model, which only guesses for another one; "
                             "run that one")
    for seeing in SEEING:
        if fields.get(seeing) is not None:
            raise ValueError(f"{fields.path}: {seeing} is there: a model of more than text, which this project "
                             "has no package for")


def check_tensor_names(directory: Path, names: Collection[str]) -> None:
    """Tensors tell what a model_type does not: vectors, scores and guesses come from the same layers."""
    heads = "score|classifier|classification_head|v_head|value_head|reward_head|summary"
    for name in names:
        if re.search(rf"(^|\.)({heads})\.(weight|bias|summary\.weight)$", name):
            raise ValueError(f"{directory}: {plain(name)} is the head of a classifier or reward model; "
                             "this project runs text generators")
        if name in ("d2t", "t2d", "fc.weight") or name.startswith(("midlayer.", "eagle_module.")):
            raise ValueError(f"{directory}: {plain(name)} is part of a draft model, which only guesses for another "
                             "one; run that one")
    for name in names:
        if re.search(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer)\.", name):
            raise ValueError(f"{directory}: {plain(name)} is part of a LoRA adapter that was not merged; "
                             "merge it with peft's merge_and_unload() and save that")
        if (found := re.fullmatch(r"(.+\.)(layers\.0\..+)", name)) and found[1] != "model." and not any(
                other.startswith("model.layers.") for other in names):
            raise ValueError(f"{directory}: its tensors are named {plain(name)} and not model.{plain(found[2])}, "
                             "as in a model of more than text or one saved within a wrapper; "
                             "save the text generator by itself")
    if "embed_tokens.weight" in names and "model.embed_tokens.weight" not in names:
        raise ValueError(f"{directory}: the names of its tensors lack 'model.', as an embedding model's do; "
                         "this project runs text generators")
