"""Measure on this machine what an image costs a CPU, for ``python -m bench.scale_study``.

    OMP_NUM_THREADS=1 python -m bench.scale_study.costs --out bench/scale_study/costs.json

Seconds are processor time of one thread, so that other work on the machine disturbs them little.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from bench.common import in_turn, machine
from bench.photographs import convert
from captioning.cli import FlagParser, command, positive_int
from captioning.data.images import load_image
from captioning.data.listing import list_images
from captioning.files import write_json
from captioning.imports import import_guarded
from microworld.scenes import generate

SIZES = ((640, 480), (4000, 3000))  # of COCO's photographs, and of a telephone's


def make_runs(paths: list[Path], phone: Path, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what is timed: the telephone's photograph once, all others over ``paths``."""
    create = import_guarded("timm.data").create_transform
    small, large = (create((3, n, n), interpolation="bicubic", crop_pct=1.0, is_training=False) for n in (224, 336))
    loaded, shard, lines = [load_image(path) for path in paths], folder / "shard.tar", folder / "captions.jsonl"
    with tarfile.open(shard, "w") as tar:
        for path in paths:
            tar.add(path, path.name)

    def read_shard() -> None:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                (tar.extractfile(member) or io.BytesIO()).read()

    def write_lines() -> None:
        with lines.open("w", encoding="utf-8") as file:
            for path in paths:
                file.write(json.dumps({"image": path.stem, "caption": "a red bus stands on a wet street"}) + "\n")

    def draft() -> None:
        with Image.open(phone) as image:
            image.draft("RGB", (448, 448))
            image.convert("RGB")

    return {
        "decode_s": lambda: [load_image(path) for path in paths],
        "tar_read_s": read_shard,
        "write_s": write_lines,
        "decode_phone_s": lambda: load_image(phone),
        "decode_phone_draft_s": draft,
        "transform_s": lambda: [small(image) for image in loaded],
        "transform_336_s": lambda: [large(image) for image in loaded],
    }


@command
def main(argv: list[str] | None = None) -> int:
    """Measure and write the figures: seconds and bytes an image."""
    parser = FlagParser(prog="python -m bench.scale_study.costs", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    parser.add_argument("--images", type=positive_int, default=64, help="photographs of 640 x 480")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, count in (("train", args.images), ("val", 1)):
            generate(folder, split, count, seed=0, workers=1)
        paths, phone = (list_images(folder / "images" / split) for split in ("train", "val"))
        image_bytes, phone_bytes = (convert(p, 1, size) for p, size in zip((paths, phone), SIZES, strict=True))
        runs = make_runs(paths, phone[0], folder)
        in_turn(runs, 1, clock=time.process_time)  # warm-up
        seconds = in_turn(runs, 3, clock=time.process_time)
    figures = {name: taken / (1 if "phone" in name else len(paths)) for name, taken in seconds.items()}
    sizes = {"image_bytes": image_bytes, "phone_bytes": phone_bytes}
    write_json(args.out, {"machine": machine(), **sizes, **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
