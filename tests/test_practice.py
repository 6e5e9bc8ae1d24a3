"""The workshop: solutions are right, usual mistakes are told in the right words, and what a learner writes never harms.

The wrong answers are pieces of the real body with something changed, or bodies of their own.
"""

import ast
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from scripts.practice import __main__ as command
from scripts.practice import exercises, folder, graft, judge, process, worker
from scripts.train import balance

ROOT = Path(__file__).parents[1]
ALL = [(package, name) for package in exercises.PACKAGES for name in exercises.of(package)]

# (package, exercise) -> [(words of the verdict, what stands in the real body, what stands there instead)]; a text alone
# instead of the two is a whole body.
WRONG = {
    ("qwen3", "rms_norm"): [
        ("after multiplying by the weight: first .to(x.dtype)", "self.weight * x32.to(x.dtype)",
         "(self.weight * x32).to(x.dtype)"),
        ("normalize after multiplying by the weight", "y = (x * self.weight).float()\n"
         "return (y / (y.pow(2).mean(-1, keepdim=True) + self.eps) ** 0.5).to(x.dtype)"),
        ("that is LayerNorm", "x32 = x.float()", "x32 = x.float() - x.float().mean(-1, keepdim=True)"),
        ("var subtracts the mean", "x32.square().mean(-1, keepdim=True)", "x32.var(-1, keepdim=True)"),
        ("self.eps is missing", " + self.eps", ""),
        ("added after the root", "x = x.float()\nreturn self.weight * (x / (x.square().mean(-1, keepdim=True).sqrt() + "
         "self.eps)).to(self.weight.dtype)"),
        ("the sum of squares", ".mean(", ".sum("),
        ("keepdim=True is missing", "mean(-1, keepdim=True)", "mean(-1)"),
        ("over the tokens", "mean(-1, keepdim=True)", "mean(-2, keepdim=True)"),
        ("self.weight is missing", "self.weight * ", ""),
        ("1 + weight, as Gemma", "self.weight * ", "(1 + self.weight) * "),
        ("the square root is missing", "torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)",
         "1 / (x32.square().mean(-1, keepdim=True) + self.eps)"),
        ("the squares overflow", "x32 = x.float()", "x32 = x"),
        ("returns float32 for x in float16", "x32.to(x.dtype)", "x32"),
        ("1e-6 is written into the code", "self.eps", "1e-6"),
        ("returns nothing", "return ", ""),
        ("it changes x", "x /= x.square().mean(-1, keepdim=True).sqrt()\nreturn self.weight * x"),
        ("the gradient for x is not", "x.float()", "x.detach().float()"),
        ("self.eps is added after the root: it belongs inside, to the mean square; and the mean runs over the tokens",
         "x = x.float()\nreturn self.weight * (x / (x.square().mean(-2, keepdim=True).sqrt() + self.eps)).to("
         "self.weight.dtype)"),
    ],
    ("qwen3", "inverse_frequencies"): [
        ("it has to be 2j/N", "torch.arange(0, N, 2, dtype", "torch.arange(0, N // 2, 1, dtype"),
        ("N frequencies: one for each pair", "torch.arange(0, N, 2, dtype", "torch.arange(0, N, dtype"),
        ("upside down", "(torch.arange", "(-torch.arange"),
        ("not divided by N", ' / N)', ")"),
        ("10,000 is written into the code", "config.rope_theta", "10000.0"),
        ('device="cpu"', ', device="cpu"', ""),
        ("the steps are 2/N", "period = config.rope_theta ** torch.linspace(0, 1, N // 2, device='cpu')"),
        ("`period` is not defined", "periods = 1"),
        ("2 pi", "period =", "period = 2 * torch.pi *"),
        ("j begins with 1", "torch.arange(0, N, 2, dtype", "torch.arange(2, N + 2, 2, dtype"),
        ("float64", "torch.float32", "torch.float64"),
    ],
    ("qwen3", "rotate"): [
        ("you turn neighbors", "x1, x2 = x[..., 0::2], x[..., 1::2]\n"
         "return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)"),
        ("you pair neighbors", "x.chunk(2, dim=-1)", "x[..., ::2], x[..., 1::2]"),
        ("turns backward", "x1 * cos - x2 * sin, x2 * cos + x1 * sin", "x1 * cos + x2 * sin, x2 * cos - x1 * sin"),
        ("the second half has a minus", "x2 * cos + x1 * sin", "x2 * cos - x1 * sin"),
        ("x1 is overwritten", "x1, x2 = x.chunk(2, dim=-1)\nx1 = x1 * cos - x2 * sin\nx2 = x2 * cos + x1 * sin\n"
         "return torch.cat((x1, x2), -1)"),
        ("cos and sin are exchanged", "x1, x2 =", "cos, sin = sin, cos\n    x1, x2 ="),
        ("the halves are exchanged", "torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin)",
         "torch.cat((x2 * cos + x1 * sin, x1 * cos - x2 * sin)"),
        ("side by side", "torch.cat", "torch.stack"),
        ("over the tokens", "x2 * cos + x1 * sin), dim=-1", "x2 * cos + x1 * sin), dim=-2"),
    ],
    ("qwen3", "sdpa"): [
        ("without the scale 1/sqrt(N)", " * self.scale", ""),
        ("the scores are divided by N", "* self.scale", "* self.scale ** 2"),
        ("your attention sees the future: token 0 changed when token 4 did: the mask is not used",
         "scores.masked_fill(~mask[..., None, :, :], -torch.inf)", "scores"),
        ("the mask is inverted", "~mask[..., None, :, :]", "mask[..., None, :, :]"),
        ("hidden scores become 0", "-torch.inf", "0"),
        ("a triangle of your own", "~mask[..., None, :, :]", "~torch.ones_like(scores, dtype=torch.bool).tril()"),
        ("over the queries", "softmax(-1)", "softmax(-2)"),
        ("repeat_interleave, not repeat", "k, v = k.repeat(1, q.shape[1] // k.shape[1], 1, 1), "
         "v.repeat(1, q.shape[1] // v.shape[1], 1, 1)\nscores = (q @ k.mT * self.scale).masked_fill(~mask, "
         "-torch.inf)\n"
         "return scores.softmax(-1) @ v"),
        ("exp overflows", "scores.float().softmax(-1)", "(scores.float().exp() / scores.float().exp().sum(-1, True))"),
        ("the weights are multiplied by the keys", "weights, v)", "weights, k)"),
        ("the softmax is missing", "scores.float().softmax(-1)",
         "scores.masked_fill(~mask[..., None, :, :], -torch.inf)"),
        ("layers.py, line ", ".flatten(1, 2)", ".flatten(1, 9)"),
        ("it needs one axis more", "mask[..., None, :, :]", "mask"),
        ("G query heads share one", "return ((q @ k.mT) * self.scale).masked_fill(~mask, -torch.inf).softmax(-1) @ v"),
        ("axes 1 and 2 exchanged|(B, T, H, N)", ".flatten(1, 2)", ".flatten(1, 2).transpose(1, 2)"),
    ],
    ("qwen3", "attention_mask"): [
        ("does not see itself", "key <= query", "key < query"),
        ("wrong way round: each query sees the future", "key <= query", "key >= query"),
        ("`first` is not used", "mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()\n"
         "return mask if padding is None else mask & (torch.arange(T) >= padding[:, :, None])"),
        ("counted from 0", "torch.arange(first, first + T, device=device)[:, None]",
         "torch.arange(T, device=device)[:, None]"),
        ("the padding is not used", "padding is not None", "False"),
        ("the first token after the padding is hidden", "key >= padding", "key > padding"),
        ("its softmax is NaN", "(mask | (key == query))", "mask"),
        ("the heads need an axis", "[:, None]  # (B, 1, T, S)", ""),
        ("wanted is bool", "return mask", "return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)"),
        ("made on the CPU, whatever", "device=device", "device='cpu'"),
        ("which comes later", "key <= query", "key <= query + 1"),
        ("mask is inverted", "return mask", "return ~mask"),
    ],
    ("qwen3", "attention"): [
        ("QK-Norm is missing", "self.q_norm(q)", "q", "self.k_norm(k)", "k"),
        ("self.k_norm is missing", "self.k_norm(k)", "k"),
        ("the keys go through self.q_norm", "self.k_norm(k)", "self.q_norm(k)"),
        ("norm first", "rotate(self.q_norm(q).transpose(1, 2), cos, sin)",
         "self.q_norm(rotate(q.transpose(1, 2), cos, sin))", "rotate(self.k_norm(k).transpose(1, 2), cos, sin)",
         "self.k_norm(rotate(k.transpose(1, 2), cos, sin))"),
        ("the rotation is missing", "rotate(self.q_norm(q).transpose(1, 2), cos, sin)",
         "self.q_norm(q).transpose(1, 2)",
         "rotate(self.k_norm(k).transpose(1, 2), cos, sin)", "self.k_norm(k).transpose(1, 2)"),
        ("the keys are not rotated", "rotate(self.k_norm(k).transpose(1, 2), cos, sin)",
         "self.k_norm(k).transpose(1, 2)"),
        ("joined wrongly", "out.transpose(1, 2).flatten(2)", "out.reshape(B, T, -1)"),
        ("o_proj is missing", "self.o_proj(out.transpose(1, 2).flatten(2))", "out.transpose(1, 2).flatten(2)"),
        ("keys first, then values", "cache.write(self.layer_idx, k, v)", "cache.write(self.layer_idx, v, k)[::-1]"),
        ("the cache is not used", "cache is not None", "False"),
        ("use self.layer_idx", "self.layer_idx, k", "0, k"),
        ("all tokens so far", "k, v = cache.write", "cache.write"),
        ("x is added", "return ", "return x + "),
        ("are rotated again", "            k, v = cache.write(self.layer_idx, k, v)",
         "            k, v = cache.write(self.layer_idx, k, v)\n            k = rotate(k, cos, sin)"),
        ("cut into heads first", "q = self.q_proj(x).view", "q = self.q_norm(self.q_proj(x)).view"),
        ("T is not in its place yet", "rotate(self.q_norm(q).transpose(1, 2), cos, sin)",
         "rotate(self.q_norm(q), cos, sin).transpose(1, 2)"),
        ("H*N need not be D", "flatten(2)", "reshape(x.shape)"),
        ("sees the future", ", v, mask)", ", v, torch.ones_like(mask))"),
        ("the values are rotated", "if cache", "v = rotate(v, cos, sin)\n        if cache"),
        ("once for each layer", "k, v = cache.write(self.layer_idx, k, v)",
         "k, v = cache.write(self.layer_idx, k, v); cache.length += T"),
        ("self.sdpa wants keys, then values", "self.sdpa(q, k, v, mask)", "self.sdpa(q, v, k, mask)"),
    ],
    ("qwen3", "mlp"): [
        ("wrong projection", "F.silu(self.gate_proj(x)) * self.up_proj(x)", "self.gate_proj(x) * "
                                                                            "F.silu(self.up_proj(x))"),
        ("silu is missing", "F.silu(self.gate_proj(x))", "self.gate_proj(x)"),
        ("this is relu", "F.silu", "F.relu"),
        ("this is gelu", "F.silu", "F.gelu"),
        ("the sigmoid", "F.silu", "torch.sigmoid"),
        ("added: multiply", ") * self", ") + self"),
        ("down_proj is missing", "self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))",
         "F.silu(self.gate_proj(x)) * self.up_proj(x)"),
        ("up_proj is missing", " * self.up_proj(x)", ""),
        ("silu comes after the product", "F.silu(self.gate_proj(x)) * self.up_proj(x)",
         "F.silu(self.gate_proj(x) * self.up_proj(x))"),
        ("line 224: AttributeError|AttributeError", "self.up_proj", "self.up"),
    ],
    ("qwen3", "layer"): [
        ("both steps: the norm comes after", "x = self.input_layernorm(x + self.self_attn(x, cos, sin, mask, cache))\n"
         "return self.post_attention_layernorm(x + self.mlp(x))"),
        ("the step of attention: x is not added", "x = x + self.self_attn", "x = self.self_attn"),
        ("the step of the MLP: x is not added", "x = x + self.mlp", "x = self.mlp"),
        ("the step of the MLP: the norm is missing", "self.mlp(self.post_attention_layernorm(x))", "self.mlp(x)"),
        ("its norm is post_attention_layernorm", "self.post_attention_layernorm", "self.input_layernorm"),
        ("from before attention", "return (x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)\n"
         "        + self.mlp(self.post_attention_layernorm(x)))"),
        ("whose part is lost", "y = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)\n"
         "return x + self.mlp(self.post_attention_layernorm(y))"),
        ("the normed x is added", "x = self.input_layernorm(x)\nx = x + self.self_attn(x, cos, sin, mask, cache)\n"
         "x = self.post_attention_layernorm(x)\nreturn x + self.mlp(x)"),
        ("the cache is not handed on", ", mask, cache)", ", mask, None)"),
        ("cos and sin are exchanged", "cos, sin, mask", "sin, cos, mask"),
    ],
    ("qwen3", "transformer"): [
        ("cache.length", "(cache.length, cache.padding) if cache is not None else (0, None)", "(0, None)"),
        ("the padding is forgotten|subtract cache.padding|positions count the padding",
         "positions = (positions - padding).clamp(min=0)", "pass"),
        ("the final norm is missing", "self.norm(x)", "x"),
        ("cache.length stays", "cache.length += T", "pass"),
        ("before all layers have written", "for layer in self.layers:",
         "if cache is not None:\n            cache.length += T\n        for layer in self.layers:",
         "        if cache is not None:\n            cache.length += T\n        return", "        return"),
        ("the last layer is left out", "in self.layers:", "in self.layers[:-1]:"),
        ("is the return inside the loop", "            x = layer(x, cos, sin, mask, cache)",
         "            x = layer(x, cos, sin, mask, cache)\n            break"),
        ("each layer reads the embedding", "x = layer(x, cos", "x = layer(self.embed_tokens(token_ids), cos"),
        ("as Gemma does", "self.embed_tokens(token_ids)", "self.embed_tokens(token_ids) * 12 ** 0.5"),
        ("the cache is not handed on", "mask, cache)\n", "mask, None)\n"),
        ("grows by 1", "cache.length += T", "cache.length += 1"),
        ("positions begin at 1", "torch.arange(first, first + T", "torch.arange(first + 1, first + T + 1"),
        ("two axes", "[None]  # (1, T)", ""),
        ("sees the future", "attention_mask(first, T, padding, device)",
         "torch.ones(T, first + T, dtype=torch.bool)"),
        ("both begin at cache.length", "attention_mask(first, T", "attention_mask(0, T"),
        ("runs after each layer", "x = layer(x, cos, sin, mask, cache)",
         "x = self.norm(layer(x, cos, sin, mask, cache))"),
    ],
    ("qwen3", "chat"): [
        ("stand there as text", "Special(IM_START), message", "IM_START, message", "Special(IM_END)", "IM_END",
         "Special(IM_START), \"assistant", "IM_START, \"assistant", "Special(THINK)", "THINK", "Special(END_THINK)",
         "END_THINK"),
        ("newline after the role", 'message["role"] + "\\n"', 'message["role"]', '"assistant\\n"', '"assistant"'),
        ("newline after <|im_end|>", 'Special(IM_END), "\\n"]', "Special(IM_END)]"),
        ("the header of the answer is missing", 'parts += [Special(IM_START), "assistant\\n"]', "pass"),
        ("the wrong way round", "if not thinking", "if thinking"),
        ("an empty think block follows", "if not thinking", "if False"),
        ("the reasoning|earlier|split_reasoning", "content = [answer]", "pass"),
        ("earlier reasoning is kept", "i > asked and (reasoning or i == len(messages) - 1)", "reasoning"),
        ("even if it is empty", "(reasoning or i == len(messages) - 1)", "reasoning"),
        ("could then end the turn", 'content = [message["content"]]', 'content = [Special(message["content"])]'),
        ("list of texts and Special", "return parts", "return parts and 7"),
        ("system messages are left out", "for i, message in enumerate(messages):",
         'for i, message in enumerate(messages):\n        if message["role"] == "system":\n            continue'),
        ("only newlines are", 'reasoning.strip("\\n")', "reasoning.strip()"),
        ("only newlines are", 'answer.lstrip("\\n")', "answer.strip()"),
        ("around a content are cut", '[message["content"]]', '[message["content"].strip()]'),
        ("where nothing was asked", "i > asked", "i >= asked"),
        ("make a new one", "reasoning, answer = split_reasoning(message)",
         "reasoning, answer = split_reasoning(message); message['content'] = answer"),
    ],
    ("qwen3", "kv_cache"): [
        ("over the old ones", "self.length:end] = part", ":new[0].shape[2]] = part"),
        ("only the new tokens come back", ":end] for tensor", "self.length:end] for tensor"),
        ("the whole capacity", "[tensor[layer, :, :, :end]", "[tensor[layer]"),
        ("self.length is moved on", "return", "self.length = end\n        return"),
        ("use `layer`", "tensor[layer, :, :, self.length", "tensor[0, :, :, self.length", "[tensor[layer", "[tensor[0"),
        ("of yours: compare length + T", "raise ValueError(", "str("),
        ("copies are returned", ":end] for", ":end].clone() for"),
        ("hand out views|torch.cat", "return [torch.cat((tensor[layer, :, :, :self.length], part), 2) "
         "for tensor, part in zip(self.tensors, new)]"),
        ("keys and values are exchanged", "zip(self.tensors, new)", "zip(self.tensors, new[::-1])"),
        ("exactly full is refused", "end > self.capacity", "end >= self.capacity"),
        ("returns nothing", "return [", "["),
    ],
    ("qwen3", "top_k_top_p"): [
        ("divide by it", "/ max(temperature, 1e-30)", "* temperature"),
        ("temperature is not used", "/ max(temperature, 1e-30)", ""),
        ("is dropped: it stays", "before >= top_p", "before + probabilities > top_p"),
        ("top_p is not used", "before >= top_p", "before > 2"),
        ("min_p is not used", "if min_p", "if False"),
        ("share of the likeliest", "min_p * probabilities.amax(-1, keepdim=True)", "min_p"),
        ("normalized again", "return probabilities, ids",
         "return probabilities / probabilities.sum(-1, keepdim=True), ids"),
        ("returns the ids that belong", "logits, ids = logits.topk", "logits, _ = logits.topk"),
        ("results are exchanged", "return probabilities, ids", "return ids, probabilities"),
        ("float32", "logits.float(), ", "logits, "),
        ("may be larger than V", "min(top_k or logits.shape[-1], logits.shape[-1])", "top_k or logits.shape[-1]"),
        ("a tiny temperature gives NaN", "(logits - logits.max(-1, keepdim=True).values) / max(temperature, 1e-30)",
         "logits / temperature"),
        ("the sum for top_p runs in the order of the ids", "if top_k or top_p < 1:", "if top_k:"),
        ("None switches|cannot be compared", "top_p = 1 if top_p is None else top_p", "pass"),
        ("< and not <=", "logits = logits.float()\nlogits = (logits - logits.amax(-1, True)) / temperature\n"
         "x, ids = logits.topk(min(top_k or 99, logits.shape[-1]))\np = x.softmax(-1)\nq = p\n"
         "if top_p is not None and top_p < 1:\n    q = q * (p.cumsum(-1) - p <= top_p)\n"
         "return q * (p >= (min_p or 0) * p[:, :1]), ids"),
        (">= and not >", "logits = logits.float()\nlogits = (logits - logits.amax(-1, True)) / temperature\n"
         "x, ids = logits.topk(min(top_k or 99, logits.shape[-1]))\np = x.softmax(-1)\nq = p\n"
         "if top_p is not None and top_p < 1:\n    q = q * (p.cumsum(-1) - p < top_p)\n"
         "return q * (p > min_p * p[:, :1]) if min_p else q, ids"),
        ("each row has its own", "logits = logits.float()\nlogits = (logits - logits.max()) / temperature\n"
         "x, ids = logits.topk(min(top_k or 99, logits.shape[-1]))\np = x.softmax(-1)\nq = p\n"
         "if top_p is not None and top_p < 1:\n    q = q * (p.cumsum(-1) - p < top_p)\n"
         "return q * (p >= (min_p or 0) * p[:, :1]), ids"),
        ("top_k 0 and None take all", "logits = logits.float()\n"
         "logits = (logits - logits.amax(-1, True)) / temperature\n"
         "x, ids = logits.topk(min(99 if top_k is None else top_k, logits.shape[-1]))\np = x.softmax(-1)\nq = p\n"
         "if top_p is not None and top_p < 1:\n    q = q * (p.cumsum(-1) - p < top_p)\n"
         "return q * (p >= (min_p or 0) * p[:, :1]), ids"),
    ],
    ("qwen3", "generate"): [
        ("the stop id is yielded", "            if int(token) in stop_ids:\n                return\n"
         "            yield int(token)", "            yield int(token)\n            if int(token) in stop_ids:\n"
         "                return"),
        ("stop ids do not stop it", "if int(token) in stop_ids", "if False"),
        ("never fed back", "logits = step(model, token, cache)", "pass"),
        ("nobody asks for", "if count < max_new_tokens:", "if True:"),
        ("whatever the temperature", "sampler(logits)", "logits.argmax(-1)"),
        ("one token too many", "max_new_tokens + 1):", "max_new_tokens + 2):", "if count < max_new_tokens:",
         "if count <= max_new_tokens:"),
        ("one token too few", "max_new_tokens + 1)", "max_new_tokens)"),
        ("check_finite", "check_finite(logits, count)", "pass"),
        ("all ids come at the end", "found = []\nlogits = prefill(model, unread, cache)\n"
         "for count in range(1, max_new_tokens + 1):\n    check_finite(logits, count)\n    token = sampler(logits)\n"
         "    if int(token) in stop_ids:\n        break\n    found.append(int(token))\n    if count < max_new_tokens:\n"
         "        logits = step(model, token, cache)\nyield from found"),
        ("yields a Tensor", "yield int(token)", "yield token"),
        ("`yield` each id", "yield int(token)", "print"),
        ("a stop id is skipped", "                return", "                continue"),
        ("`unread` is what", "prefill(model, unread, cache)", "prefill(model, torch.tensor([prompt_ids]), cache)"),
        ("a count that begins with 0", "check_finite(logits, count)", "check_finite(logits, count - 1)"),
        ("a tensor of shape (1,)", "step(model, token, cache)", "step(model, int(token), cache)"),
        ("a tensor of shape (1,)", "step(model, token, cache)", "step(model, token[None], cache)"),
    ],
    ("qwen3_moe", "router"): [
        ("add up to 1", "if self.norm_topk_prob:", "if True:"),
        ("softmax over all E", "weights, topk_ids = self.logits(x).float().topk(self.num_experts_per_tok)\n"
         "return weights.softmax(-1).to(x.dtype), topk_ids"),
        ("divided by their sum", "if self.norm_topk_prob:", "if False:"),
        ("DeepSeek-V3's router", ".softmax(-1)  # (n, E)", ".sigmoid()  # (n, E)"),
        ("softmax is missing", ".float().softmax(-1)", ".float()"),
        ("over the tokens", ".float().softmax(-1)", ".float().softmax(0)"),
        ("rounded too early|in bfloat16", ".float().softmax(-1)", ".softmax(-1)"),
        ("type of x", "weights.to(x.dtype), topk_ids", "weights, topk_ids"),
        ("2 experts are chosen always", "topk(self.num_experts_per_tok)", "topk(2)"),
        ("least likely", "topk(self.num_experts_per_tok)", "topk(self.num_experts_per_tok, largest=False)"),
        ("exchanged", "weights.to(x.dtype), topk_ids", "topk_ids, weights.to(x.dtype)"),
        ("wrong way round", "if self.norm_topk_prob", "if not self.norm_topk_prob"),
        ("computed anew in float32", "self.logits(x).float()", "(x.float() @ self.weight.float().T)"),
    ],
    ("qwen3_moe", "mixture"): [
        ("weights are not used", "weights[t, a] * ", ""),
        ("the last choice alone", "y[t] +=", "y[t] ="),
        ("only the first choice", "range(topk_ids.shape[1])", "range(1)"),
        ("weight of the first choice", "weights[t, a]", "weights[t, 0]"),
        ("is taken for the expert", "int(topk_ids[t, a])", "a"),
        ("through all experts", "for t in range(len(x)):\n    for expert in experts:\n"
         "        y = torch.zeros_like(x) if t == 0 and expert is experts[0] else y\n        y[t] += expert(x[t])\n"
         "return y"),
        ("multiplies the input", "weights[t, a] * expert(x[t:t + 1])[0]", "expert(weights[t, a] * x[t:t + 1])[0]"),
        ("divided by A", "return y", "return y / topk_ids.shape[1]"),
        ("x is added", "torch.zeros_like(x)", "x.clone()"),
        ("it changes x", "torch.zeros_like(x)", "x"),
        ("through all experts", "return sum(weights[:, :1] * expert(x) for expert in experts)"),
    ],
    ("qwen3_moe", "dispatch"): [
        ("weights are not used", "combine(results, weights)", "results.sum(1)"),
        ("works for", "y = x * 0\nfor e in range(len(self)):\n    out = self[e](x)\n"
         "    y = y + out * ((topk_ids == e) * weights).sum(1, keepdim=True).to(x.dtype)\nreturn y"),
        ("expert 0 runs 7 times for 7 tokens", "y = x * 0\nfor t in range(len(x)):\n"
         "    for a in range(topk_ids.shape[1]):\n        y[t] += weights[t, a] * self[int(topk_ids[t, a])](x[t:t + "
         "1])[0]\n"
         "return y"),
        ("so that one choice alone counts", "y = torch.zeros_like(x)\nfor e in topk_ids.unique().tolist():\n"
         "    token, place = (topk_ids == e).nonzero(as_tuple=True)\n    results = self[e](x[token])\n"
         "    y[token] = results * weights[token, place][:, None]\nreturn y"),
        ("weight of the first choice", "y = torch.zeros_like(x)\nfor e in topk_ids.unique().tolist():\n"
         "    token, place = (topk_ids == e).nonzero(as_tuple=True)\n"
         "    y[token] += self[e](x[token]) * weights[token, 0][:, None]\nreturn y"),
        ("only the first choice", "token, place = (topk_ids == e)", "token, place = (topk_ids[:, :1] == e)"),
        ("weights of token 0", "combine(results, weights)", "combine(results, weights[:1])"),
        ("which no token chose", "if torch.is_grad_enabled():", "if True:"),
        ("result|expert", "results = x.new_zeros(*topk_ids.shape, x.shape[-1])\nfor e in range(len(self) - 1):\n"
         "    token, place = torch.where(topk_ids == e)\n    if len(token):\n"
         "        results[token, place] = self[e](x[token])\nreturn combine(results, weights)"),
    ],
    ("qwen3_moe", "moe_block"): [
        ("the shared expert is left out", "self.shared_expert is not None", "False"),
        ("without its gate", "self.shared_expert_gate(tokens).sigmoid() * ", ""),
        ("the sigmoid on the shared", ".sigmoid()", ""),
        ("batch and time are exchanged", "x.flatten(0, 1)", "x.transpose(0, 1).flatten(0, 1)"),
        ("it is (n, D)|is (n, D)", "y.view_as(x)", "y"),
        ("x is added", "return y", "return x + y"),
        ("are lost", "y = y + self", "y = self"),
        ("where the config has none", "if self.shared_expert is not None", "if True"),
        ("tokens, weights and topk_ids", "*self.gate(tokens)", "self.gate(tokens)"),
    ],
    ("qwen3_moe", "balance_loss"): [
        ("the factor E", "return E * ", "return "),
        ("divide by the number of choices", "topk_ids.numel()", "len(topk_ids)"),
        ("f_e is a count", " / topk_ids.numel()", ""),
        ("P_e is a sum", "probabilities.mean(0)", "probabilities.sum(0)"),
        ("minlength=E", ", minlength=E", ""),
        ("no gradient flows", "probabilities.mean(0)", "probabilities.detach().mean(0)"),
        ("only the first choice", "f = torch.bincount(topk_ids[:, 0], minlength=probabilities.shape[1]) / "
                                  "len(topk_ids)\n"
         "return probabilities.shape[1] * (f * probabilities.mean(0)).sum()"),
        ("a mean stands in place of the sum", ".sum()", ".mean()"),
        ("the mean over the tokens, axis 0", "probabilities.mean(0)", "probabilities.mean(1)"),
        ("as they are", "p = probabilities.gather(-1, topk_ids)\np = p / p.sum(-1, keepdim=True)\n"
         "p, E = torch.zeros_like(probabilities).scatter(-1, topk_ids, p), probabilities.shape[1]\n"
         "return E * (torch.bincount(topk_ids.flatten(), minlength=E) / topk_ids.numel() * p.mean(0)).sum()"),
        ("a tensor without dimensions", ".sum()", ".sum().item()"),
        ("topk_ids.flatten()", "topk_ids.flatten()", "topk_ids"),
    ],
    ("deepseek_v3", "latents"): [
        ("nothing is rotated", "q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)", "pass"),
        ("k_rope is not rotated", ", rotate(k_rope, cos, sin)", ", k_rope"),
        ("deinterleave is missing", "if self.rope_interleave", "if False"),
        ("applied always", "if self.rope_interleave", "if True"),
        ("q_rope does not go through", "deinterleave(q_rope), deinterleave", "q_rope, deinterleave"),
        ("before it, so that", "        if self.rope_interleave:\n            q_rope, k_rope = deinterleave(q_rope), "
         "deinterleave(k_rope)\n        q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)\n",
         "        q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)\n"
         "        if self.rope_interleave:\n            q_rope, k_rope = deinterleave(q_rope), deinterleave(k_rope)\n"),
        ("the latent is not normed", "self.kv_a_layernorm(c)", "c"),
        ("q_a_layernorm is missing", "self.q_a_layernorm(self.q_a_proj(x))", "self.q_a_proj(x)"),
        ("wrong order", "(self.kv_a_layernorm(c), k_rope)", "(k_rope, self.kv_a_layernorm(c))"),
        ("mixes tokens", "q.unflatten(-1, (-1, N + P)).transpose(1, 2)",
         "q.reshape(len(x), -1, x.shape[1], N + P)"),
        ("give them these names", "latents = torch.cat", "latent = torch.cat"),
        ("R values of the latent first", "c, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split((R, P), -1)",
         "k_rope, c = self.kv_a_proj_with_mqa(x)[:, None].split((P, R), -1)"),
        ("there is no q_proj where", "self.q_lora_rank is None", "True"),
    ],
    ("deepseek_v3", "expanded"): [
        ("key part (N) first", "k_nope, v = kv.split((N, M), -1)", "v, k_nope = kv.split((M, N), -1)"),
        ("different orders", "torch.cat((q_nope, q_rope), -1)", "torch.cat((q_rope, q_nope), -1)"),
        ("expand it to all", "k_rope.expand(-1, kv.shape[1], -1, -1)", "k_rope"),
        ("mixes tokens", "unflatten(-1, (-1, N + M)).transpose(1, 2)", "reshape(len(c), -1, c.shape[2], N + M)"),
        ("R values of c alone", "self.kv_b_proj(c[:, 0])", "self.kv_b_proj(latents[:, 0])"),
        ("rotary part is missing", "self.sdpa(torch.cat((q_nope, q_rope), -1), k, v, mask)",
         "self.sdpa(q_nope, k_nope, v, mask)"),
        ("sees the future|the mask is not used", ", v, mask)", ", v, torch.ones_like(mask))"),
        ("normed again", "c[:, 0]", "self.kv_a_layernorm(c[:, 0])"),
        ("self.absorbed computed them", "return self.absorbed(q_nope, q_rope, latents, mask)"),
        ("also has the factor of YaRN", "N, R = self.qk_nope_head_dim, self.kv_lora_rank\n"
         "kv = self.kv_b_proj(latents[:, 0, :, :R]).unflatten(-1, (q_nope.shape[1], -1)).transpose(1, 2)\n"
         "s = q_nope @ kv[..., :N].mT + q_rope @ latents[..., R:].mT\n"
         "s = (s * (N + self.qk_rope_head_dim) ** -0.5).masked_fill(~mask, -torch.inf)\n"
         "return s.float().softmax(-1).to(s.dtype) @ kv[..., N:]"),
    ],
    ("deepseek_v3", "absorbed"): [
        ("W_UK.mT", "W_UK.mT", "W_UK"),
        ("W_UV is missing", "return self.each_head(out, W_UV)", "return out"),
        ("rebuilds keys and values", "return self.expanded(q_nope, q_rope, latents, mask)"),
        ("key part (N) first", "W_UK, W_UV = self.kv_b_proj.matrix(latents.dtype).view(-1, N + M, R).split((N, M), 1)",
         "W_UV, W_UK = self.kv_b_proj.matrix(latents.dtype).view(-1, N + M, R).split((M, N), 1)"),
        ("rotary part is missing", "q_rope), -1)", "q_rope * 0), -1)"),
        ("cut wrongly", ".view(-1, N + M, R).split((N, M), 1)",
         ".view(N + M, -1, R).transpose(0, 1).split((N, M), 1)"),
        ("split before it is cut into heads", "W_UK, W_UV = self.kv_b_proj.matrix(latents.dtype).view(-1, N + M, R)."
         "split((N, M), 1)", "H = q_nope.shape[1]\n        W = self.kv_b_proj.matrix(latents.dtype)\n"
         "        W_UK, W_UV = W[:H * N].view(H, N, R), W[H * N:].view(H, M, R)"),
        ("the end of the latents", "latents[..., :R]", "latents[..., -R:]"),
    ],
    ("deepseek_v3", "deinterleave"): [
        ("odd places come first", "x[..., 0::2], x[..., 1::2]", "x[..., 1::2], x[..., 0::2]"),
        ("this is the inverse", "return torch.stack(x.chunk(2, -1), -1).flatten(-2)"),
        ("the halves are exchanged", "return torch.cat(x.chunk(2, -1)[::-1], -1)"),
        ("the order is unchanged", "return x"),
        ("this is the inverse|order is unchanged", "return torch.stack((x[..., 0::2], x[..., 1::2]), -1).flatten(-2)"),
        ("over the tokens", "dim=-1", "dim=-2"),
        ("there is a minus", "x[..., 1::2]", "-x[..., 1::2]"),
        ("only the even places", "return x[..., ::2]"),
    ],
    ("deepseek_v3", "yarn"): [
        ("upside down", "keep = 1 - ramp", "keep = ramp"),
        ("beta_fast and beta_slow are exchanged", "pair_that_turns(scaling.beta_fast), pair_that_turns("
         "scaling.beta_slow)", "pair_that_turns(scaling.beta_slow), pair_that_turns(scaling.beta_fast)"),
        ("clamp(0, 1)", ".clamp(0, 1)", ""),
        ("down and up, where", "if scaling.truncate", "if False"),
        ("only where scaling.truncate", "if scaling.truncate", "if True"),
        ("2 pi is missing", "(times * 2 * math.pi)", "times"),
        ("plain interpolation", "keep = 1 - ramp", "keep = 0 * ramp"),
        ("periods are blended", "1 / (scaling.factor * period) * (1 - keep) + 1 / period * keep",
         "1 / (scaling.factor * period * (1 - keep) + period * keep)"),
        ("divides by zero", "high += 0.001 if low == high else 0", "pass"),
        ('device="cpu"', ', device="cpu"', ""),
        ("multiplied by the factor", "1 / (scaling.factor * period)", "scaling.factor / period"),
        ("give the result that name", "frequencies = 1", "result = 1"),
        ("max(low, 0)", "max(low, 0)", "low"),
        ("min(high, N - 1)", "min(high, N - 1)", "high"),
        ("on the meta device the numbers are lost", ', device="cpu"', ""),
    ],
    ("deepseek_v3", "softmax_scale"): [
        ("N values: a score", " + config.qk_rope_head_dim", ""),
        ("mscale comes once", " ** 2", ""),
        ("mscale² is missing", "if scaling and", "if False and"),
        ("may be None", "if scaling and scaling", "if scaling"),
        ("there is no factor", "if scaling and scaling.mscale_all_dim:", "if scaling:", "scaling.mscale_all_dim) ** 2",
         "scaling.mscale_all_dim or 1) ** 2"),
        ("scaling.mscale is used", "mscale(scaling.factor, scaling.mscale_all_dim)", "mscale(scaling.factor, "
         "scaling.mscale)"),
        ("upside down", "** -0.5", "** 0.5"),
        ("a Python float", "return scale", "return torch.tensor(scale)"),
        ("mscale_all_dim alone decides", "n = config.qk_nope_head_dim + config.qk_rope_head_dim\n"
         "s = config.rope_scaling\nm = mscale(s.factor, s.mscale_all_dim) if s and s.mscale and s.mscale_all_dim "
         "else 1.0\nreturn m * m / n ** 0.5"),
        ("the square is taken of everything", "n = config.qk_nope_head_dim + config.qk_rope_head_dim\n"
         "s = config.rope_scaling\nif s and s.mscale_all_dim:\n"
         "    return (mscale(s.factor, s.mscale_all_dim) / n ** 0.5) ** 2\nreturn 1 / n ** 0.5"),
        ("mscale_all_dim may be None", "n = config.qk_nope_head_dim + config.qk_rope_head_dim\n"
         "s = config.rope_scaling\nm = mscale(s.factor, s.mscale_all_dim) if s else 1.0\nreturn m * m / n ** 0.5"),
        ("in this order", "n = config.qk_nope_head_dim + config.qk_rope_head_dim\ns = config.rope_scaling\n"
         "m = mscale(s.mscale_all_dim, s.factor) if s and s.mscale_all_dim else 1.0\nreturn m * m / n ** 0.5"),
    ],
    ("deepseek_v3", "router"): [
        ("the bias weighs too", "scores.gather(1, topk_ids)", "(scores + self.e_score_correction_bias).gather(1, "
         "topk_ids)"),
        ("the bias is not used", "scores + self.e_score_correction_bias", "scores"),
        ("in place of the sigmoid", ".sigmoid()", ".softmax(-1)"),
        ("routed_scaling_factor is missing", " * self.routed_scaling_factor", ""),
        ("divided by their sum", "if self.norm_topk_prob", "if False"),
        ("only where self.norm_topk_prob", "if self.norm_topk_prob", "if True"),
        ("by its best expert", "groups.topk(2).values.sum(-1)", "groups.amax(-1)"),
        ("0 wins", "-torch.inf", "0.0"),
        ("the groups are not used", "if self.n_group > 1", "if False"),
        ("float32, whatever x is|they stay float32", "return weights * self.routed_scaling_factor",
         "return (weights * self.routed_scaling_factor).to(x.dtype)"),
        ("before the sigmoid", "self.logits(x).sigmoid()", "(self.logits(x) + self.e_score_correction_bias).sigmoid()",
         "scores + self.e_score_correction_bias", "scores"),
        ("the sum + 1e-20", " + 1e-20", ""),
    ],
    ("deepseek_v3", "bias_update"): [
        ("wrong way round", "counts.mean() - counts", "counts - counts.mean()"),
        ("only its direction counts", ".sign()", ""),
        ("compared with n/E", "counts.mean()", "len(topk_ids) / len(bias)"),
        ("only the first choice", "topk_ids.flatten()", "topk_ids[:, 0]"),
        ("minlength=len(bias)", ", minlength=len(bias)", ""),
        ("it changes bias", "counts = torch.bincount(topk_ids.flatten(), minlength=len(bias)).float()\n"
         "bias += speed * (counts.mean() - counts).sign()\nreturn bias"),
        ("`speed` is not used", "speed * ", ""),
        ("returns nothing", "return bias", "bias"),
        ("/ and not //", "loads = torch.bincount(topk_ids.flatten(), minlength=len(bias))\n"
         "return bias + speed * (topk_ids.numel() // len(bias) - loads).sign()"),
        ("of all E, those with 0 too", "loads = torch.bincount(topk_ids.flatten(), minlength=len(bias)).float()\n"
         "return bias + speed * (loads[loads > 0].mean() - loads).sign()"),
        ("topk_ids.flatten()", "loads = torch.bincount(topk_ids, minlength=len(bias)).float()\n"
         "return bias + speed * (loads.mean() - loads).sign()"),
    ],
    ("deepseek_v3", "mtp_join"): [
        ("as in eq. 21", "self.enorm(embedded), self.hnorm(hidden)", "self.hnorm(hidden), self.enorm(embedded)"),
        ("both norms are missing", "self.enorm(embedded), self.hnorm(hidden)", "embedded, hidden"),
        ("self.hnorm is missing", "self.hnorm(hidden)", "hidden"),
        ("norms are exchanged", "self.enorm(embedded), self.hnorm(hidden)", "self.hnorm(embedded), self.enorm(hidden)"),
        ("self.eh_proj is missing", "self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))",
         "torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)"),
        ("2 D values", "torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)",
         "self.enorm(embedded) + self.hnorm(hidden)"),
        ("the two are added", "return self.enorm(embedded) + self.hnorm(hidden)"),
        ("the state is added", "return ", "return hidden + "),
    ],
    ("deepseek_v3", "verify"): [
        ("always kept", "chance * guess[drafted] < truth[drafted]", "True"),
        ("no draft is used", "return draw(truth, generator)"),
        ("upside down", "chance * guess[drafted] < truth[drafted]", "chance * truth[drafted] < guess[drafted]"),
        ("drawn from the truth", "missing if missing.any() else truth", "truth"),
        ("clamp at 0|clamp (truth - guess)", ".clamp(min=0)", ".abs()"),
        ("draw from the truth then", "missing if missing.any() else truth", "missing",
         "chance * guess[drafted] < truth[drafted]", "chance * guess[drafted] < truth[drafted] * 0.999"),
        ("kept only where truth >= guess", "chance * guess[drafted] < truth[drafted]",
         "guess[drafted] <= truth[drafted]"),
        ("without the generator", "torch.rand((), generator=generator, device=generator.device)", "torch.rand(())"),
        ("clamp (truth - guess)", ".clamp(min=0)", ""),
        ("an int is wanted", "return drafted", "return torch.tensor(drafted)"),
        ("the draft is kept with probability truth", "chance * guess[drafted] < truth[drafted]",
         "chance < truth[drafted]"),
        ("drawn from `generator`", "import random\nif random.random() * guess[drafted] < truth[drafted]:\n"
         "    return drafted\nreturn draw((truth - guess).clamp(min=0), generator)"),
        ("it changes truth", "if torch.rand((), generator=generator) * guess[drafted] < truth[drafted]:\n"
         "    return drafted\ntruth -= guess\nreturn draw(truth.clamp(min=0), generator)"),
    ],
}

# Right ones in other words.
RIGHT = {
    ("qwen3", "rms_norm"): ["y = x.to(torch.float32)\nr = (y ** 2).mean(dim=-1, keepdim=True) + self.eps\n"
                            "return self.weight * (y / torch.sqrt(r)).to(x.dtype)",
                            "y = x.float()\ny = y * (y.pow(2).sum(-1, True) / y.shape[-1] + self.eps).pow(-0.5)\n"
                            "return y.type_as(x) * self.weight"],
    ("qwen3", "inverse_frequencies"): ["period = torch.tensor([config.rope_theta ** (2 * j / N) for j in range(N // "
                                       "2)],"
                                       " device='cpu')"],
    ("qwen3", "rotate"): ["half = x.shape[-1] // 2\nother = torch.cat((-x[..., half:], x[..., :half]), -1)\n"
                          "return x * torch.cat((cos, cos), -1) + other * torch.cat((sin, sin), -1)"],
    ("qwen3", "sdpa"): ["G = q.shape[1] // k.shape[1]\nk, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)\n"
                        "s = (q * self.scale) @ k.transpose(-1, -2)\ns = s.masked_fill(mask.logical_not(), -1e30)\n"
                        "s = s.float() - s.float().amax(-1, keepdim=True)\ne = s.exp()\n"
                        "return (e / e.sum(-1, keepdim=True)).to(q.dtype) @ v",
                        "return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, "
                        "enable_gqa=True)"],
    ("qwen3", "attention_mask"): ["S = first + T\nmask = torch.ones(T, S, dtype=torch.bool, "
                                  "device=device).tril(first)\n"
                                  "if padding is not None:\n    seen = torch.arange(S, device=device) >= padding\n"
                                  "    own = torch.eye(S, dtype=torch.bool, device=device)[first:]\n"
                                  "    mask = (mask & seen[:, None, None, :]) | own\nreturn mask"],
    ("qwen3", "attention"): ["B, T, _ = x.shape\nN = self.head_dim\nq = self.q_proj(x).reshape(B, T, -1, N)\n"
                             "q = rotate(self.q_norm(q.transpose(1, 2)), cos, sin)\n"
                             "k = rotate(self.k_norm(self.k_proj(x).reshape(B, T, -1, N).transpose(1, 2)), cos, sin)\n"
                             "v = self.v_proj(x).reshape(B, T, -1, N).permute(0, 2, 1, 3)\nif cache:\n"
                             "    k, v = cache.write(self.layer_idx, k, v)\n"
                             "return self.o_proj(self.sdpa(q, k, v, mask).permute(0, 2, 1, 3).reshape(B, T, -1))"],
    ("qwen3", "mlp"): ["g = self.gate_proj(x)\nreturn self.down_proj(g * torch.sigmoid(g) * self.up_proj(x))"],
    ("qwen3", "layer"): ["h = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)\n"
                         "return self.mlp(self.post_attention_layernorm(h)) + h"],
    ("qwen3", "transformer"): ["B, T = token_ids.shape\nfirst = 0 if cache is None else cache.length\n"
                               "padding = None if cache is None else cache.padding\n"
                               "positions = torch.arange(first, first + T).unsqueeze(0)\nif padding is not None:\n"
                               "    positions = positions - padding\nh = self.embed_tokens(token_ids)\n"
                               "cos, sin = self.rotary_emb(positions, h.dtype)\nfor layer in self.layers:\n"
                               "    h = layer(h, cos, sin, attention_mask(first, T, padding, h.device), cache)\n"
                               "if cache is not None:\n    cache.length = first + T\nreturn self.norm(h)"],
    ("qwen3", "kv_cache"): ["n, T = self.length, new[0].shape[-2]\nif n + T > self.tensors[0].shape[-2]:\n"
                            "    raise ValueError('full')\nout = []\nfor i in range(len(new)):\n"
                            "    self.tensors[i][layer].narrow(2, n, T).copy_(new[i])\n"
                            "    out.append(self.tensors[i][layer].narrow(2, 0, n + T))\nreturn tuple(out)"],
    ("qwen3", "top_k_top_p"): ["x = logits.float()\nx = (x - x.amax(-1, keepdim=True)) / temperature\n"
                               "x, ids = x.sort(descending=True)\nk = top_k or x.shape[-1]\nx, ids = x[:, :k], "
                               "ids[:, :k]\n"
                               "p = x.softmax(-1)\nkeep = torch.ones_like(p, dtype=torch.bool)\n"
                               "if top_p is not None and top_p < 1:\n    keep &= p.cumsum(-1) - p < top_p\nif min_p:\n"
                               "    keep &= p >= min_p * p[:, :1]\nreturn torch.where(keep, p, 0.0), ids"],
    ("qwen3", "generate"): ["logits, count = prefill(model, unread, cache), 0\nwhile count < max_new_tokens:\n"
                            "    count += 1\n    check_finite(logits, count)\n    token = sampler(logits)\n"
                            "    id = token.item()\n    if id in stop_ids:\n        break\n    yield id\n"
                            "    if count != max_new_tokens:\n        logits = decode(model, token, cache)"],
    ("qwen3_moe", "router"): ["p = torch.softmax(self.logits(x), dim=-1, dtype=torch.float32)\n"
                              "w, i = torch.topk(p, self.num_experts_per_tok, dim=-1)\nif self.norm_topk_prob:\n"
                              "    w /= w.sum(dim=-1, keepdim=True)\nreturn w.to(x.dtype), i",
                              "p = self.logits(x).float().softmax(-1)\nw, i = p.sort(-1, descending=True)\n"
                              "w, i = (one[:, :self.num_experts_per_tok] for one in (w, i))\n"
                              "return (w / w.sum(-1, True) if self.norm_topk_prob else w).to(x.dtype), i"],
    ("qwen3_moe", "mixture"): ["rows = []\nfor t, token in enumerate(x):\n    rows.append(sum(w * experts[e](token) "
                               "for w, e "
                               "in zip(weights[t], topk_ids[t].tolist())))\nreturn torch.stack(rows)"],
    ("qwen3_moe", "dispatch"): ["y = torch.zeros_like(x)\nfor e, expert in enumerate(self):\n"
                                "    token, place = torch.where(topk_ids == e)\n    if len(token):\n"
                                "        y.index_add_(0, token, expert(x[token]) * weights[token, place, None])\n"
                                "return y"],
    ("qwen3_moe", "moe_block"): ["B, T, D = x.shape\nh = x.reshape(-1, D)\nw, i = self.gate(h)\n"
                                 "out = self.experts(h, w, i)\nif self.shared_expert:\n"
                                 "    out = out + torch.sigmoid(self.shared_expert_gate(h)) * self.shared_expert(h)\n"
                                 "return out.reshape(B, T, D)"],
    ("qwen3_moe", "balance_loss"): ["n, E = probabilities.shape\n"
                                    "f = torch.nn.functional.one_hot(topk_ids, E).sum(1).float().mean(0)\n"
                                    "return E / topk_ids.shape[1] * f @ probabilities.mean(0)"],
    ("deepseek_v3", "latents"): ["q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.q_lora_rank else "
                                 "self.q_proj(x)\nq = q.view(x.shape[0], x.shape[1], -1, N + P).transpose(1, 2)\n"
                                 "q_nope, q_rope = q[..., :N], q[..., N:]\nkv = self.kv_a_proj_with_mqa(x)\n"
                                 "k_rope = kv[..., None, R:].transpose(1, 2)\nif self.rope_interleave:\n"
                                 "    q_rope, k_rope = deinterleave(q_rope), deinterleave(k_rope)\n"
                                 "q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)\n"
                                 "latents = torch.cat((self.kv_a_layernorm(kv[..., :R]).unsqueeze(1), k_rope), -1)"],
    ("deepseek_v3", "expanded"): ["B, H, T, N = q_nope.shape\nR, M = self.kv_lora_rank, self.v_head_dim\n"
                                  "c, r = latents[..., :R], latents[..., R:]\n"
                                  "kv = self.kv_b_proj(c).view(B, -1, H, N + M).transpose(1, 2)\n"
                                  "k = torch.cat((kv[..., :N], r.repeat(1, H, 1, 1)), -1)\n"
                                  "return self.sdpa(torch.cat((q_nope, q_rope), -1), k, kv[..., N:], mask)"],
    ("deepseek_v3", "absorbed"): ["N, R = self.qk_nope_head_dim, self.kv_lora_rank\n"
                                  "W = self.kv_b_proj.weight.view(q_nope.shape[1], -1, R)\n"
                                  "q = q_nope @ W[:, :N]\nc, r = latents[..., :R], latents[..., R:]\n"
                                  "s = (q @ c.mT + q_rope @ r.mT) * self.scale\n"
                                  "a = s.masked_fill(~mask, float('-inf')).float().softmax(-1).to(c.dtype)\n"
                                  "return (a @ c) @ W[:, N:].mT"],
    ("deepseek_v3", "deinterleave"): ["return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)"],
    ("deepseek_v3", "softmax_scale"): ["n = config.qk_nope_head_dim + config.qk_rope_head_dim\ns = "
                                       "config.rope_scaling\n"
                                       "m = 1.0\nif s is not None and s.mscale_all_dim:\n"
                                       "    m = mscale(s.factor, s.mscale_all_dim)\nreturn m * m / n ** 0.5"],
    ("deepseek_v3", "router"): ["s = torch.sigmoid(self.logits(x))\nc = s + self.e_score_correction_bias\nn, E = "
                                "s.shape\n"
                                "G = self.n_group\nif G > 1:\n    g = c.view(n, G, E // G)\n"
                                "    best = g.sort(-1, descending=True).values[..., :2].sum(-1)\n"
                                "    keep = torch.zeros(n, G, dtype=torch.bool)\n"
                                "    keep.scatter_(1, best.topk(self.topk_group).indices, True)\n"
                                "    c = c.masked_fill(~keep.repeat_interleave(E // G, 1), float('-inf'))\n"
                                "i = c.argsort(-1, descending=True)[:, :self.num_experts_per_tok]\nw = s.gather(1, i)\n"
                                "if self.norm_topk_prob:\n    w = w / (w.sum(1, True) + 1e-20)\n"
                                "return self.routed_scaling_factor * w, i"],
    ("deepseek_v3", "bias_update"): ["load = torch.zeros(len(bias)).index_add_(0, topk_ids.reshape(-1), "
                                     "torch.ones(topk_ids.numel()))\nerror = load.mean() - load\n"
                                     "return bias + torch.sign(error) * speed"],
    ("deepseek_v3", "mtp_join"): ["x = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=2)\n"
                                  "return self.eh_proj(x)"],
    ("deepseek_v3", "verify"): ["p, q = truth[drafted], guess[drafted]\n"
                                "if torch.rand(1, generator=generator).item() <= min(1.0, (p / q).item()):\n"
                                "    return drafted\nrest = torch.relu(truth - guess)\nif rest.sum() == 0:\n"
                                "    rest = truth\nreturn draw(rest / rest.sum(), generator)"],
}


