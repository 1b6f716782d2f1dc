"""Where images come from by the million: tar shards, lists of paths, folders. Read as a stream, a shard at a time.

A shard is what one process works on: a tar file (webdataset's form), or a run of lines of a list. The names in a folder
become such a list. Nothing here holds more of a source than one entry; a list of shards is all that grows with it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import heapq
import itertools
import json
import lzma
import os
import re
import struct
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from captioning.data.images import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, decode_image, load_image
from captioning.files import atomic_path, parse_json

LIST_SUFFIXES = (".txt", ".list", ".lst", ".jsonl")
MOST_SHARDS = 10**6  # a slip in a brace range must not fill the memory
BLOCK = 2**20  # bytes of a tar that are read at once
SORTED_AT_ONCE = 10**5  # names of a folder
# What tarfile, zlib and lzma raise for damaged files. An OSError is none of these: a disk that fails is no bad shard.
DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, struct.error)


@dataclass(frozen=True)
class Entry:
    """One image of a shard, not decoded yet.

    Attributes:
        key: by which its caption is found.
        name: what messages call it.
        source: its bytes, its path, or why there is neither.
    """

    key: str
    name: str
    source: bytes | Path | ValueError

    def load(self, draft: int | None = None) -> Image.Image:
        """Return the image as ``data.load_image`` does. Raises ValueError or OSError naming it."""
        if isinstance(self.source, ValueError):
            raise self.source
        if isinstance(self.source, Path):
            return load_image(self.source, draft)
        return decode_image(self.source, self.name, draft)


@dataclass
class Findings:
    """What one pass over a shard finds beside its images, whole behind the last one.

    Attributes:
        others: entries that claim to be no image.
        damage: why the rest of the shard cannot be read.
        sha256: of the file, or of the list's lines.
    """

    others: int = 0
    damage: str = ""
    sha256: str = ""


# ---------------------------------------------------------------------------------------------------------------- tars


@dataclass(frozen=True)
class TarShard:
    """A tar file, plain or compressed; an image's key is its name in it without the ending.

    Attributes:
        path: the file.
        name: unlike any other shard's; its results are called so.
        pattern: which entries are images, as in ``*.jpg``; without it all with an image's ending.
    """

    path: Path
    name: str
    pattern: str | None = None

    def identity(self) -> dict[str, Any]:
        """Return what changes when the shard does."""
        stat = self.path.stat()
        return {"path": str(self.path.resolve()), "size": stat.st_size, "modified_ns": stat.st_mtime_ns}

    def entries(self, findings: Findings) -> Iterator[Entry]:
        """Yield the images in the file's order, up to the end or to where the file is damaged."""
        with self.path.open("rb") as file:
            stream = _Hashing(file)
            try:
                for member, archive in _members(stream):
                    if self._is_image(member.name):
                        yield self._entry(member, archive)
                    elif member.isfile():
                        findings.others += 1
            except DAMAGE as error:
                findings.damage = str(error) or type(error).__name__
            while stream.read(BLOCK):
                pass
        findings.sha256 = stream.digest.hexdigest()

    def _is_image(self, name: str) -> bool:
        base = name.rpartition("/")[2]
        if self.pattern is not None:
            return fnmatch.fnmatchcase(base, self.pattern)
        return os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES and not base.startswith(".")  # noqa: PTH122

    def _entry(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> Entry:
        name = f"{self.path}: {_printable(member.name)}"
        key, problem = _key(member.name), None
        if not member.isreg():
            problem = "is a link or no plain file"
        elif member.size > MAX_IMAGE_BYTES:
            problem = f"larger than {MAX_IMAGE_BYTES / 1e6:.0f} MB"
        elif key is None:
            problem = "its name is no valid Unicode"
        if problem:
            return Entry(key or _printable(member.name), name, ValueError(f"{name}: {problem}; take it out"))
        return Entry(key, name, archive.extractfile(member).read())


class _Hashing:
    """A file that is read once from its beginning, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        block = self._file.read(size)
        self.digest.update(block)
        return block


class _Member(tarfile.TarInfo):
    """A tar's entry that tells its archive when the header behind the last entry is no end mark.

    ``TarFile.next`` ends at a damaged header as at a good end, and the rest of the file would be lost in silence.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        tarfile_.ended_by = None
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            tarfile_.ended_by = error
            raise


def _members(stream: _Hashing) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the entries of a tar; raises one of ``DAMAGE`` where it is cut off or damaged."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=BLOCK, tarinfo=_Member) as archive:
            while (member := archive.next()) is not None:
                yield member, archive
                archive.members = []  # it would keep them all
            if not isinstance(archive.ended_by, tarfile.EOFHeaderError):
                raise tarfile.ReadError(f"no entry and no end mark at byte {archive.offset}: cut off or damaged")
    except TypeError as error:  # tarfile takes an end within a gzip header so
        raise tarfile.ReadError("unexpected end of data") from error


# --------------------------------------------------------------------------------------------------------------- lists


@dataclass(frozen=True)
class ListShard:
    """A run of lines of a list: a path a line, or a JSON object with ``image``, its path, and maybe ``key``.

    Attributes:
        path: the list.
        name: unlike any other shard's; its results are called so.
        start, end: bytes of the list that it begins and ends at.
        line: number of its first line, from 1.
        sha256: of those bytes.
        root: what relative paths are relative to.
    """

    path: Path
    name: str
    start: int
    end: int
    line: int
    sha256: str
    root: Path

    def identity(self) -> dict[str, Any]:
        """Return what changes when the shard does."""
        where = {"first_line": self.line, "size": self.end - self.start, "sha256": self.sha256}
        return {"path": str(self.path.resolve()), **where, "root": str(self.root.resolve())}

    def entries(self, findings: Findings) -> Iterator[Entry]:
        """Yield the images in the list's order."""
        findings.sha256 = self.sha256
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.end - self.start
            for number in itertools.count(self.line):
                if left <= 0:
                    break
                text = file.readline()
                left -= len(text)
                if text.strip():
                    yield self._entry(text.strip(b"\r\n"), number)

    def _entry(self, text: bytes, number: int) -> Entry:
        line = f"{self.path} line {number}"
        try:
            record = _record(text) if self.path.suffix.lower() == ".jsonl" else {"image": text.decode()}
        except ValueError as error:
            return Entry(line, line, ValueError(f"{line}: {error}"))
        image = record["image"]
        path = self.root / image
        if "\0" in image:
            return Entry(line, line, ValueError(f"{line}: a zero byte in a path"))
        return Entry(record.get("key", path.stem), str(path), path)


def _record(text: bytes) -> dict[str, str]:
    """Return a line of a JSONL list. Raises ValueError saying what is wrong with it."""
    record = parse_json(text.decode())
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise ValueError('needs "image", the path of an image, as a text')
    for name in record.keys() & {"image", "key"}:
        if not isinstance(record[name], str) or not record[name] or record[name] != _printable(record[name]):
            raise ValueError(f'needs "{name}" as a text in valid Unicode')
    return record


def cut_list(path: Path, size: int, root: Path) -> list[ListShard]:
    """Return a list's lines as shards of ``size`` lines. Raises ValueError for an empty list."""
    found: list[ListShard] = []
    start, first = 0, 1
    with path.open("rb") as file:
        while lines := list(itertools.islice(file, size)):
            text = b"".join(lines)
            name = f"{path.stem.lstrip('._') or 'list'}-{len(found):06d}"
            digest = hashlib.sha256(text).hexdigest()
            found.append(ListShard(path, name, start, start + len(text), first, digest, root))
            start, first = start + len(text), first + len(lines)
    if not found:
        raise ValueError(f"{path}: an empty list of images")
    return found


def list_folder(folder: Path, target: Path) -> None:
    """Write the images directly in ``folder``, sorted by name, as a JSONL list; memory stays flat.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images, list of paths or tar shard")
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=".", suffix=".tmp"))
        listing = stack.enter_context(os.scandir(folder))
        runs = []
        names = (entry.name for entry in listing if _is_listed(entry))
        while some := sorted(itertools.islice(names, SORTED_AT_ONCE)):
            runs.append(Path(temporary) / str(len(runs)))
            runs[-1].write_text("".join(json.dumps(name) + "\n" for name in some), encoding="ascii")
        if not runs:
            endings = ", ".join(IMAGE_SUFFIXES)
            raise ValueError(f"{folder}: no image here; expected files ending in {endings}; tars are '{folder}/*.tar'")
        with atomic_path(target) as path, path.open("w", encoding="ascii") as file:
            for name in heapq.merge(*map(_names, runs)):
                file.write(json.dumps({"image": name}) + "\n")


def _names(path: Path) -> Iterator[str]:
    with path.open(encoding="ascii") as file:
        yield from map(json.loads, file)


def _is_listed(entry: os.DirEntry) -> bool:
    ending = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - a Path each would take most of the time
    return ending in IMAGE_SUFFIXES and not entry.name.startswith(".") and not entry.is_dir()


# -------------------------------------------------------------------------------------------------------- the argument


Shard = TarShard | ListShard


@dataclass(frozen=True)
class Source:
    """What a command line names as its images.

    Attributes:
        argument: a folder of images, a list (``LIST_SUFFIXES``), or tars: a path, a glob, ``{000..999}`` or ``{a,b}``.
        shard_size: images of a folder or list that make a shard.
        root: what a list's relative paths are relative to; without it the list's folder.
        pattern: which entries of a tar are images.
    """

    argument: Path
    shard_size: int = 10_000
    root: Path | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"--shard-size {self.shard_size}: must be at least 1")
        if self.root is not None and self.kind != "list":
            raise ValueError(f"--list-root {self.root}: belongs to a list of paths, and {self.argument} is none")
        if self.pattern is not None and self.kind != "tars":
            raise ValueError(f"--entries {self.pattern}: belongs to tar shards, and {self.argument} is none")

    @property
    def kind(self) -> str:
        """``folder``, ``list`` or ``tars``; what is not there and looks like nothing else passes for a folder."""
        if self.argument.is_dir():
            return "folder"
        if self.argument.suffix.lower() in LIST_SUFFIXES:
            return "list"
        return "tars" if re.search(r"[*?\[{]|\.tar(\.\w+)?$|\.tgz$", str(self.argument)) else "folder"

    def spool(self, state: Path) -> None:
        """Write a folder's names into ``state``, once a run; for the first of several processes."""
        if self.kind == "folder" and not (state / "images.jsonl").exists():
            list_folder(self.argument, state / "images.jsonl")

    def forget(self, state: Path) -> None:
        """Drop what :meth:`spool` wrote, so that another run sees the folder as it is then."""
        (state / "images.jsonl").unlink(missing_ok=True)

    def shards(self, state: Path) -> list[Shard]:
        """Return the shards in order; a folder must have been spooled into ``state``.

        Raises:
            FileNotFoundError: there is no such file, or one of a range is missing.
            ValueError: there is nothing in it.
        """
        if self.kind == "folder":
            return cut_list(state / "images.jsonl", self.shard_size, self.argument)
        if self.kind == "list":
            if not self.argument.is_file():
                raise FileNotFoundError(f"{self.argument}: no such list of images")
            return cut_list(self.argument, self.shard_size, self.root or self.argument.parent)
        paths = list(find_tars(str(self.argument)))
        return [TarShard(path, name, self.pattern) for path, name in zip(paths, _part_names(paths), strict=True)]


def find_tars(text: str) -> Iterator[Path]:
    """Yield the files that ``text`` names: a path, a glob, or either with brace ranges.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: a range is no range, or far too long.
    """
    if re.match(r"[a-z0-9]+:", text):
        raise ValueError(f"{text}: only local files are read; mount or copy them")
    for name in [text] if Path(text).exists() else expand_braces(text):
        if glob.has_magic(name) and not Path(name).exists():
            found = sorted(Path(match) for match in glob.iglob(name, recursive=True))  # noqa: PTH207 - absolute ones too
        else:
            found = [Path(name)]
        if not found or not found[0].is_file():
            raise FileNotFoundError(f"{name}: no such folder, list of images or tar shard")
        yield from found


def expand_braces(text: str) -> Iterator[str]:
    """Yield ``text`` with each ``{000..999}`` and ``{a,b}`` replaced by what it stands for, in order.

    Raises:
        ValueError: a range runs backwards, or there are too many names.
    """
    choices, count = [], 1
    for number, part in enumerate(re.split(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}", text)):
        options = [part] if number % 2 == 0 else _options(part)
        count *= len(options)
        if count > MOST_SHARDS:
            raise ValueError(f"{text}: more than {MOST_SHARDS} files; is there a digit too many in a range?")
        choices.append(options)
    return map("".join, itertools.product(*choices))


def _options(inside: str) -> Any:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not ends:
        if ".." in inside and "," not in inside:
            raise ValueError(f"{{{inside}}}: a range needs two numbers, as in {{000..999}}")
        return inside.split(",")
    low, high = (int(end) for end in ends.groups())
    if high < low:
        raise ValueError(f"{{{inside}}}: runs backwards")
    if high - low >= MOST_SHARDS:
        raise ValueError(f"{{{inside}}}: more than {MOST_SHARDS} files; is there a digit too many in a range?")
    width = max(map(len, ends.groups())) if any(len(e) > 1 and e[0] == "0" for e in ends.groups()) else 0
    return [f"{value:0{width}d}" for value in range(low, high + 1)]


def _part_names(paths: Iterable[Path]) -> list[str]:
    """Return a name for each path: its stem, and where several share that, something of the whole path too."""
    paths = list(paths)
    stems = [re.sub(r"\.tar(\.\w+)?$|\.tgz$", "", path.name).lstrip("._") or "shard" for path in paths]
    count = Counter(stems)
    if len(set(paths)) < len(paths):
        twice = next(path for path, number in Counter(paths).items() if number > 1)
        raise ValueError(f"{twice}: named twice")
    return [
        stem if count[stem] == 1 else f"{stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
        for stem, path in zip(stems, paths, strict=True)
    ]


def _key(name: str) -> str | None:
    """Return a tar entry's key, or None where it could not be written down."""
    name = re.sub(r"^(\./|/)+", "", name)
    return os.path.splitext(name)[0] if name == _printable(name) else None  # noqa: PTH122


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
