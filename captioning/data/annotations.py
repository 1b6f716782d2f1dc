"""The files that scores are made of: COCO-style references, predictions by image, and whether they belong together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.files import read_json
from captioning.messages import listed, some

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Annotations:
    """The references and the picture of every image of a COCO-style file, keyed by file name without extension."""

    references: dict[str, list[str]]
    file_names: dict[str, str]


def load_annotations(annotation_file: str | os.PathLike) -> Annotations:
    """Read ``images[{id, file_name}]`` and ``annotations[{image_id, caption}]`` from a JSON file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not of that form, two images share a stem or an id, two captions share an id, an
            image has no reference, or a reference is empty or belongs to no image.
    """
    content = _load_object(annotation_file)
    stems, file_names = {}, {}
    for image in _records(annotation_file, content, "images", {"id": int, "file_name": str}):
        stem = Path(image["file_name"]).stem
        if stem in file_names:
            names = f"{file_names[stem]!r} and {image['file_name']!r}"
            raise ValueError(f"{annotation_file}: {names} share the stem {stem!r}, which must name one image")
        if image["id"] in stems:
            raise ValueError(f"{annotation_file}: two images have the id {image['id']}")
        stems[image["id"]], file_names[stem] = stem, image["file_name"]

    references: dict[str, list[str]] = {stem: [] for stem in file_names}
    ids: set[Any] = set()
    for record in _records(annotation_file, content, "annotations", {"image_id": int, "caption": str}):
        if record["image_id"] not in stems:
            raise ValueError(f"{annotation_file}: a caption belongs to no listed image: id {record['image_id']}")
        if not isinstance(record.get("id", 0), int | str):
            raise ValueError(f"{annotation_file}: a caption has the id {record['id']!r:.80}, which is no number")
        if record.get("id") in ids:
            raise ValueError(f"{annotation_file}: two captions have the id {record['id']}; remove the copy")
        ids |= {record["id"]} if "id" in record else set()
        stem, caption = stems[record["image_id"]], record["caption"]
        if not caption.strip():
            raise ValueError(f"{annotation_file}: image {stem!r} has an empty reference; remove or fill it")
        references[stem].append(_unicode(annotation_file, stem, caption))
    bare = [stem for stem, captions in references.items() if not captions]
    if bare or not references:
        raise ValueError(f"{annotation_file}: {len(bare)} of {len(references)} images have no reference: {some(bare)}")
    return Annotations(references, file_names)


def load_references(annotation_file: str | os.PathLike) -> dict[str, list[str]]:
    """Return ``{file name without extension: [captions]}`` of a COCO-style file; see ``load_annotations``."""
    return load_annotations(annotation_file).references


def load_predictions(pred_file: str | os.PathLike) -> dict[str, str]:
    """Read one flat JSON object ``{file name without extension: caption}``; an empty caption is legal.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not such an object, or names an image twice.
    """
    predictions = _load_object(pred_file)
    for stem, caption in predictions.items():
        if not isinstance(caption, str):
            raise ValueError(f"{pred_file}: {stem!r} must map to one caption (a string), not {type(caption).__name__}")
        _unicode(pred_file, stem, caption)
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
    """Return both cut down to the images that both name.

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
            twins = [path.with_name(stem + suffix) for suffix in (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))]
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


def _load_object(path: str | os.PathLike) -> dict[str, Any]:
    """Return the JSON object in ``path``."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold one JSON object, not a {type(content).__name__}")
    return content


def _records(path: Any, content: dict[str, Any], name: str, kinds: dict[str, type]) -> list[dict[str, Any]]:
    records = content.get(name)
    if not isinstance(records, list):
        raise ValueError(f"{path}: needs a list {name!r} of objects with {' and '.join(kinds)}")
    for number, record in enumerate(records):
        for key, kind in kinds.items():
            if not isinstance(record, dict) or not isinstance(record.get(key), kind):
                raise ValueError(f"{path}: {name}[{number}] needs {key!r} as {kind.__name__}")
    return records


def _unicode(path: Any, stem: str, caption: str) -> str:
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: a caption of {stem!r} holds half a surrogate pair, which is no text") from error
    return caption
