"""Products by frozen weights, in training by the fastest way there is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from captioning.kernels.onednn import OneDnnLinear, can_use_onednn


def frozen_linear(layer: nn.Linear | nn.Embedding, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by a layer's frozen weight (out, in): (..., in) to (..., out)."""
    weight = frozen_weight(layer)
    if torch.is_grad_enabled() and can_use_onednn(x, weight, bias):
        return OneDnnLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def frozen_weight(layer: nn.Linear | nn.Embedding) -> torch.Tensor:
    """The layer's weight, or where autocast would cast it at this use the copy that ``keep_cast_weight`` made."""
    weight, copy = layer.weight, getattr(layer, "cast_weight", None)
    kind = weight.device.type
    if copy is None or copy.device != weight.device or not torch.is_autocast_enabled(kind):
        return weight
    return copy if copy.dtype == torch.get_autocast_dtype(kind) else weight


def keep_cast_weight(layer: Any, dtype: torch.dtype | None) -> None:
    """Keep a copy of a layer's weight in ``dtype``, outside of state dicts; none with None or the weight's own type."""
    layer.cast_weight = None if dtype in (None, layer.weight.dtype) else layer.weight.detach().to(dtype)
