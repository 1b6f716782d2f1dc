"""names.py: which image a name or a number means, and what could mean two."""

import json
import unicodedata

import pytest

from captioning.data.annotations import Annotations, find_images, load_annotations, load_predictions
from captioning.data.names import keys_of, number_of, without_suffix


def annotations(names, ids=()):
    keys = keys_of("val.json", names)
    return Annotations(
        {key: ["x"] for key in keys}, dict(zip(keys, names, strict=True)), dict(zip(keys, ids, strict=False))
    )


def predicted(tmp_path, content, *of, names_are="auto"):
    (tmp_path / "pred.json").write_text(json.dumps(content))
    return load_predictions(tmp_path / "pred.json", annotations(*of), names_are)


def test_a_key_is_the_name_without_folder_and_suffix_where_that_is_unique():
    assert keys_of("f", ["val/a.jpg", "val/b.c.PNG", "v1.0", "d"]) == ["a", "b.c", "v1.0", "d"]
    assert keys_of("f", ["a/1.jpg", "b/1.jpg", "2.png"]) == ["a/1", "b/1", "2"]
    for names in (
        ["a.jpg", "a.png"],
        ["x/a.jpg", "b.png", "x/a.png"],
        ["é.jpg", unicodedata.normalize("NFD", "é.jpg")],
    ):
        with pytest.raises(ValueError, match=r"^val\.json: \S+ and \S+ share the name '.*' without suffix"):
            keys_of("val.json", names)


def test_suffixes_are_those_of_images_and_numbers_stand_at_the_end():
    assert [without_suffix(name) for name in ("a.JPEG", "a.b", "a.b.png", ".jpg", "a")] == [
        "a",
        "a.b",
        "a.b",
        ".jpg",
        "a",
    ]
    names = ("COCO_val2014_000000000042.jpg", "7", "im0.png", "v1.5", "a", "0a.jpg", "img-12.webp", "9" * 30)
    assert [number_of(name) for name in names] == [42, 7, 0, 5, None, None, 12, None]


def test_a_name_is_found_by_the_longest_end_of_its_path(tmp_path):
    names = ["images/a/1.jpg", "images/b/1.jpg", "2.jpg"]
    found = predicted(tmp_path, {"shard/a/1": "one", "/data/images/b/1.png": "two", "./2.jpg": "three"}, names)
    assert found == {"images/a/1": "one", "images/b/1": "two", "2": "three"}
    with pytest.raises(
        ValueError, match=r"pred\.json: '1' could be images/a/1\.jpg, images/b/1\.jpg; give the folder too"
    ):
        predicted(tmp_path, {"1": "one"}, names)
    assert predicted(tmp_path, {"1": "x", "b/1": "y"}, ["1.jpg", "b/1.jpg"]) == {"1": "x", "b/1": "y"}, (
        "exact comes first"
    )


def test_dots_in_names_are_no_suffixes(tmp_path):
    assert predicted(tmp_path, {"v1.0": "x", "v1.1.jpg": "y"}, ["v1.0.jpg", "v1.1.png"]) == {"v1.0": "x", "v1.1": "y"}


