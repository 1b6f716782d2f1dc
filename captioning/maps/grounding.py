"""Do the maps point at what the words name? Pointing game, attention inside the box, IoU, against boxes.

A caption that people wrote is read after its image, and the map of each word that names things is compared with the
boxes of those things. Which word names which boxes is read from the annotations (``mentions``, as the micro world
writes them) or found by the name of the boxes' category (COCO instances).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from captioning.data.coco import Record, read_captions, read_object, read_records
from captioning.data.images import load_image
from captioning.data.listing import on_disk
from captioning.maps.attention import MapSpec, Window, cell_centres
from captioning.maps.explainers import Explainer, read

log = logging.getLogger(__name__)

THRESHOLDS = np.arange(0.05, 1.0, 0.05)  # of a map's maximum
Box = tuple[float, float, float, float]  # x, y, width, height in pixels, as COCO has it


@dataclass(frozen=True)
class Mention:
    """A word of a caption, by its number among the white-space words, and the boxes of what it names."""

    word: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class GroundedCaption:
    """An image file, one of its captions, and what the caption's words name."""

    path: Path
    caption: str
    mentions: tuple[Mention, ...]


# --- annotations ----------------------------------------------------------------------------------------------------


def load_grounded_captions(annotations: Path, images: Path, boxes: Path | None = None) -> list[GroundedCaption]:
    """Return one caption per image, the one that names the most things, with the boxes of its words.

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
            samples.append(GroundedCaption(on_disk(images / image["file_name"]), record["caption"], best))
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


def inside(boxes: Sequence[Box], xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Return (len(ys), len(xs)): whether the point at each x and y lies in one of the boxes, borders included."""
    return np.any([np.outer((ys >= y) & (ys <= y + h), (xs >= x) & (xs <= x + w)) for x, y, w, h in boxes], axis=0)


def coverage(boxes: Sequence[Box], window: Window, grid: tuple[int, int], fine: int = 4) -> np.ndarray:
    """Return (gh, gw): which share of each cell the boxes cover together, by ``fine`` x ``fine`` points per cell."""
    gh, gw = grid
    covered = inside(boxes, *cell_centres(window, (gh * fine, gw * fine)))
    return covered.reshape(gh, fine, gw, fine).mean((1, 3))


@dataclass
class Score:
    """Sums over the mentions, for one spec; the properties are the means that are reported."""

    count: int = 0
    hits: float = 0.0
    mass: float = 0.0
    area: float = 0.0
    intersections: np.ndarray | float = 0.0  # by threshold
    unions: np.ndarray | float = 0.0

    def add(self, word_map: np.ndarray, boxes: Sequence[Box], covered: np.ndarray, window: Window) -> None:
        """Count one word: its map (gh, gw), its boxes, and their ``coverage``."""
        row, column = divmod(int(word_map.argmax()), word_map.shape[1])
        xs, ys = cell_centres(window, word_map.shape)
        self.count += 1
        self.hits += inside(boxes, xs[[column]], ys[[row]]).item()
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


def measure(
    explainer: Explainer, samples: Sequence[GroundedCaption], specs: Sequence[MapSpec]
) -> tuple[dict[MapSpec, Score], dict[str, float], int]:
    """Score every spec on the mentions of ``samples``; an image that cannot be read is named and left out.

    Returns:
        the scores, the baselines' pointing accuracy, and how many images were measured.

    Raises:
        ValueError: none was.
    """
    scores = {spec: Score() for spec in specs}
    mentions, count = [], 0
    for sample in tqdm(samples, "grounding", disable=None):
        try:
            image = load_image(sample.path)
        except (ValueError, OSError) as error:
            log.error("not measured: %s", error)
            continue
        count += 1
        window = explainer.window(image.size)
        attention = read(explainer, explainer.prepare(image), explainer.tokens(sample.caption), specs)
        grid = attention.capture.grid
        covered = [coverage(mention.boxes, window, grid) for mention in sample.mentions]
        mentions += [(mention.boxes, window) for mention in sample.mentions]
        for spec in specs:
            maps = attention.maps(spec)
            for mention, share in zip(sample.mentions, covered, strict=True):
                scores[spec].add(maps[mention.word], mention.boxes, share, window)
    if not count:
        raise ValueError(f"none of the {len(samples)} images could be measured")
    return scores, baselines(mentions, grid), count


class Row(NamedTuple):
    """A row of grounding.csv: a spec with its measures, or a baseline, which has a name and a pointing accuracy."""

    method: str
    layers: str | None
    heads: str | None
    row: str | None
    pointing: float
    mass_ratio: float | None
    iou: float | None
    note: str

    def __str__(self) -> str:
        if self.layers is None:
            return f"{self.method:<44}{self.pointing:>7.3f}{'':>14}  {self.note}"
        name = f"{self.method} layers {self.layers} heads {self.heads} {self.row}"
        return f"{name:<44}{self.pointing:>7.3f}{self.mass_ratio:>7.2f}{self.iou:>7.3f}  {self.note}"


def table(scores: Mapping[MapSpec, Score], floor: Mapping[str, float], notes: Mapping[MapSpec, str]) -> list[Row]:
    """Return a row per spec, the best pointing accuracy first, and after them those of the baselines (``floor``)."""
    rows = [
        Row(s.method, s.layers, s.heads, s.row, score.pointing, score.mass_ratio, score.iou, notes.get(s, ""))
        for s, score in sorted(scores.items(), key=lambda item: -item[1].pointing)
    ]
    return rows + [Row(name, None, None, None, value, None, None, "baseline") for name, value in floor.items()]
