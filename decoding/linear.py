"""Linear layers with float16 weights and float32 activations on x86 CPUs, through fbgemm.

Twice as fast as float32 at one row and float32 in all but the rounding of the weights. The two ops
are marked deprecated by torch, so they are used nowhere else, and where they are missing every
layer stays float32.
"""

import platform

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FLOAT16_MAX = 65504.0


class Float16Linear(nn.Module):
    """Drop-in for `nn.Linear`: float32 `[..., in]` to float32 `[..., out]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)

    @property
    def num_bytes(self) -> int:
        """Bytes of the float16 weights."""
        return 2 * self.out_features * self.in_features

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = torch.ops.quantized.linear_dynamic_fp16.op(inputs, self.packed)
        return output


def float16_linear_available() -> bool:
    """Whether this machine runs the ops and they agree with float32 on a small product."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    weight = torch.linspace(-1, 1, 64).view(8, 8)
    try:
        result = Float16Linear(weight, None)(torch.ones(2, 8))
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(result, weight.sum(1).expand(2, 8), atol=1e-2)


def apply_float16_linear(model: nn.Module) -> float:
    """Replace the linear layers of `model` in place; return the share of parameters now reduced.

    `nn.Linear` and GPT-2's `Conv1D` are replaced; a layer with a weight beyond 65504 stays float32.
    """
    reduced = 0
    total = sum(parameter.numel() for parameter in model.parameters())
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(child)
            if replacement is not None:
                reduced += replacement.out_features * replacement.in_features
                setattr(parent, name, replacement)
    kept = sum(parameter.numel() for parameter in model.parameters())
    return reduced / max(reduced + kept, total)


def _replacement(module: nn.Module) -> Float16Linear | None:
    if type(module) is nn.Linear:
        weight = module.weight.detach()
    elif type(module) is Conv1D:
        weight = module.weight.detach().t()
    else:
        return None
    if weight.dtype != torch.float32 or not weight.abs().max() <= FLOAT16_MAX:
        return None
    bias = module.bias
    return Float16Linear(weight, None if bias is None else bias.detach())
