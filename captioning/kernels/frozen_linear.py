"""Products by frozen weights, in training by the fastest way there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from captioning.kernels.onednn import OneDnnLinear, can_use_onednn


def frozen_linear(layer: nn.Linear | nn.Embedding, x: torch.Tensor) -> torch.Tensor:
    """Multiply by a layer's frozen weight (out, in), and add its bias if it has one: (..., in) to (..., out)."""
    weight, bias = frozen_weight(layer), frozen_bias(layer)
    if torch.is_grad_enabled() and can_use_onednn(x, weight, bias):
        return OneDnnLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def frozen_weight(layer: nn.Linear | nn.Embedding) -> torch.Tensor:
    """The layer's weight, or where products have another type the copy of that type that ``keep_casts`` made."""
    return _copy_of(layer.weight, getattr(layer, "cast_weight", None))


def frozen_bias(layer: nn.Linear | nn.Embedding) -> torch.Tensor | None:
    """The layer's bias, likewise; None where it has none."""
    bias = getattr(layer, "bias", None)
    return None if bias is None else _copy_of(bias, getattr(layer, "cast_bias", None))


def product_dtype_of(x: torch.Tensor) -> torch.dtype:
    """The type that matrix products of ``x`` have here: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _copy_of(tensor: torch.Tensor, copy: torch.Tensor | None) -> torch.Tensor:
    if copy is None or copy.device != tensor.device or copy.dtype != product_dtype_of(tensor):
        return tensor
    return copy


def keep_casts(layer: Any, dtype: torch.dtype | None) -> None:
    """Keep copies of a layer's weight and bias in ``dtype``, outside of state dicts.

    There are none with None, or of what has that type.
    """
    for name in ("weight", "bias"):
        tensor = getattr(layer, name, None)
        copy = None if tensor is None or dtype in (None, tensor.dtype) else tensor.detach().to(dtype)
        setattr(layer, f"cast_{name}", copy)


class CastTogether(torch.autograd.Function):
    """Casts of many tensors of one type by few kernels, both ways: their gradients are cast back together too."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors in ``dtype``."""
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)  # what was not used has no gradient, not one of zeros
        return tuple(_cast(tensors, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients in the tensors' own type."""
        cast = iter(_cast([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast
