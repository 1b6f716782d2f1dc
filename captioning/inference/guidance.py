"""Guidance: captions that say more of what is only in the image, by extrapolating from what words alone would say.

Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), for captions by Kornblith et al. (arXiv 2307.16686): the
next token is searched by

    log p(token | words) + g (log p(token | image, words) - log p(token | words)).

With g = 1 that is the captioner itself. p(token | words) is the captioner's own, after an image of zeros, which
training must have shown it (``--image-dropout``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from captioning.inference.search import Step


class GuidedStep:
    """A step function of B images over one of 2B rows: the images, then as many of zeros.

    Args:
        step: of the 2B rows.
        keep: drops all rows but the given ones; None where the batch stays complete.
        images: B.
        scale: g.
    """

    def __init__(self, step: Step, keep: Callable[[torch.Tensor], None] | None, images: int, scale: float) -> None:
        self.step, self.images, self.scale = step, images, scale
        self._keep = keep

    def __call__(self, tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        """Return guided logits (B, K, V) after the newest tokens (B, K), each of which sees its ancestors (B, K, n)."""
        logits = self.step(tokens.repeat(2, 1), ancestors.repeat(2, 1, 1))
        seeing, blind = torch.log_softmax(logits.float(), -1).chunk(2)
        return blind + self.scale * (seeing - blind)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all images but these, by place in the batch (n,)."""
        assert self._keep is not None
        self._keep(torch.cat((rows, rows + self.images)))
        self.images = len(rows)


def check_guidance(guidance: float, image_dropout: float) -> None:
    """Raise ValueError for a scale below 0, or an adapter that learned no captions without images."""
    if not 0 <= guidance < math.inf:
        raise ValueError(f"--guidance {guidance}: must be a number from 0 on; 1 is without")
    if guidance != 1 and not image_dropout:
        raise ValueError(
            f"--guidance {guidance}: the adapter was trained without --image-dropout, so what it says without an image "
            "means nothing; train one with --image-dropout 0.1, or leave --guidance out"
        )
