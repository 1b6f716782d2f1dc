"""What an image file says beside its pixels: the orientation, and the picture's bytes without all of that.

Metadata is written by cameras, editors and web servers, often wrongly, and Pillow refuses some pictures for it. Of all
of it only the orientation matters here. EXIF is a TIFF directory of its own: entries of tag, type, count and value.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION, SHORT = 0x0112, 3  # a tag and the type that it must have
# TIFF's tags of pixels: their sizes, layout, compression, colours. All others are about the picture.
PIXEL_TAGS = {*range(256, 260), 262, 266, 273, ORIENTATION, *range(277, 280), 284, 292, 293, 317, *range(320, 326)}
PIXEL_TAGS |= {332, 338, 339, 347, *range(512, 522), *range(529, 533)}


def orientation(image: Image.Image) -> int:
    """Return which way up an opened image is, 1 to 8 as EXIF has it; 1, as stored, where that cannot be read.

    Pillow's own reader, which also knows PNG's and XMP's forms of it, gives up at a damaged tag before this one.
    """
    try:
        found = _exif_orientation(image.info.get("exif", b"")) or image.getexif().get(ORIENTATION)
        return next((way for way in range(1, 9) if way == found), 1)
    except Exception:  # of any type, for any tag
        return 1


def _exif_orientation(exif: bytes) -> int | None:
    tiff = re.sub(rb"\A(Exif\0\0)*", b"", exif)
    directory = _Directory.of(tiff)
    if directory is not None:
        for tag, entry in directory.entries(tiff):
            kind, number, value = struct.unpack_from(f"{directory.order}HIH", entry, 2)
            if tag == ORIENTATION and (kind, number) == (SHORT, 1):
                return value
    return None


def without_metadata(encoded: bytes) -> tuple[bytes, bytes]:
    """Return a JPEG, PNG, WebP or TIFF without its metadata, and the EXIF block; any other file as it is, and none.

    A TIFF keeps its orientation, and so needs no EXIF block.
    """
    try:
        if encoded.startswith(b"\xff\xd8"):
            return _jpeg(encoded)
        if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(encoded)
        if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
            return _webp(encoded)
        return _tiff(encoded), b""
    except (IndexError, struct.error):  # it ends too early
        return encoded, b""


def _jpeg(encoded: bytes) -> tuple[bytes, bytes]:
    """Keep all segments but APP1 to APP13, APP15 and comments: APP0 is JFIF's, APP14 says what the colours are."""
    kept, exif, start = [encoded[:2]], b"", 2
    while encoded[start] == 0xFF and (kind := encoded[start + 1]) != 0xDA:  # the scan: pixels up to the end
        end = start + 2 + int.from_bytes(encoded[start + 2 : start + 4])
        if encoded[start + 4 : start + 8] == b"Exif":
            exif = encoded[start + 4 : end]
        elif not (0xE1 <= kind <= 0xED or kind in (0xEF, 0xFE)):
            kept.append(encoded[start:end])
        start = end
    return b"".join([*kept, encoded[start:]]), exif


def _png(encoded: bytes) -> tuple[bytes, bytes]:
    """Keep the critical chunks, which begin with a capital, and the transparency."""
    kept, exif, start = [encoded[:8]], b"", 8
    while start < len(encoded):
        end = start + 12 + int.from_bytes(encoded[start : start + 4])
        kind = encoded[start + 4 : start + 8]
        if kind == b"eXIf":
            exif = encoded[start + 8 : end - 4]
        elif kind[:1].isupper() or kind == b"tRNS":
            kept.append(encoded[start:end])
        start = end
    return b"".join(kept), exif


def _webp(encoded: bytes) -> tuple[bytes, bytes]:
    """Keep all chunks but EXIF, XMP and colour profile, of which a header chunk says whether they are there."""
    kept, exif, start = [b"WEBP"], b"", 12
    while start < len(encoded):
        kind, size = struct.unpack_from("<4sI", encoded, start)
        chunk = encoded[start : start + 8 + size + size % 2]
        if kind == b"EXIF":
            exif = chunk[8 : 8 + size]
        elif kind == b"VP8X":
            kept.append(chunk[:8] + bytes([chunk[8] & ~0b101100]) + chunk[9:])
        elif kind not in (b"XMP ", b"ICCP"):
            kept.append(chunk)
        start += len(chunk)
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body, exif


def _tiff(encoded: bytes) -> bytes:
    """Keep the entries of pixels in the first directory, and no other directory; the values stay where they are."""
    directory = _Directory.of(encoded)
    if directory is None:
        return encoded
    kept = [entry for tag, entry in directory.entries(encoded) if tag in PIXEL_TAGS]
    following = bytes(4 if directory.number == "H" else 8)  # no other directory
    shorter = struct.pack(directory.order + directory.number, len(kept)) + b"".join(kept) + following
    return encoded[: directory.start] + shorter + encoded[directory.start + len(shorter) :]


class _Directory(NamedTuple):
    """The first directory of a TIFF: where it begins, and the byte order and, as struct's, the formats in it."""

    start: int
    order: str
    number: str  # of entries
    size: int  # of an entry

    @classmethod
    def of(cls, tiff: bytes) -> _Directory | None:
        order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
        if order and tiff[2:4] in (b"*\0", b"\0*"):
            return cls(struct.unpack_from(f"{order}I", tiff, 4)[0], order, "H", 12)
        if order and tiff[2:4] in (b"+\0", b"\0+"):  # BigTIFF
            return cls(struct.unpack_from(f"{order}Q", tiff, 8)[0], order, "Q", 20)
        return None

    def entries(self, tiff: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the tag and all bytes of each entry, up to where the file ends."""
        (number,) = struct.unpack_from(self.order + self.number, tiff, self.start)
        first = self.start + struct.calcsize(self.order + self.number)
        for place in range(first, min(first + number * self.size, len(tiff) - self.size + 1), self.size):
            yield struct.unpack_from(f"{self.order}H", tiff, place)[0], tiff[place : place + self.size]
