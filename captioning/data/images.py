"""Image files: which formats are read, and their pixels as upright 8-bit RGB."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captioning.data.metadata import orientation, without_metadata
from captioning.messages import first_line

if TYPE_CHECKING:  # scoring captions by CIDEr reads no image, so Pillow is imported where pixels are
    from PIL import Image

# Of the formats of pixels that Pillow may read, with pillow-heif those of HEIF too: what is no part of an image's key.
_SUFFIXES = (
    ".apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .fit .fits .flc .fli .ftc .ftu .gbr .gif .heic .heics .heif "
    ".heifs .hif .icb .icns .ico .iim .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .msp .pbm .pcd .pcx "
    ".pfm .pgm .png .pnm .ppm .psd .pxr .qoi .ras .rgb .rgba .sgi .tga .tif .tiff .vda .vst .webp .xbm .xpm"
)
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
# Formats that Pillow knows by name and does not read itself; for EPS it would start Ghostscript on the file.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

MAX_IMAGE_BYTES = 512 * 2**20  # images within Pillow's limit on pixels are smaller than this

# A draft keeps at least this many times the side length that the model gets. Scaled down from there to the model's
# size, 20 photographs of COCO (at sizes that allow drafts) differ from those decoded in full by at most 5 of 255
# levels, and by 0.7 on an image's average; tests hold generated pictures to 8 and 1. With a factor of 2: 20 and 2.
DRAFT_FACTOR = 4


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the image formats that are read here, by Pillow's names; HEIF where pillow-heif is installed."""
    from PIL import Image

    Image.preinit()  # first, as Pillow itself does: the order decides where a file could be of two formats
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.ID if name not in NOT_READ)


@functools.cache
def read_suffixes() -> frozenset[str]:
    """Return those of ``IMAGE_SUFFIXES`` whose formats are read here: not all are by every build of Pillow."""
    from PIL import Image

    known = {*formats(), "MPO"}  # Pillow opens an MPO as a JPEG
    return IMAGE_SUFFIXES & {suffix for suffix, name in Image.registered_extensions().items() if name in known}


def load_image(path: str | os.PathLike, draft: int | None = None) -> Image.Image:
    """Return the image at ``path`` as 8-bit RGB, upright: EXIF rotation applied, first frame, transparency on white.

    With ``draft`` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where its shorter side keeps at least ``draft``
    pixels, which takes a fraction of the time for big photographs. Only where both sides divide evenly: otherwise the
    picture would be stretched by a fraction of a pixel. ``DRAFT_FACTOR`` says how close the pixels come.

    Raises:
        OSError: the file is missing, or reading it is not permitted.
        ValueError: the file is empty, truncated, damaged, not an image, of floating-point pixels, which have no plain
            meaning in 8 bits, or so large that Pillow takes it for a decompression bomb; or it is not a plain file.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a read from a named pipe may never end
        raise ValueError(f"{path}: not a plain file; replace it or take it out")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_IMAGE_BYTES / 1e6:.0f} MB; scale it down or take it out")
    return decode_image(path.read_bytes(), path, draft)  # apart from decoding: a missing file is not a damaged one


def decode_image(encoded: bytes, name: object, draft: int | None = None) -> Image.Image:
    """Return the image in ``encoded``, the bytes of an image file, as :func:`load_image` does.

    Raises:
        ValueError: as :func:`load_image`, beginning with ``name``.
    """
    from PIL import UnidentifiedImageError

    try:
        return _decode(encoded, draft)
    except UnidentifiedImageError as error:
        reason = "of no known image format" if encoded else "empty"
        raise ValueError(f"{name}: the file is {reason}; replace it or take it out") from error
    except Exception as error:  # of any type: Pillow's readers do not agree on what a damaged file raises
        reason = first_line(error)
        raise ValueError(f"{name}: cannot be read as an image ({reason}); replace it or take it out") from error


def _decode(encoded: bytes, draft: int | None) -> Image.Image:
    """Return the picture, also where Pillow fails at its metadata: then without them."""
    try:
        return _read(encoded, draft)
    except Exception:
        pixels, exif = without_metadata(encoded)
        with contextlib.suppress(Exception):
            if pixels != encoded:
                return _read(pixels, draft, exif)
        raise


def _read(encoded: bytes, draft: int | None, exif: bytes | None = None) -> Image.Image:
    from PIL import Image

    with Image.open(io.BytesIO(encoded), formats=formats()) as image:
        if draft and image.format == "JPEG":
            _decode_smaller(image, draft)
        return as_rgb(image, exif)


def as_rgb(image: Image.Image, exif: bytes | None = None) -> Image.Image:
    """Return a picture that has been opened, or made, as :func:`load_image` returns a file's.

    ``exif`` is its EXIF block where the picture itself has lost that. Raises ValueError for floating-point pixels, and
    what Pillow raises for damaged ones.
    """
    transparent = _transparent_value(image)
    image.load()
    if transparent is not None:
        image.info["transparency"] = transparent
    if exif is not None:
        image.info["exif"] = exif
    return _to_rgb(_turned(image, orientation(image)))


def _transparent_value(image: Image.Image) -> int | tuple[int, ...] | None:
    """Return a PNG's transparent value on the scale of the pixels as Pillow reads them, where Pillow does not."""
    tile = getattr(image, "tile", None)  # of a file whose pixels have not been read
    layout = tile[0][3] if image.format == "PNG" and tile else None
    value = image.info.get("transparency")
    if layout in ("L;2", "L;4") and value is not None:
        return value * (85 if layout == "L;2" else 17)
    if layout == "RGB;16B" and value is not None:
        return tuple(part >> 8 for part in value)
    return None


def _turned(image: Image.Image, way: int) -> Image.Image:
    """Return an image that is stored in one of EXIF's eight orientations upright."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[way]) if way in turns else image


def _decode_smaller(image: Image.Image, shorter: int) -> None:
    """Set the smallest size at which Pillow may decode a JPEG whose shorter side must keep ``shorter`` pixels."""
    width, height = image.size
    for divisor in (8, 4, 2):
        if min(width, height) >= divisor * shorter and width % divisor == 0 and height % divisor == 0:
            image.draft(None, (width // divisor, height // divisor))
            return


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which leaves an almost white picture; keep the high byte as libpng does.
        values = np.asarray(image)  # (H, W)
        grey = (np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
