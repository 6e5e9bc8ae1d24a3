"""The exercises of deepseek_v3, in the order of its page. What is the same as in qwen3 is not taken out."""

from .exercises import EXTRA, Exercise

TASKS = (
    Exercise("latents", "mla.py", "Attention.forward", "hard", 25,
             "Make q_nope (B, H, T, N), q_rope (B, H, T, P) and latents (B, 1, T, R + P), as the picture above shows "
             "them. Queries: self.q_proj, or where self.q_lora_rank is not None self.q_a_proj, norm, self.q_b_proj; "
             "each head has its N values first, then its P. self.kv_a_proj_with_mqa gives R values for the latent, "
             "then P for the rotary key, one head for all. Only the latent is normed (self.kv_a_layernorm), only the "
             "P parts are rotated; where self.rope_interleave they go through `deinterleave` first.",
             ("Two separate paths: queries from q_*, latents from kv_a_*. Each is split into a part without position "
              "and a part with it.",
              "Queries: .unflatten(-1, (-1, N + P)).transpose(1, 2).split((N, P), -1). Keys: [:, None] makes the one "
              "head, .split((R, P), -1).",
              "deinterleave both rotary parts, rotate both, and torch.cat((self.kv_a_layernorm(c), k_rope), -1)."),
             r"latent", cut=("q = self.q_proj", "latents = torch.cat")),
    Exercise("expanded", "mla.py", "Attention.expanded", "medium", 20,
             "latents (B, 1, S, R + P) are c (R), then k_rope (P). self.kv_b_proj makes of c, for each head, a key "
             "part k_nope (N) and then a value (M). Each head's key is k_nope and then the k_rope that all share. "
             "self.sdpa does the rest, with keys and values (B, H, S, ·).",
             ("Split the latents; only c goes through self.kv_b_proj, whose H*(N + M) outputs are cut into heads.",
              "kv = self.kv_b_proj(c[:, 0]).unflatten(-1, (-1, N + M)).transpose(1, 2). k_rope.expand(-1, H, -1, -1) "
              "gives every head the shared key.",
              "k = cat((k_nope, k_rope.expand(…)), -1), q = cat((q_nope, q_rope), -1), in the same order; "
              "self.sdpa(q, k, v, mask)"),
             r"latent"),
    Exercise("absorbed", "mla.py", "Attention.absorbed", "hard", 25,
             "The same numbers, and no key or value is rebuilt. self.kv_b_proj.matrix(dtype) is (H*(N + M), R): for "
             "each head W_UK (N, R), then W_UV (M, R). Fold W_UK into the query; then the latents are the one key of "
             "all heads and their first R values the one value; at the end W_UV. self.each_head multiplies by a matrix "
             "for each head.",
             ("A key is [c, k_rope]. So the query must become [W_UKᵀ q_nope, q_rope], (B, H, T, R + P).",
              "matrix.view(-1, N + M, R).split((N, M), 1) gives W_UK (H, N, R) and W_UV (H, M, R). each_head(x, W) "
              "computes x Wᵀ: for W_UKᵀ q pass W_UK.mT.",
              "q = cat((self.each_head(q_nope, W_UK.mT), q_rope), -1); out = self.sdpa(q, latents, latents[..., :R], "
              "mask); self.each_head(out, W_UV)"),
             r"absor"),
    Exercise("deinterleave", "layers.py", "deinterleave", "easy", 5,
             "The last axis of x, in the order of the docstring.",
             ("Slices with a step.", "x[..., 0::2] are the values at even places.",
              "torch.cat((x[..., 0::2], …), dim=-1)"),
             r"rotary|rope|position"),
    Exercise("yarn", "yarn.py", "yarn", "hard", 30,
             "Make `frequencies` (N/2,), float32. For `times` turns within the trained length, pair_that_turns(times) "
             "= N ln(original_max_position_embeddings / (times * 2 pi)) / (2 ln theta) gives a pair j, not rounded. "
             "low belongs to beta_fast, high to beta_slow; where scaling.truncate, low is rounded down and high up. "
             "low is at least 0, high at most N - 1; where the two are equal, add 0.001 to high. A ramp goes from 0 at "
             "pair low to 1 at pair high, and stays 0 before and 1 after. Where it is 0 the frequency is 1/period, "
             "where it is 1 it is 1/(factor * period), and in between it is the blend of both. device=\"cpu\".",
             ("Low numbers of pairs are the fast ones. They keep their speed: their ramp is 0.",
              "ramp = ((torch.arange(N // 2, dtype=torch.float32, device=\"cpu\") - low) / (high - low)).clamp(0, 1)",
              "keep = 1 - ramp; frequencies = 1 / (scaling.factor * period) * (1 - keep) + 1 / period * keep"),
             r"yarn", cut=("def pair_that_turns", "frequencies =")),
    Exercise("softmax_scale", "mla.py", "softmax_scale", "easy", 10,
             "A Python float, of config.qk_nope_head_dim (N), config.qk_rope_head_dim (P) and config.rope_scaling, "
             "which may be None. mscale(factor, m) is imported from yarn.py; m is scaling.mscale_all_dim, and where "
             "that is None or 0 there is no factor.",
             ("A score is a dot product over N + P values.",
              "mscale belongs to the query and to the key, so it comes twice in the score.",
              "scale *= mscale(scaling.factor, scaling.mscale_all_dim) ** 2"),
             r"yarn|scale"),
    Exercise("router", "moe.py", "Router.forward", "hard", 30,
             "scores = sigmoid of self.logits(x), (n, E) float32. What chooses is scores + "
             "self.e_score_correction_bias; what weighs are the scores alone. With self.n_group > 1 the E experts form "
             "that many groups of neighbors. A group is worth the sum of its two best (with the bias). Only experts of "
             "the best self.topk_group groups can be chosen. The chosen scores are divided by their sum + 1e-20 if "
             "self.norm_topk_prob, and multiplied by self.routed_scaling_factor in any case. Return weights (n, A) "
             "float32, and ids (n, A).",
             ("Keep two tensors: `choice`, which only chooses, and `scores`, from which the weights are gathered.",
              "choice.unflatten(-1, (self.n_group, -1)).topk(2).values.sum(-1) is what the groups are worth. "
              "Experts of "
              "other groups get -inf and not 0: a bias may make all allowed numbers negative.",
              "topk_ids = choice.topk(self.num_experts_per_tok).indices; weights = scores.gather(1, topk_ids); divide "
              "by weights.sum(-1, keepdim=True) + 1e-20; times self.routed_scaling_factor"),
             r"router"),
    Exercise("bias_update", EXTRA, "bias_update", "easy", 10,
             "Three lines.",
             ("Count how often each expert was chosen, and compare with the mean of the counts.",
              "Only the direction matters: torch.sign. A busy expert's bias goes down.",
              "counts = torch.bincount(topk_ids.flatten(), minlength=len(bias)).float(); bias + speed * …sign()"),
             r"balanc"),
    Exercise("mtp_join", "model.py", "MTPLayer.join", "easy", 10,
             "embedded and hidden are (B, T, D): the embedding of token t+1, and the model's state at t. Norm each "
             "with its own norm (self.enorm, self.hnorm), put them side by side, and project with self.eh_proj.",
             ("Two vectors of D become one of 2 D, and that one of D.",
              "Read the docstring for the order.",
              "self.eh_proj(torch.cat((self.enorm(embedded), …), dim=-1))"),
             r"second token|mtp|multi-token"),
    Exercise("verify", "speculative.py", "verify", "hard", 25,
             "Return the id of the next token, an int: `drafted`, or another. Draw all random numbers from "
             "`generator`: torch.rand((), generator=generator), and draw(probabilities, generator), above, which needs "
             "no normalized probabilities but at least one above 0.",
             ("Two cases. Where the guess gave the draft no more than the truth does, keep it always. Where it gave "
              "more, keep it with probability truth/guess.",
              "After a rejection draw from what the guess lacked: (truth - guess), where that is positive.",
              "if chance * guess[drafted] < truth[drafted]: return drafted; missing = (truth - guess).clamp(min=0); "
              "and draw from it, or from truth where nothing is missing."),
             r"specul|accept|verif"),
)
