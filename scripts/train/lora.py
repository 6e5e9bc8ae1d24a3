"""LoRA: fine-tuning with a hundredth of the trained numbers (Hu et al. 2021, arXiv:2106.09685).

    y = x Wᵀ + (x Aᵀ) Bᵀ · scale        W (out, in) stands still; A (r, in) and B (out, r) are trained

Fine-tuning changes a matrix only a little, and that change can nearly be written as B A of a small rank r. Full
training keeps a gradient and two running means for every weight of W, twelve bytes a weight in float32; here only A and
B have them. B begins at zero, so that the first step starts from the model as it is. In the end B A is added to W, and
what is saved is an ordinary checkpoint.
"""

import importlib

import torch
from torch import Tensor, nn


def lora_class(package: str) -> type[nn.Module]:
    """The package's Linear with a trained change beside its weight."""
    Linear = importlib.import_module(f"{package}.layers").Linear

    class LoRALinear(Linear):
        def __init__(self, linear: nn.Module, r: int, scale: float):
            nn.Module.__init__(self)  # not Linear's: the weight is the old one and no new
            (out_features, in_features), device = linear.weight.shape, linear.weight.device
            self.weight, self.scale = linear.weight.requires_grad_(False), scale
            self.lora_A = nn.Parameter((torch.randn(r, in_features) / in_features ** 0.5).to(device))
            self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scale

        def matrix(self, dtype: torch.dtype) -> Tensor:
            """For MLA, which multiplies with parts of the matrix itself."""
            return super().matrix(dtype) + (self.lora_B @ self.lora_A * self.scale).to(dtype)

        @torch.no_grad()
        def merged(self) -> nn.Module:
            """The plain Linear with W + B A · scale, rounded once to W's type."""
            linear = Linear.__new__(Linear)  # without the random weights that Linear's own __init__ would make
            nn.Module.__init__(linear)
            weight = self.weight.float() + self.lora_B @ self.lora_A * self.scale
            linear.weight = nn.Parameter(weight.to(self.weight.dtype))
            return linear

    return LoRALinear


def add_lora(model: nn.Module, package: str, r: int, scale: float = 2.0) -> None:
    """Every Linear inside the layers gets its A and B; everything else stands still."""
    model.requires_grad_(False)
    LoRALinear = lora_class(package)
    Linear = LoRALinear.__base__
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear:
                setattr(parent, name, LoRALinear(child, r, scale))


def merge_lora(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "lora_A"):
                setattr(parent, name, child.merged())
