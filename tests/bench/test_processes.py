"""bench/processes.py in its tiny form: two processes find the losses, the adapter and the captions of one."""

import torch

from bench import processes as bench


def test_two_processes_find_what_one_finds(capsys):
    assert bench.main(["--tiny", "--device", "cpu"]) == 0
    assert "2 processes against 1: losses differ by" in capsys.readouterr().out


def result(rate, loss=1.0, weight=0.0, caption="a"):
    return {
        "captions/s": rate,
        "images/s": rate / 4,
        "losses": [loss],
        "captions": {"x": caption},
        "adapter": {"w": torch.tensor([weight])},
    }


def compare(monkeypatch, tmp_path, found, repeats=1):
    found = iter(found)
    monkeypatch.setattr(bench, "start", lambda count, args, folder: next(found))
    return bench.compare(bench.build_parser().parse_args(["--repeats", str(repeats)]), tmp_path)


def test_rates_are_medians_and_efficiency_is_a_share_of_twice_one(monkeypatch, tmp_path):
    rates = (100, 150, 90, 180, 300, 170)  # one and two processes in turn
    rows, equal = compare(monkeypatch, tmp_path, map(result, rates), repeats=3)
    assert equal
    assert [row["training, captions/s"] for row in rows] == [100, 170]
    assert [row["training efficiency"] for row in rows] == ["100%", "85%"]
    assert [row["inference, images/s"] for row in rows] == [25, 42.5]


def test_other_losses_weights_or_captions_are_noticed(monkeypatch, tmp_path):
    for other in ({"loss": 1.001}, {"weight": 0.01}, {"caption": "b"}):
        assert not compare(monkeypatch, tmp_path, [result(1), result(1, **other)])[1]
