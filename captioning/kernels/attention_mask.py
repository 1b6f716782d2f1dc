"""Masks in the form that attention adds to its scores."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_MULTIPLE = 16  # numbers; CUDA's kernels want every row of a mask to begin at a multiple of 16 bytes


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a query may look and -inf elsewhere, of the shape of ``visible`` (..., S) and the queries' type.

    Made once it serves all layers, each of which would convert a boolean mask again. On CUDA its rows lie apart by a
    multiple of ``ROW_MULTIPLE``, or attention would pad a copy of it in every layer.
    """
    *rows, size = visible.shape
    length = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE if visible.device.type == "cuda" else size
    mask = torch.zeros(*rows, length, dtype=dtype, device=visible.device)[..., :size]
    return mask.masked_fill_(~visible, -torch.inf)
