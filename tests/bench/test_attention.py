"""bench/attention.py on one scene: captions alone and the maps of each method, for both models."""

from bench import attention as bench
from captioning.maps.attention import METHODS


def test_a_row_for_each_method_of_each_model(capsys):
    assert bench.main(["--count", "1", "--repeats", "1", "--device", "cpu"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| p")]
    fast = sorted(name for name, method in METHODS.items() if not method.slow)
    count = 1 + len(fast)
    assert [row[0] for row in rows] == ["| p2"] * count + ["| p1"] * count
    for first in (0, count):
        names = [row[1].removesuffix(" (default)") for row in rows[first : first + count]]
        assert names[0] == "captions alone" and sorted(names[1:]) == fast
        assert rows[first][3] == "1"
