"""Do the maps point at what the words name? Pointing game, attention inside the box, IoU, against boxes.

A caption that people wrote is read behind its image, and for each word that names things the map of that word is
compared with the boxes of those things. Which word names which boxes stands in the annotations (``mentions``, as the
micro world writes them) or is found by the name of the boxes' category (COCO instances).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioning.data.annotations import Record, read_captions, read_object, read_records
from captioning.data.images import load_image
from captioning.maps.attention import Look, Window, cell_centres
from captioning.maps.explainers import Explainer, read

THRESHOLDS = np.arange(0.05, 1.0, 0.05)  # of a map's maximum
Box = tuple[float, float, float, float]  # x, y, width, height in pixels, as COCO has it


@dataclass(frozen=True)
class Mention:
    """A word of a caption, by its number among the white-space words, and the boxes of what it names."""

    word: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Sample:
    """An image file, one of its captions, and what the caption's words name."""

    path: Path
    caption: str
    mentions: tuple[Mention, ...]


# --- annotations ----------------------------------------------------------------------------------------------------


def load_samples(annotations: Path, images: Path, boxes: Path | None = None) -> list[Sample]:
    """Return one caption an image, the one that names most, with the boxes of its words.

    Args:
        annotations: COCO-style captions; with ``mentions`` and ``objects`` they carry their own boxes.
        images: the folder of the images.
        boxes: COCO instances for captions without mentions.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as ``read_captions``; also a box outside its image, or no word that names a box.
    """
    file = read_captions(annotations)
    find = _own_mentions(annotations, file.content) if boxes is None else _category_mentions(boxes)
    samples = []
    for image_id, records in file.captions.items():
        image, mentions = file.images[image_id], [find(record) for record in records]
        record, best = max(zip(records, mentions, strict=True), key=lambda pair: len(pair[1]))
        if best:
            _check_boxes(annotations, image, best)
            samples.append(Sample(images / image["file_name"], record["caption"], best))
    if not samples:
        raise ValueError(
            f"{boxes or annotations}: no word of a caption names a box; the annotations need mentions and "
            "objects, or --boxes COCO instances"
        )
    return samples


def _own_mentions(path: Path, content: Record) -> Callable[[Record], tuple[Mention, ...]]:
    """Return a function of a caption record: its mentions of nouns, from the annotations themselves."""
    objects = read_records(path, content, "objects", "id", "image_id", "bbox", optional=True)
    boxes: dict[tuple[int, int], Box] = {(o["image_id"], o["id"]): tuple(o["bbox"]) for o in objects}

    def find(record: Record) -> tuple[Mention, ...]:
        words, where = len(record["caption"].split()), f"{path}: a caption of image {record['image_id']}"
        try:
            found = tuple(
                Mention(m["word"], tuple(boxes[record["image_id"], thing] for thing in m["objects"]))
                for m in record.get("mentions", [])
                if m["role"] == "noun"
            )
            if all(m.boxes and 0 <= m.word < words for m in found):
                return found
        except (KeyError, TypeError) as error:  # a field is missing, or of another type
            raise ValueError(
                f"{where} has mentions of another form; each needs word, role and objects of its image"
            ) from error
        raise ValueError(f"{where} mentions a word that it lacks, or no object")

    return find


def _category_mentions(path: Path) -> Callable[[Record], tuple[Mention, ...]]:
    """Return a function of a caption record: words that are the name of a category that has boxes in the image."""
    content = read_object(path)
    categories = {c["id"]: c["name"].lower() for c in read_records(path, content, "categories", "id", "name")}
    boxes: dict[tuple[int, str], list[Box]] = {}
    for record in read_records(path, content, "annotations", "image_id", "category_id", "bbox"):
        name = categories.get(record["category_id"], "")
        boxes.setdefault((record["image_id"], name), []).append(tuple(record["bbox"]))
    single = {name for name in categories.values() if " " not in name}

    def find(record: Record) -> tuple[Mention, ...]:
        found = []
        for number, word in enumerate(record["caption"].split()):
            plain = word.strip(".,;:!?\"'()").lower()
            name = next((n for n in (plain, plain.removesuffix("s"), plain.removesuffix("es")) if n in single), None)
            if name and (record["image_id"], name) in boxes:
                found.append(Mention(number, tuple(boxes[record["image_id"], name])))
        return tuple(found)

    return find


def _check_boxes(path: Path, image: Record, mentions: Sequence[Mention]) -> None:
    width, height = image.get("width"), image.get("height")
    if not isinstance(width, int) or not isinstance(height, int):
        return  # COCO gives them; without them the boxes cannot be checked
    for mention in mentions:
        for x, y, w, h in mention.boxes:
            if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1 or w <= 0 or h <= 0:
                name = f"image {image['file_name']} of {width} x {height}"
                raise ValueError(f"{path}: {name} has a box {x, y, w, h}, which lies outside or is empty")


