"""Captions kept as they come: an append-only file of JSON lines with checksums, written by one process at a time.

{"run": {…}}                                                  header: what the captions belong to
{"image": "000000000001", "caption": "a red bike", "check": 1234567890}
…
"""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import Any

from captioning.data.ranked import caption_of, record_of
from captioning.files import composed, lock, parse_json

log = logging.getLogger(__name__)


class AppendLog:
    """A side file that is open for writing. It holds a lock until it is closed.

    Args:
        path: the file, made where it is missing.

    Raises:
        HeldError: another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = lock(path)

    def begin(self, header: dict[str, Any]) -> None:
        """Cut a torn line off the end, and write ``header`` as the first line of a new file."""
        self._file.seek(0)
        text = self._file.read()
        self._file.truncate(text.rfind(b"\n") + 1)
        if b"\n" not in text:
            self._write(header)

    def clear(self) -> None:
        """Drop all that is in it."""
        self._file.truncate(0)

    def add(self, captions: dict[str, str]) -> None:
        """Keep the captions of a batch, ``{image: caption}``. Raises OSError, naming the file, where that fails."""
        self._write(
            *(
                {"image": image, **record_of(caption), "check": checksum(image, caption)}
                for image, caption in captions.items()
            )
        )

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def _write(self, *records: dict[str, Any]) -> None:
        left = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(
                f"{self.path}: cannot be written ({error}); the captions so far are kept in it, so make room "
                "and run the same command again"
            ) from error


def read_log(path: Path, overwrite: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a side file's header and captions; a line that is torn or damaged is skipped.

    Raises:
        ValueError: the header is damaged; with ``overwrite`` that is a warning, and nothing is returned.
    """
    first, *others = path.read_bytes().split(b"\n")[:-1] or [b"{}"]
    try:
        header = dict(parse_json(first.decode()))
    except (ValueError, TypeError) as error:
        if overwrite:
            log.warning("%s: damaged (%s); starting again", path, error)
            return {}, {}
        raise ValueError(f"{path}: damaged ({error}); remove it, or give --overwrite") from error
    kept = [caption for caption in map(_caption_of, others) if caption]
    if len(kept) < len(others):
        log.warning("%s: %d lines are damaged; their images are captioned again", path, len(others) - len(kept))
    return header, dict(kept)


def checksum(image: str, caption: str) -> int:
    """Return the checksum of a line."""
    return zlib.crc32(json.dumps([image, *record_of(caption).values()]).encode())


def as_read_back(header: dict[str, Any]) -> dict[str, Any]:
    """Return a header as :func:`read_log` will return it: with lists for tuples, for example."""
    return json.loads(json.dumps(header))


def other_run(place: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> ValueError:
    """Return the error for captions of another run; both headers hold ``run``, whatever decides the captions."""
    differ = [key for key, value in ours["run"].items() if theirs.get("run", {}).get(key) != value]
    return ValueError(
        f"{place} belongs to another run (other {', '.join(differ)}); finish that one first, or "
        "give --overwrite to drop it"
    )


def _caption_of(line: bytes) -> tuple[str, str] | None:
    """Return image and caption of a line, or None where its checksum is wrong.

    An earlier version wrote the names of images in the form of Unicode that the disk had.
    """
    try:
        record = parse_json(line.decode())
        image, caption = record["image"], caption_of(record)
        return (composed(image), caption) if record["check"] == checksum(image, caption) else None
    except (ValueError, KeyError, TypeError):
        return None
