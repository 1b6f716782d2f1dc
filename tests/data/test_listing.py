"""listing.py: which files of a folder are images, by which keys, and what is passed over."""

import os
import sys
import unicodedata
from types import SimpleNamespace

import pytest
from PIL import Image

from captioning.data import images as images_module
from captioning.data import listing
from captioning.data.images import IMAGE_SUFFIXES, formats, load_image, read_suffixes
from captioning.data.listing import images_in, key_of, list_images, on_disk

COMPOSED, SPLIT = (unicodedata.normalize(form, "café ガ") for form in ("NFC", "NFD"))


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), "red").save(path)
    return path


def test_list_images_takes_any_letter_case_sorted_and_not_recursive(tmp_path):
    for name in ("b.JPG", "a.png", "d.WebP", "c.jpeg", "sub/e.jpg"):
        save_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves beside it")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG", "c.jpeg", "d.WebP"]


def test_a_dangling_link_is_not_dropped_silently(tmp_path):
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


def test_a_name_that_is_not_valid_unicode_is_refused_before_any_work(tmp_path):
    """It failed when the captions were written, after all the work."""
    picture = save_image(tmp_path / "a.png")
    try:
        picture.rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes valid Unicode only")
    with pytest.raises(ValueError, match=r"not valid Unicode.*rename"):
        list_images(tmp_path)


def test_every_suffix_that_pillow_reads_is_taken_and_its_picture_read(tmp_path):
    """.jfif, .bmp, .gif and .tif were left out without a word."""
    names = [
        "a.jfif",
        "b.bmp",
        "c.gif",
        "d.tif",
        "e.TIFF",
        "f.jp2",
        "g.jpe",
        "h.ppm",
        "i.tga",
        "j.ico",
        "k.mpo",
        "l.qoi",
    ]
    for name in names:
        save_image(tmp_path / name)
    found = images_in(tmp_path)
    assert list(found) == list("abcdefghijkl")
    assert all(load_image(path).mode == "RGB" for path in found.values())
    heif = {".heic", ".heics", ".heif", ".heifs", ".hif"}
    registered = {
        suffix for suffix, name in Image.registered_extensions().items() if name in formats() or name == "MPO"
    }
    assert read_suffixes() | heif == registered | heif == IMAGE_SUFFIXES, (
        "a suffix that this Pillow reads is not listed"
    )
    assert read_suffixes() >= {".jpg", ".jpeg", ".png", ".webp", ".apng", ".dds", ".psd"}
    assert not read_suffixes() & {".pdf", ".eps", ".ps", ".mpg", ".h5", ".wmf", ".txt", ".json", ".tar", ".zip", ""}


def test_heic_is_taken_where_pillow_heif_is_installed(monkeypatch):
    known = {suffix: name for suffix, name in Image.EXTENSION.items() if name != "HEIF"}
    monkeypatch.setattr(Image, "EXTENSION", known)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))

    def register():
        Image.register_open("HEIF", lambda *_: None, lambda start: False)
        Image.register_extensions("HEIF", [".heic"])

    functions = (images_module.formats, images_module.read_suffixes)
    for installed in (None, SimpleNamespace(register_heif_opener=register)):
        monkeypatch.setitem(sys.modules, "pillow_heif", installed)
        for function in functions:
            function.cache_clear()
        assert (".heic" in read_suffixes()) == (installed is not None)
    for function in functions:
        function.cache_clear()


def test_what_is_passed_over_is_counted_in_one_line(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(listing, "read_suffixes", lambda: {".png"})  # as without pillow-heif
    for name in ("a.png", "sub/b.png"):
        save_image(tmp_path / name)
    (tmp_path / "other").mkdir()
    for name in ("notes.txt", "x.HEIC", "clip.mp4", "data.tar", ".DS_Store", "._a.png", "no suffix"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".git").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.png"]
    (line,) = caplog.messages
    assert line == (
        f"{tmp_path}: 5 files and 2 subfolders passed over: clip.mp4, data.tar, no suffix, notes.txt, other/ and 2 "
        "more; --recursive takes subfolders; `pip install -e '.[heic]'` in the scripts' folder, and .heic is read; "
        "tars and zips are given by name, as 'DIR/*.tar'"
    )
    caplog.clear()
    assert list(images_in(tmp_path, recursive=True)) == ["a", "sub/b"]
    assert "5 files passed over: clip.mp4" in caplog.text
    caplog.clear()
    list_images(save_image(tmp_path / "only" / "a.png").parent)
    assert not caplog.records


def test_a_folder_without_images_says_what_is_there_instead(tmp_path):
    save_image(tmp_path / "train" / "a.png")
    (tmp_path / "val.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"no image here.*1 file and 1 subfolder passed over: train/, val\.json; --recursive"
    ):
        list_images(tmp_path)


def test_subfolders_give_keys_like_those_of_a_tar(tmp_path):
    for name in ("b.png", "a/x.jpg", "a/b/x.png", "a.b/x.webp", "A/x.gif"):
        save_image(tmp_path / name)
    save_image(tmp_path / "a" / ".hidden" / "no.png")
    found = images_in(tmp_path, recursive=True)
    assert list(found) == ["A/x", "a.b/x", "a/b/x", "a/x", "b"]
    assert found["a/b/x"] == tmp_path / "a" / "b" / "x.png"
    save_image(tmp_path / "a" / "x.png")
    with pytest.raises(ValueError, match=r"x\.jpg and x\.png share the name 'a/x'"):
        images_in(tmp_path, recursive=True)


def test_links_between_folders_are_followed_and_end(tmp_path):
    save_image(tmp_path / "here" / "a.png")
    save_image(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "self.png").symlink_to("self.png")
    found = images_in(tmp_path / "here", recursive=True)
    assert {"a", "link/b", "self"} <= found.keys()
    assert len(found) < 10


def test_a_name_is_the_same_in_both_forms_of_unicode(tmp_path):
    """macOS writes é as two characters; annotations made elsewhere have one."""
    save_image(tmp_path / f"{SPLIT}.png")
    assert list(images_in(tmp_path)) == [COMPOSED] == [key_of(f"{COMPOSED}.jpg")]
    save_image(tmp_path / SPLIT / "x.png")
    assert list(images_in(tmp_path, recursive=True)) == [f"{COMPOSED}", f"{COMPOSED}/x"]
    assert on_disk(tmp_path / COMPOSED / "x.png") == tmp_path / SPLIT / "x.png"
    assert on_disk(tmp_path / f"{COMPOSED}.png") == tmp_path / f"{SPLIT}.png"
    assert on_disk(tmp_path / f"{COMPOSED}.jpg").name == f"{COMPOSED}.jpg"
    assert on_disk(tmp_path / "é" / "x.png") == tmp_path / "é" / "x.png"
    save_image(tmp_path / f"{COMPOSED}.jpg")
    with pytest.raises(ValueError, match="share the name"):
        images_in(tmp_path)
