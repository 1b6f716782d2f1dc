"""JSON that strangers wrote: one reader for all files, which refuses what Python's own takes in silence."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 30  # COCO's largest instances file has half of it; parsed, a byte becomes about ten in memory
_MARKS = {  # UTF-32's mark begins with UTF-16's, so the order matters
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_json(path: str | os.PathLike) -> Any:
    """Return what the JSON file ``path`` holds: UTF-8, or what a byte-order mark says (Windows editors write one).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, repeats a key, holds NaN or infinity, is nested too deeply, or is above 1 GiB.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes of JSON are more than {MAX_BYTES:,}; split the file")
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return parse_json(content.decode(encoding))
    except ValueError as error:  # bad JSON or bad encoding
        raise ValueError(f"{path}: not a JSON file ({error}); was the download cut off?") from error


def parse_json(text: str) -> Any:
    """Return the value of ``text``; ValueError as :func:`read_json`, without a file's name."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated key, of which ``json`` would silently keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {repeated!r:.80} stands there twice")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.40} is beyond floating point")
    return number
