"""comparison.py: which specs are compared, on which words, and the tables made of every word's measures."""

import csv
import logging

import numpy as np
import pytest

from captioning.maps.attention import MapSpec
from captioning.maps.comparison import (
    Measured,
    Row,
    Word,
    best_of_each_method,
    measure,
    parse_specs,
    table,
    with_answers,
    write_tables,
)
from captioning.maps.explainers import specs_to_compare
from captioning.maps.faithfulness import Asked, Faithfulness
from captioning.maps.grounding import GroundedCaption, Mention
from captioning.maps.measures import coverage, measure_map

WINDOW, GRID = (0.0, 0.0, 80.0, 60.0), (6, 8)  # cells of 10 pixels
BOX = (10, 20, 10, 10)
RAW, GRAD = MapSpec("raw"), MapSpec("grad")


def planted(row, column):
    grid = np.full(GRID, 0.01)
    grid[row, column] = 1.0
    return measure_map(grid, [BOX], coverage([BOX], WINDOW, GRID), WINDOW)


@pytest.fixture
def found():
    """Two images with a thing and a colour each: raw misses all, grad finds the things."""
    words = [Word(f"{n}.png", at, text, kind, 1 / 48) for n in (1, 2) for at, text, kind in COLOURED_THING]
    right, wrong = planted(2, 1), planted(0, 0)
    return Measured(words, {RAW: [wrong] * 4, GRAD: [right, wrong] * 2}, {GRID: [right] * 4}, {"centre": 0.25}, 2)


COLOURED_THING = ((2, "bike", "thing"), (1, "red", "colour"))


def test_the_table_has_the_best_spec_first_and_ceiling_and_baselines_last(found):
    rows = table(found, {RAW: "default"}, RAW)
    assert [(row.method, row.pointing, row.note) for row in rows] == [
        ("grad", 1.0, ""),
        ("raw", 0.0, "default"),
        ("the boxes, 6 x 8", 1.0, "ceiling"),
        ("centre", 0.25, "baseline"),
    ]
    assert (rows[0].kind, rows[0].words) == ("thing", 2)
    assert (rows[0].pointing_low, rows[0].pointing_high, rows[0].iou) == (1, 1, pytest.approx(1))
    assert rows[0].p_pointing == pytest.approx(0.5, abs=0.1)  # two images: half of all signs are as far from 0
    assert rows[1].p_pointing is None and rows[3].iou is None


def test_other_kinds_of_words_have_tables_of_their_own(found):
    assert found.kinds() == ["thing", "colour"]
    assert {(row.method, row.pointing, row.kind) for row in table(found, {}, RAW, "colour")} == {
        ("raw", 0.0, "colour"),
        ("grad", 0.0, "colour"),
    }


def test_one_row_of_each_method_is_printed_and_all_that_have_a_note():
    names = [("grad", "1", ""), ("raw", "1", ""), ("grad", "2", ""), ("raw", "2", "report"), ("raw", "3", "")]
    rows = [Row(method, layers, note=note) for method, layers, note in names]
    assert best_of_each_method(rows) == [rows[0], rows[1], rows[3]]


def test_answers_are_means_over_words_with_intervals_and_tests_over_images(found):
    def answers(spec, kind, *deletions):
        return [
            Asked(f"{n}.png", 0, "a", kind, spec, Faithfulness(value, 1 - value, np.nan, 0.5))
            for n, value in enumerate(deletions)
        ]

    found.floor = {"random": 0.1}
    asked = [*answers(GRAD, "thing", 0.1, 0.3), *answers(RAW, "thing", 0.2, 0.4), *answers(None, "thing", 0.9, 0.9)]
    grad, raw, ceiling, random = with_answers(table(found, {}, RAW), asked, RAW)
    assert (grad.deletion, grad.insertion, grad.random_layers, grad.asked) == (
        pytest.approx(0.2),
        pytest.approx(0.8),
        None,
        2,
    )
    assert (grad.deletion_low, grad.deletion_high) == (pytest.approx(0.1), pytest.approx(0.3))
    assert grad.p_deletion == pytest.approx(0.5, abs=0.1) and raw.p_deletion is None
    assert random.deletion == 0.9 and ceiling.deletion is None and grad.pointing == 1
    assert with_answers([grad], answers(GRAD, "colour", 0.5), RAW) == [grad]


