"""The page of a full-size folder: plain runs are the settings, and no reader is sent to the micro world."""

import csv
import html
import json
import re

import pytest
from report_runs import png, write_run


def commands(page):
    return [html.unescape(text) for text in re.findall(r"<code>(.*?)</code>", page)]


@pytest.fixture
def full(tmp_path):
    """A folder with runs/best, as `bash p2_train.sh` leaves it."""
    write_run(tmp_path / "runs" / "best", setting="best", profile="full", cider=0.9)
    return tmp_path / "runs"


@pytest.mark.parametrize("scored", [True, False])
def test_nobody_is_sent_to_the_micro_world(scored, full, make):
    if not scored:
        (full / "best" / "val_scores.json").unlink()
    page = make(full)
    assert [text for text in commands(page) if "make " in text or "micro" in text or "lora" in text] == []
    for what in ("make variants", "make letter", "P2: variants", "point by point", "times of the steps"):
        assert what not in page
    assert "<li>settings 1, 2, 3, 4, 5 (optional)<br>" in page
    assert "bash p2_train.sh --setting 1 --report-faithful --out RUNS/1-letter" in page
    assert "--boxes INSTANCES.json" in page


def test_plain_runs_are_the_settings(full, tmp_path, make):
    for name, cider in zip("12345", (0.5, 0.6, 0.7, 0.8, 0.85), strict=True):
        write_run(full / name, setting=name, profile="full", cider=cider)
    letter = write_run(full / "1-letter", setting="1", profile="full", cider=0.55)
    config = json.loads((letter / "config.json").read_text())
    (letter / "config.json").write_text(json.dumps(config | {"report_faithful": True}))
    write_run(full / "scst", setting="best", profile="full", cider=0.95, objective="scst")
    page = html.unescape(make(full))
    assert re.findall(r"<li>(settings.*?)<br>", page) == ["settings 2, 3, 4, 5 to the letter (optional)"]
    with (tmp_path / "report_files" / "p2_reported.csv").open() as file:
        rows = {row["setting"]: row for row in csv.DictReader(file)}
    assert [rows[name]["ours, sound practice: CIDEr"] for name in "125"] == ["0.500", "0.600", "0.850"]
    assert rows["1"]["ours to the letter: CIDEr"] == "0.550"
    assert "By mean CIDEr, setting 5 is the best of the report's settings here: 0.850" in page
    assert "best, has 0.900 (+6%)" in page
    assert not (tmp_path / "report_files" / "p2_settings.csv").exists()  # the table of runs has them already
    assert page.count("<table>") == len(set(re.findall(r"<caption>.*?</caption>", page)))


def test_only_a_run_with_scores_is_called_the_best(full, make):
    """The first folder by name was called so where none had been scored."""
    write_run(full / "3", setting="3", profile="full", cider=0.2)
    (full / "best" / "val_scores.json").unlink()
    page = html.unescape(make(full))
    assert "Best run here: 3 (setting 3)" in page
    assert "<li>captions and scores of best<br>" in page
    assert "python evaluate.py --pred_file RUNS/best/val.json --images_root IMG_DIR" in page
    (full / "3" / "val_scores.json").write_text('{"CLIPScore": 1.0}')  # --metrics clipscore
    page = make(full)
    assert "Best run" not in page and "a finished training run" not in page


def test_the_pair_is_that_of_the_best_scored_run(full, tmp_path, make):
    """It was read from a folder named lora."""
    write_run(full / "2", setting="2", profile="full", cider=0.95)
    page = html.unescape(make(full))
    assert "--adapter RUNS/2/best.safetensors --best-worst RUNS/2/val_per_image.json" in page
    assert "--init-adapter RUNS/2/best.safetensors" in page
    (full / "attention").mkdir()
    (full / "attention" / "best_worst.png").write_bytes(png())
    for name, scores in (("best", (0.1, 0.2)), ("2", (0.3, 0.4, 0.9))):
        rows = {str(n): {"CLIPScore": score, "caption": "a"} for n, score in enumerate(scores)}
        (full / name / "val_per_image.json").write_text(json.dumps(rows))
    make(full)
    with (tmp_path / "report_files" / "p3_pairs.csv").open() as file:
        assert [(row["pair"], row["CLIPScore"]) for row in csv.DictReader(file)] == [("best", "0.9"), ("worst", "0.3")]


@pytest.mark.parametrize("profile", ["full", "micro"])
def test_llavas_scores_alone_say_which_size_it_is(profile, tmp_path, make):
    (tmp_path / "runs" / "llava").mkdir(parents=True)
    scores = {"CIDEr": 1.0, "CLIPScore": 0.7, "words": 9.0, "images": 5, "profile": profile, "device": "cpu"}
    (tmp_path / "runs" / "llava" / "val.json").write_text(json.dumps({"1": scores, "2": scores}))
    page = make(tmp_path / "runs")
    assert ("Full size: photographs" in page) == (profile == "full")
    assert ("make variants" in page) == (profile == "micro")
