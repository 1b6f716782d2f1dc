"""Every kind of image file becomes upright RGB or is refused by name; drafts keep nearly the same pixels."""

import io
import os
import zlib

import numpy as np
import pytest
from image_bytes import grey_png
from PIL import Image

from captioning.data import images as images_module
from captioning.data.images import DRAFT_FACTOR, decode_image, formats, load_image
from captioning.data.listing import list_images
from captioning.profiles import ROOT

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def save_image(path, color=RED, mode="RGB", size=(4, 3), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((6, 4), np.uint8)
    upright[0, 0], upright[0, 3] = 255, 128  # tells all eight orientations apart
    # How the camera stored the picture: the inverse of the turn that EXIF asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png"))[..., 0], upright)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, WHITE),
        ("CMYK", (0, 255, 255, 0), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), WHITE),
        ("I;16", 0xFFFF, WHITE),
        ("I;16", 0x4080, (0x40, 0x40, 0x40)),
    ],
)
def test_every_pixel_mode_becomes_rgb(tmp_path, mode, color, expected):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    image = load_image(save_image(tmp_path / name, color, mode))
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert np.abs(np.asarray(image, np.int64) - expected).max() <= 1  # JPEG and alpha round


def test_sixteen_bit_ramp_is_scaled_and_not_clipped(tmp_path):
    """Pillow's convert("RGB") clips 16-bit greys at 255: nearly every picture turned white."""
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png"))[..., 0], ramp // 257)
    (tmp_path / "b.png").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())  # Pillow's mode "I"
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "b.png"))[..., 1], ramp // 257)


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, b"\x80", 1, [255] + [0] * 7),
        (1, b"\x80", 0, [255] * 8),
        (2, b"\x1b", 1, [0, 255, 170, 255]),
        (4, b"\x5a", 5, [255, 170]),
        (8, b"\x05\x0a", 5, [255, 10]),
        (16, b"\x05\x05\x05\x06", 0x0505, [255, 5]),  # equal in the eight bits that are kept
        (16, b"\x00\x00\x80\x00", 0, [255, 128]),
    ],
)
def test_a_transparent_grey_is_white_at_any_depth(depth, row, transparent, expected):
    """16 bits lost the transparency; of 2 and 4 bits Pillow scales the pixels and not the transparent value."""
    image = decode_image(grey_png(depth, row, (transparent,)), "a.png")
    assert np.asarray(image)[0].tolist() == [[level] * 3 for level in expected]


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_white(depth):
    row = b"".join(value.to_bytes(depth // 8, "big") for value in (1, 2, 300 % 2**depth, 1, 2, 4))
    image = decode_image(grey_png(depth, row, (1, 2, 300 % 2**depth), colours=2), "a.png")
    assert image.getpixel((0, 0)) == WHITE
    assert image.getpixel((1, 0)) == ((1, 2, 4) if depth == 8 else (0, 0, 0))


@pytest.mark.filterwarnings("error")
def test_a_palette_with_shades_of_transparency_is_blended_without_a_warning(tmp_path):
    """Pillow warned of it and dropped the transparency where the mode was RGB at once."""
    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED, *RED, *RED])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "a.png", transparency=bytes([0, 128, 255]))
    pixels = np.asarray(load_image(tmp_path / "a.png"))[0].tolist()
    assert pixels[0] == list(WHITE) and pixels[2] == list(RED)
    assert pixels[1] == pytest.approx([255, 127, 127], abs=1)


def test_palette_transparency_and_animation(tmp_path):
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, *GREEN])
    palette.save(tmp_path / "opaque.png")
    assert load_image(tmp_path / "opaque.png").getpixel((0, 0)) == GREEN
    palette.save(tmp_path / "clear.png", transparency=1)
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == WHITE
    frames = [Image.new("RGB", (4, 3), color) for color in (GREEN, RED)]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(tmp_path / name).getpixel((0, 0)) == GREEN


