"""bench/train.py in its tiny form: packed and cached training has the script's loss and gradients."""

import torch

from bench import train as bench


def test_loss_and_gradients_are_equal(capsys):
    assert bench.main(["--tiny", "--images", "2"]) == 0
    assert "largest relative difference" in capsys.readouterr().out


def test_a_prefix_that_the_captions_do_not_share_is_noticed(monkeypatch):
    """Were positions not to restart after the prefix, loss and gradients would be others."""
    pack = bench.data.pack_captions

    def shifted(*args, **kwargs):
        batch = pack(*args, **kwargs)
        batch.positions += 1
        return batch

    monkeypatch.setattr(bench.data, "pack_captions", shifted)
    assert bench.main(["--tiny", "--images", "2"]) == 1


def test_a_row_for_each(tmp_path, monkeypatch):
    rivals = bench.Rivals(bench.TINY, 2, tmp_path, torch.device("cpu"))
    monkeypatch.setattr(bench, "Floor", lambda *_: type("Floor", (), {"operations_a_second": 1e6})())
    args = bench.build_parser().parse_args(["--images", "2", "--repeats", "1"])
    ours, script = bench.compare(rivals, "bf16", args, torch.device("cpu"))
    assert (ours["captions a step"], script["captions a step"]) == (10, 5)
    assert ours["we are faster by"] == 1.0
    assert script["captions/s"] > 0
    assert int(ours["share of the matrix rate"].split("%")[0]) > 0
