"""What float32 and bf16 take on this device, in turn in one run: a training step, a search, the encoder, LLaVA.

    OMP_NUM_THREADS=1 python -m bench.precision --device cpu      full-size models with random weights
    python -m bench.precision --tiny                              small ones: does every part run?

What ``--precision auto`` picks on a processor rests on this table (docs/full_size.md). LLaVA-1.5-7B has few of its
layers here; the others are alike.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import decode, llava, train
from bench.common import CLOCKS, draw_scenes, in_turn, make_parser, report
from captioning.cli import FlagParser, command, positive_int
from captioning.data.images import load_image
from captioning.device import autocast, pick_device
from captioning.models.inference_weights import prepare_linears
from captioning.models.llava import PROMPTS, load_llava
from captioning.profiles import PROFILES
from decoder import cast_frozen

DTYPES = decode.DTYPES
Runs = dict[str, Callable[[], Any]]
TOKENS = 16  # of an answer of LLaVA


def build_parser() -> FlagParser:
    """Return the command line."""
    parser = make_parser("precision", __doc__, clock=True)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="which")
    add("--images", type=positive_int, default=4, help="images a training step, a search and a batch of the encoder")
    add("--layers", type=positive_int, default=2, help="layers of LLaVA's tower and language model, of 24 and 32")
    add("--tiny", action="store_true", help="tiny models, and the micro LLaVA")
    return parser


def training(args: argparse.Namespace, device: torch.device, folder: Path) -> Runs:
    """Return a step as p2_train.py takes it, five captions an image, in either type."""
    rivals = train.Rivals(train.TINY if args.tiny else train.FULL, args.images, folder, device)
    cast_frozen(rivals.captioner.decoder, torch.bfloat16)  # copies that float32 does not look at
    every = rivals.first(train.CAPTIONS)
    return {name: lambda n=name: rivals.step(lambda: rivals.packed_loss(every), n) for name in DTYPES}


def searching(args: argparse.Namespace, device: torch.device, folder: Path) -> Runs:
    """Return a beam search as p2_infer.py makes it, from the projected image tokens on."""
    size = decode.TINY if args.tiny else decode.FULL
    return {name: decode.Rivals(size, args.images, name, device).ours for name in DTYPES}


def encoding(args: argparse.Namespace, device: torch.device, folder: Path) -> Runs:
    """Return the encoder's work as in p2_infer.py."""
    rivals = train.Rivals(train.TINY if args.tiny else train.FULL, args.images, folder, device)
    pixels, runs = rivals.pixels.to(device), {}
    for name, dtype in DTYPES.items():
        captioner = copy.deepcopy(rivals.captioner).eval()
        prepare_linears(captioner.encoder, dtype)

        def run(captioner: Any = captioner, name: str = name) -> None:
            with torch.no_grad(), autocast(device, name):
                captioner.encode(pixels)

        runs[name] = run
    return runs


def answering(args: argparse.Namespace, device: torch.device, folder: Path) -> Runs:
    """Return a batch of answers of LLaVA, of one length."""
    paths, runs = draw_scenes(folder, args.images), {}
    for name, dtype in DTYPES.items():
        if args.tiny:
            model = load_llava(PROFILES["micro"].llava, device, dtype)
        else:
            model = llava.random_llava(args.layers, dtype, device)
        rows = [model.row(load_image(path), PROMPTS[1]) for path in paths]
        runs[name] = lambda model=model, rows=rows: model.generate(rows, max_new_tokens=TOKENS)
    return runs


PARTS: dict[str, Callable[[argparse.Namespace, torch.device, Path], Runs]] = {
    "training": training,
    "search": searching,
    "encoder": encoding,
    "LLaVA": answering,
}


def measure(part: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time one part in either type; return its row."""
    clock = CLOCKS[args.clock]
    with tempfile.TemporaryDirectory() as folder:
        runs = PARTS[part](args, device, Path(folder))
        in_turn(runs, 1, device, clock)  # warm-up
        seconds = in_turn(runs, args.repeats, device, clock)
    row = {"part": part, "images": args.images} | {f"{name}, s": taken for name, taken in seconds.items()}
    return row | {"fp32 / bf16": seconds["fp32"] / seconds["bf16"]}


@command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    rows = [measure(part, args, device) for part in args.parts]
    size = "small models" if args.tiny else f"full size, random weights, LLaVA-1.5-7B with {args.layers} layers"
    report(f"float32 and bf16: {size}, {args.clock} time", rows, device, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
