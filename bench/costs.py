"""Measure on this machine what an image costs outside of a GPU, and the models on a CPU: ``bench/costs.json``.

    OMP_NUM_THREADS=1 python -m bench.costs --out bench/costs.json          2 minutes of one core
    python -m bench.costs --tiny                                            small models and pictures; no figures of use

The figures feed ``python -m bench.simulate``. Seconds are those of one thread's processor time, so that other work on
the machine disturbs them little; models have random weights.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.common import CLOCKS, add_clock, in_turn, machine
from bench.photographs import convert
from bench.stand_ins import BEAMS, FULL, TINY, TOKENS, Size, write_tokenizer
from captioning.cli import FlagParser, command
from captioning.data.images import list_images, load_image
from captioning.data.tokenizer import Tokenizer
from captioning.files import write_json
from captioning.imports import import_guarded
from captioning.inference.captions import caption_features
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.encoder import RANDOM
from captioning.models.inference_weights import prepare
from captioning.profiles import PROFILES
from decoder import Decoder, LoraConfig
from microworld.scenes import generate

CPU = torch.device("cpu")
PHONE = (4000, 3000)  # pixels of a telephone's photograph


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(prog="python -m bench.costs", description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=64, help="photographs read and decoded")
    parser.add_argument("--captions", type=int, default=4, help="images encoded and captioned, at once")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each, in turn")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--tiny", action="store_true", help="small models and pictures: does it run?")
    add_clock(parser)
    parser.set_defaults(clock="cpu")
    return parser


def draw(folder: Path, count: int, size: tuple[int, int]) -> tuple[list[Path], float]:
    """Draw ``count`` photographs; return their paths and mean bytes."""
    generate(folder, "train", count, seed=0, workers=1)
    paths = list_images(folder / "images" / "train")
    return paths, convert(paths, 1, size)


def picture_runs(paths: list[Path], phone: Path, transforms: dict[str, Callable], folder: Path) -> dict[str, Callable]:
    """Return what is timed of pictures, by name of the figure."""
    loaded = [load_image(path) for path in paths]
    shard = folder / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    lines = folder / "captions.jsonl"

    def read_shard() -> None:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                tar.extractfile(member).read()

    def write_lines() -> None:
        with lines.open("w", encoding="utf-8") as file:
            for path in paths:
                file.write(json.dumps({"image": path.stem, "caption": "a red bus stands on a wet street"}) + "\n")

    def draft() -> None:
        with Image.open(io.BytesIO(phone.read_bytes())) as image:
            image.draft("RGB", (448, 448))
            image.convert("RGB")

    runs: dict[str, Callable] = {
        "decode_s": lambda: [load_image(path) for path in paths],
        "tar_read_s": read_shard,
        "write_s": write_lines,
        "decode_phone_s": lambda: load_image(phone),
        "decode_phone_draft_s": draft,
    }
    for name, transform in transforms.items():
        runs[name] = lambda transform=transform: [transform(image) for image in loaded]
    return runs


def model_runs(captioner: Captioner, tokenizer: Tokenizer, count: int) -> dict[str, Callable]:
    """Return what is timed of the models: ``count`` images encoded, and captioned from their features."""
    torch.manual_seed(0)
    pixels = torch.randn(count, 3, *captioner.encoder.patch_embed.img_size)
    features = captioner.encode(pixels)
    return {
        "encode_cpu_s": lambda: captioner.encode(pixels),
        "search_cpu_s": lambda: caption_features(captioner, tokenizer, features, BEAMS, TOKENS),
    }


def build(size: Size) -> Captioner:
    """Build a captioner with random weights, ready to caption."""
    profile = PROFILES[size.profile]
    lora = LoraConfig(rank=32, alpha=32.0, lm_head=True)
    config = CaptionerConfig(profile.encoder, profile.encoder_kwargs, RANDOM, lora=lora)
    torch.manual_seed(0)
    captioner = Captioner(config, Decoder(size.decoder, lora)).merge()
    prepare(captioner, "fp32")
    return captioner


def larger_transform(pixels: int) -> Callable:
    """Return CLIP's preprocessing to ``pixels`` a side, as LLaVA's vision tower takes it."""
    return import_guarded("timm.data").create_transform(
        (3, pixels, pixels), interpolation="bicubic", crop_pct=1.0, is_training=False
    )


def measure(args: argparse.Namespace, size: Size, folder: Path) -> dict[str, Any]:
    """Return the figures: seconds and bytes an image."""
    paths, bytes_an_image = draw(folder / "photographs", args.images, size.photograph)
    phone, phone_bytes = draw(folder / "phone", 1, tuple(side // 10 for side in PHONE) if args.tiny else PHONE)
    clock, captioner = CLOCKS[args.clock], build(size)
    transforms = {"transform_s": captioner.transform, "transform_336_s": larger_transform(336)}
    runs = picture_runs(paths, phone[0], transforms, folder)
    counts = dict.fromkeys(runs, len(paths)) | {"decode_phone_s": 1, "decode_phone_draft_s": 1}
    more = model_runs(captioner, write_tokenizer(folder / "tokenizer"), args.captions)
    counts |= dict.fromkeys(more, args.captions)
    runs |= more
    in_turn(runs, 1, CPU, clock)  # warm-up
    seconds = in_turn(runs, args.repeats, CPU, clock)
    return {
        "machine": machine(CPU),
        "clock": args.clock,
        "image_bytes": bytes_an_image,
        "phone_bytes": phone_bytes,
        **{name: taken / counts[name] for name, taken in seconds.items()},
    }


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the figures."""
    args = build_parser().parse_args(argv)
    for name in ("images", "captions", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, TINY if args.tiny else FULL, Path(folder))
    for name, value in found.items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.4g')}")
    if args.out:
        write_json(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
