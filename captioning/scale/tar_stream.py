"""Tar files read once from front to back, hashed on the way, where damage is an error and never a silent end.

``tarfile`` takes a damaged or missing header after the first one for the end of the file, and all images after it would
be lost without a word; webdataset, which is built on it, loses them so. tests/scale/test_tar_stream.py cuts tars off at
every length and damages their headers.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, Self, cast

BLOCK = 2**20  # bytes of a tar that are read at once
# What tarfile, zlib and lzma raise for damaged files. An OSError is none of these: a disk that fails is no bad shard.
DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, struct.error)


class HashingReader:
    """A file that is read once from its beginning; ``digest`` is the SHA-256 of what has been read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most ``size``."""
        block = self._file.read(size)
        self.digest.update(block)
        return block

    def read_rest(self) -> None:
        """Read to the end, for the digest's sake."""
        while self.read(BLOCK):
            pass


def tar_members(stream: HashingReader) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the entries of a tar, plain or compressed, each with the archive to extract it from before the next.

    Raises:
        one of ``DAMAGE``: where the tar is cut off or damaged.
    """
    ended_by: list[tarfile.HeaderError] = []

    class Header(tarfile.TarInfo):
        """A header that keeps why there is no further one, which ``TarFile.next`` does not tell."""

        @classmethod
        def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
            try:
                return super().fromtarfile(archive)
            except tarfile.HeaderError as error:
                ended_by[:] = [error]
                raise

    try:
        file = cast(IO[bytes], stream)  # of which the mode r| only reads
        with tarfile.open(fileobj=file, mode="r|*", bufsize=BLOCK, tarinfo=Header) as archive:
            while (member := archive.next()) is not None:
                yield member, archive
                archive.members = []  # type: ignore[attr-defined]  # not in the stubs; it would keep them all
            end_mark: Any = tarfile.EOFHeaderError  # type: ignore[attr-defined]  # not in the stubs
            if not (ended_by and isinstance(ended_by[0], end_mark)):
                raise tarfile.ReadError(f"no entry and no end mark at byte {archive.offset}: cut off or damaged")
    except TypeError as error:  # raised by tarfile for a file that ends within a gzip header
        raise tarfile.ReadError("unexpected end of data") from error