@pytest.fixture(autouse=True)
def less_patience(monkeypatch):
    """Three mistakes at the same time are looked for in the slow tests only."""
    monkeypatch.setattr(judge, "PATIENCE", 0.0)


def real(package: str, name: str) -> tuple[str, int, int]:
    """The real file, and the lines that the exercise takes out."""
    exercise = exercises.of(package)[name]
    source = exercises.source_path(package, exercise.file).read_text("utf-8")
    return source, *exercises.region(source, exercise)


def with_body(package: str, name: str, body: str) -> str:
    """The real file with another body, as a learner would have it."""
    source, first, last = real(package, name)
    lines = source.splitlines()
    line = next(line for line in lines[first - 1:last] if line.strip())
    lines[first - 1:last] = textwrap.indent(body, line[:len(line) - len(line.lstrip())]).splitlines()
    return "\n".join(lines) + "\n"


def with_changes(package: str, name: str, *changes: str) -> str:
    source, first, last = real(package, name)
    lines = source.splitlines(keepends=True)
    body = "".join(lines[first - 1:last])
    for old, new in zip(changes[::2], changes[1::2]):
        assert old in body, old
        body = body.replace(old, new)
    return "".join(lines[:first - 1]) + body + "".join(lines[last:])


def judged(package: str, name: str, text: str, path: Path) -> dict:
    """In this process: a learner's file of this text."""
    (path / exercises.of(package)[name].file).write_text(text, encoding="utf-8")
    return worker.judged(package, name, path)


