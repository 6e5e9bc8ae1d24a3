"""generation_config.json: the sampling defaults, and what ends an answer.

Every field that changes the text is read or refused by name. Two lists decide what becomes of the others: OFF and
PASSED_OVER.
"""

from pathlib import Path

from .fields import Fields, check_off, read_json

# What changes the text and is not computed here, with the values that switch it off …
OFF = {
    "num_beams": (1,), "num_beam_groups": (1,), "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "top_h": (1,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "frequency_penalty": (0,), "guidance_scale": (1,), "penalty_alpha": (0,),
    "min_length": (0,), "min_new_tokens": (0,), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],), "force_words_ids": ([],), "constraints": ([],), "sequence_bias": ({}, []),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "exponential_decay_length_penalty": (),
    "watermarking_config": (), "token_healing": (False,), "dola_layers": (),
}
# … and what does not: it bounds or stops generation, is about outputs or memory, or only means something with beams.
PASSED_OVER = set("""
    max_length max_new_tokens max_time max_tokens stop_strings stop_words_ids use_cache cache_implementation
    cache_config max_cache_len return_legacy_cache prefill_chunk_size low_memory pad_token_id bos_token_id
    decoder_start_token_id transformers_version output_attentions output_hidden_states output_scores output_logits
    return_dict_in_generate num_return_sequences early_stopping length_penalty diversity_penalty renormalize_logits
    remove_invalid_values is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind
    prompt_lookup_num_tokens max_matching_ngram_size use_mtp speculative speculation_type compile_config
    disable_compile generation_kwargs continuous_batching_config trust_remote_code chat_format max_window_size
    max_context_size model_max_length auto_map seed
    """.split())
USED = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "eos_token_id"}


def read_generation(directory: Path, config: Fields) -> tuple[dict[str, object], list[str]]:
    """({"eos_token_id": stop ids, "temperature": …, …}, notes); ValueError for what would change the text unnoticed."""
    check_off(config, OFF | {"repetition_penalty": (1,), "min_p": (0,), "presence_penalty": (0,)})
    path = directory / "generation_config.json"
    generation = Fields(path, read_json(path) if path.exists() else {})
    check_off(generation, OFF)
    for name, value in generation.values.items():
        known = name in PASSED_OVER or name in USED or name in OFF or name.startswith("_")
        if not known and value not in (None, False, 0, "", [], {}):
            generation.refuse(name, "this field is not known here; take it out to go on without it")
    if generation.get("stop_strings"):
        generation.notes.append("generation_config.json: stop_strings are not used here, only eos_token_id ends an "
                                "answer")
    vocab_size = config.integer("vocab_size")
    stop_ids = generation.token_ids("eos_token_id", vocab_size)
    if stop_ids is None:
        stop_ids = config.token_ids("eos_token_id", vocab_size)
    return {"eos_token_id": stop_ids or ()} | read_sampling(generation), generation.notes


def read_sampling(generation: Fields) -> dict[str, float]:
    """The sampling defaults. do_sample false is how a Base checkpoint asks for greedy decoding.

    The penalties count in greedy decoding too. What changes nothing (a penalty of 1.0, a top_k of -1) is left out.
    """
    sampling: dict[str, float] = {}
    if generation.get("repetition_penalty", 1) != 1:
        sampling["repetition_penalty"] = generation.number("repetition_penalty")
    if generation.get("presence_penalty", 0) != 0:
        sampling["presence_penalty"] = generation.signed("presence_penalty", 2)
    if not generation.boolean("do_sample", False):
        return sampling
    sampling["temperature"] = generation.number("temperature", 1.0, zero=True)
    if generation.get("top_k") not in (None, -1):
        sampling["top_k"] = generation.integer("top_k", zero=True)
    for name in ("top_p", "min_p"):
        if generation.get(name) is not None:
            value = generation.number(name, zero=name == "min_p")
            if value > 1:
                generation.refuse(name, "expected at most 1")
            if (name, value) != ("min_p", 0):
                sampling[name] = value
    return sampling
