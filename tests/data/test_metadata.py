"""metadata.py: no metadata, however wrong, changes a picture or ends its reading; the orientation is obeyed."""

import io
import random
import zlib

import numpy as np
import pytest
from image_bytes import (
    EXIF_TAGS,
    STORED,
    TURNED,
    chunk,
    encoded,
    entry,
    exif,
    jpeg_with,
    oriented,
    png_with,
    segment,
    tiff_with,
    webp_with,
    wrong_entry,
    wrong_exif,
)
from PIL import Image

from captioning.data.images import decode_image
from captioning.data.metadata import without_metadata

MAKERS = {
    "jpeg": lambda block: jpeg_with(segment(0xE1, b"Exif\0\0" + block)),
    "png": lambda block: png_with(chunk(b"eXIf", block)),
    "png, after the pixels": lambda block: png_with(chunk(b"eXIf", block), last=True),
    "webp": webp_with,
}
FROM_JPEG = np.asarray(Image.open(io.BytesIO(encoded("JPEG", quality=95))))  # what JPEG makes of the picture


def pixels(content):
    return np.asarray(decode_image(content, "a"))


def as_turned(way, jpeg=False):
    """The upright picture; a JPEG's pixels are not quite those that were stored."""
    if not jpeg:
        return TURNED[way]
    turn = {1: lambda p: p, 3: lambda p: p[::-1, ::-1], 6: lambda p: np.rot90(p, -1), 8: np.rot90}
    return turn[way](FROM_JPEG)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's words on damaged tags
@pytest.mark.parametrize("kind", MAKERS)
def test_thousand_wrong_exif_blocks_leave_the_pixels_right(kind):
    """struct.error, TypeError, AttributeError and others came from ``exif_transpose``, which rewrites all tags."""
    for seed in range(1000):
        rng = random.Random(seed)
        way = rng.choice([None, 1, 3, 6, 8])
        found = pixels(MAKERS[kind](wrong_exif(rng, way)))
        np.testing.assert_array_equal(found, as_turned(way or 1, kind == "jpeg"), err_msg=f"seed {seed}")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_thousand_wrong_tiff_tags_leave_the_pixels_right(compression):
    whole = encoded("TIFF", compression=compression)
    for seed in range(1000):
        rng = random.Random(seed)
        way = rng.choice([None, 3, 6])
        entries = [wrong_entry(rng, "<", tag) for tag in rng.sample(EXIF_TAGS, rng.randrange(1, 6))]
        content = tiff_with(whole, entries + ([oriented("<", way)] if way else []), rng.randbytes(rng.randrange(40)))
        np.testing.assert_array_equal(pixels(content), TURNED[way or 1], err_msg=f"seed {seed}")


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("way", TURNED)
def test_every_orientation_in_both_byte_orders(kind, order, way):
    np.testing.assert_array_equal(pixels(MAKERS[kind](exif(order, [oriented(order, way)]))), TURNED[way])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "wrong",
    [
        entry("<", 0x11A, 7, 1, 2**32 - 1),  # TypeError
        entry("<", 0x132, 12, 1, 0),  # AttributeError
        entry("<", 0x9286, 16, 4, 2),  # struct.error
        entry("<", 0x8825, 8, 1, 2**32 - 1),  # ValueError
        entry("<", 0x10F, 2, 65535, 26),  # OSError at a tag before the orientation
    ],
)
def test_a_turned_photograph_with_one_wrong_tag_is_turned(wrong):
    block = exif("<", [oriented("<", 6), wrong]) + bytes(60)
    for kind, make in MAKERS.items():
        np.testing.assert_array_equal(pixels(make(block)), as_turned(6, kind == "jpeg"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "block", [b"", b"II", b"II*\0", b"no TIFF at all", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff"]
)
def test_where_the_orientation_cannot_be_read_the_picture_is_as_stored(block):
    for kind, make in MAKERS.items():
        np.testing.assert_array_equal(pixels(make(block)), as_turned(1, kind == "jpeg"))


@pytest.mark.parametrize("value", [0, 9, 6 << 8, 65535])
def test_an_orientation_that_is_none_of_the_eight_is_passed_over(value):
    np.testing.assert_array_equal(pixels(MAKERS["png"](exif("<", [oriented("<", value)]))), STORED)


def test_forms_of_the_orientation_that_pillow_knows():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    block = b"Exif\0\0" + exif("<", [oriented("<", 6)])
    raw = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    long = exif("<", [entry("<", 0x112, 4, 1, 6)])
    for content in (
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)),
        png_with(chunk(b"tEXt", b"Raw profile type exif\0" + raw)),
        png_with(chunk(b"eXIf", long)),
    ):
        np.testing.assert_array_equal(pixels(content), TURNED[6])


