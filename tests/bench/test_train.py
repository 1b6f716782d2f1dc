"""bench/train.py in its tiny form: packed and cached training has the script's loss and gradients."""

import pytest
import torch

from bench import train as bench
from decoder import frozen_linear


@pytest.mark.parametrize(("batch_by", "route"), [("images", "auto"), ("images", "mask"), ("captions", "auto")])
def test_loss_and_gradients_are_equal(batch_by, route, capsys):
    assert bench.main(["--tiny", "--images", "2", "--batch-by", batch_by, "--attention", route]) == 0
    assert "largest relative difference" in capsys.readouterr().out


def test_a_prefix_that_the_captions_do_not_share_is_noticed(monkeypatch):
    """Were positions not to restart after the prefix, loss and gradients would be others."""
    pack = bench.pack_captions

    def shifted(*args, **kwargs):
        batch = pack(*args, **kwargs)
        batch.positions += 1
        return batch

    monkeypatch.setattr(bench, "pack_captions", shifted)
    assert bench.main(["--tiny", "--images", "2"]) == 1


def test_a_row_for_each(tmp_path, monkeypatch):
    rivals = bench.Rivals(bench.TINY, 2, tmp_path, torch.device("cpu"))
    monkeypatch.setattr(bench, "Floor", lambda *_: type("Floor", (), {"operations_a_second": 1e6})())
    args = bench.build_parser().parse_args(["--images", "2", "--repeats", "1", "--batch-by", "captions"])
    ours, transformers, script, captions = bench.compare(rivals, "bf16", args, torch.device("cpu"))
    assert [row["captions a step"] for row in (ours, transformers, script, captions)] == [10, 5, 5, 2]
    assert ours["GFLOP a caption"] < captions["GFLOP a caption"]
    args.batch_by = "images"
    assert len(bench.compare(rivals, "fp32", args, torch.device("cpu"))) == 3
    assert ours["GFLOP a caption"] < min(row["GFLOP a caption"] for row in (transformers, script))
    assert ours["peak GB so far"] > 0
    assert ours["we are faster by"] == 1.0
    assert min(transformers["captions/s"], script["captions/s"]) > 0
    assert int(ours["share of the matrix rate"].split("%")[0]) > 0


def test_products_of_onednn_are_counted():
    x, layer = torch.randn(70, 8), torch.nn.Linear(8, 5).requires_grad_(False)
    product = bench.count_operations(lambda: frozen_linear(layer, x))
    assert product == bench.count_operations(lambda: layer(x)) == 2 * 70 * 8 * 5


def test_a_loop_of_transformers_without_our_lora_is_noticed(monkeypatch):
    monkeypatch.setattr(
        bench.LoraConv1D, "forward", lambda self, x: self.base(x) + 0 * x @ self.lora.lora_A.T @ self.lora.lora_B.T
    )
    assert bench.main(["--tiny", "--images", "2"]) == 1
