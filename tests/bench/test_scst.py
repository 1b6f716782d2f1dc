"""bench/scst.py on a tiny captioner: every part of a step is timed."""

import torch
from tiny import TINY_ENCODER, TINY_ENCODER_KWARGS

from bench import scst as bench
from captioning.models.captioner import Captioner, CaptionerConfig
from decoder import Decoder, DecoderConfig, LoraConfig


def test_the_parts_of_a_step_and_the_share_of_the_reward(monkeypatch, capsys):
    lora = LoraConfig(rank=4, alpha=4.0, lm_head=True)
    config = CaptionerConfig(TINY_ENCODER, TINY_ENCODER_KWARGS, "random", lora=lora)
    torch.manual_seed(0)
    captioner = Captioner(config, Decoder(DecoderConfig(101, 64, 64, 2, 2), lora))
    parts = bench.measure(captioner.eval(), images=2, samples=3, repeats=1, known=20)
    assert list(parts) == ["draw", "reward", "gradient"] and min(parts.values()) > 0
    monkeypatch.setattr(bench, "make_captioner", lambda: captioner)
    for seconds, code in ((0.09, 0), (0.11, 1)):
        monkeypatch.setattr(bench, "measure", lambda *_, s=seconds: {"draw": 0.5, "reward": s, "gradient": 0.5 - s})
        assert bench.main(["--images", "2", "--device", "cpu"]) == code
        assert f"| {seconds} |" in capsys.readouterr().out
