"""Look at the routing: which experts worked, layer by layer. Only --show-experts needs it, and it changes nothing.

    layer  0  ▓ ░▒ █ ░  ...      one character an expert, or several experts where the line would be too wide
"""

import shutil

import torch

from ..model import Model
from ..moe import Router

SHADES = " ░▒▓█"


class Routing:
    """Counts, from now on, how often each expert of a model is chosen: `counts[layer]` is (E,) int64."""

    def __init__(self, model: Model):
        self.active, self.counts = model.config.num_experts_per_tok, {}
        for name, module in model.named_modules():
            if isinstance(module, Router):
                layer = int(name.split(".")[2])  # model.layers.{layer}.mlp.gate
                self.counts[layer] = torch.zeros(len(module.weight), dtype=torch.int64)
                module.register_forward_hook(lambda _, __, out, layer=layer: self.count(layer, out[1]))

    def count(self, layer: int, topk_ids: torch.Tensor) -> None:
        self.counts[layer] += torch.bincount(topk_ids.flatten().cpu(), minlength=len(self.counts[layer]))

    def picture(self, width: int | None = None) -> str:
        """Layers x experts, shaded by share of the tokens, and each layer's balance.

        "busiest" is the share of the busiest expert against a fair one, 1.0 for perfect balance; "idle" the
        number of experts that no token went to.
        """
        if not self.counts:
            return "no layer of this model has experts"
        E = max(map(len, self.counts.values()))
        worked = {layer: counts for layer, counts in self.counts.items() if counts.any()}
        columns = max((width or shutil.get_terminal_size().columns) - 34, 16)
        per_character = -(-E // columns)  # experts that share a character
        tokens = sum(int(counts.sum()) for counts in worked.values()) // (self.active * max(len(worked), 1))
        lines = [f"experts by layer: {tokens} tokens, {self.active} of {E} experts each"
                 + (f"; {per_character} experts a character" if per_character > 1 else ""),
                 "{1} under half the fair share  {2} up to it  {3} up to twice  {4} more".format(*SHADES)]
        for layer, counts in worked.items():
            load = counts.float() * len(counts) / max(int(counts.sum()), 1)  # 1 is a fair share
            groups = [float(part.mean()) for part in load.split(per_character)]
            cells = "".join(SHADES[0 if g == 0 else 1 if g < 0.5 else 2 if g <= 1 else 3 if g <= 2 else 4]
                            for g in groups)
            busiest, idle = float(load.max()), int((counts == 0).sum())
            lines.append(f"layer {layer:2} │{cells}│ busiest {busiest:4.1f}  idle {idle:3}")
        return "\n".join(lines)