@pytest.mark.parametrize("package, name", ALL)
def test_solutions_are_right_and_stubs_are_not_written(package, name, tmp_path):
    source, *_ = real(package, name)
    assert judged(package, name, source, tmp_path) == {"state": "right", "text": ""}
    stub = folder.files_of(package)[exercises.of(package)[name].file]
    assert judged(package, name, stub, tmp_path) == {"state": "not written", "text": ""}
    for body in RIGHT.get((package, name), ()):
        assert judged(package, name, with_body(package, name, body), tmp_path) == {"state": "right", "text": ""}, body


def untold(package: str, name: str, wrong: list[tuple], path: Path) -> list[tuple]:
    """Wrong answers whose verdict is not in the right words."""
    missed = []
    for words, *changes in wrong:
        text = with_body(package, name, *changes) if len(changes) == 1 else with_changes(package, name, *changes)
        found = judged(package, name, text, path)
        told = any(one in found["text"] for one in words.split("|"))
        if found["state"] != "wrong" or len(found["text"]) >= 300 or not told:
            missed.append((words, found))
    return missed


@pytest.mark.parametrize("package, name", ALL)
def test_usual_mistakes_are_told_in_their_own_words(package, name, tmp_path):
    assert len(WRONG[package, name]) >= 5
    assert untold(package, name, WRONG[package, name][:3], tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("package, name", ALL)
def test_more_mistakes_are_told_in_their_own_words(package, name, tmp_path):
    assert untold(package, name, WRONG[package, name][3:], tmp_path) == []


@pytest.mark.slow
def test_three_mistakes_at_the_same_time_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "PATIENCE", 60.0)
    found = judged("deepseek_v3", "latents", with_changes(
        "deepseek_v3", "latents", "self.q_a_layernorm(self.q_a_proj(x))", "self.q_a_proj(x)", "if self.rope_interleave",
        "if False", "self.kv_a_layernorm(c)", "c"), tmp_path)
    for words in ("deinterleave is missing", "the latent is not normed", "self.q_a_layernorm is missing"):
        assert words in found["text"]


