"""What a step of self-critical training spends on its reward: ``python -m bench.scst``.

GPT-2 small with LoRA after 257 image tokens, random weights, so every beam runs to its full length; references are
drawn from a Zipf distribution over GPT-2's vocabulary, 10,000 images with 5 captions of 12 tokens each.
"""

from __future__ import annotations

import sys
import time
from typing import cast

import numpy as np
import torch

from bench.common import make_parser, peak_memory, report
from captioning.cli import command, positive_int
from captioning.data.tokenizer import Tokenizer
from captioning.device import pick_device
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.training.rewards import CiderReward
from captioning.training.scst import advantages, beams, weighted_loss
from decoder import Decoder, DecoderConfig, LoraConfig


class Ids:
    """Replaces the tokenizer, of which only these two numbers are used."""

    def __init__(self, vocab_size: int) -> None:
        self.eos_id, self.vocab_size = vocab_size - 1, vocab_size


def make_captioner(
    encoder: str = "vit_large_patch14_clip_224", kwargs: dict | None = None, decoder: DecoderConfig | None = None
) -> Captioner:
    """Return a captioner with random weights: by default of full size, but for an encoder of one layer.

    Its tokens are cached in training anyway.
    """
    lora = LoraConfig(32, 32.0, lm_head=True)
    config = CaptionerConfig(encoder, {"depth": 1} if kwargs is None else kwargs, "random", lora=lora)
    return Captioner(config, Decoder(decoder or DecoderConfig(), lora))


def measure(captioner: Captioner, images: int, samples: int, repeats: int, known: int = 10_000) -> dict[str, float]:
    """Return the median seconds of each part of a step, after one step to warm up.

    Args:
        captioner: that is trained.
        images: of a step.
        samples: captions of each.
        repeats: steps that are timed.
        known: images with references.
    """
    device, ids = captioner.device, Ids(captioner.decoder.config.vocab_size)
    eos = ids.eos_id
    captions = (np.random.default_rng(0).zipf(1.3, size=(known, 5, 12)) % eos).tolist()
    reward = CiderReward(captions, eos)
    features = torch.randn(images, *captioner.feature_shape, device=device)
    times: dict[str, list[float]] = {"draw": [], "reward": [], "gradient": []}
    for _ in range(repeats + 1):
        marks = [time.perf_counter()]
        drawn = beams(captioner, cast(Tokenizer, ids), features, samples, 30)
        marks.append(time.perf_counter())
        flat = [sample for group in drawn for sample in group]
        rewards = reward(np.repeat(np.arange(images), samples).tolist(), flat).reshape(images, samples)
        marks.append(time.perf_counter())
        people = [[[*caption, eos] for caption in group] for group in captions[:images]]
        weights = np.concatenate([advantages(rewards), np.full((images, 5), 0.25)], 1)
        both = [a + b for a, b in zip(drawn, people, strict=True)]
        weighted_loss(captioner, features, both, weights.tolist(), eos).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        for name, seconds in zip(times, np.diff(marks), strict=True):
            times[name].append(float(seconds))
    return {name: float(np.median(values[1:])) for name, values in times.items()}


@command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 where the reward takes 10 % of a step or more."""
    parser = make_parser("scst", __doc__)
    parser.add_argument("--images", type=positive_int, default=4, help="images a step")
    parser.add_argument("--samples", type=positive_int, default=5, help="captions an image: beams")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    parts = measure(make_captioner().to(device).eval(), args.images, args.samples, args.repeats)
    share = parts["reward"] / sum(parts.values())
    row = {"images": args.images, "samples an image": args.samples}
    row |= {f"{name}, s": seconds for name, seconds in parts.items()}
    row |= {"reward's share": share, "peak memory, GB": peak_memory(device)}
    report("Self-critical training, a step at full size (random weights)", [row], device, args.out)
    return int(share >= 0.1)


if __name__ == "__main__":
    sys.exit(main())
