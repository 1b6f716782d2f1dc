"""Shards that are one file: tars, read as a stream, and zips. Of each only one entry is in memory at a time."""

from __future__ import annotations

import fnmatch
import lzma
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.data.images import MAX_IMAGE_BYTES
from captioning.data.listing import is_image, key_of
from captioning.files import sha256_of
from captioning.inference.batches import Entry
from captioning.scale.tar_stream import DAMAGE, HashingReader, tar_members

NAMES = re.compile(r"\.tar(\.\w+)?$|\.tgz$|\.zip$", re.IGNORECASE)  # the endings of such files
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
NOT_READ = (NotImplementedError, RuntimeError)  # what zipfile raises for a compression that it lacks, and for passwords


@dataclass
class Findings:
    """What one pass over a shard finds besides its images; complete after the last entry."""

    others: int = 0  # files whose names are not those of images
    damage: str = ""  # why the rest of the shard cannot be read
    sha256: str = ""  # of the file, or of the list's lines


@dataclass(frozen=True)
class Archive:
    """A file of images; the key of each is its name in there without the suffix."""

    path: Path
    name: str  # of its results, unique among the shards
    pattern: str | None = None  # which entries are images, as in *.jpg; None: those with an image's suffix

    def identity(self) -> dict[str, Any]:
        """Return what changes when the shard does."""
        status = self.path.stat()
        return {"path": str(self.path.resolve()), "size": status.st_size, "modified_ns": status.st_mtime_ns}

    def _is_image(self, name: str) -> bool:
        if self.pattern is not None:
            return fnmatch.fnmatchcase(name.rpartition("/")[2], self.pattern)
        return is_image(name)

    def _entry(self, name: str, content: bytes | str) -> Entry:
        """Return the entry of an image; a text as content says what is wrong with it."""
        shown = f"{self.path}: {printable(name)}"
        key = key_of(re.sub(r"^(\./|/)+", "", printable(name)))
        if printable(name) != name:
            content = "its name is no valid Unicode"
        source = ValueError(f"{shown}: {content}; take it out") if isinstance(content, str) else content
        return Entry(key, shown, source)


class TarShard(Archive):
    """A tar, plain or compressed, read once from front to back; twice where images in it are links to others."""

    def entries(self, findings: Findings) -> Iterator[Entry]:
        """Yield the images in the file's order, links last, up to the end or to where the file is damaged."""
        links: dict[str, str] = {}
        with self.path.open("rb") as file:
            stream = HashingReader(file)
            try:
                for member, archive in tar_members(stream):
                    if member.islnk() or member.issym():
                        links[member.name] = _target(member)
                    if not self._is_image(member.name):
                        findings.others += member.isfile() or member.islnk()
                    elif member.name not in links:
                        yield self._entry(member.name, _content(member, archive))
            except DAMAGE as error:
                findings.damage = str(error) or type(error).__name__
            stream.read_rest()
        findings.sha256 = stream.digest.hexdigest()
        yield from self._linked(links)

    def _linked(self, links: dict[str, str]) -> Iterator[Entry]:
        """Yield the images that are links, with the content of those that they lead to."""
        by_name = {_plain(name): target for name, target in links.items()}
        wanted: dict[str, list[str]] = {}
        for name in filter(self._is_image, links):
            target, seen = links[name], {_plain(name)}
            while target in by_name and target not in seen:
                seen.add(target)
                target = by_name[target]
            wanted.setdefault(target, []).append(name)
        if wanted:
            yield from self._second_pass(wanted)
        for target, names in wanted.items():
            for name in names:
                yield self._entry(name, f"is a link to {printable(target)}, which is not in there")

    def _second_pass(self, wanted: dict[str, list[str]]) -> Iterator[Entry]:
        with self.path.open("rb") as file:
            try:
                for member, archive in tar_members(HashingReader(file)):
                    if member.isreg() and _plain(member.name) in wanted:
                        content = _content(member, archive)
                        for name in wanted.pop(_plain(member.name)):
                            yield self._entry(name, content)
                    if not wanted:
                        return
            except DAMAGE:  # the first pass has told
                return


def _target(link: tarfile.TarInfo) -> str:
    """Return where a link leads, in the form of :func:`_plain`: a symbolic one from its own folder."""
    return _plain(posixpath.join(posixpath.dirname(link.name) if link.issym() else "", link.linkname))


def _plain(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _content(member: tarfile.TarInfo, archive: tarfile.TarFile) -> bytes | str:
    content = archive.extractfile(member) if member.isreg() else None
    if content is None:
        return "is no plain file"
    return _too_large(member.size) or content.read()


def _too_large(size: int) -> str:
    return f"larger than {MAX_IMAGE_BYTES / 1e6:.0f} MB" if size > MAX_IMAGE_BYTES else ""


class ZipShard(Archive):
    """A zip, whose directory at the end says what is in it."""

    def entries(self, findings: Findings) -> Iterator[Entry]:
        """Yield the images in the order of the directory; none where that is damaged."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    if self._is_image(info.filename):
                        yield self._entry(info.filename, _unzipped(info, archive))
                    else:
                        findings.others += not info.is_dir()
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            findings.damage = str(error)
        findings.sha256 = sha256_of(self.path)


def _unzipped(info: zipfile.ZipInfo, archive: zipfile.ZipFile) -> bytes | str:
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link"
    try:
        return _too_large(info.file_size) or archive.read(info)
    except (*ZIP_DAMAGE, *NOT_READ) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's; bz2 raises one for damaged content
            raise
        return f"cannot be unpacked ({error})"


def printable(name: str) -> str:
    """Return a name with whatever is no valid Unicode in it as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
