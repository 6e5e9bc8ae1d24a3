"""Later reading: the same numbers faster, from smaller weights and stranger files; and the terminal.

The lesson is complete without this folder. Where it comes in, it replaces: `weights.load_model` builds the plain model
and lets `prepare` swap parts for these; load_model(engine=False) and --plain leave them out.

    faster          architecture (which part is swapped for which), fast (matmuls, attention), experts, compiled, batch
    smaller         quantized (FP8), quantization (how a checkpoint says so)
    files           prepare (loading), safetensors_reader, sizes and memory (does it fit?), drafts
    longer          yarn
    refused         supported, fields, requests
    tokens, chat    tiktoken_vocab, chat_formats, templates, template_reader, template_shapes, chatml_shapes
    the terminal    arguments, conversation, terminal, expert_picture

Some files are only where an architecture needs them.
"""