def noise_image(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_damaged_images_are_refused_by_name(tmp_path, name):
    whole = noise_image(tmp_path / name)
    for content, reason in ((b"", "empty"), (b"<html>404</html>", "no known image"), (whole[: len(whole) // 2], "")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
            load_image(tmp_path / name)


def test_a_broken_png_chunk_is_no_syntax_error(tmp_path):
    """Pillow raises SyntaxError for it, which no handler of OSError and ValueError catches."""
    whole = noise_image(tmp_path / "a.png")
    start = whole.index(b"IDAT")
    half = whole[start : start + 1000]  # type and data of a shorter chunk
    chunk = (len(half) - 4).to_bytes(4, "big") + half + zlib.crc32(half).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(whole[: start - 4] + chunk + b"\0\0\0\4\xff\xff\xff\xff" + bytes(8))
    with pytest.raises(ValueError, match=r"a\.png.*broken PNG"):
        load_image(tmp_path / "a.png")


def test_any_damage_gives_an_image_or_a_value_error(tmp_path):
    """Pillow raises SyntaxError, OSError, EOFError and ValueError, depending on the byte that is wrong."""
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "a.png", "a.webp"):
        whole = bytearray(noise_image(tmp_path / name))
        for _ in range(60):
            broken = whole.copy()
            broken[rng.integers(8, 120)] = rng.integers(256)
            (tmp_path / name).write_bytes(broken)
            try:
                assert load_image(tmp_path / name).mode == "RGB"
            except ValueError as error:
                assert name in str(error)


def test_pipes_loops_and_huge_files_are_refused_at_once(tmp_path, monkeypatch):
    """Reading from a named pipe never ended."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    picture = save_image(tmp_path / "-large\n.png", size=(20_000, 2))
    assert load_image(picture).size == (20_000, 2)
    monkeypatch.setattr(images_module, "MAX_IMAGE_BYTES", 20)
    for name, error in (("pipe.jpg", "not a plain file"), ("loop.jpg", "loop.jpg"), (picture.name, "scale it down")):
        with pytest.raises((ValueError, OSError), match=error):
            load_image(tmp_path / name)
    assert [path.name for path in list_images(tmp_path)] == [picture.name, "loop.jpg", "pipe.jpg"]


def test_the_first_frame_counts_whatever_the_suffix_says(tmp_path):
    red, green = (Image.new("RGB", (4, 4), colour) for colour in ("red", "green"))
    for kind, name in (("GIF", "gif.jpg"), ("PNG", "apng.webp"), ("WEBP", "webp.png")):
        red.save(tmp_path / name, format=kind, save_all=True, append_images=[green])
        level = load_image(tmp_path / name).getpixel((1, 1))
        assert level[0] > 240 and max(level[1:]) < 15, name


def test_bombs_floats_and_folders_are_refused(tmp_path, monkeypatch):
    Image.new("F", (2, 2)).save(tmp_path / "a.tif")
    (tmp_path / "a.tif").rename(tmp_path / "float.png")
    with pytest.raises(ValueError, match=r"float\.png.*8 bits"):
        load_image(tmp_path / "float.png")
    bomb = save_image(tmp_path / "bomb.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb\.png.*decompression bomb"):
        load_image(bomb)
    with pytest.raises(OSError, match=str(tmp_path)):
        load_image(tmp_path)


def test_formats_that_pillow_hands_to_other_programs_are_not_opened(monkeypatch):
    """Of an EPS that is named .jpg Pillow would start Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    eps = io.BytesIO()
    Image.new("RGB", (4, 4)).save(eps, "EPS")
    with pytest.raises(ValueError, match="of no known image format"):
        decode_image(eps.getvalue(), "a.jpg")
    assert {"JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF"} & {*Image.OPEN} <= {*formats()}


def test_one_loader_opens_the_pictures_of_all():
    """CLIPScore and the captioner saw different pictures. document.py opens the figures that it has just drawn."""
    openers = {path.name for path in (ROOT / "captioning").rglob("*.py") if "with Image.open(" in path.read_text()}
    assert openers == {"images.py", "document.py"}


# --- JPEG drafts ----------------------------------------------------------------------------------------------------


def generated_picture(kind, size=(1344, 1040)):
    """Pictures of what JPEG and scaling find easy and hard; both sides are multiples of 8."""
    width, height = size
    generator = np.random.default_rng(3)
    if kind == "smooth":
        small = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    if kind == "noise":
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if kind == "edges":
        squares = generator.integers(0, 2, (height // 26 + 1, width // 26 + 1, 3), dtype=np.uint8) * 255
        return Image.fromarray(squares.repeat(26, 0).repeat(26, 1)[:height, :width])
    rows, columns = np.mgrid[:height, :width]  # rings that become finer outwards, down to a few pixels
    rings = 127 + 127 * np.sin((rows**2 + columns**2) / 1500)
    return Image.fromarray(rings.astype(np.uint8)).convert("RGB")


def seen_by_a_model(image, size=96):
    """What reaches a model: shorter side scaled to ``size``, centre crop, as integers."""
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).astype(int)


@pytest.mark.parametrize("kind", ["smooth", "noise", "edges", "rings"])
@pytest.mark.parametrize("quality", [75, 95])
def test_a_draft_gives_nearly_the_pixels_of_the_full_size(tmp_path, kind, quality):
    generated_picture(kind).save(tmp_path / "a.jpg", quality=quality)
    whole = load_image(tmp_path / "a.jpg")
    draft = load_image(tmp_path / "a.jpg", draft=DRAFT_FACTOR * 96)
    assert (whole.size, draft.size) == ((1344, 1040), (672, 520))
    difference = np.abs(seen_by_a_model(whole) - seen_by_a_model(draft))
    assert difference.max() <= 8
    assert difference.mean() <= 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_draft_of_another_colour_space_is_rgb(tmp_path, mode):
    generated_picture("smooth").convert(mode).save(tmp_path / "a.jpg")
    whole, draft = (load_image(tmp_path / "a.jpg", side) for side in (None, 384))
    assert (draft.mode, draft.size) == ("RGB", (672, 520))
    assert np.abs(seen_by_a_model(whole) - seen_by_a_model(draft)).max() <= 8


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_draft_is_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    generated_picture("smooth").save(tmp_path / "a.jpg", exif=exif)
    whole, draft = (load_image(tmp_path / "a.jpg", side) for side in (None, 384))
    assert draft.size == tuple(side // 2 for side in whole.size)
    assert (draft.width > draft.height) == (orientation == 3)
    assert np.abs(seen_by_a_model(whole) - seen_by_a_model(draft)).max() <= 8


@pytest.mark.parametrize(
    ("size", "draft", "expected"),
    [
        ((1600, 1600), 200, (200, 200)),
        ((1600, 1600), 201, (400, 400)),
        ((1600, 1600), 801, (1600, 1600)),  # half of it would be too small
        ((1604, 1600), 200, (401, 400)),  # eighths do not divide it, quarters do
        ((1601, 1600), 200, (1601, 1600)),
        ((400, 4000), 200, (200, 2000)),  # the shorter side decides
    ],
)
def test_a_draft_is_as_small_as_divides_evenly_and_no_smaller(tmp_path, size, draft, expected):
    Image.new("RGB", size, "red").save(tmp_path / "a.jpg")
    assert load_image(tmp_path / "a.jpg", draft).size == expected


def test_other_formats_are_read_in_full(tmp_path):
    Image.new("RGB", (800, 800), "red").save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 100).size == (800, 800)