@pytest.mark.slow
@pytest.mark.parametrize("package", exercises.PACKAGES)
def test_the_usual_mistakes_are_written_out_rightly(package):
    """Without an option the right result; with one a wrong one, which is told by the sentence of that option."""
    for name, check in importlib.import_module(f"scripts.practice.{worker.CHECKS[package]}").CHECKS.items():
        module = graft.real_module(package, exercises.of(package)[name].file)
        cases = check.cases()

        def results(run) -> list:
            with torch.no_grad():
                return [judge.attempt(lambda: run(case.copy())) for case in cases]

        wanted = results(check.wanted or (lambda i: check.run(module, i)))
        assert [judge.agrees(check, *pair) for pair in zip(results(check.wrong), wanted, cases)] == [True] * len(cases)
        for options, sentence in check.mistakes:
            given = results(lambda i: check.wrong(i, **options))
            assert not all(judge.agrees(check, *pair) for pair in zip(given, wanted, cases)), (name, options)
            assert judge.usual_mistake(check, cases, given, wanted) == sentence, (name, options)
            assert len(sentence) < 200


# --- what a learner's file may be ---

RMS = ("qwen3", "rms_norm")


def test_a_learners_file_is_one_sentence_whatever_it_is(tmp_path):
    source, *_ = real(*RMS)

    def changed(line: str) -> str:
        return with_changes(*RMS, "x32 = x.float()", f"x32 = x.float()\n        {line}")

    line = real(*RMS)[1] + 3
    for text, wanted in (
            (source.replace("def new_weight(", "def new_weight(:"), "layers.py, line 38: Python cannot read this line"),
            (source.replace("class RMSNorm(nn.Module)", "class Norm(nn.Module)"),
             "the forward of class RMSNorm is gone; uv run python -m scripts.practice qwen3 --again rms_norm"),
            ("import no_such_module\n" + source, "layers.py, line 1: ModuleNotFoundError: No module named"),
            (source + "\nx = 1 / 0\n", f"layers.py, line {source.count(chr(10)) + 2}: ZeroDivisionError"),
            (source.replace("def forward(self, x: Tensor) -> Tensor:\n        # In", "def forward(self, y):\n       "
                                                                                     " # In"),
             "line 30: the parameters of forward must stay (self, x), they are (self, y)"),
            (changed("exit()"), f"layers.py, line {line}: it ends the program (exit)"),
            (changed("breakpoint"), "right"),
            (changed("self.forward(x)"), f"layers.py, line {line - 1}: it calls itself without an end|line "
                                                f"{line}: it calls itself without an end"),
            (changed("return (x32,)"), "the result is tuple, wanted is a tensor|returns a tuple"),
            (changed("return x32.tolist()"), "the result is list, wanted is a tensor"),
            (changed("return 1.0"), "wanted is a tensor"),
            (changed("yield x"), "returns a generator"),
            (changed("raise KeyError('a' * 500)"), f"layers.py, line {line}: KeyError: 'aaa"),
            (changed("print('here', x32.shape)"), f"it prints (layers.py, line {line}): 'here torch.Size"),
            ("\0", "layers.py: Python cannot read it|layers.py cannot be read")):
        found = judged(*RMS, text, tmp_path)
        told = any(one in found["text"] or one == found["state"] for one in wanted.split("|"))
        assert told and len(found["text"]) < 300 and "\n" not in found["text"], (wanted, found)
    (tmp_path / "layers.py").write_bytes(b"x = '\xff'\n")
    assert "layers.py" in worker.judged(*RMS, tmp_path)["text"]
    (tmp_path / "layers.py").unlink()
    assert "layers.py is gone" in worker.judged(*RMS, tmp_path)["text"]


