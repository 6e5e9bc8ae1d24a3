"""Real runs of the embedded models in float32 -> the numbers of each picture, small enough for a JSON file."""

from unittest.mock import patch

import torch

from qwen3.layers import attention_mask

from . import measure_deepseek_v3, measure_qwen3, measure_qwen3_moe
from .__main__ import parse
from .pack import Words, small_numbers, visible
from .run import Program, one_run, record
from .terminal import shares

SUM, GLOSSARY = "What is 347 + 586?", "What is RoPE?"
# Three heads of Qwen3-Tiny that look at one digit each; scripts/xray/README.md tells what happens without them.
READS_DIGITS = (1, 0), (1, 1), (1, 2)
# DeepSeek-V3 as published, and the same with 8 key/value heads of 128 as Qwen3 has: values a token and layer.
LAYERS, HEADS, NOPE, ROPE, VALUE, LATENT, GROUPS, GROUP = 61, 128, 128, 64, 128, 512, 8, 128


def recorded(model: str, question: str, *words: str) -> tuple[Program, dict, list[str]]:
    """One run in float32: (the program, what a page would hold of the run, its tokens as text)."""
    own, rest = parse(["-m", model, "-p", question, "--dtype", "float32", *words])
    program = Program(own, rest)
    program.load(program.prompt_ids(question))
    recording = record(program, question, None)
    run = one_run(program, Words(program.tokenizer), recording, recording)
    return program, run, [text(program, id) for id in recording.ids]


def text(program: Program, id: int) -> str:
    spelled = visible(program.tokenizer.bytes_of.get(id, b""))
    return spelled.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


def last_column(tokens: list[str]) -> tuple[int, int]:
    """Of a sum of three digits: where its third column begins, and the blank after its = sign."""
    equals = [i for i, token in enumerate(tokens) if token.strip("·") == "="]
    if len(equals) < 3:
        raise ValueError(f"the model no longer adds {SUM[8:-1]} column by column: {''.join(tokens)[-100:]}")
    begin = max(i for i in range(equals[2]) if tokens[i].endswith("⏎")) + 1
    return begin, equals[2] + 1


def measure_attention() -> dict:
    _, run, tokens = recorded("Qwen3-Tiny", SUM)
    begin, end = last_column(tokens)
    maps = [[[round(share, 3) for share in shares(run, run["steps"].index(p), layer, head)[begin:]]
             for p in range(begin, end + 1)] for layer, head in READS_DIGITS]
    return {"question": SUM, "tokens": tokens[begin:end + 1], "wrote": tokens[end + 1], "heads": READS_DIGITS,
            "maps": maps}


def measure_lens() -> dict:
    program, run, tokens = recorded("Qwen3-Tiny", SUM)
    _, end = last_column(tokens)
    rows = [run["steps"].index(p) for p in range(end - 4, end + 3)]
    cells = [[[text(program, run["lens"]["top"][r][depth][0][0]), round(run["lens"]["top"][r][depth][0][1], 3)]
              for r in rows] for depth in range(run["L"] + 1)]
    return {"question": SUM, "reads": [tokens[run["steps"][r]] for r in rows],
            "came": [tokens[run["steps"][r] + 1] for r in rows], "cells": cells, "chosen": 4,
            "written": [round(chance, 4) for chance in run["lens"]["written"][rows[4]]]}


