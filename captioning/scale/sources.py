"""Where images come from: folders, pictures, lists of paths, tars and zips, each read as a stream of entries.

A shard is what one process works on: a tar (as webdataset's), a zip, or some successive lines of a list. The names in a
folder are written down as such a list. Of a source only one entry is in memory at a time, and the list of its shards.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import heapq
import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from captioning.data.listing import PassedOver, by_key, images_in, is_image, key_of, on_disk, walk
from captioning.files import atomic_path, composed, encoding_of, parse_json
from captioning.inference.batches import Entry
from captioning.messages import some
from captioning.scale.archives import NAMES, Findings, TarShard, ZipShard, printable

LIST_SUFFIXES = (".txt", ".list", ".lst", ".jsonl")
MOST_SHARDS = 10**6  # a slip in a brace range must not fill the memory
SORTED_AT_ONCE = 10**5  # names of a folder that are sorted in memory


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
    encoding: str = "utf-8"  # of the list

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
                text = _line(file, self.encoding)
                left -= len(text)
                if text.strip(b"\0\t\r\n "):
                    yield self._entry(text, number)

    def _entry(self, text: bytes, number: int) -> Entry:
        line = f"{self.path} line {number}"
        try:
            plain = text.decode(self.encoding).strip("\r\n")
            record = _record(plain) if self.path.suffix.lower() == ".jsonl" else {"image": plain}
        except ValueError as error:
            return Entry(line, line, ValueError(f"{line}: {error}"))
        image = record["image"]
        if "\0" in image:
            return Entry(line, line, ValueError(f"{line}: a zero byte in a path"))
        path = on_disk(self.root / image)
        return Entry(composed(record["key"]) if "key" in record else key_of(path.name), str(path), path)


def _record(text: str) -> dict[str, str]:
    """Return a line of a JSONL list. Raises ValueError saying what is wrong with it."""
    record = parse_json(text)
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise ValueError('needs "image", the path of an image, as a text')
    for name in record.keys() & {"image", "key"}:
        if not isinstance(record[name], str) or not record[name] or record[name] != printable(record[name]):
            raise ValueError(f'needs "{name}" as a text in valid Unicode')
    return record


def _line(file: BinaryIO, encoding: str) -> bytes:
    """Return the next line with its end, which has more bytes in UTF-16 and UTF-32 than ``readline`` looks for."""
    line = file.readline()
    end = "\n".encode(encoding)
    while len(end) > 1 and not (line.endswith(end) and len(line) % len(end) == 0):
        more = file.read(-len(line) % len(end)) or file.readline()
        if not more:
            break
        line += more
    return line


def cut_list(path: Path, size: int, root: Path) -> list[ListShard]:
    """Return a list's lines as shards of ``size`` lines. Raises ValueError for an empty list."""
    found: list[ListShard] = []
    with path.open("rb") as file:
        mark, encoding = encoding_of(file.read(4))
        start, first = file.seek(len(mark)), 1
        lines = iter(functools.partial(_line, file, encoding), b"")
        while chunk := list(itertools.islice(lines, size)):
            text = b"".join(chunk)
            name = f"{path.stem.lstrip('._') or 'list'}-{len(found):06d}"
            digest = hashlib.sha256(text).hexdigest()
            found.append(ListShard(path, name, start, start + len(text), first, digest, root, encoding))
            start, first = start + len(text), first + len(chunk)
    if not found:
        raise ValueError(f"{path}: an empty list of images")
    return found


def list_folder(folder: Path, target: Path, recursive: bool = False) -> None:
    """Write the images in ``folder``, found by ``listing.walk``, as a JSONL list, sorted by name; memory stays flat.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image.
    """
    others = PassedOver()
    names = walk(folder, recursive, others)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".", suffix=".tmp") as temporary:
        runs: list[Path] = []
        while chunk := sorted(itertools.islice(names, SORTED_AT_ONCE)):
            runs.append(Path(temporary) / str(len(runs)))
            runs[-1].write_text("".join(json.dumps(name) + "\n" for name in chunk), encoding="ascii")
        others.report(folder, bool(runs))
        with atomic_path(target) as path, path.open("w", encoding="ascii") as file:
            for name in heapq.merge(*map(_names, runs)):
                inside = {"key": key_of(name)} if "/" in name else {}
                file.write(json.dumps({"image": name} | inside) + "\n")


def _names(path: Path) -> Iterator[str]:
    with path.open(encoding="ascii") as file:
        yield from map(json.loads, file)


# -------------------------------------------------------------------------------------------------------- the argument


Shard = TarShard | ZipShard | ListShard
PLACES = "give folders, pictures or globs"  # where each image must be a file of its own
WHAT_TO_GIVE = "give a folder, pictures, a list of paths (.txt or .jsonl), or tars or zips"


