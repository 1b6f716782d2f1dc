"""Measures of a word's map against the boxes of what the word names, and their means over words.

Every measure of many words is a ratio of two sums, such as hits over words or intersections over unions. So all of
them get intervals and paired tests alike, over images: words of one image are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from captioning.maps.attention import Window, cell_centres
from captioning.scoring.significance import bootstrap_interval, compare

THRESHOLDS = np.arange(0.05, 1.0, 0.05)  # of a map's maximum
FIXED = 9  # number of the one threshold that no measurement chose: half of the maximum
DRAWS = 1000  # resamples of the images for an interval, and random signs for a test
Box = tuple[float, float, float, float]  # x, y, width, height in pixels, as COCO has it
Ratio = tuple[np.ndarray, np.ndarray]  # (W,) and (W,): a measure is the sum of the first over that of the second


# --- one map --------------------------------------------------------------------------------------------------------


def inside(boxes: Sequence[Box], xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Return (len(ys), len(xs)): whether the point at each x and y lies in one of the boxes, borders included."""
    return np.any([np.outer((ys >= y) & (ys <= y + h), (xs >= x) & (xs <= x + w)) for x, y, w, h in boxes], axis=0)


def coverage(boxes: Sequence[Box], window: Window, grid: tuple[int, ...], fine: int = 4) -> np.ndarray:
    """Return (gh, gw): which share of each cell the boxes cover together, by ``fine`` x ``fine`` points per cell."""
    gh, gw = grid
    covered = inside(boxes, *cell_centres(window, (gh * fine, gw * fine)))
    return covered.reshape(gh, fine, gw, fine).mean((1, 3))


def average_precision(word_map: np.ndarray, covered: np.ndarray) -> float:
    """Return how well a map ranks the cells of the boxes before all others, 0 to 1; a perfect map has 1.

    A cell belongs to the boxes where they cover at least half of it, and where there is none, where they cover most.
    Cells of one value are one step, so ties gain nothing by their order: a flat map gets the boxes' share of the cells.
    """
    wanted = (covered >= min(0.5, covered.max())).ravel()
    order = np.argsort(-word_map.ravel(), kind="stable")
    values, found = word_map.ravel()[order], np.cumsum(wanted[order])
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)  # the last cell of each run of equal values
    gained = np.diff(found[ends], prepend=0)
    return float((gained * found[ends] / (ends + 1)).sum() / wanted.sum())


class MapMeasures(NamedTuple):
    """Of one word's map.

    Attributes:
        hit: whether its maximum lies in a box (pointing game, Zhang et al. 2018).
        mass: share of the map inside the boxes.
        precision: as :func:`average_precision`.
        overlap: (T,) cells of the boxes that lie above each threshold.
        union: (T,) cells that are above each threshold or belong to the boxes.
    """

    hit: bool
    mass: float
    precision: float
    overlap: np.ndarray
    union: np.ndarray


def measure_map(word_map: np.ndarray, boxes: Sequence[Box], covered: np.ndarray, window: Window) -> MapMeasures:
    """Measure a map (gh, gw) against boxes, of which some of the window is covered, and their ``coverage`` of it."""
    row, column = divmod(int(word_map.argmax()), word_map.shape[1])
    xs, ys = cell_centres(window, word_map.shape)
    total = float(word_map.sum())
    above = word_map[None] >= THRESHOLDS[:, None, None] * word_map.max()  # (T, gh, gw)
    overlap = (above * covered).sum((1, 2))
    return MapMeasures(
        inside(boxes, xs[[column]], ys[[row]]).item(),
        float((word_map * covered).sum() / total) if total > 0 else float(covered.mean()),
        average_precision(word_map, covered),
        overlap,
        above.sum((1, 2)) + covered.sum() - overlap,
    )


def baselines(mentions: Sequence[tuple[Sequence[Box], Window]], grid: tuple[int, int]) -> dict[str, float]:
    """Return the pointing accuracy of points that know nothing of the word: what attention must beat.

    ``centre`` is the middle of the image, ``random`` any cell of the grid, ``mean image`` the one cell that lies in the
    most boxes of these very mentions, the best that any fixed point can do.
    """
    hits = np.zeros(grid)
    centre = 0
    for boxes, window in mentions:
        hits += inside(boxes, *cell_centres(window, grid))
        left, top, right, bottom = window
        centre += inside(boxes, np.array([(left + right) / 2]), np.array([(top + bottom) / 2])).item()
    count = len(mentions)
    return {"centre": centre / count, "random": float(hits.mean() / count), "mean image": float(hits.max() / count)}


# --- many words -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredMaps:
    """The measures of W words' maps by one spec, as arrays (W,) or (W, T), and the boxes' shares of the image (W,)."""

    hit: np.ndarray
    mass: np.ndarray
    precision: np.ndarray
    overlap: np.ndarray
    union: np.ndarray
    area: np.ndarray

    @classmethod
    def stack(cls, maps: Sequence[MapMeasures], area: np.ndarray) -> MeasuredMaps:
        """Join the words' measures."""
        return cls(**{name: np.array([getattr(m, name) for m in maps]) for name in MapMeasures._fields}, area=area)

    def of(self, words: np.ndarray) -> MeasuredMaps:
        """Return the measures of some words, by their numbers or a mask."""
        return MeasuredMaps(*(values[words] for values in vars(self).values()))

    @property
    def threshold(self) -> int:
        """The number of the one threshold whose IoU over all words is best."""
        return int((self.overlap.sum(0) / self.union.sum(0)).argmax())

    def ratios(self) -> dict[str, Ratio]:
        """Return every measure as numerators and denominators of its words.

        ``pointing`` is the share of hits, ``mass_ratio`` the share of the map inside the boxes over the boxes' share of
        the image (1 is no better than spread evenly), ``iou`` intersection over union of map and boxes at the one
        threshold that is best over all words, ``iou_fixed`` at half of the maximum, and ``precision`` the mean average
        precision.
        """
        one = np.ones(len(self.hit))
        return {
            "pointing": (self.hit.astype(float), one),
            "mass_ratio": (self.mass, self.area),
            "iou": (self.overlap[:, self.threshold], self.union[:, self.threshold]),
            "iou_fixed": (self.overlap[:, FIXED], self.union[:, FIXED]),
            "precision": (self.precision, one),
        }


def value(ratio: Ratio) -> float:
    """Return a measure over all words."""
    top, bottom = (float(part.sum()) for part in ratio)
    return top / bottom if bottom else float("nan")


def per_image(ratio: Ratio, images: Sequence[str]) -> dict[str, float]:
    """Return a score of each image whose mean over images is the measure, for resampling images and not words.

    It is the ratio's linearisation, measure + (numerator - measure * denominator) / mean denominator, with the image's
    own sums, so that images with many words or large boxes count as much as they do in the measure.
    """
    names, number = np.unique(list(images), return_inverse=True)
    top, bottom = (np.bincount(number, part, len(names)) for part in ratio)
    whole = value(ratio)
    return dict(zip(names.tolist(), (whole + (top - whole * bottom) / bottom.mean()).tolist(), strict=True))


def interval(ratio: Ratio, images: Sequence[str]) -> tuple[float, float]:
    """Return the measure's 95% bootstrap interval over images."""
    return bootstrap_interval(list(per_image(ratio, images).values()), DRAWS)


def p_value(first: Ratio, second: Ratio, images: Sequence[str]) -> float:
    """Return the paired test's two-sided p-value that two specs do not differ by a measure, over the same images."""
    return compare(per_image(first, images), per_image(second, images), DRAWS).p_value
