"""Sizes of the embedded checkpoints, and how long each is trained."""

VOCABULARY = 2048
STEPS = {"qwen3": 7000, "qwen3_moe": 4500, "deepseek_v3": 4500}
# For the matrices; the rest gets four times as much. DeepSeek-V3 has no norm on queries and keys.
LEARNING_RATE = {"qwen3": 5e-3, "qwen3_moe": 5e-3, "deepseek_v3": 4e-3}


# H · N = 192 differs from D = 160, and K < H: code that mistakes one size for another fails on this checkpoint too.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": 160,
    "intermediate_size": 448, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
    "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 5,
    "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16",
}
# 8 experts, 2 of them active: each token uses 1.5 of 2.9 million parameters.
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "tie_word_embeddings": False,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False, "router_aux_loss_coef": 0.01,
}
# Sizes that could be mistaken for each other all differ. 3 of 8 experts, from 2 of 4 groups, and one shared expert.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": VOCABULARY,
    "hidden_size": 160, "intermediate_size": 336, "moe_intermediate_size": 48, "num_hidden_layers": 5,
    "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 64, "kv_lora_rank": 56,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 32,
    "v_head_dim": 30, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0},
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16",
}
# package -> the checkpoint's name, its config
KINDS = {"qwen3": ("Qwen3-Tiny", QWEN3), "qwen3_moe": ("Qwen3-MoE-Tiny", QWEN3_MOE),
         "deepseek_v3": ("DeepSeek-V3-Tiny", DEEPSEEK_V3)}
