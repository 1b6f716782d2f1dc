"""Layouts of caption files that people have: how each is recognised, and the images and captions in it.

:func:`read_images` reads any of them, as references or predictions; which of the two it is, annotations.py asks. Each
layout of ``LAYOUTS`` is a function that returns what it finds in a file's content, or None where the layout is another.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from captioning.data.coco import Record, is_filled, parse_captions
from captioning.files import cut_off, is_integer, parse_json, read_json, read_text, sha256_of

# What records call things, the first one that is there counts.
KEYS = ("key",)
FILE_NAMES = ("file_name", "filename", "image", "image_name", "image_path")
IDS = ("image_id", "img_id")
CAPTIONS = ("caption", "captions", "text", "comment")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")  # of files in these layouts


@dataclass(frozen=True)
class ImageCaptions:
    """An image as a caption file has it.

    Attributes:
        name: file name, with folders if it has some, and perhaps without suffix; or the id as text.
        captions: in the file's order; whatever stands in a caption's place.
        id: the image's number, where the file gives one.
        split: which part of the data it is in, where the file says so.
    """

    name: str
    captions: list[Any]
    id: int | None = None
    split: str | None = None


def read_images(file: str | os.PathLike) -> list[ImageCaptions]:
    """Return the images and captions of a file in any layout, or of the folder that a captioning run wrote.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, has no known layout, could mean two things, or holds no image.
    """
    content = _content(Path(file))
    found = {layout.shape: images for layout in LAYOUTS if (images := layout.read(file, content)) is not None}
    if len(found) > 1:
        raise ValueError(f"{file}: could mean {' or '.join(found)}; write it as {_RECORDS}")
    if not found:
        shapes = "; ".join(layout.shape for layout in LAYOUTS)
        raise ValueError(f"{file}: of no known layout, which are: {shapes}")
    (images,) = found.values()
    if not images:
        raise ValueError(f"{file}: holds no image; write it as {_RECORDS}")
    wrong = [image.name for image in images if not is_filled(image.name)]
    if wrong:
        raise ValueError(f"{file}: an image is called {wrong[0]!r:.80}, which is empty or not valid Unicode")
    return images


# --- from bytes to values -------------------------------------------------------------------------------------------


def _content(file: Path) -> Any:
    """Return a JSON value; for JSON lines, Parquet and a run's folder a list of records; for other text the text."""
    if file.is_dir():
        return _rows_of_run(file)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix.lower() == ".parquet":
        return _rows_of_parquet(file)
    text = read_text(file)
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        return _rows_of_lines(file, text)
    if text.strip() and text.lstrip()[0] not in "{[":
        return text
    try:
        return parse_json(text)
    except ValueError as error:
        if str(error).startswith("Extra data") and "\n" in text.strip():
            return _rows_of_lines(file, text)
        raise ValueError(f"{file}: not a JSON file ({error}){cut_off(error)}") from error


