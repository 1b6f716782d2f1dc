"""References and predictions in whichever layout they come: checked, matched by image, and as training and scoring take
them. formats.py reads the files, names.py says which image a name or a number means.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioning.data.coco import is_filled
from captioning.data.formats import SUFFIXES, ImageCaptions, read_images
from captioning.data.names import Names, find_files, keys_of, number_of
from captioning.files import is_text
from captioning.messages import listed, some

# --- references -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotations:
    """The references and the picture of every image of a caption file, by key (see ``names.keys_of``).

    Attributes:
        references: the captions as they are written.
        file_names: relative to the folder of the images; where the file has only keys or ids, those.
        ids: the images' numbers, from the file or else from the ends of their names.
        splits: which part of the data an image is in, where the file says so; Karpathy's ``restval`` is ``train``.
    """

    references: dict[str, list[str]]
    file_names: dict[str, str]
    ids: dict[str, int] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)

    def of(self, keys: Iterable[str]) -> Annotations:
        """Return the annotations of some images, in the order of ``keys``."""
        keys = list(keys)
        return Annotations(
            {key: self.references[key] for key in keys},
            {key: self.file_names[key] for key in keys},
            {key: self.ids[key] for key in keys if key in self.ids},
            {key: self.splits[key] for key in keys if key in self.splits},
        )


def load_annotations(annotation_file: str | os.PathLike, split: str | None = None) -> Annotations:
    """Return the references of a caption file in any of the layouts of formats.py.

    Args:
        annotation_file: which.
        split: where the file has splits, as Karpathy's has, only the images of this one, or of several with commas
            between; a file without splits is one split.

    Raises:
        FileNotFoundError, ValueError: as ``formats.read_images``; also where an image has no caption, a caption is
            empty or not valid Unicode, two images share a key or an id, or there is no such split.
    """
    images = read_images(annotation_file)
    bare = [image.name for image in images if not image.captions]
    if bare:
        raise ValueError(f"{annotation_file}: {len(bare)} of {len(images)} images have no caption: {some(bare)}")
    wrong = next(((image, text) for image in images for text in image.captions if not is_filled(text)), None)
    if wrong:
        name, text = wrong[0].name, wrong[1]
        raise ValueError(
            f"{annotation_file}: a caption of {name!r} must be non-empty text in valid Unicode, not {text!r:.80}"
        )
    keys = keys_of(annotation_file, [image.name for image in images])
    by_key = dict(zip(keys, images, strict=True))
    found = Annotations(
        {key: image.captions for key, image in by_key.items()},
        {key: image.name for key, image in by_key.items()},
        _ids(annotation_file, by_key),
        {key: "train" if image.split == "restval" else image.split for key, image in by_key.items() if image.split},
    )
    return _of_splits(annotation_file, found, split) if split and found.splits else found


def _ids(file: str | os.PathLike, images: Mapping[str, ImageCaptions]) -> dict[str, int]:
    """Return the ids that a file gives, or those that its names end in where no two are the same."""
    given = {key: image.id for key, image in images.items() if image.id is not None}
    ids = given or {key: n for key, image in images.items() if (n := number_of(image.name)) is not None}
    owners: dict[int, str] = {}
    for key, number in ids.items():
        other = owners.setdefault(number, key)
        if other != key and given:
            raise ValueError(f"{file}: {other} and {key} have the same id {number}; give each its own")
    return ids if len(owners) == len(ids) else {}


def _of_splits(file: str | os.PathLike, annotations: Annotations, split: str) -> Annotations:
    wanted, there = {name.strip() for name in split.split(",")}, set(annotations.splits.values())
    if not wanted <= there:
        raise ValueError(f"{file}: has no split {split!r}; its splits are {', '.join(sorted(there))}")
    return annotations.of(key for key, name in annotations.splits.items() if name in wanted)


def references_beside(images: str | os.PathLike | None) -> Path:
    """Return the references of a folder ``DATA/images/val`` by default, ``DATA/val.json``: as training data lies.

    Raises:
        ValueError: there are none, or no folder is known.
    """
    folder = Path(images or "").absolute()
    file = folder.parents[1] / f"{folder.name}.json" if len(folder.parents) > 1 else folder
    if images is None or not file.is_file():
        raise ValueError(
            "--annotation-file: name the references; without it they are DATA/val.json for images in DATA/images/val"
        )
    return file


def load_references(annotation_file: str | os.PathLike, split: str | None = None) -> dict[str, list[str]]:
    """Return ``{key: [captions]}`` of a caption file; see :func:`load_annotations`."""
    return load_annotations(annotation_file, split).references


# --- what training takes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One image and its reference captions, white space normalised."""

    image_id: int
    path: Path
    captions: tuple[str, ...]


def load_samples(
    annotation_file: str | os.PathLike, images_root: str | os.PathLike, split: str | None = None
) -> list[Sample]:
    """Return the samples of a caption file in the order of its images, whose names are relative to ``images_root``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_annotations`; FileNotFoundError also where images are missing,
            ValueError where several could be meant.
    """
    found, root = load_annotations(annotation_file, split), Path(images_root)
    paths = find_files(str(root), found.file_names, root)
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{root}: {len(missing)} of the {len(paths)} images that {annotation_file} names are not there: "
            f"{some(missing)}; point --images_root (or --data) to the right folder, or complete the download"
        )
    return [
        Sample(found.ids.get(key, number), paths[key], tuple(" ".join(caption.split()) for caption in captions))
        for number, (key, captions) in enumerate(found.references.items())
    ]


