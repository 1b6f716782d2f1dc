"""Image files put together byte by byte, with metadata that no encoder would write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

STORED = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3  # (6, 4, 3): no turn or flip of it is itself
TURNED = {  # what is upright, by EXIF's orientation
    1: STORED,
    2: STORED[:, ::-1],
    3: STORED[::-1, ::-1],
    4: STORED[::-1],
    5: STORED.transpose(1, 0, 2),
    6: np.rot90(STORED, -1),
    7: np.rot90(STORED[::-1], 1),
    8: np.rot90(STORED),
}
TYPES = [*range(14), 16, 17, 18, 255, 65535]  # of EXIF's values, some of which exist
COUNTS = [0, 1, 1, 1, 2, 3, 4, 5, 100, 65535, 2**31, 2**32 - 1]
VALUES = [0, 1, 2, 8, 26, 50, 200, 2**31, 2**32 - 1]
EXIF_TAGS = [269, 270, 271, 272, 282, 283, 296, 305, 306, 315, 700, 0x8298, 0x83BB, 0x8649, 0x8769, 0x8773, 0x8825]
EXIF_TAGS += [0x14A, 0x201, 0x202, 0x9286, 0x927C, 0x9C9B, 0x9C9C, 0xA005, 0xC4A5, 0x1234]


def encoded(kind, picture=STORED, **options):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


def entry(order, tag, kind, count, value):
    return struct.pack(f"{order}HHII", tag, kind, count, value)


def oriented(order, way):
    return struct.pack(f"{order}HHIHH", 0x112, 3, 1, way, 0)


def wrong_entry(rng, order, tag):
    """A tag with a random type, count and value: mostly ones that it must not have, or that lie nowhere."""
    return entry(order, tag, rng.choice(TYPES), rng.choice(COUNTS), rng.choice([*VALUES, rng.randrange(2**32)]))


def directory(order, entries, following=0):
    ordered = sorted(entries, key=lambda found: struct.unpack(f"{order}H", found[:2]))
    return struct.pack(f"{order}H", len(entries)) + b"".join(ordered) + struct.pack(f"{order}I", following)


def exif(order, entries, following=0):
    return {"<": b"II*\0\x08\0\0\0", ">": b"MM\0*\0\0\0\x08"}[order] + directory(order, entries, following)


def wrong_exif(rng, way):
    """An EXIF block with up to five wrong tags, and the orientation ``way`` beside them where it is one."""
    order = rng.choice("<>")
    entries = [wrong_entry(rng, order, tag) for tag in rng.sample(EXIF_TAGS, rng.randrange(1, 6))]
    entries += [oriented(order, way)] if way else []
    return exif(order, entries, rng.choice([0, 8, 60, 2**32 - 1])) + rng.randbytes(rng.randrange(80))


def segment(kind, content):
    """Part of a JPEG."""
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(content) + 2) + content


def chunk(kind, content, checksum=None):
    """Part of a PNG."""
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def jpeg_with(*segments):
    picture = encoded("JPEG", quality=95)
    return picture[:2] + b"".join(segments) + picture[2:]


def png_with(*chunks, last=False):
    picture = encoded("PNG")
    place = picture.index(b"IEND") - 4 if last else 33
    return picture[:place] + b"".join(chunks) + picture[place:]


def webp_with(exif_block, cut=0):
    """A lossless WebP with an EXIF chunk, whose last ``cut`` bytes are missing."""
    header = b"VP8X" + struct.pack("<I", 10) + bytes([8, 0, 0, 0, 3, 0, 0, 5, 0, 0])
    tail = b"EXIF" + struct.pack("<I", len(exif_block)) + exif_block + b"\0" * (len(exif_block) % 2)
    body = b"WEBP" + header + encoded("WEBP", lossless=True)[12:] + tail
    return (b"RIFF" + struct.pack("<I", len(body)) + body)[: len(body) + 8 - cut]


def tiff_with(picture, entries, tail=b""):
    """A TIFF, little-endian as Pillow writes it, whose directory holds ``entries`` instead of those of their tags."""
    (start,) = struct.unpack_from("<I", picture, 4)
    (count,) = struct.unpack_from("<H", picture, start)
    own = [picture[start + 2 + 12 * n :][:12] for n in range(count)]
    replaced = {found[:2] for found in entries}
    kept = [found for found in own if found[:2] not in replaced]
    return picture[:4] + struct.pack("<I", len(picture)) + picture[8:] + directory("<", [*kept, *entries]) + tail


def grey_png(depth, row, transparent=None, colours=0):
    """A PNG of one row of packed greys (or with ``colours`` 2, of RGB), and maybe its transparent value."""
    channels = 3 if colours == 2 else 1
    header = struct.pack(">IIBBBBB", len(row) * 8 // depth // channels, 1, depth, colours, 0, 0, 0)
    key = [] if transparent is None else [chunk(b"tRNS", struct.pack(f">{channels}H", *transparent))]
    body = [chunk(b"IHDR", header), *key, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)