@pytest.mark.parametrize(("there", "said"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_form_of_unicode_does_not_matter(tmp_path, there, said):
    name, other = (unicodedata.normalize(form, "Übung é.jpg") for form in (there, said))
    key = unicodedata.normalize("NFC", "Übung é")
    assert predicted(tmp_path, {other: "x"}, [name]) == {key: "x"}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / other).touch()
    assert find_images(annotations([name]), tmp_path / "images") == {key: tmp_path / "images" / other}


def test_two_predictions_of_one_image_and_two_images_of_one_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'a' and 'val/a\.jpg' are both 'a'; remove one"):
        predicted(tmp_path, {"a": "x", "val/a.jpg": "x"}, ["a.jpg"])
    with pytest.raises(ValueError, match=r"pred\.json: '7' must have one caption, not 2"):
        predicted(tmp_path, [{"image_id": 7, "caption": "x"}] * 2, ["a.jpg"], [7])
    records = [
        {"file_name": "a.jpg", "image_id": 3, "caption": "x"},
        {"file_name": "b.jpg", "image_id": 3, "caption": "y"},
    ]
    (tmp_path / "val.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"val\.json: a and b have the same id 3"):
        load_annotations(tmp_path / "val.json")


def test_unknown_images_stay_as_they_are_called(tmp_path):
    assert predicted(tmp_path, {"a": "x", "e1.png": "y", "9": "z"}, ["a.jpg"], [1]) == {
        "a": "x",
        "e1.png": "y",
        "9": "z",
    }
    assert predicted(tmp_path, {"2": "x"}, ["2.jpg"], [1], names_are="ids") == {"id 2": "x"}


MIXED = (["1.jpg", "2.jpg"], [2, 1])  # as where ids were dealt out in another order than names


def test_a_text_that_could_be_name_or_id_is_refused_until_said_which(tmp_path):
    message = r"pred\.json: '1' could be the id of 2\.jpg and the name of 1\.jpg; say which by --pred-keys"
    for content in ({"1": "one", "2": "two"}, [{"image_id": "1", "caption": "one"}], {"1": "one", "5": "five"}):
        with pytest.raises(ValueError, match=message):
            predicted(tmp_path, content, *MIXED)
    both = {"1": "one", "2": "two"}
    assert predicted(tmp_path, both, *MIXED, names_are="names") == both
    assert predicted(tmp_path, both, *MIXED, names_are="ids") == {"1": "two", "2": "one"}
    assert predicted(tmp_path, {"1.jpg": "one", "2": "two"}, ["1.jpg", "2.jpg"], [8, 9]) == both


def test_whichever_makes_sense_of_all_images_counts(tmp_path):
    """Names 1 to 3 beside ids 0 to 2, and the other way round."""
    assert predicted(tmp_path, {"1": "x", "2": "y", "3": "z"}, ["1.jpg", "2.jpg", "3.jpg"], [0, 1, 2]).keys() == {
        "1",
        "2",
        "3",
    }
    found = predicted(tmp_path, {"0": "x", "1": "y", "2": "z"}, ["1.jpg", "2.jpg", "3.jpg"], [0, 1, 2])
    assert found == {"1": "x", "2": "y", "3": "z"}


def test_a_number_is_an_id_where_there_are_ids_and_else_a_name(tmp_path):
    numbers = [{"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "two"}]
    assert predicted(tmp_path, numbers, *MIXED) == {"2": "one", "1": "two"}
    assert predicted(tmp_path, numbers, ["1.jpg", "2.jpg"]) == {"1": "one", "2": "two"}


def test_ids_are_the_ends_of_names_where_the_file_has_none(tmp_path):
    (tmp_path / "val.json").write_text(
        json.dumps({"COCO_val2014_000000000042.jpg": ["x"], "COCO_val2014_000000000073": ["y"]})
    )
    (tmp_path / "pred.json").write_text(
        json.dumps([{"image_id": 73, "caption": "b"}, {"image_id": 42, "caption": "a"}])
    )
    found = load_predictions(tmp_path / "pred.json", load_annotations(tmp_path / "val.json"))
    assert found == {"COCO_val2014_000000000073": "b", "COCO_val2014_000000000042": "a"}
    (tmp_path / "val.json").write_text(json.dumps({"a_1": ["x"], "b_1": ["y"]}))
    assert load_annotations(tmp_path / "val.json").ids == {}


def test_an_image_with_a_number_alone_is_the_picture_whose_name_ends_in_it(tmp_path):
    for name in ("COCO_val2014_000000000042.jpg", "000000000073.png", "notes_42.txt"):
        (tmp_path / name).touch()
    paths = find_images(annotations(["42", "73"]), tmp_path)
    assert [path.name for path in paths.values()] == ["COCO_val2014_000000000042.jpg", "000000000073.png"]
    (tmp_path / "x_42.jpg").touch()
    with pytest.raises(
        ValueError, match=r"42 is not there; COCO_val2014_000000000042\.jpg and x_42\.jpg could be meant"
    ):
        find_images(annotations(["42"]), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images are not there \(44\)"):
        find_images(annotations(["44"]), tmp_path)