def load_split(data_dir: str | os.PathLike, split: str) -> list[Sample]:
    """Return the samples of ``data_dir/<split>.json`` with their images in ``data_dir/images/<split>/``.

    The file may be in any layout, under the suffix that belongs to it, as in ``train.jsonl``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_samples`; ValueError also where there are two files.
    """
    files = [file for suffix in SUFFIXES if (file := Path(data_dir) / f"{split}{suffix}").is_file()]
    if not files:
        raise FileNotFoundError(
            f"{Path(data_dir) / split}.json: no such file; `bash hw3_download.sh data` makes hw3_data, `python -m "
            "microworld.scenes` others"
        )
    if len(files) > 1:
        raise ValueError(f"{data_dir}: {some(file.name for file in files)} could be meant; leave one of them there")
    return load_samples(files[0], Path(data_dir) / "images" / split, split)


# --- predictions ----------------------------------------------------------------------------------------------------


def load_predictions(
    pred_file: str | os.PathLike, annotations: Annotations | None = None, names_are: str = "auto"
) -> dict[str, str]:
    """Read predictions in any of the layouts of formats.py: one caption an image; an empty caption is legal.

    Args:
        pred_file: which; or the folder that a captioning run wrote.
        annotations: the images they are of; the result has their keys, and what none of them is called stays as it is.
            Without them images are called as the file calls them.
        names_are: ``names``, ``ids``, or ``auto``: whatever the annotations have.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: as ``formats.read_images``; an image has no caption, several, or one that is no text in valid
            Unicode; a name could mean two images, or two names mean one.
    """
    images = read_images(pred_file)
    for image in images:
        _check_prediction(pred_file, image)
    if annotations is None:
        return {image.name: image.captions[0] for image in images}
    return match(pred_file, images, annotations, names_are)


def _check_prediction(file: str | os.PathLike, image: ImageCaptions) -> None:
    if len(image.captions) != 1:
        raise ValueError(
            f"{file}: {image.name!r} must have one caption, not {len(image.captions)}; files of "
            "several are references, which go to --annotation-file"
        )
    (caption,) = image.captions
    if not isinstance(caption, str):
        raise ValueError(
            f"{file}: {image.name!r} must map to one caption (a string), not {type(caption).__name__}; wanted is "
            '{"NAME": "TEXT"} or [{"image": "NAME", "caption": "TEXT"}]'
        )
    if not is_text(caption):
        raise ValueError(f"{file}: the caption of {image.name!r} holds half a surrogate pair: not valid Unicode")


def match(
    source: object, images: Sequence[ImageCaptions], annotations: Annotations, names_are: str = "auto"
) -> dict[str, str]:
    """Return predictions by the keys of ``annotations``; errors as :func:`load_predictions`."""
    names = Names(annotations.file_names, annotations.ids)
    found: dict[str, ImageCaptions] = {}
    for image, key in zip(images, names.keys(source, images, names_are), strict=True):
        label = key or (image.name if image.name not in annotations.references else f"id {image.name}")
        other = found.setdefault(label, image)
        if other is not image:
            raise ValueError(f"{source}: {other.name!r} and {image.name!r} are both {label!r}; remove one")
    return {key: image.captions[0] for key, image in found.items()}


def match_captions(source: object, captions: Mapping[str, str], annotations: Annotations) -> dict[str, str]:
    """Return captions, ``{name without suffix: caption}``, by the keys of ``annotations``; errors as :func:`match`."""
    return match(source, [ImageCaptions(name, [caption]) for name, caption in captions.items()], annotations)


def predicted_split(file: object, annotations: Annotations, predictions: Iterable[Mapping[str, str]]) -> Annotations:
    """Return the one split whose images are predicted; all annotations where these have no splits.

    Raises:
        ValueError: images of several splits are predicted.
    """
    hit = {annotations.splits[key] for captions in predictions for key in captions if key in annotations.splits}
    if len(hit) > 1:
        raise ValueError(f"{file}: the predictions are of its splits {', '.join(sorted(hit))}; say which by --split")
    return _of_splits(str(file), annotations, hit.pop()) if hit else annotations


# --- both -----------------------------------------------------------------------------------------------------------


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
    shared = [key for key in annotations.references if key in predictions]
    if not shared:
        check_keys(annotations.references, predictions)
    return annotations.of(shared), {key: predictions[key] for key in shared}


def find_images(annotations: Annotations, images_root: str | os.PathLike | None) -> dict[str, Path]:
    """Return each image's file in ``images_root``, by key, as ``names.find_files`` finds it.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: no folder is given, or several images could be meant.
    """
    if images_root is None:
        raise ValueError("--images_root is needed for CLIPScore; give it or use --metrics cider")
    if not Path(images_root).is_dir():
        raise FileNotFoundError(f"--images_root {images_root}: no such folder; give the one that holds the pictures")
    paths = find_files(f"--images_root {images_root}", annotations.file_names, Path(images_root))
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"--images_root {images_root}: {len(missing)} of {len(paths)} images are not there{listed(missing)}"
        )
    return paths