def measure_clocks() -> dict:
    _, run, tokens = recorded("Qwen3-Tiny", SUM)
    _, query = last_column(tokens)
    looked = shares(run, run["steps"].index(query), *READS_DIGITS[1])
    key, frequencies = looked.index(max(looked)), run["rope"]["frequencies"]
    pairs = list(range(0, len(frequencies), max(1, len(frequencies) // 8)))
    return {"query": query, "key": key, "words": [tokens[query], tokens[key]], "head": READS_DIGITS[1],
            "pairs": pairs, "frequencies": [frequencies[j] for j in pairs]}


def measure_yarn() -> dict:
    program, run, _ = recorded("DeepSeek-V3-Tiny", GLOSSARY)
    scaling = program.config.rope_scaling
    return {"factor": scaling.factor, "trained": scaling.original_max_position_embeddings,
            "fast": scaling.beta_fast, "slow": scaling.beta_slow,
            "plain": run["rope"]["plain"], "stretched": run["rope"]["frequencies"]}


def measure_experts() -> dict:
    found = []
    for question in (SUM, GLOSSARY):
        _, run, _ = recorded("Qwen3-MoE-Tiny", question)
        experts = run["experts"]
        tokens = sum(experts["loads"][0]) / experts["A"]
        found.append([small_numbers(torch.tensor(load) / tokens, 4) for load in experts["loads"]])
    return {"questions": [SUM, GLOSSARY], "layers": experts["layers"], "active": experts["A"], "shares": found}


def measure_cache() -> dict:
    """Bytes a token, in bfloat16. The rule is tried on the caches of the small models before it is used."""
    for model in ("Qwen3-Tiny", "DeepSeek-V3-Tiny"):
        program, run, _ = recorded(model, GLOSSARY, "-n", "1")
        config = program.config
        kept = (config.kv_lora_rank + config.qk_rope_head_dim if hasattr(config, "kv_lora_rank")
                else 2 * config.num_key_value_heads * config.head_dim)
        if run["cache"]["numbers"] != kept:
            raise ValueError(f"{model} keeps {run['cache']['numbers']} values a token and layer, and not {kept}")
    values = {"multi-head": HEADS * (NOPE + ROPE + VALUE), "grouped": 2 * GROUPS * GROUP, "latent": LATENT + ROPE}
    return {"layers": LAYERS, "values": values, "bytes": {name: 2 * LAYERS * n for name, n in values.items()}}


def measure_drafting() -> dict:
    """The first four steps in a row with drafts kept and refused; hot enough that some are refused."""
    for seed in range(40):
        steps, tokens = drafted_run(seed)
        for at in range(len(steps) - 3):
            some = steps[at:at + 4]
            if len({step["kept"] for step in some[:3]}) == 2:
                return {"seed": seed, "steps": some, "question": GLOSSARY, "temperature": 3, "tokens": tokens}
    raise ValueError("no run of forty has both a draft that was kept and one that was refused")


def drafted_run(seed: int) -> tuple[list[dict], list[str]]:
    """A speculative run: its steps (slots, what was read, whether the draft was kept) and its tokens as text."""
    own, rest = parse(["-m", "DeepSeek-V3-Tiny", "-p", GLOSSARY, "--dtype", "float32", "--speculative",
                       "-t", "3", "-n", "24", "--seed", str(seed)])
    program = Program(own, rest)
    prompt_ids = program.prompt_ids(GLOSSARY)
    program.load(prompt_ids)
    speculative, steps = program.module("speculative"), []
    draft, verify = speculative.draft, speculative.verify

    def seen_draft(model, following, hidden, cache):
        begin, out = cache.length, draft(model, following, hidden, cache)
        steps.append({"drafts": [begin, cache.length]})  # slots that the draft layer wrote
        return out

    def seen_pass(_, args):
        if steps:
            token_ids, cache = args
            steps[-1] |= {"first": cache.length, "read": [text(program, id) for id in token_ids[0].tolist()]}

    def seen_verify(truth, guess, drafted, generator):
        token = verify(truth, guess, drafted, generator)
        steps[-1] |= {"kept": token == drafted, "wrote": text(program, token)}
        return token

    hook = program.model.model.register_forward_pre_hook(seen_pass)
    try:
        with patch.object(speculative, "draft", seen_draft), patch.object(speculative, "verify", seen_verify):
            ids = list(program.generate(prompt_ids))
    finally:
        hook.remove()
    return [step for step in steps if "kept" in step], [text(program, id) for id in prompt_ids + ids]


def measure_mask() -> dict:
    """Three tokens read after four that the cache holds; two prompts of one batch, the second two tokens shorter."""
    device = torch.device("cpu")
    padded = attention_mask(0, 5, torch.tensor([[0], [2]]), device)[:, 0]
    return {"cached": 4, "after": attention_mask(4, 3, None, device).int().tolist(),
            "padding": [0, 2], "batch": padded.int().tolist()}


MEASURE = {"attention": measure_attention, "lens": measure_lens, "clocks": measure_clocks, "yarn": measure_yarn,
           "experts": measure_experts, "cache": measure_cache, "drafting": measure_drafting, "mask": measure_mask}
MEASURE |= measure_qwen3.MEASURE | measure_qwen3_moe.MEASURE | measure_deepseek_v3.MEASURE
