"""Where millions of images come from: tar shards, lists of paths, folders, each read as a stream of entries.

A shard is what one process works on: a tar file (as webdataset's) or some successive lines of a list. The names in a
folder are written down as such a list. Of a source only one entry is in memory at a time, and the list of its shards.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import heapq
import itertools
import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.data.images import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from captioning.files import atomic_path, parse_json
from captioning.inference.batches import Entry
from captioning.scale.tar_stream import DAMAGE, HashingReader, tar_members

LIST_SUFFIXES = (".txt", ".list", ".lst", ".jsonl")
MOST_SHARDS = 10**6  # a slip in a brace range must not fill the memory
SORTED_AT_ONCE = 10**5  # names of a folder that are sorted in memory


@dataclass
class Findings:
    """What one pass over a shard finds besides its images; complete after the last entry."""

    others: int = 0  # files whose names are not those of images
    damage: str = ""  # why the rest of the shard cannot be read
    sha256: str = ""  # of the file, or of the list's lines


# ---------------------------------------------------------------------------------------------------------------- tars


@dataclass(frozen=True)
class TarShard:
    """A tar file, plain or compressed; an image's key is its name in the tar without the suffix."""

    path: Path
    name: str  # of its results, unique among the shards
    pattern: str | None = None  # which entries are images, as in *.jpg; None: those with an image's suffix

    def identity(self) -> dict[str, Any]:
        """Return what changes when the shard does."""
        stat = self.path.stat()
        return {"path": str(self.path.resolve()), "size": stat.st_size, "modified_ns": stat.st_mtime_ns}

    def entries(self, findings: Findings) -> Iterator[Entry]:
        """Yield the images in the file's order, up to the end or to where the file is damaged."""
        with self.path.open("rb") as file:
            stream = HashingReader(file)
            try:
                for member, archive in tar_members(stream):
                    if self._is_image(member.name):
                        yield self._entry(member, archive)
                    elif member.isfile():
                        findings.others += 1
            except DAMAGE as error:
                findings.damage = str(error) or type(error).__name__
            stream.read_rest()
        findings.sha256 = stream.digest.hexdigest()

    def _is_image(self, name: str) -> bool:
        base = name.rpartition("/")[2]
        if self.pattern is not None:
            return fnmatch.fnmatchcase(base, self.pattern)
        return os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES and not base.startswith(".")  # noqa: PTH122

    def _entry(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> Entry:
        name = f"{self.path}: {_printable(member.name)}"
        key, problem = _key(member.name), ""
        content = archive.extractfile(member) if member.isreg() else None
        if content is None:
            problem = "is a link or no plain file"
        elif member.size > MAX_IMAGE_BYTES:
            problem = f"larger than {MAX_IMAGE_BYTES / 1e6:.0f} MB"
        elif key is None:
            problem = "its name is no valid Unicode"
        else:
            return Entry(key, name, content.read())
        return Entry(key or _printable(member.name), name, ValueError(f"{name}: {problem}; take it out"))


# --------------------------------------------------------------------------------------------------------------- lists


@dataclass(frozen=True)
class ListShard:
    """Successive lines of a list: a path a line, or a JSON object with ``image``, its path, and maybe ``key``."""

    path: Path  # of the list
    name: str  # of its results, unique among the shards
    start: int  # bytes of the list at which it begins and ends
    end: int
    line: int  # number of its first line, from 1
    sha256: str  # of those bytes
    root: Path  # what relative paths are relative to

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
        runs: list[Path] = []
        names = (entry.name for entry in listing if _is_listed(entry))
        while chunk := sorted(itertools.islice(names, SORTED_AT_ONCE)):
            runs.append(Path(temporary) / str(len(runs)))
            runs[-1].write_text("".join(json.dumps(name) + "\n" for name in chunk), encoding="ascii")
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
    """What a command line names as its images."""

    argument: Path  # a folder of images, a list (LIST_SUFFIXES), or tars: a path, a glob, {000..999} or {a,b}
    shard_size: int = 10_000  # images of a folder or list that make a shard
    root: Path | None = None  # what a list's relative paths are relative to; None: the list's folder
    pattern: str | None = None  # which entries of a tar are images

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"--shard-size {self.shard_size}: must be at least 1")
        if self.root is not None and self.kind != "list":
            raise ValueError(f"--list-root {self.root}: belongs to a list of paths, and {self.argument} is none")
        if self.pattern is not None and self.kind != "tars":
            raise ValueError(f"--entries {self.pattern}: belongs to tar shards, and {self.argument} is none")

    @property
    def kind(self) -> str:
        """``folder``, ``list`` or ``tars``: a name that does not exist is a folder's unless it looks otherwise."""
        if self.argument.is_dir():
            return "folder"
        if self.argument.suffix.lower() in LIST_SUFFIXES:
            return "list"
        return "tars" if re.search(r"[*?\[{]|\.tar(\.\w+)?$|\.tgz$", str(self.argument)) else "folder"

    def spool(self, state: Path) -> None:
        """Write a folder's names into ``state``, once a run; the first of several processes does it."""
        if self.kind == "folder" and not (state / "images.jsonl").exists():
            list_folder(self.argument, state / "images.jsonl")

    def forget(self, state: Path) -> None:
        """Remove what :meth:`spool` wrote, so that another run sees the folder as it is then."""
        (state / "images.jsonl").unlink(missing_ok=True)

    def shards(self, state: Path) -> Sequence[Shard]:
        """Return the shards in order; a folder must have been spooled into ``state``.

        Raises:
            FileNotFoundError: there is no such file, or one of a range is missing.
            ValueError: the source is empty.
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
        ValueError: a range is malformed or far too long, or the text is a URL.
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
    """Yield ``text`` with each ``{000..999}`` and ``{a,b}`` expanded, in order.

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


def _options(inside: str) -> list[str]:
    """Return what the text inside braces expands to."""
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
    """Return a name for each path: its stem, and where several paths share that, a hash of the path too."""
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
    """Return a tar entry's key, or None where its name is not valid Unicode."""
    name = re.sub(r"^(\./|/)+", "", name)
    return os.path.splitext(name)[0] if name == _printable(name) else None  # noqa: PTH122


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
