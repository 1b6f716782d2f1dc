"""Caption files in COCO's layout, read strictly once, and what training and scoring take from them; predictions.

A caption file is one JSON object, ``{"images": [{id, file_name}], "annotations": [{id, image_id, caption}]}``
(https://cocodataset.org/#format-data). :func:`read_captions` is the only reader: training takes a list of
:class:`Sample` from it, scoring :class:`Annotations`, and the grounding of attention maps also the boxes beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.data.images import READABLE_SUFFIXES, refuse_shared_stems
from captioning.files import is_integer, is_text, read_json
from captioning.messages import listed, some

Record = dict[str, Any]

# --- the reader -----------------------------------------------------------------------------------------------------


def _is_filled(value: Any) -> bool:
    return is_text(value) and bool(value.strip())


def _is_box(value: Any) -> bool:
    is_list_of_four = isinstance(value, list) and len(value) == 4
    return is_list_of_four and all(is_integer(v) or isinstance(v, float) for v in value)


_INTEGER, _TEXT = ("an integer", is_integer), ("non-empty text in valid Unicode", _is_filled)
_FIELDS = {
    **dict.fromkeys(("id", "image_id", "category_id"), _INTEGER),
    **dict.fromkeys(("file_name", "caption", "name"), _TEXT),
    "bbox": ("four numbers", _is_box),
}


@dataclass(frozen=True)
class CaptionFile:
    """What a caption file holds.

    Attributes:
        content: the JSON object, with whatever else is in it.
        images: the image records by id, in the file's order.
        captions: the caption records of each image id, both in the order of the file's captions.
    """

    content: Record
    images: dict[int, Record]
    captions: dict[int, list[Record]]


def read_captions(file: str | os.PathLike) -> CaptionFile:
    """Read a caption file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not JSON or has another structure; a text is empty or not valid Unicode; two images share an
            id or a name without suffix, or two captions an id; a caption is of no listed image; an image has none.
    """
    content = read_object(file)
    records = read_records(file, content, "images", "id", "file_name")
    _refuse_repeated(file, "images", [image["id"] for image in records])
    refuse_shared_stems(file, [Path(image["file_name"]) for image in records])
    images = {image["id"]: image for image in records}
    captions: dict[int, list[Record]] = {}
    records = read_records(file, content, "annotations", "image_id", "caption")
    _refuse_repeated(file, "captions", [record["id"] for record in records if "id" in record])
    for record in records:
        captions.setdefault(record["image_id"], []).append(record)
    unknown = [image_id for image_id in captions if image_id not in images]
    if unknown:
        raise ValueError(f"{file}: captions of image ids that 'images' does not list: {some(unknown)}")
    bare = [f"{image['file_name']} (id {image_id})" for image_id, image in images.items() if image_id not in captions]
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
    file: str | os.PathLike, content: Record, name: str, *fields: str, optional: bool = False
) -> list[Record]:
    """Return the list ``name`` in ``content``, COCO's records with ``fields``; where ``optional`` it may be empty.

    Raises:
        ValueError: there is no such list, or a record lacks one of the fields or has it in another type.
    """
    records = content.get(name, [] if optional else None)
    if not isinstance(records, list) or not (records or optional):
        raise ValueError(f"{file}: needs a list {name!r} of records with {', '.join(fields)}")
    for number, record in enumerate(records):
        for field in fields:
            wanted, is_valid = _FIELDS[field]
            value = record.get(field) if isinstance(record, dict) else None
            if not is_valid(value):
                raise ValueError(f"{file}: {name}[{number}] needs {field!r} as {wanted}, not {value!r:.80}")
    return records


def _refuse_repeated(file: str | os.PathLike, name: str, ids: Iterable[Any]) -> None:
    seen = set()
    for given in ids:
        if not isinstance(given, int | str):  # COCO's are integers; others number captions by text
            raise ValueError(f"{file}: one of the {name} has the id {given!r:.80}, which is neither number nor text")
        if given in seen:
            raise ValueError(f"{file}: two {name} have the id {given!r:.80}; remove the copy")
        seen.add(given)


# --- what training takes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One image and its reference captions, white space normalised."""

    image_id: int
    path: Path
    captions: tuple[str, ...]


