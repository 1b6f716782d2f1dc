"""Training with cached features and packed captions against a script that has the encoder in its loop.

    python -m bench.train --out bench/train      ViT-L/14 and GPT-2 small with random weights, 5 captions an image
    python -m bench.train --tiny                 tiny models: are loss and gradients equal? no times

Both train the same weights (LoRA of rank 32 on every linear layer, and the projector) on the same captions with Adam.
The script encodes the image of every caption, has one caption a sequence and takes logits at all positions; ours reads
the image's tokens from the feature cache, as p2_train.py does. Building that cache costs the encoder once an image.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import runtime
from bench.common import CLOCKS, Floor, add_clock, add_common_flags, in_turn, peak_memory, report
from captioner import IGNORED, Captioner, CaptionerConfig
from decoder import Decoder, DecoderConfig, LoraConfig
from generation import autocast, cached_features, product_dtype, read_pixels
from microworld.scenes import generate
from profiles import PROFILES
from training import TrainConfig, make_optimizer

CAPTIONS = 5  # an image
TOLERANCE = 1e-3  # the cache rounds features to float16
TINY = (
    DecoderConfig(vocab_size=101, n_positions=64, n_embd=64, n_layer=2, n_head=2), "vit_base_patch32_clip_224.openai",
    {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 48},
)  # fmt: skip
FULL = (DecoderConfig(), PROFILES["full"].encoder, {})


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = runtime.FlagParser(prog="python -m bench.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"],
                        help="fp32, or bf16 under autocast")  # fmt: skip
    parser.add_argument("--images", type=int, default=4, help="images a step of ours, all of their captions together")
    parser.add_argument("--student-batch", type=int, default=5, help="captions a step of the script")
    add_common_flags(parser, repeats=3)
    parser.add_argument("--tiny", action="store_true", help="compare losses and gradients of tiny models; no times")
    add_clock(parser)
    return parser


class Rivals:
    """Both ways to train one captioner on the same images and captions.

    Args:
        size: the decoder's shape, the encoder's name and its arguments.
        images: how many.
        folder: where images and the feature cache go.
        device: where it runs.
    """

    def __init__(self, size: tuple[DecoderConfig, str, dict], images: int, folder: Path, device: torch.device) -> None:
        shape, encoder, kwargs = size
        lora = LoraConfig(rank=32, alpha=32.0)
        self.eos = shape.vocab_size - 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            decoder = Decoder(shape, lora)
            with torch.no_grad():
                for name, parameter in decoder.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.02)  # at zero, as LoRA begins, A would have no gradient
            lengths = torch.randint(8, 15, (images, CAPTIONS)).tolist()
            self.captions = [[torch.randint(0, self.eos, (n,)).tolist() for n in row] for row in lengths]
            self.captioner = Captioner(CaptionerConfig(encoder, kwargs, "random", lora=lora), decoder).to(device)
        self.captioner.train()
        generate(folder, "train", images, seed=0, workers=1)
        paths = data.list_images(folder / "images" / "train")
        self.pixels = read_pixels(self.captioner.transform, paths)
        self.features = cached_features(self.captioner, paths, folder / "cache")
        self.optimizer = make_optimizer(self.captioner, TrainConfig())

    def packed_loss(self) -> torch.Tensor:
        """Ours, of all images."""
        device = self.captioner.device
        features = self.features.gather(range(len(self.features))).float().to(device)
        return self.captioner.loss(features, data.pack_captions(self.captions, self.eos, pad_to_multiple=8).to(device))

    def student_loss(self, start: int, count: int) -> torch.Tensor:
        """The script's, of ``count`` captions from number ``start`` on."""
        device = self.captioner.device
        chosen = [(image, tokens) for image, row in enumerate(self.captions) for tokens in row][start : start + count]
        longest = max(len(tokens) for _, tokens in chosen) + 1
        inputs, targets = torch.full((2, count, longest), self.eos)
        targets[:] = IGNORED
        for row, (_, tokens) in enumerate(chosen):
            inputs[row, : len(tokens) + 1] = torch.tensor([self.eos, *tokens])
            targets[row, : len(tokens) + 1] = torch.tensor([*tokens, self.eos])
        pixels = self.pixels[[image for image, _ in chosen]].to(device)
        prefix = self.captioner.prefix(self.captioner.encode(pixels))  # (n, P, C)
        decoder = self.captioner.decoder
        x = torch.cat([prefix, decoder.embed(inputs.to(device)).to(prefix.dtype)], 1)
        logits = decoder.logits(decoder(x, torch.arange(x.shape[1]))).float()  # (n, P + T, V)
        targets = F.pad(targets.to(device), (prefix.shape[1], 0), value=IGNORED)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def step(self, loss: Callable[[], torch.Tensor], precision: str) -> None:
        """Take one optimiser step."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.captioner.device, precision):
            value = loss()
        value.backward()
        self.optimizer.step()

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient of every trained parameter."""
        parameters = self.captioner.trainable()
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def largest_difference(rivals: Rivals) -> tuple[float, float]:
    """Compare both on all captions in float32: the losses, and the gradient furthest off, both relative to theirs."""
    ours, theirs = rivals.packed_loss(), rivals.student_loss(0, sum(map(len, rivals.captions)))
    mine, wanted = rivals.gradients(ours), rivals.gradients(theirs)
    furthest = max(((mine[k] - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted)
    return abs(ours.item() - theirs.item()) / theirs.item(), furthest


def compare(rivals: Rivals, precision: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time one step of each; return a row each."""
    clock, count = CLOCKS[args.clock], min(args.student_batch, args.images * CAPTIONS)
    runs = {
        "ours": lambda: rivals.step(rivals.packed_loss, precision),
        "script": lambda: rivals.step(lambda: rivals.student_loss(0, count), precision),
    }
    in_turn(runs, 1, device, clock)  # warm-up
    with FlopCounterMode(display=False) as counter:
        runs["ours"]()
    seconds = in_turn(runs, args.repeats, device, clock)
    floor = Floor(device, product_dtype(device, precision), clock)
    captions = {"ours": args.images * CAPTIONS, "script": count}
    rate = {name: captions[name] / taken for name, taken in seconds.items()}
    reached = counter.get_total_flops() / seconds["ours"] / floor.operations_a_second
    return [
        {
            "precision": precision,
            "who": name,
            "captions a step": captions[name],
            "captions/s": rate[name],
            "we are faster by": rate["ours"] / rate[name],
            "share of the matrix rate": f"{reached:.0%} ({floor})" if name == "ours" else "-",
        }
        for name in runs
    ]


@runtime.command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 where losses or gradients in float32 differ by more than ``TOLERANCE``."""
    args = build_parser().parse_args(argv)
    device = runtime.pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        rivals = Rivals(TINY if args.tiny else FULL, args.images, Path(folder), device)
        if args.tiny:
            loss, gradient = largest_difference(rivals)
            print(f"largest relative difference: {loss:.1e} in the loss, {gradient:.1e} in a gradient")
            return int(max(loss, gradient) > TOLERANCE)
        rows = [row for precision in args.precision for row in compare(rivals, precision, args, device)]
    report(f"Training: ViT-L/14 and GPT-2 small with random weights, {CAPTIONS} captions an image, {args.clock} time, "
           f"peak memory {peak_memory(device):.1f} GB", rows, device, args.out)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
