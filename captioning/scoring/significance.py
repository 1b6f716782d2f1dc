"""How sure a score is: bootstrap intervals over images (Efron 1979), and a paired test between two captioners.

Both are for metrics that are means over images. Only the images are resampled: document frequencies and models stay
what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

CONFIDENCE = 0.95
BLOCK = 1 << 22  # numbers drawn at once: 32 MB


@dataclass(frozen=True)
class Comparison:
    """How the first of two prediction files differs from the second by one metric."""

    difference: float  # of the means, first minus second
    low: float  # of the difference's bootstrap interval
    high: float
    p_value: float  # two-sided; the hypothesis is that the two could be swapped on any image
    wins: int  # images on which the first is better
    ties: int
    losses: int
    largest: list[tuple[str, float]]  # images that differ, and by how much, the largest differences first

    def turned(self) -> Comparison:
        """Return the same for a metric of which less is better: wins are where the first has less."""
        return replace(self, wins=self.losses, losses=self.wins)

    def line(self, metric: str) -> str:
        """The result in words."""
        return (
            f"{metric}: difference {self.difference:+.6f}, {CONFIDENCE:.0%} interval "
            f"[{self.low:+.6f}, {self.high:+.6f}], p = {self.p_value:.4g}; "
            f"{self.wins} wins, {self.ties} ties, {self.losses} losses"
        )

    def summary(self) -> dict[str, Any]:
        """The result for machines."""
        return {**vars(self), "confidence": CONFIDENCE, "largest": dict(self.largest)}


def bootstrap_interval(scores: Sequence[float] | np.ndarray, draws: int, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the mean of ``scores`` ``(n,)`` from ``draws`` resamples of the images.

    Raises:
        ValueError: there are fewer than 2 draws or no scores.
    """
    if draws < 2:
        raise ValueError(f"--bootstrap {draws}: must be at least 2; 1000 is usual")
    scores = np.asarray(scores, dtype=np.float64)
    if not len(scores):
        raise ValueError("a bootstrap interval needs the score of at least one image")
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(scores))
    means = [
        scores[generator.integers(len(scores), size=(min(rows, draws - start), len(scores)))].mean(axis=1)
        for start in range(0, draws, rows)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def compare(
    first: Mapping[str, float], second: Mapping[str, float], draws: int = 10_000, seed: int = 0, largest: int = 10
) -> Comparison:
    """Compare two ``{image: score}`` of the same images.

    The p-value is that of a paired randomisation test (Fisher 1935): how often the differences with random signs have
    a mean at least as far from 0. The observed signs count as one draw, so it is never 0.

    Raises:
        ValueError: the images differ, or there are none.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError("a paired comparison needs scores of the same images, and of at least one")
    difference = np.array([first[image] - second[image] for image in first], dtype=np.float64)
    low, high = bootstrap_interval(difference, draws, seed)
    generator = np.random.default_rng(seed + 1)
    observed, extreme = abs(difference.sum()), 0
    rows = max(1, BLOCK // len(difference))
    for start in range(0, draws, rows):
        signs = generator.integers(2, size=(min(rows, draws - start), len(difference)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ difference) >= observed * (1 - 1e-12)).sum())
    ranked = sorted(zip(first, difference.tolist(), strict=True), key=lambda pair: (-abs(pair[1]), pair[0]))
    return Comparison(
        float(difference.mean()),
        low,
        high,
        (extreme + 1) / (draws + 1),
        int((difference > 0).sum()),
        int((difference == 0).sum()),
        int((difference < 0).sum()),
        [pair for pair in ranked[:largest] if pair[1]],
    )