# --- measures -------------------------------------------------------------------------------------------------------


def coverage(boxes: Sequence[Box], window: Window, grid: tuple[int, int], fine: int = 4) -> np.ndarray:
    """Return (gh, gw): which share of each cell the boxes cover together."""
    gh, gw = grid
    xs, ys = cell_centres(window, (gh * fine, gw * fine))
    inside = np.zeros((gh * fine, gw * fine), bool)
    for x, y, w, h in boxes:
        inside |= np.outer((ys >= y) & (ys <= y + h), (xs >= x) & (xs <= x + w))
    return inside.reshape(gh, fine, gw, fine).mean((1, 3))


def centre_in(cell: tuple[int, int], boxes: Sequence[Box], window: Window, grid: tuple[int, int]) -> bool:
    """Say whether the centre of a cell (row, column) lies in one of the boxes."""
    xs, ys = cell_centres(window, grid)
    x, y = xs[cell[1]], ys[cell[0]]
    return any(left <= x <= left + w and top <= y <= top + h for left, top, w, h in boxes)


@dataclass
class Score:
    """Sums over the mentions of one way of looking; the properties are the means that are reported."""

    count: int = 0
    hits: float = 0.0
    mass: float = 0.0
    area: float = 0.0
    intersections: np.ndarray | float = 0.0  # by threshold
    unions: np.ndarray | float = 0.0

    def add(self, word_map: np.ndarray, boxes: Sequence[Box], covered: np.ndarray, window: Window) -> None:
        """Count one word: its map (gh, gw), its boxes, and their ``coverage``."""
        peak = np.unravel_index(int(word_map.argmax()), word_map.shape)
        self.count += 1
        self.hits += centre_in(peak, boxes, window, word_map.shape)
        total = float(word_map.sum())
        self.mass += float((word_map * covered).sum() / total) if total > 0 else float(covered.mean())
        self.area += float(covered.mean())
        above = word_map[None] >= THRESHOLDS[:, None, None] * word_map.max()  # (thresholds, gh, gw)
        overlap = (above * covered).sum((1, 2))
        self.intersections = self.intersections + overlap
        self.unions = self.unions + above.sum((1, 2)) + covered.sum() - overlap

    @property
    def pointing(self) -> float:
        """Share of words whose map has its maximum inside a box (pointing game, Zhang et al. 2018)."""
        return self.hits / self.count

    @property
    def mass_ratio(self) -> float:
        """Share of the map inside the boxes over the boxes' share of the image; 1 is no better than spread evenly."""
        return self.mass / self.area if self.area else float("nan")

    @property
    def iou(self) -> float:
        """Intersection over union of map and boxes, at the one threshold that is best over all words."""
        return float((np.asarray(self.intersections) / np.asarray(self.unions)).max())


def baselines(mentions: Sequence[tuple[Sequence[Box], np.ndarray, Window]]) -> dict[str, float]:
    """Return the pointing accuracy of maps that know nothing of the word: the bar that attention must clear.

    ``centre`` points at the middle of the image, ``random`` at any cell, ``mean image`` at the one cell that lies in
    most boxes of these very mentions, the best that any fixed point can do.

    Args:
        mentions: boxes, their coverage (gh, gw) and the window.
    """
    grid = mentions[0][1].shape
    hits = np.zeros(grid)
    centre = 0
    for boxes, covered, window in mentions:
        xs, ys = cell_centres(window, grid)
        inside = np.zeros(covered.shape, bool)
        for x, y, w, h in boxes:
            inside |= np.outer((ys >= y) & (ys <= y + h), (xs >= x) & (xs <= x + w))
        hits += inside
        middle = ((window[0] + window[2]) / 2, (window[1] + window[3]) / 2)
        centre += any(x <= middle[0] <= x + w and y <= middle[1] <= y + h for x, y, w, h in boxes)
    count = len(mentions)
    return {"centre": centre / count, "random": float(hits.mean() / count), "mean image": float(hits.max() / count)}


def measure(
    explainer: Explainer, samples: Sequence[Sample], looks: Sequence[Look], relative_to: str
) -> tuple[dict[Look, Score], dict[str, float]]:
    """Score every look on the mentions of ``samples``; return the scores and the baselines' pointing accuracy."""
    scores = {look: Score() for look in looks}
    seen = []
    for sample in tqdm(samples, "grounding", disable=None):
        image = load_image(sample.path)
        window = explainer.window(image.size)
        reading = read(explainer, explainer.prepare(image), explainer.tokens(sample.caption), looks, relative_to)
        covered = [coverage(m.boxes, window, reading.capture.grid) for m in sample.mentions]
        seen += [(m.boxes, c, window) for m, c in zip(sample.mentions, covered, strict=True)]
        for look in looks:
            maps = reading.maps(look)
            for mention, share in zip(sample.mentions, covered, strict=True):
                scores[look].add(maps[mention.word], mention.boxes, share, window)
    return scores, baselines(seen)