def test_damaged_metadata_beside_whole_pixels():
    """A checksum, a length, a text that unpacks to too much: Pillow refused all of them."""
    turned = exif("<", [oriented("<", 6)])
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**21)))
    for content in (
        png_with(chunk(b"tEXt", b"Title\0x", checksum=1), chunk(b"eXIf", turned)),
        png_with(chunk(b"tEXt", b"Title\0x", checksum=1), chunk(b"eXIf", turned), last=True),
        png_with(chunk(b"iCCP", b"profile\0\7\7"), chunk(b"eXIf", turned)),
        png_with(chunk(b"pHYs", b"\0"), chunk(b"eXIf", turned)),
        png_with(bomb, chunk(b"eXIf", turned)),
    ):
        np.testing.assert_array_equal(pixels(content), TURNED[6])
    cut = webp_with(turned + bytes(400), cut=350)
    np.testing.assert_array_equal(pixels(cut), TURNED[6])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_files_without_their_metadata_are_the_same_pictures(kind):
    block = exif("<", [oriented("<", 1)])
    options = {
        "JPEG": {"quality": 95, "exif": b"Exif\0\0" + block, "icc_profile": b"x" * 500, "comment": b"c"},
        "PNG": {"exif": block, "icc_profile": b"x" * 500},
        "WEBP": {"lossless": True, "exif": block, "xmp": b"<x/>"},
        "TIFF": {"description": "a ball", "icc_profile": b"x" * 500},
    }
    whole = encoded(kind, **options[kind])
    bare, found = without_metadata(whole)
    assert bare != whole
    assert found.endswith(block) or kind == "TIFF"
    np.testing.assert_array_equal(pixels(bare), pixels(whole))
    with Image.open(io.BytesIO(bare)) as image:
        assert not {"exif", "xmp", "icc_profile", "comment"} & image.info.keys()


def test_a_big_tiff_loses_its_metadata_too():
    whole = encoded("TIFF", big_tiff=True, description="a ball")
    bare, _ = without_metadata(whole)
    assert bare != whole
    np.testing.assert_array_equal(pixels(bare), STORED)


def test_any_beginning_of_a_file_is_taken_apart_without_an_error():
    wholes = [make(exif(">", [oriented(">", 6)])) for make in MAKERS.values()] + [encoded("TIFF"), encoded("GIF")]
    for whole in wholes:
        for length in range(len(whole)):
            bare, _ = without_metadata(whole[:length])
            assert len(bare) <= length + 8


def test_a_cmyk_photograph_keeps_its_colours_without_metadata():
    """Its APP14 says that the colours are inverted."""
    inks = np.arange(8 * 8 * 4, dtype=np.uint8).reshape(8, 8, 4)
    file = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(file, "JPEG", quality=95, exif=exif("<", [oriented("<", 1)]))
    bare, _ = without_metadata(file.getvalue())
    assert len(bare) < len(file.getvalue())
    np.testing.assert_array_equal(pixels(bare), pixels(file.getvalue()))
