"""bench/decode.py in its tiny form: ours, transformers' and the plain script's captions, and the reckoned floor."""

import pytest
import torch

from bench import decode as bench

CPU = torch.device("cpu")


def test_all_three_caption_alike(capsys):
    assert bench.main(["--tiny", "--batch-size", "5"]) == 0
    assert "different: none" in capsys.readouterr().out


def test_a_caption_that_differs_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(bench.Rivals, "transformers", lambda self: self.captions.update(transformers=[]))
    assert bench.main(["--tiny", "--batch-size", "2"]) == 1
    assert "different: transformers" in capsys.readouterr().out


def test_a_row_for_each_with_cache_and_ratio(monkeypatch):
    monkeypatch.setattr(bench, "Floor", lambda *_: type("Floor", (), {"seconds": lambda *_: 0.0})())
    args = bench.build_parser().parse_args(["--batch-size", "2", "--repeats", "1"])
    rows = {row["who"]: row for row in bench.compare(bench.TINY, "fp32", args, CPU)}
    assert list(rows) == ["ours", "transformers", "plain"]
    assert rows["transformers"]["captions equal to ours"] == "2 of 2"
    assert rows["ours"]["we are faster by"] == 1.0
    assert rows["plain"]["captions/s"] > 0
    # 2 images x (9 + 5 x 12) slots x keys and values x 2 layers x 32 numbers of 4 bytes
    assert rows["ours"]["cache, MB"] == pytest.approx(2 * 69 * 2 * 2 * 32 * 4 / 1e6)


def test_the_floor_counts_weights_cache_and_operations():
    """At one byte and one operation a second the floor is the larger count of the prefix and of every step."""
    floor = bench.Floor.__new__(bench.Floor)
    floor.bytes_a_second, floor.operations_a_second = 1.0, float("inf")
    size, tokens = bench.TINY, range(1, bench.TINY.tokens + 1)
    weights = 4 * (12 * 2 * 32 * 32)
    head, cache = 4 * 41 * 32, sum(4 * 2 * 2 * 3 * (9 + 5 * t) * 32 for t in tokens)
    moved = weights + len(tokens) * (weights + head) + cache
    assert bench.floor_seconds(floor, size, 3, torch.float32) == moved
