"""Images with their captions, read from COCO-style files for training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.data.images import refuse_shared_stems
from captioning.files import is_text, read_json
from captioning.messages import some


@dataclass(frozen=True)
class Sample:
    """One image and its reference captions, white space normalised."""

    image_id: int
    path: Path
    captions: tuple[str, ...]


def load_annotations(annotation_file: str | os.PathLike, images_root: str | os.PathLike | None) -> list[Sample]:
    """Return the samples of a COCO-style caption file in the file's order.

    Args:
        annotation_file: JSON, ``{"images": [{id, file_name}], "annotations": [{id, image_id, caption}]}``.
        images_root: the folder that file names are relative to; with None no image needs to exist, and paths are
            the bare file names (scoring by references alone).

    Raises:
        FileNotFoundError: the file is missing, or images that it names are missing under ``images_root``.
        ValueError: it is no JSON, has another structure, names an image twice or one that it does not list, has two
            images with one stem, an image without captions, or an empty caption.
    """
    file = Path(annotation_file)
    content = read_json(file)
    images = _records(file, content, "images", {"id": int, "file_name": str})
    annotations = _records(file, content, "annotations", {"image_id": int, "caption": str})
    root = Path() if images_root is None else Path(images_root)
    paths = _image_paths(file, images, root)
    if images_root is not None:
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{root}: {len(missing)} of the {len(paths)} images that {file} names are not there: {some(missing)}; "
                "point --images_root (or --data) to the right folder, or complete the download"
            )
    captions = _captions_by_image(file, annotations, paths)
    return [Sample(image_id, path, tuple(captions[image_id])) for image_id, path in paths.items()]


def load_split(data_dir: str | os.PathLike, split: str) -> list[Sample]:
    """Return the samples of ``data_dir/<split>.json`` with their images in ``data_dir/images/<split>/``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_annotations`.
    """
    file = Path(data_dir) / f"{split}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; `bash hw3_download.sh data` makes hw3_data, `python -m microworld.scenes` others"
        )
    return load_annotations(file, Path(data_dir) / "images" / split)


def _records(file: Path, content: Any, name: str, kinds: dict[str, type]) -> list[dict[str, Any]]:
    records = content.get(name) if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise ValueError(f'{file}: no list "{name}" with something in it; expected COCO-style captions')
    for number, record in enumerate(records):
        for field, kind in kinds.items():
            value = record.get(field) if isinstance(record, dict) else None
            if not _is_int(value) if kind is int else not is_text(value):
                wanted = "an integer" if kind is int else "a text in valid Unicode"
                raise ValueError(f'{file}: "{name}"[{number}] needs "{field}" as {wanted}, not {value!r:.80}')
    return records


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _image_paths(file: Path, images: list[dict[str, Any]], root: Path) -> dict[int, Path]:
    paths: dict[int, Path] = {}
    for image in images:
        if image["id"] in paths:
            raise ValueError(f"{file}: image id {image['id']} stands there twice; ids must be unique")
        if not image["file_name"].strip():
            raise ValueError(f"{file}: image id {image['id']} has an empty file_name")
        paths[image["id"]] = root / image["file_name"]
    refuse_shared_stems(file, paths.values())
    return paths


def _captions_by_image(file: Path, annotations: list[dict[str, Any]], paths: dict[int, Path]) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {image_id: [] for image_id in paths}
    unknown = sorted({a["image_id"] for a in annotations} - paths.keys())
    if unknown:
        raise ValueError(f'{file}: captions for image ids that "images" does not list: {some(unknown)}')
    empty = []
    for number, annotation in enumerate(annotations):
        caption = " ".join(annotation["caption"].split())
        if not caption:
            empty.append(annotation.get("id", f"number {number}"))
        captions[annotation["image_id"]].append(caption)
    if empty:
        raise ValueError(f"{file}: empty captions in annotations {some(empty)}; write or remove them")
    bare = [f"{paths[image_id].name} (id {image_id})" for image_id, texts in captions.items() if not texts]
    if bare:
        raise ValueError(f"{file}: images without a caption: {some(bare)}; caption or remove them")
    return captions
