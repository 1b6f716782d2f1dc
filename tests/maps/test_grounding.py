"""grounding.py: boxes and words from annotations, and measures on maps whose scores are known."""

import copy
import json

import numpy as np
import pytest

from captioning.maps.attention import MapSpec
from captioning.maps.grounding import Score, baselines, coverage, inside, load_grounded_captions, table

WINDOW, GRID = (0.0, 0.0, 80.0, 60.0), (6, 8)  # cells of 10 pixels


def planted(row, column):
    grid = np.full(GRID, 0.01)
    grid[row, column] = 1.0
    return grid


def test_coverage_is_the_share_of_each_cell():
    covered = coverage([(10, 20, 20, 10)], WINDOW, GRID)
    assert covered.sum() == 2
    assert covered[2, 1] == covered[2, 2] == 1
    assert coverage([(10, 20, 5, 10)], WINDOW, GRID)[2, 1] == 0.5
    twice = coverage([(10, 20, 20, 10), (10, 20, 20, 10)], WINDOW, GRID)
    assert np.array_equal(twice, covered)


def test_boxes_outside_the_crop_do_not_count():
    assert coverage([(0, 0, 10, 10)], (40, 30, 80, 60), GRID).sum() == 0


def test_pointing_needs_the_peak_inside_a_box_of_the_right_orientation():
    boxes = [(10, 20, 20, 10)]
    right, turned = Score(), Score()
    right.add(planted(2, 1), boxes, coverage(boxes, WINDOW, GRID), WINDOW)
    turned.add(planted(1, 2), boxes, coverage(boxes, WINDOW, GRID), WINDOW)
    assert (right.pointing, turned.pointing) == (1, 0)


def test_points_on_the_border_of_a_box_are_inside():
    found = inside([(10, 20, 20, 10), (0, 0, 1, 1)], np.array([0, 10, 30, 31]), np.array([1, 30]))
    assert found.tolist() == [[True, False, False, False], [False, True, True, False]]


def test_measures_of_a_perfect_and_of_a_flat_map():
    boxes = [(10, 20, 20, 10)]
    covered = coverage(boxes, WINDOW, GRID)
    perfect, flat, wrong = Score(), Score(), Score()
    perfect.add(covered, boxes, covered, WINDOW)
    flat.add(np.ones(GRID), boxes, covered, WINDOW)
    wrong.add(planted(5, 7), boxes, covered, WINDOW)
    assert (perfect.pointing, perfect.iou) == (1.0, 1.0)
    assert perfect.mass_ratio == pytest.approx(48 / 2)
    assert flat.mass_ratio == pytest.approx(1.0)
    assert flat.iou == pytest.approx(2 / 48)
    assert (wrong.pointing, wrong.iou) == (0.0, 0.0)


def test_scores_are_means_over_words():
    boxes = [(10, 20, 10, 10)]
    covered = coverage(boxes, WINDOW, GRID)
    score = Score()
    for place in ((2, 1), (0, 0), (2, 1), (5, 5)):
        score.add(planted(*place), boxes, covered, WINDOW)
    assert score.pointing == 0.5


def test_baselines_know_nothing_of_the_word():
    one, two = [(30, 20, 20, 20)], [(35, 25, 10, 10)]
    found = baselines([(boxes, WINDOW) for boxes in (one, two)], GRID)
    assert found["centre"] == 1.0
    assert found["mean image"] >= 0.5
    assert found["random"] == pytest.approx((4 + 4) / 48 / 2)  # borders count: 4 centres each


def test_the_table_has_the_best_spec_first_and_the_baselines_last():
    boxes, specs = [(10, 20, 10, 10)], [MapSpec("raw"), MapSpec("grad")]
    covered = coverage(boxes, WINDOW, GRID)
    scores = {spec: Score() for spec in specs}
    scores[specs[0]].add(planted(0, 0), boxes, covered, WINDOW)
    scores[specs[1]].add(planted(2, 1), boxes, covered, WINDOW)
    rows = table(scores, {"centre": 0.25}, {specs[0]: "default"})
    assert [(row.method, row.pointing, row.note) for row in rows] == [
        ("grad", 1.0, ""),
        ("raw", 0.0, "default"),
        ("centre", 0.25, "baseline"),
    ]
    assert rows[0].mass_ratio == scores[specs[1]].mass_ratio and rows[2].iou is None


# -------------------------------------------------------------------------------------------------------- annotations


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
