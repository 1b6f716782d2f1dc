"""Strict reading and atomic writing of files: JSON, CSV, Markdown tables, text; checksums and locks."""

from __future__ import annotations

import base64
import codecs
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

# --- writing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it, on failure remove it.

    A reader sees the old file or the complete new one, never a part, whatever interrupts the writer.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets; results get the user's usual permissions
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike, flag: str) -> None:
    """Raise ValueError where nothing can be written into ``folder``, which ``flag`` names; it is not made yet."""
    there = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be written ({error.strerror}); name another with {flag}") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Write ``value`` to ``path`` as UTF-8 JSON, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write rows of cells under ``columns`` as CSV, atomically; floats keep every digit, None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table, one line a row; a ``|`` inside a cell is escaped."""
    cells = [list(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    head, *body = ["| " + " | ".join(row) + " |\n" for row in cells]
    return head + "|" + "---|" * len(columns) + "\n" + "".join(body)


_ENCODERS: dict[str, dict[str, Any]] = {"jpeg": {"quality": 85, "optimize": True}, "png": {}}


def data_url(image: Image, longest: int, formats: Sequence[str] = ("jpeg",)) -> str:
    """Return a picture as a ``data:`` URL, no side over ``longest`` pixels, in whichever of ``formats`` is shortest.

    Raises:
        OSError, SyntaxError: the file that ``image`` was opened from is damaged.
    """
    small = image.copy()
    small.thumbnail((longest, longest))
    encoded = []
    for name in formats:
        content = io.BytesIO()
        (small.convert("RGB") if name == "jpeg" else small).save(content, name, **_ENCODERS[name])
        encoded.append(f"data:image/{name};base64,{base64.b64encode(content.getvalue()).decode()}")
    return min(encoded, key=len)


# --- reading --------------------------------------------------------------------------------------------------------

MAX_BYTES = 1 << 30  # COCO's largest instances file has half of it; parsed, a byte becomes about ten in memory

_ENCODINGS = {  # UTF-32's mark begins with UTF-16's, so the order matters
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def encoding_of(start: bytes) -> tuple[bytes, str]:
    """Return the byte-order mark that a text begins with, and the encoding of what follows it: UTF-8 without one."""
    mark = next((mark for mark in _ENCODINGS if start.startswith(mark)), b"")
    return mark, _ENCODINGS.get(mark, "utf-8")


def decode(content: bytes) -> str:
    """Return the text in ``content``: UTF-8, or what a byte-order mark says (Windows editors write one)."""
    mark, encoding = encoding_of(content[:4])
    return content.removeprefix(mark).decode(encoding)


def read_json(path: str | os.PathLike) -> Any:
    """Return what the JSON file ``path`` holds; its encoding is found as by :func:`read_text`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, repeats a key, holds NaN or infinity, is nested too deeply, or is above 1 GiB.
    """
    content = _read_bytes(path)
    try:
        return parse_json(decode(content))
    except ValueError as error:  # bad JSON or bad encoding
        raise ValueError(f"{path}: not a JSON file ({error}){cut_off(error)}") from error


def read_text(path: str | os.PathLike) -> str:
    """Return the text in ``path``: UTF-8, or what a byte-order mark says (Windows editors write one).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text in that encoding, or is above 1 GiB.
    """
    content = _read_bytes(path)
    try:
        return decode(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error}){cut_off(error)}") from error


def _read_bytes(path: str | os.PathLike) -> bytes:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes of text are more than {MAX_BYTES:,}; split the file")
    return path.read_bytes()


def cut_off(error: ValueError) -> str:
    """Return a question to end the message with where ``error`` says that a text, JSON or any, ends too early."""
    early = False
    if isinstance(error, UnicodeDecodeError):
        early = error.reason in ("unexpected end of data", "truncated data")
    elif isinstance(error, json.JSONDecodeError):
        rest, whole = error.doc[error.pos :].strip(), error.msg.startswith("Extra data")
        early = not whole and (error.msg.startswith("Unterminated string") or _BEGUN.fullmatch(rest) is not None)
    return "; was the download cut off?" if early else ""


# What can be left of a JSON value that breaks off: nothing, the start of a literal, of an exponent or of an escape.
_BEGUN = re.compile(r"|-|\.|[eE][+-]?|t(ru?)?|f(a(ls?)?)?|n(ul?)?|\\?u?[0-9a-fA-F]{0,4}")


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
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated!r:.80} occurs twice")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.40} is beyond floating point")
    return number


def is_text(value: Any) -> bool:
    """Whether ``value`` is a string in valid Unicode; JSON can hold half of a surrogate pair, which is not."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def composed(text: str) -> str:
    """Return ``text`` in Unicode's composed form (NFC), in which names are compared: macOS stores é as e and ´."""
    return unicodedata.normalize("NFC", text)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer; Python counts true and false among them, JSON does not."""
    return isinstance(value, int) and not isinstance(value, bool)


# --- checksums and locks --------------------------------------------------------------------------------------------


def sha256_of(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HeldError(ValueError):
    """Another process holds the lock."""


def lock(path: Path) -> io.FileIO:
    """Open ``path`` to append to it, and lock it until it is closed or the process ends.

    Raises:
        HeldError: another process holds it.
    """
    import fcntl  # POSIX only; whatever takes no lock also runs elsewhere

    while True:
        file = path.open("a+b", buffering=0)  # what a full disk refuses must not wait in a buffer
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise HeldError(f"{path}: another run is writing it; wait for it, or name another") from error
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its run finished and removed it between our open and our lock


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, made where it is missing, once no other process or thread holds it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it when the process dies
        yield
