"""first_picture.py: which image and which word stand at the head of the page, and when none can."""

import html
import io

import numpy as np
import pytest
from PIL import Image
from report_runs import NAUGHTY, write_maps

import report
from captioning.report.first_picture import first_picture


def words_lit(root):
    (row,) = first_picture(root, "micro")
    return [figure.caption.split("The map of ")[1].split(" is by ")[0] for figure in row.figures[1:]]


def test_an_image_its_captions_by_both_models_and_two_maps_stand_before_the_contents(root, tmp_path, make):
    write_maps(root, "7", (f"A red ball. {NAUGHTY}", "The ball rolls."), ["ball."])
    page = make(root)
    head = html.unescape(page[: page.index("<nav")])
    assert head.count("<img ") == 3
    for text in ("7.jpg (micro world)", f"LLaVA: “A red ball. {NAUGHTY}”", "The captioner: “The ball rolls.”"):
        assert text in head
    assert NAUGHTY not in page
    assert all((tmp_path / "report_files" / f"first_{name}.png").is_file() for name in ("image", "p1", "p2"))


def test_a_map_lies_where_it_is_hot_on_the_window_and_the_rest_is_grey(root):
    write_maps(root, "7", ("A ball.", "A ball."), ["ball."])
    (row,) = first_picture(root, "micro")
    scene, lit = (np.asarray(Image.open(io.BytesIO(figure.png)), dtype=int) for figure in row.figures[:2])
    assert scene.shape == lit.shape == (420, 560, 3)
    coloured = np.ptp(lit, axis=2) > 60
    rows, columns = np.nonzero(coloured)
    # the cell in row 1 of 3 and column 2 of 4, of a window from 10 to 70 of 80 pixels
    assert (rows.mean() / 420, columns.mean() / 560) == pytest.approx((0.5, (10 + 60 * 2.5 / 4) / 80), abs=0.01)


def test_the_first_image_whose_captions_share_a_word_and_of_these_the_most_concentrated(root):
    write_maps(root, "1", ("a dog on the road", "a cat in the street"), ["road", "a"])
    write_maps(root, "2", ("Black cars wait there.", "There are black cars"), ["cars", "wait"])
    write_maps(root, "3", ("one ball", "one ball"), ["ball"])
    (row,) = first_picture(root, "micro")
    assert row.figures[0].caption.startswith("2.jpg")
    assert words_lit(root) == ["“cars”", "“cars”"]
    assert "share a word of four letters" in row.caption


def test_where_no_word_is_shared_each_map_is_the_most_concentrated_of_its_caption(root):
    write_maps(root, "1", ("a dog on the road", "a cat in the street"), ["road", "cat"])
    assert words_lit(root) == ["“road”", "“cat”"]
    (row,) = first_picture(root, "micro")
    assert "no two captions share a word" in row.caption


@pytest.mark.parametrize("left", ["image", "p1", "p2", "path"])
def test_without_the_image_or_one_models_maps_the_page_has_no_such_picture(left, root, make):
    write_maps(root, "1", ("a ball", "a ball"), [])
    if left == "image":
        (root / "data" / "1.jpg").unlink()
    for model in ("p1", "p2"):
        file = root / "attention" / model / "1.npz"
        if left == "path":  # as earlier versions wrote it
            np.savez(file, **{key: value for key, value in np.load(file).items() if key != "path"})
        elif left == model:
            file.unlink()
    assert "<img " not in make(root).partition("<nav")[0]


def test_the_picture_says_how_its_maps_were_made_and_what_grounding_leaves_is_no_map(root):
    write_maps(root, "1", ("a ball", "a ball"), [])
    for model in ("p1", "p2"):
        np.savez(root / "attention" / model / "grounding_words.npz", pointing=np.ones((2, 3)))
    (row,) = first_picture(root, "micro")
    assert all(
        figure.caption.endswith("The map of “ball” is by raw, layers 0-1, heads mean.") for figure in row.figures[1:]
    )


def test_a_damaged_file_of_maps_is_one_line_that_names_it(root, tmp_path, capsys):
    write_maps(root, "1", ("a ball", "a ball"), [])
    file = root / "attention" / "p2" / "1.npz"
    for content in (b"", b"PK\x03\x04", file.read_bytes()[:300], b"no npz"):
        file.write_bytes(content)
        assert report.main(["--runs", str(root), "--out", str(tmp_path / "r.html")]) == 2
        error = capsys.readouterr().err
        assert str(file) in error and "p3_attention.py" in error and "Traceback" not in error
