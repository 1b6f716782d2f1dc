"""data/annotations.py, what scoring takes: references and predictions that are wrong, missing, extra, repeated."""

import json
import re

import pytest
from PIL import Image
from scoring_examples import REFERENCES, annotation_content

from captioning.data.annotations import (
    Annotations,
    check_keys,
    find_images,
    load_annotations,
    load_predictions,
    load_references,
)


@pytest.mark.parametrize(("predicted", "message"), [("a", "1 missing .*\\(b\\)"), ("abc", "1 extra .*\\(c\\)")])
def test_one_missing_or_one_extra_prediction_is_enough(predicted, message):
    with pytest.raises(ValueError, match=message):
        check_keys({"a": ["x"], "b": ["y"]}, dict.fromkeys(predicted, "x"))


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


def changed(name, index, **fields):
    content = annotation_content()
    content[name][index] = {**content[name][index], **fields}
    return content


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "holds no image"),
        (without(annotation_content(), "images"), "needs a list 'images'"),
        (without(annotation_content(), "annotations"), "needs a list 'annotations'"),
        (changed("images", 1, file_name=7), "images[1] needs 'file_name' as non-empty text"),
        (changed("images", 1, id="x"), "images[1] needs 'id' as an integer"),
        (changed("annotations", 2, caption=None), "annotations[2] needs 'caption' as non-empty text"),
        (changed("annotations", 2, image_id=5), "captions of image ids that 'images' does not list: 5"),
        (changed("annotations", 2, caption=" \n"), "annotations[2] needs 'caption' as non-empty text"),
        (
            changed("annotations", 2, caption="x \ud83d"),
            r"non-empty text in valid Unicode, not 'x \ud",
        ),
        (changed("images", 1, file_name="a.jpg"), "a.png and a.jpg share the name 'a' without suffix"),
        (changed("images", 1, id=100), "two images have the id 100"),
        (annotation_content({**REFERENCES, "e": []}), "1 of 5 images have no caption: e"),
        ({"images": [], "annotations": []}, "needs a list 'images'"),
        # padding of distributed runs repeats records, and CIDEr would count them twice
        (changed("annotations", 0, id=0), "two captions have the id 0"),
        # found by mutating files at random: it ended in a TypeError, unhashable
        (changed("annotations", 0, id=[1]), "one of the captions has the id [1], which is neither number nor text"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, annotations, message):
    file = tmp_path / "val.json"
    file.write_text(json.dumps(annotations))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: .*{re.escape(message)}"):
        load_annotations(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["a caption"]', "record 1 must be an object with image and caption, not 'a caption'"),
        ('{"a": ["a caption", "another"]}', "'a' must have one caption, not 2"),
        ('{"a": []}', "'a' must have one caption, not 0"),
        ('{"a": 5}', "'a' must map to one caption (a string), not int"),
        ('{"a": {"b": "a caption"}}', "'a' must map to one caption (a string), not dict"),
        ('{"a": "x", "b": "y", "a": "z"}', "the key 'a' occurs twice"),
        ('{"a": "\\ud83d"}', "'a' holds half a surrogate pair"),
        ('{"a": ', "Expecting value"),
    ],
)
def test_wrong_predictions_are_named(tmp_path, text, message):
    file = tmp_path / "pred.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: .*{re.escape(message)}"):
        load_predictions(file)


def test_references_keep_their_images_and_their_order(tmp_path):
    (tmp_path / "val.json").write_text(json.dumps(annotation_content()))
    expected = {stem: captions[::-1] for stem, captions in REFERENCES.items()}
    assert load_references(tmp_path / "val.json") == expected


def test_two_images_that_could_be_meant_are_refused(tmp_path):
    for suffix in ("png", "webp"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match=r"a\.jpg is not there; a\.png and a\.webp could be meant"):
        find_images(Annotations({"a": ["x"]}, {"a": "a.jpg"}), tmp_path)