def _rows_of_lines(file: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [parse_json(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{file} line {number}: not a JSON value ({error}){cut_off(error)}") from error
    return rows


def _rows_of_parquet(file: Path) -> list[Record]:
    from captioning.data.part_files import parquet  # imports torch

    module = parquet()
    try:
        with module.ParquetFile(file) as table:  # the pictures that some files hold stay on the disk
            columns = {*KEYS, *FILE_NAMES, *IDS, *CAPTIONS} & set(table.schema_arrow.names)
            return table.read(sorted(columns)).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of both kinds
        raise ValueError(f"{file}: not a Parquet file of captions ({error})") from error


def _rows_of_run(folder: Path) -> list[Any]:
    """Return the rows of all parts that the manifest of a captioning run names."""
    manifest, rows = folder / "_manifest.json", []
    if not manifest.is_file():
        raise ValueError(
            f"{folder}: a folder without _manifest.json, which p2_infer.py writes at its end; run the same command "
            "again, or name a file"
        )
    try:
        parts = [(folder / Path(shard["part"]).name, shard["part_sha256"]) for shard in read_json(manifest)["shards"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{manifest}: damaged ({error!r}); run the same command again") from error
    for part, digest in parts:
        if sha256_of(part) != digest:
            raise ValueError(f"{part}: damaged since it was written; remove it and run the same command again")
        rows += _content(part)
    return rows


# --- layouts --------------------------------------------------------------------------------------------------------


def _coco(file: object, content: Any) -> list[ImageCaptions] | None:
    """COCO's annotations, and LAVIS's ``*_gt.json``, whose images have ids only."""
    if not _has_lists(content, "images", "annotations") or _is_karpathy(content):
        return None
    found = parse_captions(str(file), content)
    return [
        ImageCaptions(
            image.get("file_name", str(number)),
            [record["caption"] for record in found.captions[number]],
            number if is_integer(number) else None,
        )
        for number, image in found.images.items()
    ]


def _karpathy(file: object, content: Any) -> list[ImageCaptions] | None:
    """Karpathy's ``dataset_coco.json``, ``dataset_flickr8k.json`` and ``dataset_flickr30k.json``."""
    if not _is_karpathy(content):
        return None
    images = []
    for number, image in enumerate(content["images"]):
        where = f"{file}: images[{number}]"
        name = _text(image, ("filename",), where)
        sentences = image.get("sentences")
        if not isinstance(sentences, list):
            raise ValueError(f"{where} ({name}) needs a list 'sentences'")
        folder, split = (_text(image, (part,), where) if image.get(part) else None for part in ("filepath", "split"))
        captions = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
        given = image.get("cocoid", image.get("imgid"))
        path = f"{folder}/{name}" if folder else name
        images.append(ImageCaptions(path, captions, given if is_integer(given) else None, split))
    return images


def _mapping(file: object, content: Any) -> list[ImageCaptions] | None:
    """One JSON object by image; a caption is a text, or an object with it, as ``evaluate.py --per-image`` writes."""
    if not isinstance(content, dict) or _has_lists(content, "images", "annotations"):
        return None
    return [ImageCaptions(name, _captions_in(value)) for name, value in content.items()]


def _records(file: object, content: Any) -> list[ImageCaptions] | None:
    """COCO's results lists, LAVIS's annotations, JSON lines, parts of a captioning run: a record a caption or image."""
    if isinstance(content, dict) and _names_in(content) and any(name in content for name in CAPTIONS):
        content = [content]  # one line of JSON lines is an object as well
    if not isinstance(content, list):
        return None
    return _grouped([_record(f"{file}: record {number}", record) for number, record in enumerate(content, 1)])


def _tokens(file: object, content: Any) -> list[ImageCaptions] | None:
    """Flickr8k's and Flickr30k's token files: a line a caption, its number after the image."""
    line = re.compile(r"(.+)#(\d+)\t(.*)")
    if not isinstance(content, str) or not line.match(content.lstrip()):
        return None
    found, seen = [], set()
    for number, text in enumerate(content.split("\n"), 1):
        if text.strip():
            match = line.fullmatch(text.strip(" \r"))
            if match is None:
                raise ValueError(f"{file} line {number}: needs NAME.jpg#0, a tab and a caption, not {text!r:.80}")
            if match.group(1, 2) in seen:
                raise ValueError(f"{file} line {number}: {match[1]}#{match[2]} a second time; remove the copy")
            seen.add(match.group(1, 2))
            found.append(ImageCaptions(match[1], [match[3]]))
    return _grouped(found)


def _table(file: object, content: Any) -> list[ImageCaptions] | None:
    """A table whose first line names the columns: Kaggle's files of Flickr8k and Flickr30k, ``--per-image OUT.csv``."""
    if not isinstance(content, str):
        return None
    for mark in ",|\t;":
        head, _, body = content.lstrip().partition("\n")
        columns = [column.strip(' "\r').lower() for column in head.split(mark)]
        if _names_in(columns) and set(columns) & set(CAPTIONS):
            rows = csv.reader(io.StringIO(body, newline=""), delimiter=mark, strict=True)
            try:
                return _grouped([_row(f"{file} line {rows.line_num + 1}", columns, row, mark) for row in rows if row])
            except csv.Error as error:  # a quote that is never closed, most often
                raise ValueError(f"{file} line {rows.line_num + 1}: {error}") from error
    return None


def _row(where: str, columns: list[str], row: list[str], mark: str) -> ImageCaptions:
    if len(row) != len(columns):
        raise ValueError(f"{where}: {len(row)} cells with {mark!r} between, and {len(columns)} in the first line")
    return _record(where, dict(zip(columns, map(str.strip, row), strict=True)))


# --- what layouts share ---------------------------------------------------------------------------------------------


def _has_lists(content: Any, *names: str) -> bool:
    return isinstance(content, dict) and any(isinstance(content.get(name), list) for name in names)


def _is_karpathy(content: Any) -> bool:
    records = content.get("images") if isinstance(content, dict) else None
    return isinstance(records, list) and bool(records) and isinstance(records[0], dict) and "sentences" in records[0]


def _names_in(fields: Any) -> bool:
    return any(name in fields for name in (*KEYS, *FILE_NAMES, *IDS))


def _record(where: str, record: Any) -> ImageCaptions:
    """Return the image and the captions of one record. Raises ValueError where it lacks one or has two."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object with image and caption, not {record!r:.80}")
    number = next((record[name] for name in IDS if is_integer(record.get(name))), None)
    named = next((names for names in (KEYS, FILE_NAMES, IDS) if any(name in record for name in names)), None)
    if named is None:
        raise ValueError(f"{where} names no image: it needs one of {', '.join((*KEYS, *FILE_NAMES, *IDS))}")
    name = str(number) if named == IDS and number is not None else _text(record, named, where)
    return ImageCaptions(name, _captions_in(_only(record, CAPTIONS, where)), number)


def _captions_in(value: Any) -> list[Any]:
    """Return the captions in a text, in an object with one of ``CAPTIONS``, or in a list of these."""
    if isinstance(value, list):
        return [caption for part in value for caption in _captions_in(part)]
    name = next((name for name in CAPTIONS if name in value), None) if isinstance(value, dict) else None
    return [value] if name is None else _captions_in(value[name])


def _text(record: Record, names: Sequence[str], where: str) -> str:
    value = _only(record, names, where)
    if not is_filled(value):
        raise ValueError(f"{where} needs {' or '.join(names)} as non-empty text in valid Unicode, not {value!r:.80}")
    return value


def _only(record: Any, names: Sequence[str], where: str) -> Any:
    """Return what a record has under one of ``names``. Raises ValueError where it has none, or two that differ."""
    found = {name: record[name] for name in names if isinstance(record, dict) and name in record}
    values = list(found.values())
    if not found or any(value != values[0] for value in values):
        what = " and ".join(f"{name!r} {value!r:.60}" for name, value in found.items()) or f"none of {', '.join(names)}"
        raise ValueError(f"{where} has {what}; it needs one")
    return values[0]


def _grouped(found: list[ImageCaptions]) -> list[ImageCaptions]:
    """Return one entry for each image, with the captions of all of its own."""
    images: dict[str, ImageCaptions] = {}
    for image in found:
        images.setdefault(image.name, ImageCaptions(image.name, [], image.id)).captions.extend(image.captions)
    return list(images.values())


class Layout(NamedTuple):
    """A layout: how it looks, for messages, and its function."""

    shape: str
    read: Callable[[object, Any], list[ImageCaptions] | None]


_RECORDS = '[{"image": "NAME", "caption": "TEXT"}, …]'
LAYOUTS = (
    Layout('{"NAME": "TEXT" or ["TEXT", …], …}', _mapping),
    Layout(_RECORDS, _records),
    Layout('{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}', _coco),
    Layout('{"images": [{"filename", "split", "sentences": [{"raw"}]}]}', _karpathy),
    Layout("lines NAME.jpg#0, tab, TEXT", _tokens),
    Layout("a table with columns image and caption", _table),
)
