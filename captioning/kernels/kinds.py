"""Which rows of a sequence are of an image, for LoRA that updates them by tensors of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class ImageRows:
    """How many rows of the sequence that is read are of an image; they come first. Nothing is read: none."""

    def __init__(self) -> None:
        self.images = self.total = 0

    @contextlib.contextmanager
    def reading(self, images: int, total: int) -> Iterator[None]:
        """Within, a sequence of ``total`` rows is read, of which the first ``images`` are of an image."""
        self.images, self.total = images, total
        try:
            yield
        finally:
            self.images = self.total = 0

    def among(self, last: int) -> int:
        """How many of the last rows of the sequence are of an image."""
        return max(0, self.images - max(0, self.total - last))


def only_own_half(low: torch.Tensor, images: int) -> torch.Tensor:
    """Of low-rank activations (..., T, r), leave image rows the first half of the rank, and text rows the second."""
    half = low.shape[-1] // 2
    own = torch.ones(low.shape[-2:], dtype=low.dtype, device=low.device)
    own[:images, half:] = 0
    own[images:, :half] = 0
    return low * own


def correct_images(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, images: int
) -> torch.Tensor:
    """Give image rows their own update in place of the text rows', which is merged into the weight.

    Args:
        out: of the merged layer (..., T, out), changed in place.
        x: its input (..., T, in).
        a: A of both kinds (r, in).
        b: B of both (out, r).
        scaling: alpha / r.
        images: how many of the rows.
    """
    if images:
        low = (x[..., :images, :].to(a.dtype) @ a.T) * scaling
        half = low.shape[-1] // 2
        low = torch.cat((low[..., :half], -low[..., half:]), -1)
        out[..., :images, :] += low.to(b.dtype) @ b.T
    return out


class CorrectedLinear(nn.Module):
    """A layer that holds the text rows' merged weight, ``linear``, and corrects the image rows.

    Args:
        linear: any module from (..., in) to (..., out).
        a, b, scaling: see ``correct_images``.
        rows: of the decoder.
    """

    def __init__(self, linear: nn.Module, a: torch.Tensor, b: torch.Tensor, scaling: float, rows: ImageRows) -> None:
        super().__init__()
        self.linear, self._a, self._b, self.scaling, self.rows = linear, a, b, scaling, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., T, in) to (..., T, out)."""
        images = self.rows.among(x.shape[-2])
        return correct_images(self.linear(x), x, self._a, self._b, self.scaling, images)
