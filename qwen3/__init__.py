"""Qwen3, the dense models: read README.md, then config, tokenizer, layers, model, files, weights, generate, main."""

import warnings

# NumPy is not needed here, and PyTorch says at every start that it could not find it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