def test_each_exercise_is_checked_alone(tmp_path):
    """All others may be unwritten or wrong; helpers, imports and a changed __init__ of the learner's are used."""
    file = folder.files_of("qwen3")["layers.py"]
    stub = re.compile(r"( +)# EXERCISE rotate .*?still to be written\"\)\n", re.S)
    text = stub.sub("    return turned(x, cos, sin)\n", file).replace(
        "class Attention(", "import torch as t\n\n\ndef turned(x, c, s):\n    a, b = x.chunk(2, -1)\n"
        "    return t.cat((a * c - b * s, b * c + a * s), -1)\n\n\nclass Attention(")
    text = text.replace("        self.head_dim, self.scale = N", "        self.head_dim, self.scale = N")
    assert judged("qwen3", "rotate", text, tmp_path) == {"state": "right", "text": ""}
    assert judged("qwen3", "attention", text, tmp_path)["state"] == "not written"
    body = "x32 = x.float()\nreturn self.weight * self.sized(x32).to(x.dtype)"
    text = with_body(*RMS, body).replace("        self.eps = eps\n", "        self.epsilon = eps\n\n    def "
                                                                     "sized(self, x):\n"
                                         "        return x * (x.square().mean(-1, True) + self.epsilon) ** -0.5\n", 1)
    assert judged(*RMS, text, tmp_path) == {"state": "right", "text": ""}
    text = with_body("qwen3", "attention_mask", "return super_mask(first, T, padding, device)")
    assert "NameError" in judged("qwen3", "attention_mask", text, tmp_path)["text"]


