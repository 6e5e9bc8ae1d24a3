"""The exercises of qwen3, in the order of its page."""

from .exercises import Exercise

TASKS = (
    Exercise("rms_norm", "layers.py", "RMSNorm.forward", "easy", 10,
             "The formula of the class's docstring, for x (..., size) of any number of dimensions. Compute in float32, "
             "round to the type of x, then multiply by self.weight, in this order. The result has the type of x.",
             ("The mean square belongs to each vector by itself: take it over the last axis and keep that axis, so "
              "that it divides every value of its own vector.",
              "In float32: x32.square().mean(-1, keepdim=True), then add self.eps, then torch.rsqrt, then multiply.",
              "x32 = x.float(); x32 = x32 * torch.rsqrt(… + self.eps); and last self.weight times that, rounded to "
              "x.dtype before the weight comes in."),
             r"rms"),
    Exercise("inverse_frequencies", "layers.py", "inverse_frequencies", "easy", 10,
             "Make `period` (N/2,), float32: how many tokens pair j takes for one radian, theta^(2j/N) for j = 0, 1, "
             "..., N/2 - 1. The lines below turn it into frequencies. Create the tensor with device=\"cpu\": "
             "load_model builds the model on the meta device, and these numbers stand in no checkpoint.",
             ("There are N/2 pairs. The exponents go up in steps of 2/N, from 0 to just below 1.",
              "torch.arange(0, N, 2) counts 2j. It needs dtype=torch.float32 and device=\"cpu\".",
              "period = config.rope_theta ** (torch.arange(0, N, 2, …) / N)"),
             r"rotary|rope|position", cut=("period =", "period =")),
    Exercise("rotate", "layers.py", "rotate", "easy", 10,
             "x (B, heads, T, N); cos and sin (B or 1, 1, T, N/2). Qwen3 pairs value j with value j + N/2. Return the "
             "turned values in the same places as before, (B, heads, T, N).",
             ("Split x into its first and its last N/2 values: those are x1 and x2 of all pairs.",
              "x.chunk(2, dim=-1) gives both halves. Each result needs both of them, so overwrite neither.",
              "torch.cat((x1 * cos - x2 * sin, …), dim=-1), and the second half is x2 cos + x1 sin."),
             r"rotary|rope|position"),
    Exercise("sdpa", "layers.py", "Attention.sdpa", "medium", 20,
             "Scores are dot products of queries and keys times self.scale. Where the mask is False a query does not "
             "see the key. Softmax over the keys, in float32, then back to the type of q. The mask is (T, S), or "
             "(B, 1, T, S) with padding. Do it without F.scaled_dot_product_attention: this is what it computes.",
             ("First solve H against K: G neighboring query heads read the same key head. Either give the queries two "
              "axes, (B, K, G, T, N), or repeat each key head G times.",
              "scores (B, K, G, T, S) = einsum(\"bkgtn,bksn->bkgts\") * self.scale; then masked_fill(~mask, -inf) "
              "before the softmax over the last axis. With two axes for the heads the mask needs one more as well.",
              "q = q.unflatten(1, (k.shape[1], -1)); mask[..., None, :, :]; weights = scores.float().softmax(-1)"
              ".to(q.dtype); einsum(\"bkgts,bksn->bkgtn\", weights, v).flatten(1, 2)"),
             r"attention"),
    Exercise("attention_mask", "layers.py", "attention_mask", "medium", 15,
             "The T queries stand in the slots first, ..., first + T - 1. The keys stand in all slots from 0 to "
             "first + T - 1, so S = first + T. `padding` (B, 1) counts each row's slots that hold no token, from slot "
             "0 on; None: no row has any. A query that is padding itself sees itself as well, since a softmax over "
             "nothing is NaN. True where a query sees a key; on `device`.",
             ("Give the slots of the queries a column and those of the keys a row. One comparison of the two gives the "
              "whole (T, S).",
              "query = torch.arange(first, first + T, device=device)[:, None]; key = torch.arange(first + T, "
              "device=device); mask = key <= query.",
              "With padding: mask & (key >= padding[:, :, None]) is (B, T, S); or-ed with (key == query); then [:, "
              "None] gives the heads an axis."),
             r"attention|mask"),
    Exercise("attention", "layers.py", "Attention.forward", "medium", 25,
             "x (B, T, D) -> (B, T, D), as the picture above shows it. cos and sin are ready for `rotate`. With a "
             "cache, cache.write(self.layer_idx, k, v) keeps the new keys and values (B, K, T, N) and returns those of "
             "all tokens so far (B, K, S, N). Then self.sdpa(q, k, v, mask).",
             ("Project, then cut the last axis into heads: (B, T, H*N) -> (B, T, H, N). Only then exchange T and H.",
              "Queries and keys: norm, then rotate. Values: neither. Keys go into the cache after the rotation.",
              "q = rotate(self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2), cos, sin); at the "
              "end out.transpose(1, 2).flatten(2) through self.o_proj."),
             r"attention"),
    Exercise("mlp", "layers.py", "MLP.forward", "easy", 5,
             "The formula of the class's docstring, with self.gate_proj, self.up_proj, self.down_proj and F.silu.",
             ("Two projections of the same x, multiplied value by value.",
              "Only the gate goes through F.silu.",
              "self.down_proj(F.silu(self.gate_proj(x)) * …)"),
             r"swiglu|mlp"),
    Exercise("layer", "model.py", "Layer.forward", "easy", 5,
             "Two steps, each added to x: attention, then the MLP. Each reads a normed copy of x. self.self_attn takes "
             "(x, cos, sin, mask, cache).",
             ("x itself is never normed: it goes round each part, and the part's result is added to it.",
              "self.input_layernorm belongs to attention, self.post_attention_layernorm to the MLP.",
              "x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache), and the same for the MLP."),
             r"model|layer|residual"),
    Exercise("transformer", "model.py", "Transformer.forward", "medium", 20,
             "Embed the ids, run all layers, norm. The new tokens stand in the slots from cache.length on, or from 0 "
             "without a cache. self.rotary_emb(positions, dtype) wants the place of each token in its own text, "
             "(1, T) or (B, T): slot minus cache.padding (B, 1), which is None where no row is padded. After the "
             "layers, cache.length grows by T.",
             ("Everything but the embedding depends on where the new tokens begin: positions, mask and cache.",
              "first = cache.length with a cache, else 0. attention_mask(first, T, padding, device). All layers share "
              "cos, sin and mask.",
              "positions = torch.arange(first, first + T, device=device)[None], minus the padding where there is one, "
              "at least 0; x = self.embed_tokens(token_ids); cos, sin = self.rotary_emb(positions, x.dtype); the loop; "
              "cache.length += T; self.norm(x)."),
             r"model|stack"),
    Exercise("chat", "tokenizer.py", "chatml", "medium", 25,
             "Each message becomes: Special(IM_START), its role and \"\\n\", its content, Special(IM_END), \"\\n\". "
             "At the end stands the header of the answer, Special(IM_START) and \"assistant\\n\". Without thinking an "
             "empty think block follows: Special(THINK), \"\\n\\n\", Special(END_THINK), \"\\n\\n\". "
             "An assistant's message has two parts, reasoning, answer = split_reasoning(message). Up to "
             "last_question(messages), an index, only the answer stays. After it, a message that has reasoning, and "
             "the very last message in any case, is written as Special(THINK), \"\\n\", the reasoning without newlines "
             "around it, \"\\n\", Special(END_THINK), \"\\n\\n\", the answer without newlines before it.",
             ("Begin with user and system messages alone; the list of parts grows by five each time.",
              "Special(…) is what makes a token; the same name as plain text stays text. The content of a user is "
              "never made Special, or a user could end a turn.",
              "asked = last_question(messages); for i, message: the think block where i > asked and (reasoning or i == "
              "len(messages) - 1); after the loop the header; and the empty block if not thinking."),
             r"text|chat|token"),
    Exercise("kv_cache", "layers.py", "KVCache.write", "medium", 15,
             "`new` are the tensors of this layer's T new tokens, one for each of self.tensors (L, B, heads, capacity, "
             "size). Write each after the self.length tokens that are there, in place. Return the list of views of "
             "all tokens so far. Raise ValueError where they do not fit. self.length stays: the model moves it on when "
             "all layers have written.",
             ("self.tensors[0] holds keys, self.tensors[1] values. zip(self.tensors, new) pairs each with what is new.",
              "The new tokens take the slots self.length to end, with end = self.length + T; what is returned are the "
              "slots from 0 to end.",
              "tensor[layer, :, :, self.length:end] = part, and return [tensor[layer, :, :, :end] for …]"),
             r"cache"),
    Exercise("top_k_top_p", "generate.py", "top_k_top_p", "hard", 30,
             "The three rules of the docstring, one after the other. top_k None or 0, top_p None or 1, min_p None or 0 "
             "switch a rule off; top_k may be larger than V. Candidates that a rule drops have probability 0 or are "
             "absent; those that stay keep the probability that the softmax (over the top_k) gave them. float32. With "
             "a tiny temperature, such as 1e-37, nothing may overflow: subtract the largest logit first.",
             ("Scale, cut to top_k, softmax, then cut by top_p, then by min_p. `topk` sorts: that is what top_p needs "
              "too, so with top_p alone take all V.",
              "top_p: cumsum of the sorted probabilities, minus the probability itself, is what all likelier tokens "
              "have together. A token stays where this is below top_p. So the first always stays.",
              "probabilities.masked_fill(before >= top_p, 0); min_p: masked_fill(probabilities < min_p * "
              "probabilities.amax(-1, keepdim=True), 0). And return the ids in the same order as the probabilities."),
             r"generat|sampl"),
    Exercise("generate", "generate.py", "generate", "medium", 20,
             "The loop. prefill(model, unread, cache) gives the logits of what follows the prompt, step(model, token, "
             "cache) those of what follows one more token (1,). For count = 1, 2, ..., max_new_tokens: "
             "check_finite(logits, count), token = sampler(logits), which is (1,). A stop id ends it and is not "
             "yielded. Yield int(token). The last new token is never fed back: nobody asks what follows it.",
             ("One prefill before the loop; one step at the end of each round, except the last.",
              "Order inside: check, sample, stop?, yield, step. A token is yielded before the next is computed.",
              "if int(token) in stop_ids: return; yield int(token); if count < max_new_tokens: logits = step(model, "
              "token, cache)"),
             r"generat", cut=("logits = prefill", "for count in")),
)
