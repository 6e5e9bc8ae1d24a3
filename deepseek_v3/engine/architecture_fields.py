"""What each architecture's config.json may say: other spellings made one, and what would be computed wrongly refused.

One function for each package. It leaves in `fields` the names and values that the package's config.py reads.
"""

import json

from .fields import Fields, short

# What GLM-4.7-Flash means where its file does not say it: the values of its class in transformers.
GLM_DEFAULTS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "rms_norm_eps": 1e-5}


def check_qwen3(fields: Fields) -> None:
    if fields.get("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", "only 'silu' is known")
    if fields.boolean("attention_bias", False):
        fields.refuse("attention_bias", "only false is known")
    # The published files carry a window that is switched off; transformers 5 spells the outcome per layer. A size that
    # is left out is some default and not "no window", which is null.
    layers = fields.integer("num_hidden_layers")
    if fields.get("layer_types") is not None:
        fields.check_every("layer_types", layers, "full_attention",
                           "only 'full_attention' is known, a sliding window is not")
    elif fields.boolean("use_sliding_window", False):
        window = fields.values.get("sliding_window", "some default")
        if window is not None and fields.integer("max_window_layers", 0, zero=True) < layers:
            fields.refuse("use_sliding_window", "sliding-window attention is not supported")
    heads = fields.integer("num_attention_heads")
    if "num_key_value_heads" in fields.values:  # null: as many
        fields.default("num_key_value_heads", heads)
    groups, head_dim = fields.integer("num_key_value_heads"), fields.integer("head_dim")
    if heads % groups:
        raise ValueError(f"{fields.path}: num_attention_heads {heads} is not a multiple of "
                         f"num_key_value_heads {groups}")
    if head_dim % 2:
        raise ValueError(f"{fields.path}: head_dim {head_dim} is odd, and RoPE turns pairs")


def check_qwen3_moe(fields: Fields) -> None:
    size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if size % heads == 0:  # transformers 5 may leave it out
        fields.default("head_dim", size // heads)
    check_qwen3(fields)
    if fields.get("num_local_experts") not in (None, fields.get("num_experts", fields.get("num_local_experts"))):
        fields.refuse("num_local_experts", "num_experts is there too and differs")
    fields.default("num_experts", fields.get("num_local_experts"))
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        fields.refuse("mlp_only_layers", "expected a list of layer numbers")
    active, experts = fields.integer("num_experts_per_tok"), fields.integer("num_experts")
    if active > experts:
        raise ValueError(f"{fields.path}: num_experts_per_tok {active} is more than the {experts} experts "
                         "that there are")


def check_deepseek_v3(fields: Fields) -> None:
    if glm := fields.get("model_type") == "glm4_moe_lite":
        for name, value in GLM_DEFAULTS.items():
            fields.default(name, value)
    for name, known in (
            ("hidden_act", "silu"), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("attention_bias", False),
            ("head_dim", fields.get("qk_rope_head_dim")), ("num_key_value_heads", fields.get("num_attention_heads")),
            ("num_local_experts", fields.get("n_routed_experts", fields.get("num_local_experts")))):
        if fields.get(name, known) != known:
            fields.refuse(name, f"only {json.dumps(known)[:60]} is known here")
    if fields.get("sliding_window") is not None and fields.boolean("use_sliding_window", True):
        fields.refuse("sliding_window", "sliding-window attention is not supported")
    if fields.get("layer_types") is not None:
        fields.check_every("layer_types", fields.integer("num_hidden_layers"), "full_attention",
                           "only 'full_attention' is known")
    dense = read_dense_layers(fields)
    fields.default("first_k_dense_replace", 1 if dense is None and glm else dense)
    fields.default("n_routed_experts", fields.get("num_local_experts"))
    fields.default("num_nextn_predict_layers", fields.get("num_mtp_layers", 0))
    check_groups(fields)


def read_dense_layers(fields: Fields) -> int | None:
    """How many layers at the beginning have no experts, in any of three spellings; None where the file does not say."""
    layers, dense = fields.integer("num_hidden_layers"), fields.get("first_k_dense_replace")
    for name, sparse in (("mlp_layer_types", "sparse"), ("moe_layer_freq", 1)):
        given = fields.get(name)
        if isinstance(given, list):
            first = next((layer for layer, kind in enumerate(given) if kind == sparse), len(given))
            dense = first if dense is None else dense
            Fields(fields.path, {name: given[first:]}).check_every(
                name, layers - first, sparse, f"only {sparse!r} is known after the dense layers")
            if dense != first:
                fields.refuse(name, f"first_k_dense_replace says that {short(dense)} layers are dense, "
                                    f"this list {first}")
        elif given is not None and (name, given) != ("moe_layer_freq", 1):
            fields.refuse(name, f"only {json.dumps(sparse)} is known here")
    return dense


def check_groups(fields: Fields) -> None:
    """ValueError unless the experts divide into groups and a token finds enough of them in the best groups."""
    experts, groups, best = (fields.integer(name) for name in ("n_routed_experts", "n_group", "topk_group"))
    left = experts // groups * best
    if fields.integer("qk_rope_head_dim") % 2:
        fields.refuse("qk_rope_head_dim", "expected an even number, for RoPE turns pairs")
    if experts % groups or (groups > 1 and experts < 2 * groups):
        fields.refuse("n_group", f"the {experts} experts do not make groups of one size with two experts or more")
    if best > groups:
        fields.refuse("topk_group", f"there are only {groups} groups")
    if fields.integer("num_experts_per_tok") > left:
        fields.refuse("num_experts_per_tok", f"only {left} experts are left to choose from")


CHECKS = {"qwen3": check_qwen3, "qwen3_moe": check_qwen3_moe, "deepseek_v3": check_deepseek_v3}
