"""Experts faster: sorted into groups, one token without sorting, or stacked in two tensors for a GPU.

    prompt, CPU        sort the choices by expert once, instead of searching them for each expert
    one token          no sorting: beside matmuls of one row, that would cost as much as several of them
    GPU                all experts of a layer in two tensors: two grouped matmuls instead of hundreds of kernel launches
    compiled           select the A experts' matrices, and let the compiler read them where they lie
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..model import Model
from ..moe import Experts, combine
from .fast import matmul_one_row
from .quantized import FP8, block_of, dequantize
from .rounding import BITS
from .safetensors_reader import CheckpointFiles

# grouped_mm(rows, matrices, offs): the first offs[0] rows times matrix 0, those up to offs[1] times matrix 1, …
grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # torch 2.9 has it under the second name only


def grouped_mm_is_one_kernel(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """On Hopper and Blackwell GPUs in bfloat16, if rows begin at multiples of 16 bytes. Elsewhere it is PyTorch's own
    loop, which waits for the GPU more often than ours."""
    if device.type != "cuda" or dtype != torch.bfloat16 or any(width % 8 for width in widths):
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


class FastExperts(Experts):
    """Experts by what suits the machine: on a GPU in stacks. (n, D), (n, A), (n, A) -> (n, D)."""
    # All experts in two tensors, and two more for the scales of FP8; see `stack`.
    gate_up = down = gate_up_scale = down_scale = None

    def stack(self, device: torch.device, dtype: torch.dtype) -> None:
        """Put all experts into gate_up (E, 2F, D) and down (E, D, F); each one's weights become views of them.

        For FP8, D and F must be multiples of 128, so that the blocks of up begin where those of gate end.
        """
        F_, D = self[0].gate_proj.weight.shape
        self.gate_up, self.down = self.share("weight", F_, D, device, dtype)
        if dtype == FP8:
            self.gate_up_scale, self.down_scale = self.share("weight_scale_inv", F_ // 128, D // 128, device,
                                                             torch.float32)

    def share(self, leaf: str, F_: int, D: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both tensors for one of the experts' parameters."""
        gate_up = torch.empty(len(self), 2 * F_, D, dtype=dtype, device=device)
        down = torch.empty(len(self), D, F_, dtype=dtype, device=device)
        trained = leaf == "weight" and dtype != FP8
        for expert, rows, more in zip(self, gate_up, down):
            for linear, view in (expert.gate_proj, rows[:F_]), (expert.up_proj, rows[F_:]), (expert.down_proj, more):
                setattr(linear, leaf, nn.Parameter(view, requires_grad=trained))
        return gate_up, down

    def _apply(self, *arguments, **more) -> "FastExperts":  # what .to() and its like come down to
        # The stacks would keep the old numbers, and the old device's memory.
        self.gate_up = self.down = self.gate_up_scale = self.down_scale = None
        return super()._apply(*arguments, **more)

    def is_stacked(self) -> bool:
        """Whether the stacks are still the experts' own memory; a copy of the model, for one, has new weights."""
        if self.gate_up is None or torch.compiler.is_compiling():  # a compiler knows no addresses, and was asked before
            return self.gate_up is not None
        return self[0].gate_proj.weight.data_ptr() == self.gate_up.data_ptr()

    def forward(self, x: Tensor, weights: Tensor, topk_ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # the stacks are no parameters: gradients must go through the experts
            return grouped(self, x, weights, topk_ids)
        stacked = self.is_stacked()
        if stacked and torch.compiler.is_compiling():
            return selected(self, x, weights, topk_ids)
        if stacked and grouped_mm_is_one_kernel(x.device, self.down.dtype, *self.down.shape[1:]):
            return stacked_grouped(self, x, weights, topk_ids)
        return (one_token if len(x) == 1 else grouped)(self, x, weights, topk_ids)


def grouped(experts: Experts, x: Tensor, weights: Tensor, topk_ids: Tensor) -> Tensor:
    """Each expert once, on the tokens that chose it. One that no token chose is not touched, except in training.

    Sorting the n*A choices by expert puts what one expert has to do into neighbouring rows:

        topk_ids   token 0: 5 2    token 1: 2 0          sorted   0 | 2 2 | 5
                                                         token    1 | 0 1 | 0
    """
    by_expert, order = topk_ids.flatten().sort(stable=True)  # (n*A,)
    ends = group_ends(by_expert, len(experts))
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()  # the one wait for a GPU
    results = x.new_empty(len(order), x.shape[1])  # (n*A, D), by token again
    for expert, group in zip(experts, order.split(counts)):
        trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in expert.parameters())
        if len(group) or trained:  # an expert without tokens still gets a gradient, of zeros
            results[group] = expert(x[group // topk_ids.shape[1]]).to(x.dtype)  # another type under autocast
    return combine(results.view(*topk_ids.shape, -1), weights)


def one_token(experts: Experts, x: Tensor, weights: Tensor, topk_ids: Tensor) -> Tensor:
    """x (1, D): each chosen expert by itself."""
    return combine(torch.cat([experts[e](x) for e in topk_ids[0].tolist()])[None], weights)


def stacked_grouped(experts: FastExperts, x: Tensor, weights: Tensor, topk_ids: Tensor) -> Tensor:
    """Two grouped matmuls, and no wait for the GPU at all: where a group ends stays there."""
    by_expert, order = topk_ids.flatten().sort(stable=True)
    ends = group_ends(by_expert, len(experts))
    gate, up = grouped_mm(x[order // topk_ids.shape[1]], experts.gate_up.mT, offs=ends).chunk(2, dim=-1)  # (n*A, F)
    results = grouped_mm(F.silu(gate) * up, experts.down.mT, offs=ends)  # (n*A, D)
    return combine(results[order.argsort()].view(*topk_ids.shape, -1), weights)


def selected(experts: FastExperts, x: Tensor, weights: Tensor, topk_ids: Tensor) -> Tensor:
    """x (1, D): compiled, this reads the selected experts in place; eagerly it copies them."""
    gate_up, down = experts.gate_up[topk_ids[0]], experts.down[topk_ids[0]]  # (A, 2F, D), (A, D, F)
    if experts.gate_up_scale is not None:
        gate_up = dequantize(gate_up, experts.gate_up_scale[topk_ids[0]], x.dtype)
        down = dequantize(down, experts.down_scale[topk_ids[0]], x.dtype)
    gate, up = matmul_one_row(x, gate_up).chunk(2, dim=-1)  # (A, 1, F)
    results = matmul_one_row(F.silu(gate) * up, down)  # (A, 1, D)
    return combine(results.transpose(0, 1), weights)


def group_ends(by_expert: Tensor, E: int) -> Tensor:
    """Where each expert's choices end among the sorted ones, (E,) int32. (torch.bincount would wait for the GPU.)"""
    return torch.searchsorted(by_expert, torch.arange(E, device=by_expert.device), right=True).int()


def stack_experts(model: Model, files: CheckpointFiles, device: torch.device, dtype: torch.dtype | str | None,
                  compute: torch.dtype) -> None:
    """Put all experts of a layer into two tensors, on a GPU."""
    stacked = type_of_stacks(model.config, files, device, dtype, compute)
    for module in model.modules():
        if stacked is not None and isinstance(module, FastExperts):
            module.stack(device, stacked)


def type_of_stacks(config: Config, files: CheckpointFiles, device: torch.device, dtype: torch.dtype | str | None,
                   compute: torch.dtype) -> torch.dtype | None:
    """The type of the tensors that hold all experts of a layer; None where these stay by themselves.

    On the CPU they stay in the file, and integers stay as they are wherever that is. On a GPU, FP8 experts that remain
    FP8 do where their widths are not whole blocks.
    """
    if device.type != "cuda" or dtype in BITS or dtype is None and config.quantization not in (None, "fp8"):
        return None
    experts = {name: tensor for name, tensor in files.tensors.items()
               if ".experts." in name and name.endswith(".weight")}
    stored = {tensor.dtype for tensor in experts.values()}
    if dtype is not None or FP8 not in stored:
        return compute
    scales = {name: scale for name in experts if (scale := files.tensors.get(f"{name}_scale_inv"))}
    blocks = {block_of(experts[name].shape, scale.shape, config.weight_block_size) for name, scale in scales.items()}
    whole = config.hidden_size % 128 == config.moe_intermediate_size % 128 == 0
    return FP8 if stored == {FP8} and blocks == {(128, 128)} and whole else None


def check_compiled(model: Model) -> None:
    """ValueError for experts that are not stacked."""
    every = [part for part in model.modules() if isinstance(part, Experts)]
    if not all(isinstance(experts, FastExperts) and experts.is_stacked() for experts in every):
        raise ValueError("compiled steps need the experts in stacks, which load_model makes on a GPU only; "
                         "leave out --compile")