def test_what_no_usual_mistake_explains_shows_the_first_difference(tmp_path):
    for name, changes, wanted in (
            ("mlp", ("self.up_proj(x)", "(self.up_proj(x) + 3 * x.mean() ** 2)"), r"the result\[0, 0, 0\] is \S+, "
                                                                                  r"right is"
             r" \S+ \(for x \(2, 5, 8\)\)"),
            ("mlp", ("return ", "return 0.3 * "), r"all numbers are 0\.3 times what they should be"),
            ("mlp", ("return ", "return x.mean() if x.ndim == 2 else "), r"only wrong for x \(n, D\): the shape of "
                                                                         r"the result is"
             r" \(\), wanted is \(B, T, D\) \(6, 8\)"),
            ("rotate", ("x1 * sin), dim=-1)", "x1 * sin), dim=-1).transpose(1, 2)"), r"the right numbers with axes "
                                                                                     r"1 and 2 exchanged"),
            ("sdpa", ("flatten(1, 2)", "flatten(1, 2).double()"), r"the result is float64, wanted is float32")):
        found = judged("qwen3", name, with_changes("qwen3", name, *changes), tmp_path)
        assert found["state"] == "wrong" and re.search(wanted, found["text"]), (wanted, found)


# --- the command line ---

def run(capsys, *words: str, practice: Path) -> tuple[int, str, str]:
    try:
        code = command.main(list(words), practice)
    except SystemExit as left:
        code = left.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("package", exercises.PACKAGES)
def test_the_folder_is_the_package_with_the_bodies_taken_out(package, tmp_path, capsys):
    code, out, err = run(capsys, package, practice=tmp_path)
    assert code == 0 and not err and f"0 of {len(exercises.of(package))} right\nnext: " in out
    for path in (ROOT / package).rglob("*.py"):
        name = path.relative_to(ROOT / package)
        mine, own = (tmp_path / package / name).read_text("utf-8"), path.read_text("utf-8")
        taken = [exercise for exercise in exercises.of(package).values() if exercise.file == name.as_posix()]
        assert mine.count("is still to be written") == len(taken)
        assert max(map(len, mine.splitlines()), default=0) <= 120
        assert (mine == own) == (not taken)
        if taken:
            ours, theirs = folder.parts(ast.parse(mine)), folder.parts(ast.parse(own))
            assert {name for name in theirs if ours[name] != theirs[name]} == {exercise.target for exercise in taken}
    for exercise in exercises.of(package).values():
        text = (tmp_path / package / exercise.file).read_text("utf-8")
        node = exercises.find(ast.parse(text), exercise.target)
        body = ast.get_source_segment(text, node)
        assert f"EXERCISE {exercise.name} ({exercise.level}, {exercise.minutes} minutes)" in body
        assert exercise.level in ("easy", "medium", "hard") and len(exercise.hints) == 3
        source = exercises.source_path(package, exercise.file).read_text("utf-8")
        assert ast.get_docstring(node) == ast.get_docstring(exercises.find(ast.parse(source), exercise.target))
        heading = exercises.section(package, exercise)
        page = (ROOT / package / "README.md").read_text("utf-8")
        assert heading and re.search(rf"^##+ +{re.escape(heading)} *$", page, re.M)


def test_what_a_learner_wrote_is_never_lost(tmp_path, capsys):
    layers = tmp_path / "qwen3" / "layers.py"
    assert run(capsys, "qwen3", practice=tmp_path)[0] == 0
    mine = layers.read_text().replace('raise NotImplementedError("exercise mlp is still to be written")', "return x")
    layers.write_text(mine)
    (tmp_path / "qwen3" / "model.py").unlink()
    code, out, err = run(capsys, "qwen3", practice=tmp_path)
    assert code == 0 and "is there and stays as it is; model.py was missing and is written again:" in out
    assert layers.read_text() == mine and (tmp_path / "qwen3" / "model.py").exists()

    code, out, err = run(capsys, "qwen3", "--again", "mlp", practice=tmp_path)
    assert code == 0 and "layers.old-1.py" in out and (tmp_path / "qwen3" / "layers.old-1.py").read_text() == mine
    assert layers.read_text() == folder.files_of("qwen3")["layers.py"]
    layers.write_text(mine.replace("    def sdpa(", "    def other(").replace("def rotate(", "def turn("))
    for name in ("sdpa", "rotate"):
        assert run(capsys, "qwen3", "--again", name, practice=tmp_path)[0] == 0
        assert judged("qwen3", name, layers.read_text(), tmp_path / "qwen3")["state"] == "not written"
    layers.write_text("def (:\n")
    code, out, err = run(capsys, "qwen3", "--again", "mlp", practice=tmp_path)
    assert code == 2 and "line 1: Python cannot read this line" in err and layers.read_text() == "def (:\n"

    code, out, err = run(capsys, "qwen3", "--fresh", practice=tmp_path)
    assert code == 0 and "is kept as" in out and (tmp_path / "qwen3.old-1" / "layers.py").read_text() == "def (:\n"
    assert layers.read_text() == folder.files_of("qwen3")["layers.py"]


