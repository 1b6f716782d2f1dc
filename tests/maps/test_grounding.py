"""grounding.py: boxes and words from annotations."""

import copy
import json

import pytest

from captioning.maps.grounding import load_grounded_captions


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def captions(*texts, **extra):
    return {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 100, "height": 80}],
        "annotations": [{"id": n, "image_id": 1, "caption": text} for n, text in enumerate(texts)],
        **extra,
    }


def test_the_micro_world_carries_its_own_boxes(tiny_data):
    samples = load_grounded_captions(tiny_data / "val.json", tiny_data / "images" / "val")
    assert len(samples) == 8
    content = json.loads((tiny_data / "val.json").read_text())
    boxes = {tuple(o["bbox"]) for o in content["objects"]}
    for sample in samples:
        assert sample.path.is_file()
        assert all(set(m.boxes) <= boxes for m in sample.mentions)
        assert all(m.word < len(sample.caption.split()) for m in sample.mentions)


def test_coco_instances_are_found_by_their_categorys_name(tmp_path):
    text = write(tmp_path / "c.json", captions("A thing.", "Two dogs chase a bus, and a man."))
    instances = {
        "images": [],
        "categories": [{"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"image_id": 1, "category_id": 18, "bbox": [0, 0, 10, 10]},
            {"image_id": 1, "category_id": 18, "bbox": [50, 0, 10, 10]},
            {"image_id": 1, "category_id": 6, "bbox": [20, 20, 30, 30]},
        ],
    }
    (sample,) = load_grounded_captions(text, tmp_path, write(tmp_path / "i.json", instances))
    assert sample.caption.startswith("Two dogs")
    assert {m.word: len(m.boxes) for m in sample.mentions} == {1: 2, 4: 1}


def test_bad_annotations_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_grounded_captions(tmp_path / "none.json", tmp_path)
    with pytest.raises(ValueError, match="needs a list 'images'"):
        load_grounded_captions(write(tmp_path / "a.json", {}), tmp_path)
    with pytest.raises(ValueError, match="no word of a caption names a box"):
        load_grounded_captions(write(tmp_path / "b.json", captions("A dog.")), tmp_path)
    content = captions("A dog.", objects=[{"id": 0, "image_id": 1, "bbox": [90, 0, 30, 10]}])
    content["annotations"][0]["mentions"] = [{"word": 1, "objects": [0], "role": "noun"}]
    with pytest.raises(ValueError, match="outside or is empty"):
        load_grounded_captions(write(tmp_path / "d.json", content), tmp_path)


MENTIONED = {
    "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 40}],
    "annotations": [
        {"id": 1, "image_id": 1, "caption": "a red bike", "mentions": [{"word": 2, "role": "noun", "objects": [7]}]}
    ],
    "objects": [{"id": 7, "image_id": 1, "bbox": [1, 2, 3, 4]}],
}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("images", 0, "id"), [], r"images\[0\] needs 'id' as an integer"),
        (("images", 0, "file_name"), None, r"images\[0\] needs 'file_name'"),
        (("annotations", 0, "caption"), 3, r"annotations\[0\] needs 'caption'"),
        (("annotations", 0, "mentions"), 3, "mentions of another form"),
        (("annotations", 0, "mentions", 0, "word"), "bike", "mentions of another form"),
        (("annotations", 0, "mentions", 0, "word"), 3, "a word that it lacks"),
        (("annotations", 0, "mentions", 0, "objects"), [8], "mentions of another form"),
        (("annotations", 0, "mentions", 0, "objects"), [], "or no object"),
        (("objects",), {}, "needs a list 'objects'"),
        (("objects", 0, "bbox"), [1, 2, 3], r"objects\[0\] needs 'bbox' as four numbers"),
        (("objects", 0, "bbox"), [1, 2, 3, "4"], "four numbers"),
    ],
)
def test_annotations_of_another_form_are_refused_by_place(tmp_path, place, value, message):
    """These ended in KeyError and TypeError, some of them after minutes of work."""
    content = copy.deepcopy(MENTIONED)
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(content))
    assert load_grounded_captions(file, tmp_path)[0].mentions[0].word == 2
    spot = content
    for step in place[:-1]:
        spot = spot[step]
    spot[place[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_grounded_captions(file, tmp_path)


def test_other_kinds_of_words_keep_their_boxes_and_may_have_none(tmp_path):
    content = copy.deepcopy(MENTIONED)
    content["annotations"][0]["mentions"] += [
        {"word": 1, "role": "colour", "objects": [7]},
        {"word": 0, "role": "place", "objects": []},
    ]
    (sample,) = load_grounded_captions(write(tmp_path / "a.json", content), tmp_path)
    assert [(m.word, m.kind, len(m.boxes)) for m in sample.mentions] == [
        (2, "thing", 1),
        (1, "colour", 1),
        (0, "place", 0),
    ]
    content["annotations"][0]["mentions"][1]["role"] = None
    with pytest.raises(ValueError, match="each needs word, role and objects"):
        load_grounded_captions(write(tmp_path / "b.json", content), tmp_path)


def test_the_caption_that_names_the_most_things_is_measured(tmp_path):
    content = copy.deepcopy(MENTIONED)
    colours = [{"word": n, "role": "colour", "objects": [7]} for n in range(2)]
    content["annotations"].append({"id": 2, "image_id": 1, "caption": "red and blue", "mentions": colours})
    (sample,) = load_grounded_captions(write(tmp_path / "a.json", content), tmp_path)
    assert sample.caption == "a red bike"


def instances(image_id):
    box = {"image_id": image_id, "category_id": 18, "bbox": [0, 0, 10, 10]}
    return {"images": [], "categories": [{"id": 18, "name": "dog"}], "annotations": [box]}


def test_boxes_of_other_images_are_named_as_such(tmp_path):
    """They read as captions that name nothing."""
    text, boxes = write(tmp_path / "c.json", captions("A dog.")), write(tmp_path / "i.json", instances(42))
    with pytest.raises(ValueError, match=r"--boxes .*i\.json: its boxes are of other images, first 42; give those of"):
        load_grounded_captions(text, tmp_path, boxes)


def test_images_without_a_word_that_has_a_box_are_counted(tmp_path, caplog):
    content = captions("A dog.")
    content["images"].append({"id": 2, "file_name": "2.jpg"})
    content["annotations"].append({"id": 9, "image_id": 2, "caption": "A cat."})
    text, boxes = write(tmp_path / "c.json", content), write(tmp_path / "i.json", instances(1))
    assert len(load_grounded_captions(text, tmp_path, boxes)) == 1
    assert "1 of 2 images have no word with a box: 2.jpg" in caplog.text
