"""bench/attention.py on one scene: captions alone and the maps of each method, for both models."""

from bench import attention as bench


def test_a_row_for_each_method_of_each_model(capsys):
    assert bench.main(["--count", "1", "--repeats", "1", "--device", "cpu"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| p")]
    assert [row[0] for row in rows] == ["| p2"] * 4 + ["| p1"] * 4
    for first in (0, 4):
        names = [row[1].removesuffix(" (default)") for row in rows[first : first + 4]]
        assert names[0] == "captions alone" and sorted(names[1:]) == ["grad", "raw", "rollout"]
        assert rows[first][3] == "1"
