"""sections.py: what is there is shown, what is not is named with the command that makes it."""

import csv

import pytest
from matplotlib.figure import Figure as MatplotlibFigure
from report_runs import png, write_run

from captioning.report import sections
from captioning.training.run_folder import find_runs


def test_missing_parts_are_named_with_the_command_that_makes_them(root, make):
    page = make(root)
    for what in (
        "captions and scores of both prompts",
        "--best-worst",
        "--grounding",
        "make settings",
        "--objective scst",
        "make variants",
    ):
        assert what in page, what


def test_a_complete_part_is_not_called_missing(root, tmp_path, make):
    folder = root / "attention" / "p2"
    folder.mkdir(parents=True)
    for name in ("one.png", "one.methods.png"):
        (folder / name).write_bytes(png())
    (folder / "grounding.csv").write_text(
        "method,layers,heads,row,pointing,mass_ratio,iou,note\nraw,all,mean,predict,0.5,2.0,0.3,default\n"
        "centre,,,,0.25,,,baseline\n"
    )
    (root / "attention" / "best_worst.png").write_bytes(png())
    page = make(root)
    assert "maps of The captioner" not in page
    assert "--best-worst" not in page
    assert page.count("<img ") == 5  # the map, the contact sheet, the pair, the curves
    assert page.count("image one (micro world): one tile per word") == 1
    assert page.count("image one (micro world): a row per noun, a column per method.") == 1
    assert (tmp_path / "report_files" / "p3_p2_one.png").read_bytes() == png()
    assert "0.2500" in page


GROUNDING = """method,layers,heads,row,pointing,pointing_low,pointing_high,mass_ratio,iou,iou_low,iou_high,deletion,note
agree,all,mean,predict,0.9,0.85,0.95,5.0,0.5,0.4,0.6,0.125,default
{other},0,max,own,0.8,0.7,0.9,4.0,0.4,0.3,0.5,,
{other},1,max,own,0.7,0.6,0.8,4.0,0.4,0.3,0.5,,
"the boxes, 12 x 12",,,,1.0,1.0,1.0,9.0,0.75,0.7,0.8,,ceiling
centre,,,,0.25,,,,,,,,baseline
"""


def test_both_models_are_side_by_side_each_method_by_its_best_row_with_intervals(root, make, tmp_path):
    for model, other in (("p1", "grad"), ("p2", "raw")):
        (root / "attention" / model).mkdir(parents=True)
        (root / "attention" / model / "grounding.csv").write_text(GROUNDING.format(other=other))
    page = make(root)
    assert "0.850 to 0.950" in page and "0.600 to 0.800" not in page  # layer 1 is not the best of its method
    both = list(csv.DictReader((tmp_path / "report_files" / "p3_grounding.csv").open()))
    assert [row["method"] for row in both] == ["agree", "grad", "raw", "the boxes, 12 x 12", "centre"]
    (grad,) = (row for row in both if row["method"] == "grad")
    assert (grad["LLaVA: pointing"], grad["LLaVA: IoU, 95%"]) == ("0.8", "0.300 to 0.500")
    assert grad["The captioner: pointing"] == ""
    one = list(csv.DictReader((tmp_path / "report_files" / "p3_grounding_p1.csv").open()))
    assert (one[0]["deletion"], one[0]["note"], len(one)) == ("0.125", "default", 4)


def test_the_words_on_the_prompts_follow_the_numbers():
    one, two = {"CIDEr": 2.0, "CLIPScore": 1.0, "words": 9}, {"CIDEr": 1.0, "CLIPScore": 1.1, "words": 18}
    assert "as in the report" in sections.explain_prompts({"1": one, "2": two})
    assert "2.0 times as long" in sections.explain_prompts({"1": one, "2": two})
    turned = sections.explain_prompts({"1": two, "2": one})
    assert turned.count("Unlike in the report") == 2


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that are saved while a test runs."""
    figures, save = [], MatplotlibFigure.savefig
    monkeypatch.setattr(
        MatplotlibFigure, "savefig", lambda figure, *args, **more: figures.append(figure) or save(figure, *args, **more)
    )
    return figures


def test_curves_have_one_style_per_setting_and_no_runs_by_reward(tmp_path, drawn):
    for name in ("1", "1-seed1", "2"):
        write_run(tmp_path / name)
    write_run(tmp_path / "tuned", objective="scst")
    runs, _ = find_runs(tmp_path)
    (row,) = sections.curves("c", "the runs", runs)
    assert [figure.name for figure in row.figures] == ["c_loss", "c_cider"]
    assert all(figure.png.startswith(b"\x89PNG") for figure in row.figures) and "(micro, cpu)" in row.caption
    for canvas, lines in zip(drawn, (6, 3), strict=True):
        assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["1", "2"]
        (axis,) = canvas.axes
        assert len(axis.lines) == lines
        assert len({(line.get_color(), line.get_marker()) for line in axis.lines}) == 2
        assert len({line.get_marker() for line in axis.lines}) == 2, "told apart without colours"
    assert sections.curves("c", "the runs", runs[-1:]) == []


def test_both_losses_are_told_apart_without_colours(tmp_path, drawn):
    for name in map(str, range(12)):
        write_run(tmp_path / name)
    runs, _ = find_runs(tmp_path)
    sections.curves("c", "the runs", runs)
    (axis,) = drawn[0].axes
    assert sum(line.is_dashed() for line in axis.lines) == len(axis.lines) / 2 == 12
    styles = [(line.get_color(), line.get_marker(), line.is_dashed()) for line in axis.lines]
    assert len(set(styles)) == len(styles)


def test_runs_without_cider_have_no_figure_of_it(tmp_path):
    folder = write_run(tmp_path / "1")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val_cider"', '"another"'))
    (row,) = sections.curves("c", "the runs", find_runs(tmp_path)[0])
    assert [figure.name for figure in row.figures] == ["c_loss"]


@pytest.mark.parametrize("epochs", [1, 2, 13])
def test_epochs_are_whole_numbers_on_the_axis(epochs, tmp_path, drawn):
    """One epoch alone stood between 0.945 and 1.050."""
    write_run(tmp_path / "1", epochs=epochs, done=epochs)
    sections.curves("c", "the runs", find_runs(tmp_path)[0])
    for (axis,) in (canvas.axes for canvas in drawn):
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)
        assert 1 in ticks or epochs > 8
