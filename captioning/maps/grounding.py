"""Captions whose words have boxes: what maps are measured against.

Which word names which boxes is read from the annotations (``mentions``, as the micro world writes them) or found by the
name of the boxes' category (COCO instances).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from captioning.data.coco import Record, read_captions, read_object, read_records
from captioning.data.listing import on_disk
from captioning.maps.measures import Box
from captioning.messages import some

log = logging.getLogger(__name__)

THING = "thing"  # the kind of words that name the things themselves; a colour's boxes are those of the coloured things
KINDS = {"noun": THING}  # by an annotation's role; other roles are kinds of their own


@dataclass(frozen=True)
class Mention:
    """A word of a caption, by its number among the white-space words, the boxes of what it is about, and its kind.

    Only a thing always has boxes.
    """

    word: int
    boxes: tuple[Box, ...]
    kind: str = THING


@dataclass(frozen=True)
class GroundedCaption:
    """An image file, one of its captions, and what the caption's words name."""

    path: Path
    caption: str
    mentions: tuple[Mention, ...]


# --- annotations ----------------------------------------------------------------------------------------------------


def load_grounded_captions(annotations: Path, images: Path, boxes: Path | None = None) -> list[GroundedCaption]:
    """Return one caption per image, the one that names the most things, with the boxes of its words.

    Images of which no word has a box are left out, which is logged.

    Args:
        annotations: COCO-style captions; with ``mentions`` and ``objects`` they carry their own boxes.
        images: the folder of the images.
        boxes: COCO instances for captions without mentions.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as ``read_captions``; also a box outside its image, or no word that names a box.
    """
    file = read_captions(annotations)
    find = _own_mentions(annotations, file.content) if boxes is None else _category_mentions(boxes, file.images)
    samples, bare = [], []
    for image_id, records in file.captions.items():
        image, mentions = file.images[image_id], [find(record) for record in records]
        record, best = max(zip(records, mentions, strict=True), key=lambda pair: _things(pair[1]))
        if _things(best):
            _check_boxes(annotations, image, best)
            samples.append(GroundedCaption(on_disk(images / image["file_name"]), record["caption"], best))
        else:
            bare.append(image["file_name"])
    if not samples:
        raise ValueError(
            f"{boxes or annotations}: no word of a caption names a box; the annotations need mentions and "
            "objects, or --boxes COCO instances"
        )
    if bare:
        log.warning(
            "%s: %d of %d images have no word with a box: %s", annotations, len(bare), len(file.images), some(bare)
        )
    return samples


def _things(mentions: Sequence[Mention]) -> int:
    return sum(mention.kind == THING for mention in mentions)


def _own_mentions(path: Path, content: Record) -> Callable[[Record], tuple[Mention, ...]]:
    """Return a function of a caption record: its mentions, from the annotations themselves."""
    objects = read_records(path, content, "objects", "id", "image_id", "bbox", optional=True)
    boxes: dict[tuple[int, int], Box] = {(o["image_id"], o["id"]): tuple(o["bbox"]) for o in objects}

    def find(record: Record) -> tuple[Mention, ...]:
        words, where = len(record["caption"].split()), f"{path}: a caption of image {record['image_id']}"
        try:
            found = tuple(
                Mention(m["word"], tuple(boxes[record["image_id"], o] for o in m["objects"]), _kind(m["role"]))
                for m in record.get("mentions", [])
            )
            if all((m.boxes or m.kind != THING) and 0 <= m.word < words for m in found):
                return found
        except (KeyError, TypeError) as error:  # a field is missing, or of another type
            raise ValueError(
                f"{where} has mentions of another form; each needs word, role and objects of its image"
            ) from error
        raise ValueError(f"{where} mentions a word that it lacks, or no object")

    return find


def _kind(role: str) -> str:
    if not isinstance(role, str):
        raise TypeError(f"the role {role!r} is no text")
    return KINDS.get(role, role)


def _category_mentions(path: Path, images: Container[int]) -> Callable[[Record], tuple[Mention, ...]]:
    """Return a function of a caption record: words that are the name of a category that has boxes in the image."""
    content = read_object(path)
    categories = {c["id"]: c["name"].lower() for c in read_records(path, content, "categories", "id", "name")}
    boxes: dict[tuple[int, str], list[Box]] = {}
    for record in read_records(path, content, "annotations", "image_id", "category_id", "bbox"):
        name = categories.get(record["category_id"], "")
        boxes.setdefault((record["image_id"], name), []).append(tuple(record["bbox"]))
    if not any(image_id in images for image_id, _ in boxes):
        first = next(iter(boxes))[0]
        raise ValueError(
            f"--boxes {path}: its boxes are of other images, first {first}; give those of the captions' images"
        )
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