def load_samples(annotation_file: str | os.PathLike, images_root: str | os.PathLike) -> list[Sample]:
    """Return the samples of a caption file in the order of its images, whose names are relative to ``images_root``.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_captions`; FileNotFoundError also where images are missing.
    """
    found, root = read_captions(annotation_file), Path(images_root)
    paths = {image_id: root / image["file_name"] for image_id, image in found.images.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{root}: {len(missing)} of the {len(paths)} images that {annotation_file} names are not there: "
            f"{some(missing)}; point --images_root (or --data) to the right folder, or complete the download"
        )
    return [
        Sample(image_id, path, tuple(" ".join(record["caption"].split()) for record in found.captions[image_id]))
        for image_id, path in paths.items()
    ]


def load_split(data_dir: str | os.PathLike, split: str) -> list[Sample]:
    """Return the samples of ``data_dir/<split>.json`` with their images in ``data_dir/images/<split>/``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_samples`.
    """
    file = Path(data_dir) / f"{split}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; `bash hw3_download.sh data` makes hw3_data, `python -m microworld.scenes` others"
        )
    return load_samples(file, Path(data_dir) / "images" / split)


# --- what scoring takes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotations:
    """The references and the picture of every image of a caption file, keyed by file name without suffix."""

    references: dict[str, list[str]]
    file_names: dict[str, str]


def load_annotations(annotation_file: str | os.PathLike) -> Annotations:
    """Return the references of a caption file as they are written, and its file names.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_captions`.
    """
    found = read_captions(annotation_file)
    names = {Path(image["file_name"]).stem: image["file_name"] for image in found.images.values()}
    groups = ([record["caption"] for record in found.captions[image_id]] for image_id in found.images)
    return Annotations(dict(zip(names, groups, strict=True)), names)


def load_references(annotation_file: str | os.PathLike) -> dict[str, list[str]]:
    """Return ``{file name without suffix: [captions]}`` of a caption file; see :func:`load_annotations`."""
    return load_annotations(annotation_file).references


def load_predictions(pred_file: str | os.PathLike) -> dict[str, str]:
    """Read one flat JSON object ``{file name without suffix: caption}``; an empty caption is legal.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not such an object, or names an image twice.
    """
    predictions = read_object(pred_file)
    for stem, caption in predictions.items():
        if not isinstance(caption, str):
            raise ValueError(f"{pred_file}: {stem!r} must map to one caption (a string), not {type(caption).__name__}")
        if not is_text(caption):
            raise ValueError(f"{pred_file}: the caption of {stem!r} holds half a surrogate pair: not valid Unicode")
    return predictions


def check_keys(references: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what is missing and what is extra, unless both have the same keys."""
    missing = [key for key in references if key not in predictions]
    extra = [key for key in predictions if key not in references]
    if missing or extra:
        raise ValueError(
            "predictions and annotations must name the same images: "
            f"{len(missing)} missing from the predictions{listed(missing)}, "
            f"{len(extra)} extra in the predictions{listed(extra)}; --allow-partial scores those that both have"
        )


def shared_images(annotations: Annotations, predictions: Mapping[str, str]) -> tuple[Annotations, dict[str, str]]:
    """Return both restricted to the images that both name.

    Raises:
        ValueError: there are none.
    """
    shared = [stem for stem in annotations.references if stem in predictions]
    if not shared:
        check_keys(annotations.references, predictions)
    references = {stem: annotations.references[stem] for stem in shared}
    file_names = {stem: annotations.file_names[stem] for stem in shared}
    return Annotations(references, file_names), {stem: predictions[stem] for stem in shared}


def find_images(annotations: Annotations, images_root: str | os.PathLike | None) -> dict[str, Path]:
    """Return ``{stem: path}``: the annotated file name in ``images_root``, or the one image there with that stem.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: no folder is given, or several images could be meant.
    """
    if images_root is None:
        raise ValueError("--images_root is needed for CLIPScore; give it or use --metrics cider")
    paths = {stem: Path(images_root) / name for stem, name in annotations.file_names.items()}
    for stem, path in paths.items():
        if not path.is_file():
            twins = [path.with_name(stem + s) for suffix in READABLE_SUFFIXES for s in (suffix, suffix.upper())]
            twins = [twin for twin in twins if twin.is_file()]
            if len(twins) > 1:
                names = " and ".join(twin.name for twin in twins)
                raise ValueError(f"--images_root {images_root}: {path.name} is not there; {names} could be meant")
            paths[stem] = twins[0] if twins else path
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"--images_root {images_root}: {len(missing)} of {len(paths)} images are not there{listed(missing)}"
        )
    return paths
