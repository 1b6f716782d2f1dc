"""Caching the encoder's tokens of JPEGs of 640 x 480, as p2_train.py does first, against one batch after another.

    python -m bench.features            ViT-L/14 with random weights
    python -m bench.features --tiny     a tiny encoder: are the features equal? no times

Ours reads images in threads while the encoder works, on a CPU with its weights reordered for oneDNN, on a GPU in TF32.
The other reads a batch, encodes it with the weights as they are, stores it, and reads the next one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common import draw_scenes, in_turn, make_parser, report
from bench.photographs import convert
from bench.train import FULL, TINY
from captioning.cli import command, positive_int
from captioning.data.feature_cache import CacheSpec, FeatureCache
from captioning.device import pick_device
from captioning.inference.encode import cached_features, prepare_encoder, read_pixels
from captioning.models.captioner import Captioner, CaptionerConfig
from decoder import Decoder, DecoderConfig, LoraConfig

READING = "reading alone"
TOLERANCE = 2e-3  # relative: float16 has 11 digits in base 2


def make_captioner(encoder: str, kwargs: dict[str, Any], device: torch.device) -> Captioner:
    """Return a captioner with that encoder, with random weights, the same ones every time, and a tiny decoder."""
    lora = LoraConfig()
    shape = DecoderConfig(vocab_size=101, n_positions=1024, n_embd=64, n_layer=1, n_head=1)
    return Captioner(CaptionerConfig(encoder, kwargs, "random", lora=lora), Decoder(shape, lora)).to(device)


def in_batches(captioner: Captioner, paths: Sequence[Path], folder: Path) -> FeatureCache:
    """Cache the features of images batch after batch, each read, encoded and stored before the next."""

    def encode(batch: list[Path]) -> torch.Tensor:
        return captioner.encode(read_pixels(captioner.transform, batch).to(captioner.device))

    return FeatureCache.open(CacheSpec(folder, {}, captioner.feature_shape), paths, encode)


def rivals(
    size: tuple[Any, str, dict[str, Any]], paths: Sequence[Path], folder: Path, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Return both ways to cache the features of images, each into a new folder whenever it is called, and reading."""
    plain, ours = (make_captioner(*size[1:], device) for _ in range(2))
    prepare_encoder(ours)

    def new_folder() -> Path:
        return Path(tempfile.mkdtemp(dir=folder))

    return {
        "ours": lambda: cached_features(ours, paths, new_folder()),
        "one batch after another": lambda: in_batches(plain, paths, new_folder()),
        READING: lambda: read_pixels(plain.transform, paths),
    }


def largest_difference(runs: dict[str, Callable[[], Any]], count: int) -> float:
    """Return how far apart the features of both are, relative to the largest."""
    ours, other = (runs[name]().gather(range(count)).float() for name in ("ours", "one batch after another"))
    return ((ours - other).abs().max() / other.abs().max()).item()


@command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 where the features differ by more than ``TOLERANCE``."""
    parser = make_parser("features", __doc__)
    parser.add_argument("--images", type=positive_int, default=32, help="images to encode")
    parser.add_argument("--tiny", action="store_true", help="compare the features of a tiny encoder; no times")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return run(args, Path(folder), pick_device(args.device))


def run(args: argparse.Namespace, folder: Path, device: torch.device) -> int:
    """Draw the images, and compare or time."""
    paths = draw_scenes(folder, args.images)
    convert(paths, workers=1)
    runs = rivals(TINY if args.tiny else FULL, paths, folder, device)
    if args.tiny:
        difference = largest_difference(runs, len(paths))
        print(f"largest relative difference of a feature: {difference:.1e}")
        return int(difference > TOLERANCE)
    in_turn({name: run for name, run in runs.items() if name != READING}, 1, device)  # warm-up
    seconds = in_turn(runs, args.repeats, device)
    rows = [
        {
            "how": name,
            "images/s": args.images / taken,
            "ms an image": 1000 * taken / args.images,
            "ours is faster by": taken / seconds["ours"],
        }
        for name, taken in seconds.items()
    ]
    report("Feature caching: ViT-L/14 with random weights, JPEGs of 640 x 480", rows, device, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
