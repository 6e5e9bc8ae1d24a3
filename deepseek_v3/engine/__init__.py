"""Later reading: the same numbers faster, from smaller weights and stranger files; and the terminal.

The lesson tells the whole story without this folder. Where the engine comes in, it replaces: `weights.load_model`
builds the plain model and lets `prepare` swap parts of it for those named in `parts`. load_model(engine=False) and
--plain leave these out: the model then consists of the lesson's own parts.

    faster          parts (which part is swapped for which), fast (matmuls, norms, attention), one_query (attention over
                    a long cache), experts, compiled, batch
    smaller         quantized (FP8), int4 (integers of 4 and 8 bits), integer_linear, packed_formats (where published
                    files keep the bits), rounding (to integers, here); how a checkpoint says so: quantization_fields,
                    integer_fields
    files           prepare (loading), safetensors_reader, sizes and memory (does it fit?), drafts
    many GPUs       parallel (two sums a layer), shares (what each of them holds), processes (how they meet and end)
    longer          yarn
    refused         supported, fields, architecture_fields, rope_fields, generation_fields, requests
    tokens, chat    vocabulary, tiktoken_vocab; chat_formats (how each is written); which one a checkpoint's template
                    means: templates, template_reader, template_expressions, template_shapes, chatml_shapes
    the terminal    arguments, conversation, terminal, expert_picture
    many prompts    batch_file (--batch), prompts (what its lines may say), continuous (rows that are refilled), journal
                    (answers that a killed run leaves), progress, replicas (several processes)

Some files are only where an architecture needs them.
"""
