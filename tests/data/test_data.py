"""data.py: bad files are refused by name, captions survive packing exactly, and the cache survives what kills it."""

import functools
import itertools
import json
import logging
import os
import pickle
import shutil
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.data import feature_cache
from captioning.data import images as images_module
from captioning.data.annotations import Annotations, Sample, load_annotations, load_split
from captioning.data.batches import CaptionDataset, length_grouped_batches, pack_captions, shuffle_captions
from captioning.data.feature_cache import FeatureCache, _append
from captioning.data.images import DRAFT_FACTOR, list_images, load_image
from captioning.data.tokenizer import Tokenizer, encode_captions, train_tokenizer
from captioning.imports import import_guarded

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def save_image(path, color=RED, mode="RGB", size=(4, 3), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


# ---------------------------------------------------------------------------------------------------------- images


def test_list_images_takes_any_letter_case_sorted_and_not_recursive(tmp_path):
    for name in ("b.JPG", "a.png", "d.WebP", "c.jpeg", "sub/e.jpg"):
        save_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves behind")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG", "c.jpeg", "d.WebP"]


def test_a_dangling_link_is_not_dropped_in_silence(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    (image,) = list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        load_image(image)


def test_list_images_refuses_missing_and_empty_folders_and_shared_stems(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no image here.*\.jpg"):
        list_images(tmp_path)
    save_image(tmp_path / "a.jpg")
    save_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png"):
        list_images(tmp_path)


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


def test_pipes_loops_and_huge_files_are_refused_and_not_waited_for(tmp_path, monkeypatch):
    """A named pipe was waited for, for ever."""
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


def test_a_name_that_is_no_unicode_is_refused_before_work(tmp_path):
    """It failed when the captions were written, behind all the work."""
    picture = save_image(tmp_path / "a.png")
    try:
        picture.rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes valid Unicode only")
    with pytest.raises(ValueError, match=r"not valid Unicode.*rename"):
        list_images(tmp_path)


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


# ----------------------------------------------------------------------------------------------------- annotations


def coco(images=((7, "a.jpg"), (3, "b.png")), captions=((7, "a dog"), (3, "a cat"), (7, "one dog"))):
    return {
        "images": [{"id": i, "file_name": name} for i, name in images],
        "annotations": [{"id": 100 + n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)],
    }


@pytest.fixture
def split(tmp_path):
    for name in ("a.jpg", "b.png"):
        save_image(tmp_path / "images" / "val" / name)
    return tmp_path


def write_split(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "val.json").write_text(text, encoding="utf-8")
    return load_split(folder, "val")


def test_load_split_keeps_the_order_and_normalises_white_space(split):
    content = coco(captions=((7, " a\u2028dog\r\n runs "), (3, "a cat"), (7, "one\x0bdog")))
    root = split / "images" / "val"
    assert write_split(split, content) == [
        Sample(7, root / "a.jpg", ("a dog runs", "one dog")),
        Sample(3, root / "b.png", ("a cat",)),
    ]
    assert write_split(split, "\ufeff" + json.dumps(content))[0].image_id == 7


def test_references_alone_need_no_images_and_stay_as_they_are(tmp_path):
    (tmp_path / "val.json").write_text(json.dumps(coco(captions=((7, " a  dog"), (3, "a cat"), (7, "one dog")))))
    found = load_annotations(tmp_path / "val.json")
    assert found == Annotations({"a": [" a  dog", "one dog"], "b": ["a cat"]}, {"a": "a.jpg", "b": "b.png"})


def changed(section, number, **fields):
    content = coco()
    content[section][number].update(fields)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "must hold one JSON object, not a list"),
        ({"images": []}, "needs a list 'images'"),
        ({"images": coco()["images"]}, "needs a list 'annotations'"),
        (changed("images", 1, id="3"), r"images\[1\] needs 'id' as an integer, not '3'"),
        (changed("images", 1, id=True), r"images\[1\] needs 'id' as an integer, not True"),
        (changed("images", 0, file_name=None), r"images\[0\] needs 'file_name' as .* text .*, not None"),
        (changed("images", 0, file_name=""), r"images\[0\] needs 'file_name' as non-empty text"),
        (changed("annotations", 2, caption=5), r"annotations\[2\] needs 'caption' as .* text .*, not 5"),
        (changed("annotations", 2, caption="half \ud83d"), r"annotations\[2\].* valid Unicode, not 'half \\ud83d'"),
        (changed("annotations", 2, caption=" \n"), r"annotations\[2\] needs 'caption' as non-empty text"),
        (changed("annotations", 2, caption=""), r"annotations\[2\] needs 'caption' as non-empty text"),
        (changed("annotations", 2, image_id=9), "'images' does not list: 9"),
        (changed("annotations", 1, image_id=7), r"1 of 2 images have no caption: b\.png \(id 3\)"),
        (changed("annotations", 1, id=100), "two captions have the id 100"),
        (changed("annotations", 1, id=[1]), r"captions has the id \[1\], which is neither number nor text"),
        (changed("images", 1, id=7), "two images have the id 7"),
        (changed("images", 1, file_name="a.png"), r"a\.jpg and a\.png"),
        ({**coco(), "images": [None]}, r"images\[0\] needs 'id'"),
    ],
)
def test_bad_annotations_are_refused_with_what_is_wrong(split, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        write_split(split, content)
    assert "val.json" in str(caught.value)


def test_missing_files_are_named(split):
    with pytest.raises(FileNotFoundError, match=r"test\.json"):
        load_split(split, "test")
    images = [(i, f"{i}.jpg") for i in range(8)]
    with pytest.raises(FileNotFoundError, match=r"8 of the 8 images.*0\.jpg, 1\.jpg.* and 3 more.*--images_root"):
        write_split(split, coco(images, [(i, "a dog") for i in range(8)]))


def test_bytes_that_are_no_text_are_refused(split):
    (split / "val.json").write_bytes(b'{"images": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"val\.json.*not a JSON file"):
        load_split(split, "val")


# ------------------------------------------------------------------------------------------------------- tokenizer

TEXTS = ["a red dog runs on the green grass", "the dog doesn't see 12 red birds", "où est le café à l'été ?"] * 3
ODD_TEXTS = [
    "a red dog",
    " leading space",
    "trailing ",
    "  runs   of    spaces ",
    "\ttabs\nand\r\nnewlines\n\n",
    "",
    "don't we'll I'VE they're he'd I'm it's 's",
    "2024 12th 3.14 1,000,000",
    "café où naïve Ångström",
    "e\u0301 ﬁ ™ ½",
    "🐶 👩‍👩‍👧 🇫🇷",
    "一只红色的狗在跑",
    "العربية हिन्दी",
    "\x00\x01\x1f\x7f\x80\xa0\xad",
    "\u200b\u2028\ufeff\ufffd",
    "#version: 0.2 # #",
    "a.b,c;(d)[e]{f}<g>|h|",
    "<|endoftext",
    "UPPER lower MiXed",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(TEXTS, 300, folder)
    return folder


def test_tokenizer_equals_the_one_of_transformers(bpe):
    ours = Tokenizer(bpe)
    theirs = import_guarded("transformers").GPT2TokenizerFast(
        vocab=str(bpe / "encoder.json"), merges=str(bpe / "vocab.bpe")
    )
    assert len(theirs) == ours.vocab_size == 300
    assert theirs.eos_token_id == ours.eos_id == 299
    for text in ODD_TEXTS + TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False).strip() == text.strip()
    assert len(ours.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # merges are in use


def test_end_of_text_inside_a_caption_is_plain_text(bpe):
    """transformers turns the characters into the special id, and such a caption would end in its middle."""
    tokenizer = Tokenizer(bpe)
    ids = tokenizer.encode("a dog<|endoftext|> runs")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a dog<|endoftext|> runs"


def test_decode_drops_specials_and_refuses_foreign_ids(bpe):
    tokenizer = Tokenizer(bpe)
    ids = [tokenizer.eos_id, *tokenizer.encode(" a dog "), tokenizer.eos_id]
    assert tokenizer.decode(torch.tensor(ids)) == "a dog"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("狗")[:1]) == "\ufffd"  # a third of a character
    for strange in (300, -1):
        with pytest.raises(ValueError, match=str(strange)):
            tokenizer.decode([strange])


def test_training_is_reproducible_and_its_files_are_gpt2s(bpe, tmp_path):
    again = train_tokenizer(iter(TEXTS), 300, tmp_path)
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / name).read_bytes() == (bpe / name).read_bytes()
    assert (bpe / "vocab.bpe").read_text(encoding="utf-8").startswith("#version: 0.2\n")
    assert again.eos_id == again.vocab_size - 1
    for byte in range(256):  # every byte has an id of its own
        assert again.decode(again.encode(f"x{chr(byte)}x")) == f"x{chr(byte)}x"


def test_training_says_when_the_texts_are_too_few_and_refuses_tiny_sizes(tmp_path, caplog):
    assert train_tokenizer(["ab ab"], 500, tmp_path).vocab_size == 258
    assert "258" in caplog.text
    assert train_tokenizer(["ab ab"], 257, tmp_path).vocab_size == 257
    with pytest.raises(ValueError, match="257"):
        train_tokenizer(["ab ab"], 256, tmp_path)


@pytest.mark.parametrize(("skipped", "newline"), [(0, "\r\n"), (1, "\n")])
def test_merges_may_have_windows_line_ends_or_no_version_line(bpe, tmp_path, skipped, newline):
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    lines = (bpe / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    (tmp_path / "vocab.bpe").write_bytes(newline.join(lines[skipped:]).encode())
    assert Tokenizer(tmp_path).encode(TEXTS[0]) == Tokenizer(bpe).encode(TEXTS[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("encoder.json", "{", "not a JSON file"),
        ("encoder.json", "[1, 2]", "not a vocabulary"),
        ("encoder.json", '{"a": 0, "b": 2}', "not a vocabulary"),
        ("encoder.json", '{"a": [0]}', "not a vocabulary"),
        ("encoder.json", '{"a": 0}', r"lacks <\|endoftext\|>"),
        ("vocab.bpe", "#version: 0.2\na b c\n", "line 2"),
        ("vocab.bpe", "#version: 0.2\nq zzz\n", "line 2"),
        ("vocab.bpe", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damaged_tokenizer_files_are_refused(bpe, tmp_path, name, content, message):
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(tmp_path)
    assert name in str(caught.value)


def test_missing_tokenizer_files_are_named(bpe, tmp_path):
    shutil.copy(bpe / "encoder.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"vocab\.bpe: missing"):
        Tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------ training sequences


def test_encode_captions_refuses_long_captions_by_name(bpe, tmp_path):
    tokenizer = Tokenizer(bpe)
    samples = [Sample(1, tmp_path / "a.jpg", ("a dog", "a red dog runs on"))]
    lengths = [len(tokenizer.encode(caption)) for caption in samples[0].captions]
    (encoded,) = encode_captions(samples, tokenizer, max(lengths))
    assert [tokenizer.decode(tokens) for tokens in encoded] == list(samples[0].captions)
    assert [len(tokens) for tokens in encoded] == lengths
    with pytest.raises(ValueError, match=rf"a\.jpg: caption 2 has {lengths[1]} tokens, more than {lengths[1] - 1}"):
        encode_captions(samples, tokenizer, lengths[1] - 1)


def test_packing_by_hand():
    packed = pack_captions([[[5, 6], [7]], [[8]]], eos_id=9, pad_to_multiple=4)
    assert packed.inputs.tolist() == [[9, 5, 6, 9, 7, 9, 9, 9], [9, 8, 9, 9, 9, 9, 9, 9]]
    assert packed.targets.tolist() == [[5, 6, 9, 7, 9, -100, -100, -100], [8, 9] + [-100] * 6]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert packed.segments.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert packed.slots.tolist() == [[[0, 1, 2], [3, 4, -1]], [[0, 1, -1], [-1, -1, -1]]]
    assert pack_captions([[[5, 6], [7]], [[8]]], eos_id=9).inputs.shape == (2, 5)


def test_captions_come_back_out_of_a_packed_batch():
    rng = np.random.default_rng(0)
    batch = [[rng.integers(1, 50, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 6))] for _ in range(7)]
    packed = pack_captions(batch, eos_id=0)
    for row, captions in enumerate(batch):
        for number, caption in enumerate(captions, start=1):
            mine = packed.segments[row] == number
            assert packed.inputs[row, mine].tolist() == [0, *caption]
            assert packed.targets[row, mine].tolist() == [*caption, 0]
            assert packed.positions[row, mine].tolist() == list(range(len(caption) + 1))
        assert packed.segments[row].max() == len(captions)
    assert torch.equal(packed.segments == 0, packed.targets == -100)


def test_packed_batch_moves_as_a_whole():
    moved = pack_captions([[[1]]], eos_id=2).to("meta")
    assert {t.device.type for t in vars(moved).values()} == {"meta"}


@pytest.mark.parametrize(("batch", "multiple"), [([], 1), ([[[1]], []], 1), ([[[1]]], 0)])
def test_packing_refuses_nothing_to_pack(batch, multiple):
    with pytest.raises(ValueError, match=r"at least one|must be 1 or more"):
        pack_captions(batch, eos_id=0, pad_to_multiple=multiple)


def test_dataset_gives_all_captions_or_walks_round_them():
    captions = [[[10 * image + n] for n in range(5)] for image in range(3)] + [[[90]]]
    assert [CaptionDataset(captions)[i] for i in range(4)] == list(enumerate(captions))
    dataset = CaptionDataset(captions, captions_per_image=2, seed=1)
    shown = []
    for epoch in range(5):
        dataset.set_epoch(epoch)
        index, chosen = dataset[1]
        assert (index, len(chosen), dataset[3]) == (1, 2, (3, [[90]]))
        assert dataset[1][1] == chosen
        shown += [tokens[0] for tokens in chosen]
    assert len(set(shown[:4])) == 4  # nothing comes back before the others were shown
    assert sorted(shown) == sorted([10, 11, 12, 13, 14] * 2)  # five epochs of two: each caption twice
    assert dataset.lengths() == [4, 4, 4, 2]
    other = CaptionDataset(captions, captions_per_image=2, seed=1)
    other.set_epoch(4)
    assert [other[i] for i in range(4)] == [dataset[i] for i in range(4)]
    with pytest.raises(ValueError, match="--captions-per-image 0"):
        CaptionDataset(captions, captions_per_image=0)


def test_every_image_and_every_seed_has_a_caption_order_of_its_own():
    captions = [[[n] for n in range(5)]] * 20
    images = {str(CaptionDataset(captions, 4)[index][1]) for index in range(20)}
    seeds = {str(CaptionDataset(captions, 4, seed)[0][1]) for seed in range(20)}
    assert len(images) > 5 and len(seeds) > 5


def test_length_grouped_batches_cover_all_and_waste_little():
    lengths = np.random.default_rng(0).integers(20, 120, 1003).tolist()
    batches = length_grouped_batches(lengths, 16, seed=0, epoch=0)
    assert sorted(itertools.chain(*batches)) == list(range(1003))
    assert sorted(map(len, batches)) == [1003 % 16] + [16] * 62
    padding = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) / sum(lengths) - 1
    assert padding < 0.05  # about 0.6 in random order
    assert batches == length_grouped_batches(lengths, 16, seed=0, epoch=0)
    means = [np.mean([lengths[i] for i in batch]) for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4  # not from short to long
    contents = [{frozenset(b) for b in length_grouped_batches(lengths, 16, s, e)} for s, e in ((0, 0), (0, 1), (1, 0))]
    assert not contents[0] & contents[1] and not contents[0] & contents[2]
    assert length_grouped_batches([], 4, 0, 0) == []
    with pytest.raises(ValueError, match="--batch-size 0"):
        length_grouped_batches([1], 0, 0, 0)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_shuffled_captions_are_a_derangement(tmp_path, count):
    samples = [Sample(i, tmp_path / f"{i}.jpg", (f"caption {i}",)) for i in range(count)]
    for seed in range(5):
        dealt = shuffle_captions(samples, seed)
        assert [(s.image_id, s.path) for s in dealt] == [(s.image_id, s.path) for s in samples]
        assert sorted(s.captions for s in dealt) == sorted(s.captions for s in samples)
        assert all(new.captions != old.captions for new, old in zip(dealt, samples, strict=True))
        assert dealt == shuffle_captions(samples, seed)
    assert count < 50 or shuffle_captions(samples, 0) != shuffle_captions(samples, 1)


def test_one_image_has_no_other_to_deal_to(tmp_path):
    with pytest.raises(ValueError, match="1 image"):
        shuffle_captions([Sample(1, tmp_path / "a.jpg", ("a",))], 0)


# --------------------------------------------------------------------------------------------------- feature cache

SHAPE = (3, 4)
KEY = {"encoder": "vit", "weights": "abc"}


class Encoder:
    """Features that depend on the content of files only; counts its work and can fail at one call."""

    def __init__(self, fail_at=None):
        self.batches, self.fail_at = [], fail_at

    def __call__(self, paths):
        if len(self.batches) == self.fail_at:
            raise RuntimeError("killed")
        self.batches.append([path.name for path in paths])
        return torch.stack([features_of(path) for path in paths])

    @property
    def encoded(self):
        return list(itertools.chain(*self.batches))


def features_of(path):
    return torch.arange(12.0).reshape(SHAPE) + int(path.read_text())


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.jpg").write_text(str(100 * number))
    return sorted(folder.iterdir())


@pytest.fixture
def open_cache(tmp_path, paths):
    defaults = {"root": tmp_path / "cache", "key": KEY, "paths": paths, "shape": SHAPE, "batch_size": 4}
    return functools.partial(FeatureCache.open, **defaults)


def cache_folder(tmp_path):
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def assert_serves(cache, paths):
    assert len(cache) == len(paths)
    for i, path in enumerate(paths):
        assert torch.equal(cache[i].float(), features_of(path)), path


def test_cache_encodes_once_and_reuses(open_cache, paths):
    first, second = Encoder(), Encoder()
    cache = open_cache(encode=first)
    assert first.encoded == [path.name for path in paths] and list(map(len, first.batches)) == [4, 4, 2]
    assert_serves(cache, paths)
    backwards = open_cache(encode=second, paths=paths[::-1])
    assert second.batches == []
    assert_serves(backwards, paths[::-1])


def test_gather_gives_writable_copies(open_cache, paths):
    cache = open_cache(encode=Encoder())
    block = cache.gather(torch.tensor([7, 2, 2]))
    assert block.shape == (3, *SHAPE) and block.dtype == torch.float16
    assert torch.equal(block, torch.stack([cache[7], cache[2], cache[2]]))
    block += 1
    cache[7].zero_()
    assert_serves(cache, paths)
    with pytest.raises(IndexError):
        cache[10]


def test_float32_is_exact_and_apart_from_float16(open_cache, tmp_path):
    def thirds(batch):
        return torch.stack([features_of(path) / 3 for path in batch])

    assert open_cache(encode=thirds)[1].dtype == torch.float16
    cache = open_cache(encode=thirds, dtype=torch.float32)
    assert torch.equal(cache[1], (torch.arange(12.0).reshape(SHAPE) + 100) / 3)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_another_key_is_another_cache(open_cache, tmp_path):
    open_cache(encode=Encoder())
    encoder = Encoder()
    open_cache(encode=encoder, key={**KEY, "weights": "def"})
    assert len(encoder.encoded) == 10
    again = Encoder()
    open_cache(encode=again, key=dict(reversed(KEY.items())))  # the order of the key means nothing
    assert again.encoded == []
    key = json.loads(next((tmp_path / "cache").iterdir()).joinpath("key.json").read_text())
    assert key["key"]["encoder"] == "vit" and key["shape"] == [3, 4]


def test_changed_images_are_encoded_anew_and_copies_are_not(open_cache, paths):
    """A cache keyed by file name served the features of the old picture."""
    open_cache(encode=Encoder())
    paths[3].write_text("77")
    paths[5].write_text(paths[6].read_text())
    encoder = Encoder()
    cache = open_cache(encode=encoder)
    assert encoder.encoded == ["3.jpg"]
    assert_serves(cache, paths)


def test_identical_images_share_a_row(open_cache, paths, tmp_path):
    for path in paths[1:]:
        path.write_text("0")
    encoder = Encoder()
    cache = open_cache(encode=encoder)
    assert len(encoder.encoded) == 1
    assert_serves(cache, paths)
    assert (cache_folder(tmp_path) / "features.bin").stat().st_size == 3 * 4 * 2


def test_more_images_are_appended(open_cache, paths):
    small = open_cache(encode=Encoder(), paths=paths[:3])
    encoder = Encoder()
    assert_serves(open_cache(encode=encoder), paths)
    assert encoder.encoded == [path.name for path in paths[3:]]
    assert_serves(small, paths[:3])  # open while the file grew


def test_a_build_killed_half_way_goes_on(open_cache, paths):
    with pytest.raises(RuntimeError, match="killed"):
        open_cache(encode=Encoder(fail_at=2))
    encoder = Encoder()
    assert_serves(open_cache(encode=encoder), paths)
    assert encoder.encoded == ["8.jpg", "9.jpg"]


@pytest.mark.parametrize("file", ["features.bin", "rows.sha256"])
@pytest.mark.parametrize("written", [0.0, 0.4, 1.0])
def test_killed_at_any_write_never_serves_an_unwritten_row(open_cache, paths, monkeypatch, file, written):
    """A row must not be listed before it is on disk: the reader would get zeros or a neighbour's features."""
    append, calls = _append, []

    def killed(path, content):
        calls.append(path.name)
        if path.name == file and calls.count(file) == 2:
            append(path, content[: int(len(content) * written)])
            raise KeyboardInterrupt
        append(path, content)

    monkeypatch.setattr(feature_cache, "_append", killed)
    with pytest.raises(KeyboardInterrupt):
        open_cache(encode=Encoder())
    monkeypatch.setattr(feature_cache, "_append", append)
    encoder = Encoder()
    assert_serves(open_cache(encode=encoder), paths)
    kept, last = 10 - len(encoder.encoded), Encoder()
    open_cache(encode=last)
    assert last.encoded == []  # half a line in the listing does not spoil the next one
    assert kept >= 4 and (file == "features.bin" or written < 1 or kept == 8)


def damage_shorter(folder):
    with (folder / "features.bin").open("r+b") as file:
        file.truncate(100)


def damage_one_bit(folder):
    with (folder / "features.bin").open("r+b") as file:
        file.seek(100)
        bit = file.read(1)[0] ^ 1
        file.seek(100)
        file.write(bytes([bit]))


def damage_checksum(folder):
    listing = folder / "rows.sha256"
    listing.write_text(listing.read_text()[:-9] + "00000000\n")


def damage_lost_features(folder):
    (folder / "features.bin").unlink()


def damage_listing(folder):
    listing = folder / "rows.sha256"
    listing.write_text(listing.read_text().replace("\n", "z\n", 1))


def damage_double_listing(folder):
    listing = folder / "rows.sha256"
    first, _, *others = listing.read_text().splitlines(keepends=True)
    listing.write_text("".join([first, first, *others]))


def damage_lost_listing(folder):
    (folder / "rows.sha256").unlink()


def damage_key(folder):
    (folder / "key.json").write_text('{"key": "of another encoder"}')


def damage_key_syntax(folder):
    (folder / "key.json").write_text("{")


def damage_lost_key(folder):
    (folder / "key.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_one_bit,
        damage_checksum,
        damage_shorter,
        damage_lost_features,
        damage_listing,
        damage_double_listing,
        damage_lost_listing,
        damage_key,
        damage_key_syntax,
        damage_lost_key,
    ],
)
def test_damaged_or_stale_caches_are_rebuilt_with_a_warning(open_cache, paths, tmp_path, caplog, damage):
    open_cache(encode=Encoder())
    damage(cache_folder(tmp_path))
    encoder = Encoder()
    with caplog.at_level(logging.WARNING):
        cache = open_cache(encode=encoder)
    assert len(encoder.encoded) == 10
    assert_serves(cache, paths)
    assert "feature cache" in caplog.text
    last = Encoder()
    open_cache(encode=last)
    assert last.encoded == []


def test_a_healthy_cache_gives_no_warning(open_cache, caplog):
    with caplog.at_level(logging.INFO):
        open_cache(encode=Encoder())
        open_cache(encode=Encoder())
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    assert "10 of 10 images to encode" in caplog.messages[0] and "10 images encoded in" in caplog.messages[1]
    assert "0 of 10 images to encode" in caplog.messages[2]


def test_a_reader_keeps_its_features_while_the_cache_is_rebuilt(open_cache, paths, tmp_path):
    reader = open_cache(encode=Encoder())
    damage_key(cache_folder(tmp_path))
    open_cache(encode=lambda batch: torch.zeros(len(batch), *SHAPE))
    assert_serves(reader, paths)


def test_two_builders_at_once_share_the_work(open_cache, paths):
    encoder, caches = Encoder(), []
    threads = [
        threading.Thread(target=lambda: caches.append(open_cache(encode=encoder, progress=False))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(encoder.encoded) == [path.name for path in paths]
    assert len(caches) == 3
    for cache in caches:
        assert_serves(cache, paths)


@pytest.mark.parametrize("kept", [0, 3, 10])
def test_images_beyond_the_limit_are_encoded_when_asked_for(open_cache, paths, tmp_path, caplog, kept):
    encoder, row = Encoder(), 3 * 4 * 2
    cache = open_cache(encode=encoder, limit=kept * row + row - 1)
    assert len(encoder.encoded) == kept
    assert (cache_folder(tmp_path) / "features.bin").stat().st_size == kept * row
    assert ("beyond its limit" in caplog.text) == (kept < 10)
    for _ in range(2):
        assert torch.equal(cache.gather([9, 0, 4]), torch.stack([features_of(paths[i]).half() for i in (9, 0, 4)]))
    assert len(encoder.encoded) == kept + {0: 6, 3: 4, 10: 0}[kept]
    assert len(open_cache(encode=Encoder(), limit=0)) == 10  # what is there is used, whatever the limit
    whole = open_cache(encode=encoder)
    assert_serves(whole, paths)


def test_disk_space_is_checked_before_encoding(open_cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * 3 * 4 * 2 - 1))
    encoder = Encoder()
    with pytest.raises(ValueError, match=r"features of 10 images need .* --cache"):
        open_cache(encode=encoder)
    assert encoder.batches == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * 3 * 4 * 2))
    assert len(open_cache(encode=encoder)) == 10


def test_features_out_of_range_or_shape_are_refused(open_cache, paths):
    """fp16 ends at 65504: larger numbers became inf in the cache, and training NaN hours later."""
    paths[5].write_text("70000")
    with pytest.raises(ValueError, match=r"float16: .*5\.jpg; cache in float32"):
        open_cache(encode=Encoder())
    assert_serves(open_cache(encode=Encoder(), dtype=torch.float32), paths)
    with pytest.raises(ValueError, match=r"\(4, 3, 4\), not \(4, 2, 4\)"):
        open_cache(encode=Encoder(), shape=(2, 4))


def test_bad_arguments_are_refused(open_cache, tmp_path):
    with pytest.raises(ValueError, match="at least one image"):
        open_cache(encode=Encoder(), paths=[])
    with pytest.raises(ValueError, match="batch_size is 0"):
        open_cache(encode=Encoder(), batch_size=0)
    with pytest.raises(ValueError, match="bfloat16"):
        open_cache(encode=Encoder(), dtype=torch.bfloat16)
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        open_cache(encode=Encoder(), paths=[tmp_path / "gone.jpg"])


def test_a_pickled_cache_maps_the_file_again(open_cache, paths):
    """Pickling a numpy memmap copies the whole file into every data-loader worker."""
    cache = open_cache(encode=Encoder(), dtype=torch.float32)
    pickled = pickle.dumps(cache)
    assert_serves(pickle.loads(pickled), paths)
    assert cache[3].numpy().tobytes() not in pickled


# ---- JPEG drafts -----------------------------------------------------------------------------------------------------


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
def test_a_draft_gives_nearly_the_pixels_of_the_whole(tmp_path, kind, quality):
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


def test_other_formats_are_read_whole(tmp_path):
    Image.new("RGB", (800, 800), "red").save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 100).size == (800, 800)
