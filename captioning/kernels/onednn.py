"""Matrix products by oneDNN, on CPUs where torch itself would ask a slower library."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from captioning.kernels.packed_attention import is_cpu

MANY_ROWS = 64  # from here on bringing a weight into oneDNN's layout costs little beside multiplying by it


class OneDnnLinear(torch.autograd.Function):
    """``F.linear`` by oneDNN, for a weight and a bias that take no gradient.

    In float32 ``F.linear`` asks MKL, which on AMD's processors reaches less than half of what oneDNN does. The
    operator is the one that torch's compiler calls; the numbers are the same but for the order of their sum.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Map (rows, in) to (rows, out)."""
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of x."""
        return OneDnnLinear.apply(grad, ctx.saved_tensors[0].T, None), None, None


def _has_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    plain = not weight.requires_grad and (bias is None or not bias.requires_grad)
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    available = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return plain and float32 and is_cpu(x) and available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


CPU_DTYPES = (torch.float32, torch.bfloat16)  # what oneDNN packs


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, its weight packed for oneDNN.

    torch has no public call for this outside of its compiler, whose operators these are; ``can_pack`` says whether
    this torch has them.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        dtype: float32 or bfloat16; inputs are cast to it and outputs have it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        # A module's parameter cannot be in the packed layout, and a buffer would end up in state dicts.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous())
        self._bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self._packed, self._bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this type can be packed on this device by this torch."""
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return device.type == "cpu" and dtype in CPU_DTYPES and torch.backends.mkldnn.is_available() and known
