"""Where captions are that follow one image prefix.

A row of a batch is ``[prefix | caption 1 | … | caption k]``. The prefix is causal; a caption's tokens see the prefix
and, up to themselves, their own caption.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.kernels.attention_mask import additive_mask


class Packing:
    """Where the captions of each row are: no mask needed.

    Args:
        n_prefix: tokens P of the prefix.
        slots: long (B, k, T), where after the prefix each caption's tokens are, in order; -1 past its end. The
            captions of a row come one after another from 0 on, those that it has before those that it lacks.
        length: tokens S after the prefix, padding included.
        mask: builds the same as a boolean mask (B, 1, P+S, P+S), for attention that takes one.
        route: one of `attention_route.ROUTES`.
    """

    def __init__(
        self, n_prefix: int, slots: Tensor, length: int, mask: Callable[[], Tensor], route: str = "auto"
    ) -> None:
        self.n_prefix, self.slots, self.length, self._mask, self.route = n_prefix, slots, length, mask, route
        self._additive: dict[torch.dtype, Tensor] = {}
        self._begins: dict[bool, Tensor] = {}

    @cached_property
    def mask(self) -> Tensor:
        """Where a query may look, bool (B, 1, P+S, P+S)."""
        return self._mask()

    def additive(self, dtype: torch.dtype) -> Tensor:
        """The mask as attention adds it to scores, made once for each type of queries."""
        if dtype not in self._additive:
            self._additive[dtype] = additive_mask(self.mask, dtype)
        return self._additive[dtype]

    def begins(self, captions_only: bool) -> Tensor:
        """Where the prefix and the captions of all rows begin, one row after the other, and the end: int32.

        Without the prefixes if ``captions_only``. Padding counts as the end of the caption before it, which does not
        see it; a caption that a row lacks is empty.
        """
        if captions_only not in self._begins:
            first = self.slots[..., 0]  # (B, k)
            first = torch.where(first < 0, self.length, first)
            if not captions_only:
                first = F.pad(first + self.n_prefix, (1, 0))
            size = self.length if captions_only else self.n_prefix + self.length
            rows = torch.arange(0, len(first) * size, size, device=first.device)[:, None]
            self._begins[captions_only] = F.pad((first + rows).flatten(), (0, 1), value=len(first) * size).int()
        return self._begins[captions_only]

    @cached_property
    def valid(self) -> Tensor:
        """Which places of the grid below are tokens, bool (B, k, T)."""
        return self.slots >= 0

    @cached_property
    def _places(self) -> tuple:
        """How to gather into the grid and back; what has no counterpart reads the one at 0, to be thrown away."""
        slots, length = self.slots, self.length
        rows = torch.arange(len(slots), device=slots.device)[:, None]  # (B, 1)
        flat, size = slots.flatten(1), slots[0].numel()
        back = torch.full((len(slots), length + 1), -1, device=slots.device)
        back[rows, torch.where(flat < 0, length, flat)] = torch.arange(size, device=slots.device)
        covered = back[:, :-1] >= 0  # (B, S), False on padding
        return (rows, flat.clamp_min(0)), (rows, back[:, :-1].clamp_min(0)), covered[:, :, None, None]

    def grid(self, x: Tensor) -> Tensor:
        """Gather what is after the prefix, (B, S, nh, n), by caption: (B, k, nh, T, n)."""
        return x[self._places[0]].unflatten(1, self.valid.shape[1:]).transpose(2, 3)

    def row(self, x: Tensor) -> Tensor:
        """The inverse of ``grid``, zeros on padding: (B, k, nh, T, n) to (B, S, nh, n)."""
        return x.transpose(2, 3).flatten(1, 2)[self._places[1]] * self._places[2]
