"""DeepSeek-V3: read README.md, then config, tokenizer, layers, mla, moe, model, files, weights, generate, speculative, main."""

import warnings

# NumPy is not needed here, and PyTorch says at every start that it could not find it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