@dataclass(frozen=True)
class Source:
    """What a command line names as its images."""

    named: tuple[Path, ...]  # a folder, a list, or pictures or archives: paths, globs, {000..999} or {a,b}
    shard_size: int = 10_000  # images of a folder or list that make a shard
    root: Path | None = None  # what a list's relative paths are relative to; None: the list's folder
    pattern: str | None = None  # which entries of a tar or zip are images
    recursive: bool = False  # a folder's subfolders too

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"--shard-size {self.shard_size}: must be at least 1")
        for flag, value, kind, what in (
            ("--list-root", self.root, "list", "a list of paths"),
            ("--entries", self.pattern, "archives", "tars and zips"),
            ("--recursive", self.recursive, "folder", "a folder"),
        ):
            if value not in (None, False) and self.kind != kind:
                raise ValueError(f"{flag}: belongs to {what}, and {some(self.named)} is none")

    @functools.cached_property
    def kind(self) -> str:
        """``folder``, ``pictures``, ``list`` or ``archives``; a name that does not exist is a folder's by default.

        Raises:
            ValueError: several things that do not go together, or a file of another kind.
        """
        kinds = {_kind(path) for path in self.named}
        if len(self.named) > 1 and kinds not in ({"pictures"}, {"archives"}):
            raise ValueError(f"{some(self.named)}: several images must be pictures, or tars and zips; {WHAT_TO_GIVE}")
        return kinds.pop()

    @property
    def identity(self) -> str:
        """What tells this source from others, for the same run to be resumed; one that is named alone is its path."""
        names = [str(path.resolve()) for path in self.named]
        if len(names) == 1:
            return names[0]
        return f"{len(names)} files, SHA-256 of their paths {hashlib.sha256(json.dumps(names).encode()).hexdigest()}"

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError where what is named is not there."""
        if self.kind == "pictures":
            self._pictures()
        elif self.kind != "folder":
            self.shards(Path())

    def images(self) -> list[Entry]:
        """Return the images of a folder, or those named.

        Raises:
            FileNotFoundError, ValueError: as ``listing.images_in``.
        """
        found = self._pictures() if self.kind == "pictures" else images_in(self.named[0], self.recursive)
        return [Entry(key, str(path), path) for key, path in found.items()]

    def _pictures(self) -> dict[str, Path]:
        paths = [path for named in self.named for path in find_files(str(named))]
        return by_key("these pictures", [path.name for path in paths], paths)

    def spool(self, state: Path) -> None:
        """Write the names of images into ``state``, once a run; the first of several processes does it."""
        target = state / "images.jsonl"
        if target.exists():
            return
        if self.kind == "folder":
            list_folder(self.named[0], target, self.recursive)
        elif self.kind == "pictures":
            with atomic_path(target) as path, path.open("w", encoding="ascii") as file:
                file.writelines(json.dumps({"image": str(p.absolute())}) + "\n" for p in self._pictures().values())

    def forget(self, state: Path) -> None:
        """Remove what :meth:`spool` wrote, so that another run sees the folder as it is then."""
        (state / "images.jsonl").unlink(missing_ok=True)

    def shards(self, state: Path) -> Sequence[Shard]:
        """Return the shards in order; folders and pictures must have been spooled into ``state``.

        Raises:
            FileNotFoundError: there is no such file, or one of a range is missing.
            ValueError: the source is empty.
        """
        first = self.named[0]
        if self.kind in ("folder", "pictures"):
            return cut_list(state / "images.jsonl", self.shard_size, first if self.kind == "folder" else Path("/"))
        if self.kind == "list":
            if not first.is_file():
                raise FileNotFoundError(f"{first}: no such list of images")
            return cut_list(first, self.shard_size, self.root or first.parent)
        paths = [path for named in self.named for path in find_files(str(named))]
        return [
            (ZipShard if path.suffix.lower() == ".zip" else TarShard)(path, name, self.pattern)
            for path, name in zip(paths, _part_names(paths), strict=True)
        ]


def _kind(path: Path) -> str:
    """Return the kind of source that one name is, by its ending; of a glob without one, by that of its first match."""
    if path.is_dir():
        return "folder"
    name = str(path) if path.exists() else next(expand_braces(str(path)))
    if Path(name).suffix.lower() in LIST_SUFFIXES:
        return "list"
    if NAMES.search(name):
        return "archives"
    if is_image(name):
        return "pictures"
    if path.is_file():
        raise ValueError(f"{path}: none of what images can come from; {WHAT_TO_GIVE}")
    if glob.has_magic(name):
        match = next(glob.iglob(name, recursive=True), None)  # noqa: PTH207 - absolute ones too
        return "archives" if match is None else _kind(Path(match))
    return "folder"


def find_files(text: str, remedy: str = WHAT_TO_GIVE) -> Iterator[Path]:
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
            raise FileNotFoundError(f"{name}: no such file; {remedy}")
        yield from found


def images_at(places: Sequence[Path], recursive: bool = False) -> dict[str, Path]:
    """Return ``{key: path}`` of the images that ``places`` (files, globs and folders) of ``--images`` name.

    Raises:
        FileNotFoundError, ValueError: a place does not exist or is a list or an archive, or two images share a key.
    """
    names: list[str] = []
    paths: list[Path] = []
    for place in map(on_disk, places):
        if place.is_dir():
            found = [*images_in(place, recursive).values()]
            names += [path.relative_to(place).as_posix() for path in found]
        else:
            found = [*find_files(str(place), PLACES)]
            names += [path.name for path in found]
        paths += found
    for path in paths:
        if path.suffix.lower() in LIST_SUFFIXES or NAMES.search(path.name):
            raise ValueError(f"--images {path}: not a picture; {PLACES}, of an archive after unpacking it")
    return by_key("--images", names, paths)


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
    stems = [NAMES.sub("", path.name).lstrip("._") or "shard" for path in paths]
    count = Counter(stems)
    if len(set(paths)) < len(paths):
        twice = next(path for path, number in Counter(paths).items() if number > 1)
        raise ValueError(f"{twice}: named twice")
    return [
        stem if count[stem] == 1 else f"{stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
        for stem, path in zip(stems, paths, strict=True)
    ]
