"""What the study ``variants`` holds against the setting ``best``, and ``rewards`` against further cross-entropy.

A new row is one line here; all else follows from it. Rates are the micro world's (``steps.scaled``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from captioning.training.config import SCST_NUMBERS, SETTINGS
from microworld.steps import WIDTH_RATIO


def rate(factor: float, field_name: str = "lr") -> str:
    """Return a rate of ``best`` on the micro world, times ``factor``."""
    return f"{getattr(SETTINGS['best'], field_name) * WIDTH_RATIO * factor:.3g}"


def rates(factor: float) -> dict[str, object]:
    """Return both rates of ``best``, times ``factor``."""
    return {"lr": rate(factor), "projector_lr": rate(factor, "projector_lr")}


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        train: flags of p2_train.py beside those of ``best``.
        search: flags of p2_infer.py.
        adapter_of: the row whose adapter captions, where only the search differs and nothing is trained.
    """

    train: Mapping[str, object] = field(default_factory=dict)
    search: Mapping[str, object] = field(default_factory=dict)
    adapter_of: str | None = None


BASE = "best"
VARIANTS: dict[str, Variant] = {
    BASE: Variant(),
    "no dropout": Variant({"lora_dropout": 0}),
    "LoRA+ 8": Variant(rates(1 / 3) | {"lora_plus": 8}),
    "LoRA+ 8, no dropout": Variant(rates(1 / 3) | {"lora_plus": 8, "lora_dropout": 0}),
    "half the rates": Variant(rates(0.5)),
    "twice the rates": Variant(rates(2)),
    "four times the rates": Variant(rates(4)),
    "constant rates": Variant({"schedule": "constant"}),
    "layer before the last": Variant({"encoder_layer": -2}),
    "no LoRA on lm_head": Variant({"lora_lm_head": False}),
    "rank 16": Variant({"lora_rank": 16, "lora_alpha": 16}),
    "projector first": Variant({"projector_epochs": 1}),
    "label smoothing 0.1": Variant({"label_smoothing": 0.1}),
    "no CLS": Variant({"cls": False}),
    "pool 2": Variant({"pool": 2}),
    "greedy search": Variant(search={"beam_size": 1}, adapter_of=BASE),
    "10 beams": Variant(search={"beam_size": 10}, adapter_of=BASE),
}

# What tunes a captioner that cross-entropy teaches no more. The brevity penalty multiplies CLIPScore too and so weighs
# more with it: a smaller exponent.
FURTHER = "more cross-entropy"
REWARDS: dict[str, dict[str, object]] = {
    FURTHER: {"objective": "xe", "warmup": SCST_NUMBERS["warmup"], "weight_decay": SCST_NUMBERS["weight_decay"]},
    "cider": {"objective": "scst"},
    "cider+clip": {"objective": "scst", "clip_reward": 1, "brevity": 1.2},
}
LEVEL = 0.005  # cross-entropy has levelled off when a further epoch at a constant low rate lowers its loss by less
