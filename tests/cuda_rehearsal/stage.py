"""What the cases share: captioners and data of the full width on a fake GPU, and how their costs are told."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

from fake_gpu import FakeGpu  # first: it loads the hooks before torch  # isort: skip

import torch

from captioning.device import pick_device
from captioning.models import captioner as captioner_module
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import build_transform
from captioning.training.config import TrainConfig
from decoder import Decoder, DecoderConfig

Facts = dict[str, Any]
ENCODER, SHALLOW = "vit_large_patch14_clip_224", {"depth": 2}  # the full-size features from fewer blocks
FULL = DecoderConfig()
CAPTIONS = 5  # of an image
EOS = 50256


class Ids:
    """Stands for a tokenizer: captions stay ids."""

    vocab_size, eos_id = EOS + 1, EOS

    def decode(self, tokens: Sequence[int]) -> str:
        """Return ids as a text."""
        return " ".join(map(str, tokens))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [int(word) for word in text.split()]


def build(gpu: FakeGpu, config: TrainConfig, layers: int = 2, encoder: dict[str, Any] = SHALLOW) -> Captioner:
    """Return a captioner of the full width, all of whose tensors are fake, on the GPU."""
    lora = config.lora()
    shape = CaptionerConfig(ENCODER, encoder, "random", config.cls, lora, encoder_layer=config.encoder_layer)
    with torch.device("meta"), mock.patch.object(captioner_module, "fingerprint", lambda state: "fake"):
        captioner = Captioner(shape, Decoder(replace(FULL, n_layer=layers), lora))
    captioner.transform = build_transform(captioner.encoder)
    with gpu.mode:
        captioner.to_empty(device=pick_device("auto"))
    return captioner


def captions(images: int) -> list[list[list[int]]]:
    """Return five captions of 9 to 16 tokens for each image."""
    draw = random.Random(0)
    return [[[draw.randrange(EOS) for _ in range(draw.randint(9, 16))] for _ in range(CAPTIONS)] for _ in range(images)]


def described(kernels: Counter, waits: Counter, wrong: Sequence[str] = ()) -> Facts:
    """Return the facts of a case: numbers for the table of budgets, and what explains them."""
    phases: Counter[str] = Counter()
    for (phase, _), count in kernels.items():
        phases[phase] += count
    parts = {phase: count for phase, count in sorted(phases.items()) if phase}
    return {
        "counts": {**parts, "kernels": kernels.total(), "waits": waits.total()},
        "waits": {f"{what} at {where}": count for (what, where), count in sorted(waits.items())},
        "operators": {f"{phase} {name}".strip(): count for (phase, name), count in kernels.most_common()},
        "wrong": sorted(set(wrong)),
    }
