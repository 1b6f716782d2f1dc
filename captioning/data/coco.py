"""Records in COCO's layout, read strictly: captions of images, and what boxes on images need.

A caption file is one JSON object, ``{"images": [{id, file_name}], "annotations": [{id, image_id, caption}]}``
(https://cocodataset.org/#format-data). Files as LAVIS writes for COCO's evaluation have images with an id alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from captioning.files import is_integer, is_text, read_json
from captioning.messages import some

Record = dict[str, Any]


def is_filled(value: Any) -> bool:
    """Whether ``value`` is text in valid Unicode, and not white space alone."""
    return is_text(value) and bool(value.strip())


def _is_box(value: Any) -> bool:
    is_list_of_four = isinstance(value, list) and len(value) == 4
    return is_list_of_four and all(is_integer(v) or isinstance(v, float) for v in value)


_INTEGER, _TEXT = ("an integer", is_integer), ("non-empty text in valid Unicode", is_filled)
_FIELDS = {
    **dict.fromkeys(("id", "image_id", "category_id"), _INTEGER),
    **dict.fromkeys(("file_name", "caption", "name"), _TEXT),
    "bbox": ("four numbers", _is_box),
}
_NAMELESS = _FIELDS | dict.fromkeys(
    ("id", "image_id"), ("an integer or text", lambda value: is_integer(value) or is_filled(value))
)


@dataclass(frozen=True)
class CaptionFile:
    """What a caption file holds.

    Attributes:
        content: the JSON object, with whatever else is in it.
        images: the image records by id, in the file's order.
        captions: the caption records of each image id, both in the order of the file's captions.
    """

    content: Record
    images: dict[Any, Record]
    captions: dict[Any, list[Record]]


def read_captions(file: str | os.PathLike) -> CaptionFile:
    """Read a caption file whose images have names; errors as :func:`parse_captions`, FileNotFoundError too."""
    return parse_captions(file, read_object(file), named=True)


def parse_captions(file: str | os.PathLike, content: Record, named: bool = False) -> CaptionFile:
    """Return what ``content``, of ``file``, holds; images may lack a file name where none has one, unless ``named``.

    Raises:
        ValueError: the structure is another; a text is empty or not valid Unicode; two images share an id, or two
            captions; a caption is of no listed image; an image has none.
    """
    nameless = not named and not _some_have(content.get("images"), "file_name")
    fields, kinds = (("id",), _NAMELESS) if nameless else (("id", "file_name"), _FIELDS)
    records = read_records(file, content, "images", *fields, kinds=kinds)
    _refuse_repeated(file, "images", [image["id"] for image in records])
    images = {image["id"]: image for image in records}
    captions: dict[Any, list[Record]] = {}
    records = read_records(file, content, "annotations", "image_id", "caption", kinds=kinds)
    if any(record.get("id") != record["image_id"] for record in records):  # LAVIS repeats the image's id there
        _refuse_repeated(file, "captions", [record["id"] for record in records if "id" in record])
    for record in records:
        captions.setdefault(record["image_id"], []).append(record)
    unknown = [image_id for image_id in captions if image_id not in images]
    if unknown:
        raise ValueError(f"{file}: captions of image ids that 'images' does not list: {some(unknown)}")
    bare = [f"{image.get('file_name', 'image')} (id {i})" for i, image in images.items() if i not in captions]
    if bare:
        raise ValueError(f"{file}: {len(bare)} of {len(images)} images have no caption: {some(bare)}")
    return CaptionFile(content, images, captions)


def read_object(file: str | os.PathLike) -> Record:
    """Return the JSON object in ``file``. Raises FileNotFoundError or ValueError where there is none."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold one JSON object, not a {type(content).__name__}")
    return content


def read_records(
    file: str | os.PathLike,
    content: Record,
    name: str,
    *fields: str,
    optional: bool = False,
    kinds: Mapping[str, tuple[str, Any]] = _FIELDS,
) -> list[Record]:
    """Return the list ``name`` in ``content``, COCO's records with ``fields``; where ``optional`` it may be empty.

    Raises:
        ValueError: there is no such list, or a record lacks one of the fields or has it in another type than ``kinds``
            says.
    """
    records = content.get(name, [] if optional else None)
    if not isinstance(records, list) or not (records or optional):
        raise ValueError(f"{file}: needs a list {name!r} of records with {', '.join(fields)}")
    for number, record in enumerate(records):
        for field in fields:
            wanted, is_valid = kinds[field]
            value = record.get(field) if isinstance(record, dict) else None
            if not is_valid(value):
                raise ValueError(f"{file}: {name}[{number}] needs {field!r} as {wanted}, not {value!r:.80}")
    return records


def _some_have(records: Any, field: str) -> bool:
    return isinstance(records, list) and any(isinstance(record, dict) and field in record for record in records)


def _refuse_repeated(file: str | os.PathLike, name: str, ids: Iterable[Any]) -> None:
    seen = set()
    for given in ids:
        if not isinstance(given, int | str):  # COCO's are integers; others number captions by text
            raise ValueError(f"{file}: one of the {name} has the id {given!r:.80}, which is neither number nor text")
        if given in seen:
            raise ValueError(f"{file}: two {name} have the id {given!r:.80}; remove the copy")
        seen.add(given)
