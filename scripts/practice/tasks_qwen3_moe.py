"""The exercises of qwen3_moe, in the order of its page. What is the same as in qwen3 is not taken out."""

from .exercises import EXTRA, Exercise

TASKS = (
    Exercise("router", "moe.py", "Router.forward", "easy", 15,
             "self.logits(x) gives (n, E). Probabilities are their softmax over all E experts, in float32. The best "
             "self.num_experts_per_tok of each token are chosen, the best first. If self.norm_topk_prob, the chosen "
             "weights are divided by their sum. Return weights (n, A) in the type of x, and ids (n, A).",
             ("The softmax comes before the choice: without norm_topk_prob the weights are shares of all E experts.",
              "Tensor.topk gives both values and indices. Normalize while the numbers are still float32.",
              "weights, topk_ids = self.logits(x).float().softmax(-1).topk(self.num_experts_per_tok); weights / "
              "weights.sum(-1, keepdim=True) if wanted; weights.to(x.dtype)"),
             r"router"),
    Exercise("mixture", EXTRA, "mixture", "easy", 10,
             "Two loops: over the tokens, and over the experts of each.",
             ("Token t has A experts: topk_ids[t, 0], topk_ids[t, 1], … The weight of the a-th is weights[t, a].",
              "The a in weights[t, a] is the place of the choice, not the number of the expert.",
              "y[t] += weights[t, a] * experts[int(topk_ids[t, a])](x[t:t + 1])[0]"),
             r"expert|dispatch"),
    Exercise("dispatch", "moe.py", "Experts.forward", "medium", 25,
             "The same numbers as the reference mixture, in another order: expert by expert. self[e] is expert e, and "
             "it runs once, on all tokens that chose it, or not at all. combine(results, weights), below, adds up the "
             "A results (n, A, D) of each token. The result has the type of x.",
             ("Turn the loops round: for each expert, which tokens chose it, and at which place of their choice?",
              "(topk_ids == e).nonzero(as_tuple=True) answers both: token (m,) and place (m,).",
              "results = x.new_zeros(*topk_ids.shape, x.shape[-1]); for e in topk_ids.unique().tolist(): … "
              "results[token, place] = self[e](x[token]); return combine(results, weights)"),
             r"dispatch|expert"),
    Exercise("moe_block", "moe.py", "SparseMoeBlock.forward", "easy", 10,
             "The router and the experts know tokens, (n, D) with n = B*T; x is (B, T, D). Where self.shared_expert is "
             "not None, its output for every token, times the sigmoid of self.shared_expert_gate, is added.",
             ("Flatten batch and time to n tokens, route, dispatch, and give the result the shape of x.",
              "self.gate(tokens) returns weights and topk_ids, in the order that self.experts wants them.",
              "y = self.experts(tokens, *self.gate(tokens)); y + self.shared_expert_gate(tokens).sigmoid() * "
              "self.shared_expert(tokens); y.view_as(x)"),
             r"shared|model|expert"),
    Exercise("balance_loss", EXTRA, "balance_loss", "medium", 10,
             "Without a loop over the tokens.",
             ("f is counted, so it has no gradient; P is a mean of probabilities, and has one.",
              "torch.bincount counts; minlength=E gives an expert that nobody chose its 0.",
              "f = torch.bincount(topk_ids.flatten(), minlength=E) / topk_ids.numel(); E * (f * "
              "probabilities.mean(0)).sum()"),
             r"balanc"),
)
