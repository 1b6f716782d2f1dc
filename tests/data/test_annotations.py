"""Caption files: bad ones are refused with what is wrong, before any work."""

import json

import pytest

from captioning.data.annotations import Annotations, Sample, load_annotations, load_split


def coco(images=((7, "a.jpg"), (3, "b.png")), captions=((7, "a dog"), (3, "a cat"), (7, "one dog"))):
    return {
        "images": [{"id": i, "file_name": name} for i, name in images],
        "annotations": [{"id": 100 + n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)],
    }


@pytest.fixture
def split(tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / "images" / "val").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "val" / name).touch()
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
    references = {"a": [" a  dog", "one dog"], "b": ["a cat"]}
    assert found == Annotations(references, {"a": "a.jpg", "b": "b.png"}, {"a": 7, "b": 3})


def changed(section, number, **fields):
    content = coco()
    content[section][number].update(fields)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "holds no image"),
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
    with pytest.raises(ValueError, match=r"val\.json.*not a text file"):
        load_split(split, "val")
