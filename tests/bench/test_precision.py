"""bench/precision.py in its tiny form: every part runs in either type."""

from bench import precision as bench
from captioning.files import read_json


def test_a_row_for_each_part(tmp_path):
    assert (
        bench.main(["--tiny", "--images", "2", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "p")]) == 0
    )
    rows = read_json(tmp_path / "p.json")["rows"]
    assert [row["part"] for row in rows] == list(bench.PARTS)
    for row in rows:
        assert row["fp32 / bf16"] == row["fp32, s"] / row["bf16, s"] > 0
