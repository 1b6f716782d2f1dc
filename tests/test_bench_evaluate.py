"""bench/evaluate.py: both sides run, agree, and are written down."""

import json
import shutil

import pytest

from bench import evaluate as bench


@pytest.mark.skipif(shutil.which("java") is None, reason="times the Java tokenizer")
def test_a_small_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "IMAGES", 20)
    assert bench.main(["--repeats", "2", "--images", "6", "--out", str(tmp_path / "figures")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["cider"]["largest_difference"] < 1e-12
    assert (figures["tokenizer"]["different"], figures["tokenizer"]["captions"]) == (0, 100)
    assert figures["second run"]["images"] == 6
    assert figures["second run"]["largest_difference"] < 1e-5
    assert len(figures["cider"]["seconds"]["cider.py"]) == 2
    table = (tmp_path / "figures.md").read_text()
    assert "CPUs" in table
    assert table in capsys.readouterr().out


def test_medians_and_their_ratio():
    found = bench.report({"theirs": [3.0, 1.0, 9.0], "ours": [1.0, 2.0, 1.5]})
    assert found["medians"] == {"theirs": 3.0, "ours": 1.5}
    assert found["times_faster"] == 2.0


def test_the_sides_run_in_turn():
    runs = []
    seconds, results = bench.in_turn({name: lambda name=name: runs.append(name) or name for name in "ab"}, 2)
    assert runs == list("ababab")
    assert results == {"a": "a", "b": "b"}
    assert [len(values) for values in seconds.values()] == [2, 2]
