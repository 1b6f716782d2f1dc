"""A filter over the grid of patches: (T, P) to (T, P), row by row."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rank_gaussian(maps: torch.Tensor, grid: tuple[int, int], side: int = 3) -> torch.Tensor:
    """Filter maps (T, P) by the sorted values of each window of ``side`` x ``side`` patches.

    The middle ranks count most; how much less the others do follows from the window's coefficient of variation: an even
    window is averaged over its middle, one with an outlier over more ranks.
    """
    padded = F.pad(maps.reshape(-1, 1, *grid), [side // 2] * 4, mode="reflect")
    windows = F.unfold(padded, side).sort(1).values  # (T, side * side, P)
    ranks = torch.arange(side * side, dtype=maps.dtype) - side * side // 2
    spread = windows.std(1, correction=0) / windows.mean(1).clamp(min=1e-12)  # (T, P)
    kernel = (-ranks.square()[:, None] / (2 * spread[:, None].square()).clamp(min=1e-12)).exp()
    return (windows * kernel).sum(1) / kernel.sum(1)
