"""Matrix products by oneDNN on CPUs, where torch itself may call a slower library.

In float32 ``F.linear`` calls MKL, which on AMD's processors reaches less than half of oneDNN's speed. The operators
here are those that torch's compiler calls; there is no public call. Results differ in the order of sums only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

MANY_ROWS = 64  # from here on reordering the weight for oneDNN costs little beside multiplying by it
CPU_DTYPES = (torch.float32, torch.bfloat16)  # of weights that oneDNN reorders


class OneDnnLinear(torch.autograd.Function):
    """``F.linear`` by oneDNN, for a weight and a bias that take no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Map (rows, in) to (rows, out)."""
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of x."""
        return OneDnnLinear.apply(grad, ctx.saved_tensors[0].T, None), None, None


def can_use_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether ``OneDnnLinear`` takes these and is worth it: float32 on a CPU, x (rows, in) with many rows."""
    many = x.dim() == 2 and len(x) >= MANY_ROWS
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    enabled = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return many and frozen and float32 and x.device.type == "cpu" and enabled and known


class ReorderedLinear(nn.Module):
    """A linear layer for inference on a CPU, its weight reordered once into oneDNN's own layout.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        dtype: float32 or bfloat16; inputs are cast to it and outputs have it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        # A module's parameter cannot have oneDNN's layout, and a buffer would be part of state dicts.
        self._weight = torch.ops.mkldnn._reorder_linear_weight.default(weight.detach().to(dtype).contiguous())
        self._bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise.default(x.to(self.dtype), self._weight, self._bias, "none", [], "")


def can_reorder(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has ``ReorderedLinear``'s operators for weights of this type on this device."""
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return device.type == "cpu" and dtype in CPU_DTYPES and torch.backends.mkldnn.is_available() and known
