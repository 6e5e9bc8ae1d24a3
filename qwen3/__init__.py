"""Qwen3, the dense models: read README.md, then config, tokenizer, layers, model, weights, generate, main."""
