"""6b. The decode step once more, with nothing in it that changes from token to token but numbers in tensors.

    plain       Python tells the GPU what to do, hundreds of small orders a token, and at each token anew
    compiled    torch.compile makes few kernels of the many; a CUDA graph records their order once and replays it

What changed is made to stand still: the position is a tensor, the cache is seen in whole blocks of 256 slots, and a
mask hides those that are not written yet. A new block is a new recording, of the same kernels.
"""

import inspect

import torch
from torch import Tensor

from .layers import KVCache
from .model import DecoderLayer, Model
from .moe import Experts

BLOCK = 256  # slots


class Slots:
    """What one layer has in the cache, up to slot `end`; written at a position that is a tensor."""

    def __init__(self, cache: KVCache, layer: int, end: int, position: Tensor):
        self.keys, self.values, self.position = cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end], position

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """KVCache.write, but all slots are returned, and the mask has to hide the later ones."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


def clear(cache: KVCache) -> None:
    """Zeros after the last token: a weight of 0 takes nothing from a masked slot, but 0 times NaN, which may lie there, is NaN."""
    cache.keys[:, :, :, cache.length:] = 0
    cache.values[:, :, :, cache.length:] = 0


def run_layer(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, slots: Slots) -> Tensor:
    """What is compiled: one layer, and not one function of all, which would take as many times as long to compile."""
    return layer(x, cos, sin, mask, slots)


def compiler_options(device: torch.device) -> dict[str, bool]:
    """For torch.compile: round where the plain step rounds, or other tokens might come; and try sizes of blocks.

    PyTorch says that a matmul of one row reaches a GPU's bandwidth only with the latter. On a CPU, PyTorch 2.9 and 2.10
    cannot do the former: there the rounding may differ.
    """
    from torch._inductor.codegen.cpp import CppVecOverrides  # takes a second to import

    rounds = device.type != "cpu" or "use_compute_types" in inspect.signature(CppVecOverrides.to_dtype).parameters
    return {"emulate_precision_casts": rounds, "coordinate_descent_tuning": True}


class CompiledStep:
    """step(token) -> logits, for one sequence: (1,) int64 -> (1, V). The cache moves on by one.

    Raises ValueError for experts that are not stacked, and where PyTorch cannot compile (without a C++ compiler,
    for instance).
    """

    def __init__(self, model: Model, cache: KVCache):
        if not all(part.is_stacked() for part in model.modules() if isinstance(part, Experts)):
            raise ValueError("compiled steps need the experts in stacks, which load_model makes on a GPU only; "
                             "leave out --compile")
        self.model, self.cache, self.dtype = model, cache, model.model.norm.weight.dtype
        # Whole blocks, and a slot more: a view of all slots would be another case, and compiled anew.
        cache.reserve(-(-cache.capacity // BLOCK) * BLOCK + 1)
        clear(cache)
        device = cache.device
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.all_slots = torch.arange(cache.capacity, device=device)
        model.model.rotary_emb(self.position[None], cache.capacity, torch.float32)  # lets its tables grow now
        self.tables = model.model.rotary_emb.cos, model.model.rotary_emb.sin
        self.run_layer = torch.compile(run_layer, dynamic=True, options=compiler_options(device))
        self.slots: dict[int, list[Slots]] = {}  # by their end, for each layer
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by the same

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token[:, None])
        self.position.fill_(self.cache.length)
        end = (self.cache.length // BLOCK + 1) * BLOCK
        try:
            logits = self.replayed(end) if self.cache.device.type == "cuda" else self.computed(end)
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"torch.compile failed ({str(error).strip().splitlines()[0]}); leave out --compile") from None
        self.cache.length += 1
        return logits

    def computed(self, end: int) -> Tensor:
        """model(token, cache, last_only=True)[:, -1]"""
        if end not in self.slots:
            self.slots[end] = [Slots(self.cache, layer, end, self.position) for layer in range(self.model.config.num_hidden_layers)]
        cos, sin = (table[self.position][None, None].to(self.dtype) for table in self.tables)  # (1, 1, 1, N/2)
        mask = self.all_slots[None, :end] <= self.position  # (1, end)
        x = self.model.model.embed_tokens(self.token)  # (1, 1, D)
        for layer, slots in zip(self.model.model.layers, self.slots[end]):
            x = self.run_layer(layer, x, cos, sin, mask, slots)
        return self.model.head(self.model.model.norm(x))[:, -1]

    def replayed(self, end: int) -> Tensor:
        if end not in self.graphs:
            side = torch.cuda.Stream()  # compiles and warms up apart from what is recorded
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.computed(end)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.computed(end)
            self.graphs[end] = graph, logits
        graph, logits = self.graphs[end]
        graph.replay()
        return logits.clone()  # the next replay writes to the same place
