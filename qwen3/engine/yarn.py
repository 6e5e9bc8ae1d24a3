"""YaRN: contexts longer than those of training, by slowing down RoPE's slow pairs (arXiv:2309.00071).

A model trained on 4,096 tokens has never seen the angles that come after them. YaRN stretches: 4 times the context
at a quarter of the speed brings them back into the range that it knows. That would blur neighbours, if it slowed the
fast pairs, which tell a token from the next; so those keep their speed, and only the slow ones are slowed.

    turns within the trained length     more than beta_fast   ...........   fewer than beta_slow
    speed                               unchanged               blended      divided by `factor`
"""

import math

import torch
from torch import Tensor


def yarn(period: Tensor, theta: float, scaling) -> tuple[Tensor, float]:
    """Plain periods (N/2,), in tokens per radian -> stretched frequencies, and the factor on cos and sin (eq. 17-22).

    `scaling` has the fields of rope_scaling under their own names: config.Yarn.
    """
    N = 2 * len(period)

    def pair_that_turns(times: float) -> float:
        """j, not rounded, with original_max_position_embeddings = times * 2 pi * theta^(2j/N)."""
        return N * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, N - 1)
    high += 0.001 if low == high else 0  # a step instead of a ramp, not a division by zero
    ramp = ((torch.arange(N // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp  # 1 for pairs that keep their speed, 0 for those that are slowed
    # In the reference implementation's order: another changes the last bit, and at position 4,000 the logits by 1e-5.
    frequencies = 1 / (scaling.factor * period) * (1 - keep) + 1 / period * keep

    if scaling.attention_factor is not None:
        return frequencies, scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        factor = mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all_dim)
    else:
        factor = mscale(scaling.factor, 1.0)
    return frequencies, factor * scaling.attn_factor


def mscale(factor: float, m: float) -> float:
    """YaRN's factor on queries and on keys, so squared in the scores (eq. 22).

    More keys flatten the softmax; a factor above 1 sharpens it again.
    """
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
