"""A map method that asks where the layers agree: attention and its gradients, each blurred a little, multiplied.

Single layers look at many places, and few of them at what the word names; other layers err elsewhere. A product keeps
what most of them have, where a mean keeps the loudest. Function and shapes as in ``by_attention``.
"""

from __future__ import annotations

import torch

from captioning.maps.by_attention import gradient_steps, raw_steps
from captioning.maps.capture import Capture, Choices

# Chosen by --grounding on scenes of the split `train`.
BLUR = 0.85  # standard deviation in patches
POINTS = 3  # rows and columns of the map in each patch
FLOOR = 0.1  # added to maps of mean 1: one layer that looks elsewhere is no veto


def agree(capture: Capture, spec: Choices) -> torch.Tensor:
    """Return the geometric mean over layers of attention and of attention times its gradient: (T, 9 P).

    Both are those of ``raw`` and ``grad``. Neighbouring patches mostly show one thing, and which of them a layer reads
    is arbitrary, so each map is blurred; with ``POINTS`` x ``POINTS`` points in each patch the blurred map shows where
    between patches its maximum is.

    Raises:
        ValueError: the capture has no gradients.
    """
    steps = torch.cat([raw_steps(capture, spec), torch.stack(gradient_steps(capture, spec)).cpu()])
    maps = steps.unflatten(-1, capture.grid)  # (2 l, T, gh, gw)
    down, across = (_blur(size) for size in capture.grid)
    maps = (down @ maps @ across.T).flatten(-2)
    maps = maps / maps.mean(-1, keepdim=True).clamp(min=1e-12)
    return (maps + FLOOR).log().mean(0).exp()


def _blur(size: int) -> torch.Tensor:
    """Return (POINTS size, size): the weight of each patch of a row at each point of it, rows summing to 1."""
    points = (torch.arange(POINTS * size) + 0.5) / POINTS - 0.5  # in patches, the first one's centre being 0
    return (-(points[:, None] - torch.arange(size)).square() / (2 * BLUR**2)).softmax(1)
