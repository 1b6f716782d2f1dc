"""bench/stream.py in small: it streams, and draws its curve."""

import json

from bench import stream


def test_the_benchmark_streams_and_draws_its_curve(tmp_path, capsys):
    words = ["--images", "60", "--per-tar", "20", "--distinct", "3", "--captioner", "tiny", "--every", "0.2"]
    assert stream.main([*words, "--out", str(tmp_path / "curve")]) == 0
    assert "60 images from 3 tars" in capsys.readouterr().out
    points = [json.loads(line) for line in (tmp_path / "curve.curve.jsonl").read_text().splitlines()]
    assert 100 < points[-1]["peak MB"] < 1500
    assert (tmp_path / "curve.png").stat().st_size > 1000