def test_hints_become_stronger_and_solutions_are_the_real_bodies(tmp_path, capsys):
    run(capsys, "qwen3", practice=tmp_path)
    three = exercises.of("qwen3")["sdpa"].hints
    for number in (1, 2, 3, 3):
        code, out, err = run(capsys, "qwen3", "--hint", "sdpa", practice=tmp_path)
        assert code == 0 and f"hint {number} of 3: {three[number - 1]}" in " ".join(out.split())
        assert ("--solution sdpa" in out) == (number == 3)
    code, out, err = run(capsys, "qwen3", "--hint", "mlp", practice=tmp_path)
    assert "hint 1 of 3" in out
    (tmp_path / "qwen3" / "progress.json").write_text("{")
    assert "hint 1 of 3" in run(capsys, "qwen3", "--hint", "mlp", practice=tmp_path)[1]
    for package, name in ALL:
        source, first, last = real(package, name)
        code, out, err = run(capsys, package, "--solution", name, practice=tmp_path)
        assert code == 0 and out.split("\n", 1)[1] == "".join(source.splitlines(keepends=True)[first - 1:last])


def test_mistakes_at_the_command_line_are_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for words, practice, wanted in (
            ([], tmp_path, "say which package: qwen3, qwen3_moe, deepseek_v3"),
            (["qwen4"], tmp_path, "there is no package 'qwen4'"),
            (["qwen3", "--check", "sdap"], tmp_path, "no exercise 'sdap', did you mean sdpa?"),
            (["qwen3", "--hint", "yarn"], tmp_path, "no exercise 'yarn': rms_norm, "),
            (["qwen3", "--solution", "all"], tmp_path, "no exercise 'all'"),
            (["qwen3", "--hint", "mlp", "--fresh"], tmp_path, "not allowed with argument"),
            (["qwen3", "--hint"], tmp_path, "--hint: expected one argument"),
            (["qwen3", "--check"], tmp_path, "qwen3 is not there yet: `uv run python -m scripts.practice qwen3`"),
            (["qwen3", "--hint", "mlp"], tmp_path, "is not there yet"),
            (["qwen3", "--again", "mlp"], tmp_path, "is not there yet"),
            (["qwen3"], tmp_path / "file", "Not a directory")):
        code, out, err = run(capsys, *words, practice=practice)
        assert code == 2 and not out and wanted in err, (words, err)
        assert err.startswith("practice: ") and err.count("\n") == 1 and len(err) < 300

    def stop(*_):
        raise KeyboardInterrupt

    run(capsys, "qwen3", practice=tmp_path)
    monkeypatch.setattr(process, "verdicts", stop)
    assert run(capsys, "qwen3", "--check", practice=tmp_path) == (130, "", "\n")


def test_a_half_written_folder_is_not_left(tmp_path, capsys, monkeypatch):
    def full(path: Path, text: str) -> None:
        if path.name == "model.py":
            raise OSError(28, "No space left on device", str(path))
        save(path, text)

    save = folder.save
    monkeypatch.setattr(folder, "save", full)
    code, out, err = run(capsys, "qwen3", practice=tmp_path)
    assert code == 2 and "No space left on device" in err and list(tmp_path.iterdir()) == []


def test_progress_is_kept_and_shown(tmp_path, capsys, monkeypatch):
    run(capsys, "qwen3_moe", practice=tmp_path)
    state = {"router": "right", "mixture": "wrong", "dispatch": "not written", "moe_block": "right",
             "balance_loss": "wrong"}
    monkeypatch.setattr(process, "verdicts", lambda package, folder, names: iter(
        [{"name": name, "state": state[name], "text": "off" if state[name] == "wrong" else ""} for name in names]))
    code, out, err = run(capsys, "qwen3_moe", "--check", practice=tmp_path)
    assert code == 1 and [line.split()[-1] for line in out.splitlines()[:5]] == ["right", "off", "yet", "right", "off"]
    assert out.splitlines()[5] == "2 of 5 right" and out.splitlines()[6].startswith("next: mixture (easy, 10 minutes)")
    state["mixture"] = "right"
    code, out, err = run(capsys, "qwen3_moe", "--check", "mixture", practice=tmp_path)
    assert code == 0 and "3 of 5 right so far\nnext: dispatch" in out
    assert "3 of 5 right" in run(capsys, "qwen3_moe", practice=tmp_path)[1]


# --- the process that runs a learner's code ---

def learner(path: Path, package: str = "qwen3", **bodies: str) -> Path:
    """A folder where these exercises are written."""
    mine = path / package
    folder.write(package, mine)
    for name, body in bodies.items():
        file = mine / exercises.of(package)[name].file
        text = file.read_text("utf-8")
        stub = rf"( +)# EXERCISE {name} .*?exercise {name} is still to be written\"\)\n"
        file.write_text(re.sub(stub, lambda found: textwrap.indent(body, found[1]) + "\n", text, flags=re.S), "utf-8")
    return mine


@pytest.mark.ahead
def test_a_loop_without_end_is_ended_and_the_others_are_checked(tmp_path):
    mine = learner(tmp_path, mlp="while True:\n    pass",
                   layer="x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)\n"
                         "return x + self.mlp(self.post_attention_layernorm(x))")
    line = mine.joinpath("layers.py").read_text().splitlines().index("        while True:") + 1
    found = {one["name"]: one for one in process.verdicts("qwen3", mine, ["mlp", "layer", "chat"], seconds=0.5)}
    told = rf"layers\.py, line ({line}|{line + 1}): still running after 0.5 seconds; a loop"
    assert re.match(told, found["mlp"]["text"])
    assert [found[name]["state"] for name in ("mlp", "layer", "chat")] == ["wrong", "right", "not written"]


@pytest.mark.slow
def test_what_happens_to_the_process_is_one_sentence(tmp_path):
    mine = learner(tmp_path, mlp="return input()", rms_norm="import os\nos.write(1, b'noise')\nos.kill(os.getpid(), "
                                                            "11)",
                   rotate="breakpoint()\nreturn x", sdpa="return torch.empty(10 ** 12)",
                   attention="import os\nos._exit(5)", kv_cache="x = []\nwhile True:\n    x.append(torch.zeros(1 << "
                                                                "22))",
                   layer="import sys\nsys.stderr.write('noise')\nsys.stdout.buffer.write(b'x')")
    found = {one["name"]: one["text"] for one in process.verdicts(
        "qwen3", mine, ["mlp", "rms_norm", "rotate", "sdpa", "attention", "kv_cache", "layer"])}
    assert "input() waits for a keyboard" in found["mlp"] and "(SIGSEGV)" in found["rms_norm"]
    assert found["attention"].startswith("Python itself ended while this ran (exit code 5)")
    assert "breakpoint() stops here" in found["rotate"] and "memory" in found["sdpa"]
    assert "memory" in found["kv_cache"] or "loop without end" in found["kv_cache"]
    assert "AttributeError" in found["layer"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_the_check_and_its_process(tmp_path):
    mine = learner(tmp_path, mlp=f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\n"
                                 "while True:\n    pass")
    code = f"from pathlib import Path; from scripts.practice.__main__ import main; import sys; " \
           f"sys.exit(main(['qwen3', '--check', 'mlp'], Path({str(tmp_path)!r})))"
    started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    for _ in range(600):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.1)
    os.kill(started.pid, signal.SIGINT)
    out, err = started.communicate(timeout=30)
    assert started.returncode == 130 and out == "" and err == "\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert mine.exists()


@pytest.mark.slow
@pytest.mark.parametrize("package", exercises.PACKAGES)
def test_the_finished_package_answers(package, tmp_path, capsys):
    mine = learner(tmp_path, package)
    for name in {exercise.file for exercise in exercises.of(package).values()}:
        shutil.copy(exercises.source_path(package, name), mine / name)
    code, out, err = run(capsys, package, "--check", practice=tmp_path)
    count = len(exercises.of(package))
    assert code == 0 and f"{count} of {count} right\n" in out and not err
    assert out.splitlines()[-2].strip().startswith("RoPE ") and out.splitlines()[-1].startswith("Congratulations: ")

    if package != "qwen3":
        return
    # What is no exercise, and broken: each exercise is right alone, and together they say so.
    text = (mine / "layers.py").read_text()
    (mine / "layers.py").write_text(text.replace("angles.cos()", "angles.sin()"))
    code, out = command.answer(package, mine), capsys.readouterr().out
    assert code == 1 and "answers otherwise" in out and "layers.py: RotaryEmbedding.__call__" in out
    (mine / "layers.py").write_text(text.replace("return x @ self.weight.T", f"from {package}.nothing import x"))
    code, out = command.answer(package, mine), capsys.readouterr().out
    assert code == 1 and re.search(r"together they do not run: layers\.py, line \d+: ModuleNotFoundError", out)


# --- beside the training lesson ---

def test_the_balance_loss_is_that_of_the_training_lesson():
    from scripts.practice import solutions

    probabilities = torch.rand(20, 6).softmax(-1)
    ids = probabilities.topk(2).indices
    assert torch.equal(solutions.balance_loss(probabilities, ids), balance.balance_loss(probabilities, ids))

    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.zeros(6, 3)
            self.e_score_correction_bias = torch.rand(6)

        def forward(self, x):
            return None, ids

    router = Router()
    expected = solutions.bias_update(router.e_score_correction_bias, ids, 0.01)
    tracked = balance.BalanceBias(torch.nn.ModuleList([router]))
    router(torch.zeros(20, 3))
    tracked.update(0.01)
    assert torch.equal(router.e_score_correction_bias, expected)


def test_the_readme_names_the_exercises_and_their_minutes():
    for package in exercises.PACKAGES:
        names, minutes = exercises.of(package), sum(one.minutes for one in exercises.of(package).values())
        row = f"| `{package}` | {', '.join(f'`{name}`' for name in names)} | {minutes} |"
        assert row in (ROOT / "scripts/practice/README.md").read_text()
