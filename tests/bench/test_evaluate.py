"""bench/evaluate.py: both sides run, agree, and are written down."""

import json
import shutil

import pytest

from bench import evaluate as bench

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="times the Java tokenizer")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(bench, "IMAGES", 20)


@needs_java
def test_a_small_run(tmp_path, capsys):
    assert bench.main(["--repeats", "2", "--images", "6", "--out", str(tmp_path / "figures")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    cider, tokenizer, second = figures["rows"]
    assert float(cider["same results"].removeprefix("largest difference: ")) < 1e-12
    assert (tokenizer["same results"], tokenizer["what"]) == ("different: 0", "tokenizer, 100 captions")
    assert second["images"] == 6
    assert float(second["same results"].removeprefix("largest difference: ")) < 1e-5
    assert second["times faster"] == pytest.approx(second["theirs, s"] / second["ours, s"])
    assert second["ours, ms an image"] == pytest.approx(1000 * second["ours, s"] / 6)
    table = (tmp_path / "figures.md").read_text()
    assert figures["machine"] in table
    assert table in capsys.readouterr().out


@needs_java
def test_the_tiny_form_notices_what_differs(monkeypatch, capsys):
    assert bench.main(["--tiny"]) == 0
    assert "3 comparisons; different: none" in capsys.readouterr().out
    scores = bench.clip_scores
    monkeypatch.setattr(bench, "clip_scores", lambda *features: scores(*features) + 0.001)
    assert bench.main(["--tiny"]) == 1
    assert "different: second run, micro scorer" in capsys.readouterr().out


def test_a_row_has_medians_of_runs_in_turn_after_a_warm_up():
    runs, now = [], [0.0]

    def side(name, seconds):
        def run():
            runs.append(name)
            now[0] += seconds.pop(0)
            return name

        return run

    sides = {"theirs": side("theirs", [3.0, 1.0, 9.0]), "ours": side("ours", [50.0, 1.0, 2.0, 1.5])}
    duel = bench.Duel("what", 2, sides, lambda a, b: (a + b, 0.0), lambda: runs.append("warm-up"))
    row = duel.row(3, lambda: now[0])
    assert runs == ["warm-up", "ours", *["theirs", "ours"] * 3]
    assert (row["theirs, s"], row["ours, s"], row["times faster"]) == (3.0, 1.5, 2.0)
    assert row["same results"] == "theirsours: 0"


@pytest.mark.parametrize("flag", ["--repeats", "--images"])
def test_numbers_below_one_are_refused(flag, capsys):
    assert bench.main([flag, "0"]) == 2
    assert f"{flag} 0: must be at least 1" in capsys.readouterr().err
