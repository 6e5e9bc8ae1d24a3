"""A decode step with static shapes, for torch.compile and CUDA graphs.

    plain       Python launches hundreds of kernels for each token, and the GPU waits for it
    compiled    torch.compile makes few kernels of the many; a CUDA graph records their launches once and replays them

Both need shapes that stay: the position is a tensor, the cache is seen in whole blocks of 256 slots, and a mask hides
the slots that are not written yet. A new block is a new recording, of the same kernels.
"""

import inspect

import torch
from torch import Tensor

from ..layers import KVCache
from ..model import Layer, Model
from .parts import check_compiled

BLOCK = 256  # slots


class StaticKVCache:
    """What one layer has in the cache, up to slot `end`; written at a position that is a tensor."""

    def __init__(self, cache: KVCache, layer: int, end: int, position: Tensor):
        self.tensors, self.position = [tensor[layer, :, :, :end] for tensor in cache.tensors], position

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        """KVCache.write, except that all slots are returned: the mask has to hide the later ones."""
        for tensor, part in zip(self.tensors, new):
            tensor.index_copy_(2, self.position, part)
        return self.tensors


def clear(cache: KVCache) -> None:
    """Zeros after the last token. A masked slot has the weight 0, and 0 times the NaN that may lie there is NaN."""
    for tensor in cache.tensors:
        tensor[:, :, :, cache.length:] = 0


def run_layer(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: StaticKVCache) -> Tensor:
    """Compile one layer and reuse it: compiling the whole stack takes as many times as long."""
    return layer(x, cos, sin, mask, cache)


def compiler_options(device: torch.device) -> dict[str, bool]:
    """For torch.compile: round where the plain step rounds, or other tokens might come; and try sizes of blocks.

    PyTorch says that a matmul of one row reaches a GPU's bandwidth only with the latter. On a CPU, PyTorch 2.9 and 2.10
    cannot do the former: there the rounding may differ.
    """
    from torch._inductor.codegen.cpp import CppVecOverrides  # takes a second to import

    rounds = device.type != "cpu" or "use_compute_types" in inspect.signature(CppVecOverrides.to_dtype).parameters
    return {"emulate_precision_casts": rounds, "coordinate_descent_tuning": True}


class CompiledStep:
    """step(model, token, cache) -> logits, in place of generate.decode, for one sequence: (1,) int64 -> (1, V).

    Raises ValueError for what cannot be compiled, and where PyTorch cannot (without a C++ compiler, for instance).
    """

    def __init__(self, model: Model, cache: KVCache):
        check_compiled(model)
        self.model, self.cache, self.dtype = model, cache, model.model.norm.weight.dtype
        # Whole blocks and one spare slot: a full-size view would be a new shape, and compiled again.
        cache.reserve(-(-cache.capacity // BLOCK) * BLOCK + 1)
        clear(cache)
        self.device = cache.tensors[0].device
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.all_slots = torch.arange(cache.capacity, device=self.device)
        self.run_layer = torch.compile(run_layer, dynamic=True, options=compiler_options(self.device))
        self.caches: dict[int, list[StaticKVCache]] = {}  # by their end, for each layer
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by the same

    def __call__(self, model: Model, token: Tensor, cache: KVCache) -> Tensor:
        self.token.copy_(token[:, None])
        self.position.fill_(cache.length)
        end = (cache.length // BLOCK + 1) * BLOCK
        try:
            logits = self.replayed(end) if self.device.type == "cuda" else self.computed(end)
        except (RuntimeError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"torch.compile failed ({reason[:150]}); leave out --compile") from None
        cache.length += 1
        return logits

    def computed(self, end: int) -> Tensor:
        """generate.decode, with the position and the mask as tensors of fixed shape."""
        model = self.model.model
        layers = model.layers[:self.model.config.num_hidden_layers]
        if end not in self.caches:
            self.caches[end] = [StaticKVCache(self.cache, i, end, self.position) for i in range(len(layers))]
        cos, sin = model.rotary_emb(self.position[None], self.dtype)  # (1, 1, 1, N/2)
        # Four dimensions, for it hides more than the causal rule: the slots that are not written yet.
        mask = (self.all_slots[:end] <= self.position)[None, None, None]  # (1, 1, 1, end)
        x = model.embed_tokens(self.token)  # (1, 1, D)
        for layer, cache in zip(layers, self.caches[end]):
            x = self.run_layer(layer, x, cos, sin, mask, cache)
        return self.model.lm_head(model.norm(x))[:, -1]

    def replayed(self, end: int) -> Tensor:
        """The logits of `computed`, (1, V), by a CUDA graph for each block, recorded once a block."""
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
