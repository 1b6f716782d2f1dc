"""microworld/demo.py: its recipe, and the table that it ends with."""

import pytest
import torch

from captioning.training.setup import resolve_config
from microworld import demo
from microworld.steps import flags, quick
from p2_train import build_parser


@pytest.mark.parametrize(
    ("can", "precision"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")]
)
def test_the_demo_trains_in_bf16_where_the_processor_has_it(monkeypatch, can, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    config = resolve_config(build_parser().parse_args(flags(**quick())))
    assert config.precision == precision
    assert (config.lora_dropout, config.lora_plus) == (0, 8)


def scores(**splits):
    return {split: {"images": 300, "CIDEr": cider, "CLIPScore": 1.9} for split, cider in splits.items()}


def test_the_table_shows_what_language_alone_scores():
    lines = demo.table({"lora": scores(val=1.5, val_novel=1.0), "llava 1": scores(val=2.1)}).splitlines()
    assert lines[-3].split() == ["blind", "*", "val", "300", "0.177", "0.288"]
    assert demo.BLIND_DATE in lines[-1]


def test_the_table_shows_a_blind_run_of_now_in_place_of_the_kept_one():
    lines = demo.table({"lora": scores(val=1.5), "blind": scores(val=0.25)}).splitlines()
    assert [line.split()[0] for line in lines] == ["run", "lora", "blind", "CIDEr"]
    assert "6.0 times" in lines[-1]