def test_the_tables_are_files(found, tmp_path):
    rows, others = table(found, {}, RAW), table(found, {}, RAW, "colour")
    answers = [
        Asked("1.png", 2, "bike", "thing", spec, Faithfulness(deletion, 0.9, -0.1, 0.5))
        for spec, deletion in ((GRAD, 0.1), (RAW, 0.3), (None, 0.4))
    ]
    write_tables(found, with_answers(rows, answers, RAW), others, answers, tmp_path)
    written = list(csv.DictReader((tmp_path / "grounding.csv").open()))
    assert [row["method"] for row in written] == ["grad", "raw", "the boxes, 6 x 8", "centre"]
    assert [row["deletion"] for row in written] == ["0.1", "0.3", "", ""]
    assert len(list(csv.DictReader((tmp_path / "grounding_kinds.csv").open()))) == 2
    each = list(csv.DictReader((tmp_path / "grounding_asked.csv").open()))
    assert [(row["text"], row["method"], row["deletion"]) for row in each] == [
        ("bike", "grad", "0.1"),
        ("bike", "raw", "0.3"),
        ("bike", "random", "0.4"),
    ]
    with np.load(tmp_path / "grounding_words.npz") as words:
        assert words["hit"].tolist() == [[False] * 4, [True, False] * 2]
        assert words["kind"].tolist() == ["thing", "colour"] * 2
        assert words["specs"].tolist() == [
            "raw, layers last, heads mean, predict",
            "grad, layers last, heads mean, predict",
        ]
        at_half = words["overlap"][..., 9].sum(1) / words["union"][..., 9].sum(1)  # whatever a table holds follows
        assert at_half == pytest.approx([0, 1 / 3])


def test_specs_by_name():
    def parsed(*texts):
        return parse_specs(texts, MapSpec("raw", "all", "mean", "own"), 4, 2)

    assert parsed("grad") == [spec for spec in specs_to_compare(4, 2) if spec.method == "grad"]
    assert parsed("grad,1-2") == [MapSpec("grad", "1-2", "mean", "own")]
    assert parsed("raw,all, max,predict", "raw,0") == [MapSpec("raw", "all", "max"), MapSpec("raw", "0", row="own")]
    for bad, message in (
        ("", "--specs : give a method"),
        ("raw,,max", "method,layers,heads,row"),
        ("raw,1,max,own,2", "method,layers,heads,row"),
        ("row", "--method row: use one of"),
        ("raw,9", "layers 0 to 3"),
        ("raw,1,7", "heads 0 to 1"),
        ("raw,1,1,both", "--row both"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(bad)


class Planted:
    """An explainer of images of 40 x 30, of which it sees the left half: each word looks at the cell of its length."""

    def window(self, size):
        return 0.0, 0.0, 20.0, 30.0

    def prepare(self, image):
        return image

    def tokens(self, text):
        return text.split()


@pytest.fixture
def planted_model(monkeypatch):
    class Attention:
        class capture:  # noqa: N801, stands for an object
            grid = (3, 2)

        def __init__(self, words):
            self.words = words

        def maps(self, spec):
            return np.array([np.eye(6)[len(word)].reshape(3, 2) for word in self.words])

    monkeypatch.setattr("captioning.maps.comparison.read", lambda e, inputs, tokens, specs: Attention(tokens))
    return Planted()


def test_words_that_the_model_does_not_see_are_not_measured(planted_model, tmp_path, caplog):
    from PIL import Image

    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    seen, cropped = ((0, 20, 10, 10),), ((30, 0, 10, 10),)
    mentions = Mention(1, seen), Mention(0, seen, "colour"), Mention(2, cropped), Mention(3, (), "place")
    sample = GroundedCaption(tmp_path / "a.png", "red bike bike here", mentions)
    with caplog.at_level(logging.WARNING):
        result = measure(planted_model, [sample], [RAW])
    assert [(word.text, word.kind) for word in result.words] == [("bike", "thing"), ("red", "colour")]
    assert [m.hit for m in result.maps[RAW]] == [True, False]
    assert "1 words not measured: their boxes lie outside" in caplog.text
    with pytest.raises(ValueError, match="no word could be measured: all boxes lie outside"):
        measure(planted_model, [GroundedCaption(sample.path, "bike", (Mention(0, cropped),))], [RAW])
