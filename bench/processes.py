"""Training and inference in several processes against one, each with one thread (or one GPU): how much faster?

    python -m bench.processes --out bench/processes      micro models: captions/s of training, images/s of inference
    python -m bench.processes --tiny                 are losses, adapters and captions equal? no times

Training is the trainer's own step with cached features, batches split over the processes and gradients summed;
inference reads, encodes and captions images by beam search, as p2_infer.py does. What is timed runs between two points
where all processes wait for each other, behind a warm-up; starting them and loading models is left out. Efficiency is
the rate of N processes over N times that of one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.common import add_common_flags, report
from captioning import cli, distributed
from captioning.cli import FlagParser
from captioning.data.annotations import load_split
from captioning.data.tokenizer import Tokenizer, encode_captions
from captioning.device import pick_device, seed_everything
from captioning.distributed import Processes
from captioning.files import write_json
from captioning.inference.captions import caption_features
from captioning.inference.encode import cached_features, read_pixels
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.inference_weights import prepare
from captioning.profiles import PROFILES
from captioning.training.config import TrainConfig
from captioning.training.run_folder import RunFolder
from captioning.training.trainer import Split, Trainer
from decoder import build_decoder
from microworld.scenes import generate

CAPTIONS = 5  # an image
LOSS, WEIGHT = 1e-5, 5e-5  # how far losses and weights may differ: floats are added in another order
TINY = {"images": 10, "batch_size": 4, "beam_size": 2, "max_new_tokens": 6, "lora_rank": 4}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(prog="python -m bench.processes", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="N",
        help="how many to compare; the first is what the others are compared with",
    )
    parser.add_argument("--images", type=int, default=64, help="of an epoch, and to caption")
    parser.add_argument("--epochs", type=int, default=4, help="timed epochs of one start")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a step, over all processes together")
    parser.add_argument("--beam-size", type=int, default=5, help="beams in inference")
    parser.add_argument("--max-new-tokens", type=int, default=20, help="longest caption in tokens")
    parser.add_argument("--lora-rank", type=int, default=32, help="LoRA's rank")
    parser.add_argument("--tiny", action="store_true", help="compare losses, adapters and captions only; no times")
    parser.add_argument(
        "--worker",
        type=Path,
        metavar="FOLDER",
        help="be one of the processes that this script starts, with its files in FOLDER",
    )
    add_common_flags(parser, repeats=5)
    return parser


class Job:
    """What one process of several measures: a trainer on the scenes of a folder, and inference with what it trained."""

    def __init__(self, args: argparse.Namespace, processes: Processes, device: torch.device) -> None:
        self.args, self.processes, self.folder = args, processes, args.worker
        profile = PROFILES["micro"]
        config = replace(
            TrainConfig(),
            batch_size=args.batch_size,
            lora_dropout=0.0,
            lora_rank=args.lora_rank,
            epochs=1 + args.epochs,
        )
        seed_everything(0)
        self.tokenizer = Tokenizer(profile.tokenizer)
        shape = CaptionerConfig(profile.encoder, profile.encoder_kwargs, profile.encoder_weights, lora=config.lora())
        self.captioner = Captioner(shape, build_decoder(profile.decoder, config.lora())).to(device)
        self.samples = load_split(self.folder, "train")
        self.paths = [sample.path for sample in self.samples]
        features = cached_features(self.captioner, self.paths, self.folder / "cache", processes=processes)
        split = Split(self.samples, encode_captions(self.samples, self.tokenizer, 60), features)
        self.trainer = Trainer(self.captioner, self.tokenizer, split, split, config, RunFolder(self.folder), processes)
        self.losses: list[float] = []

    def timed(self, work: Any, *arguments: Any) -> float:
        """Return the seconds until all processes have done their part."""
        self.processes.wait()
        start = time.perf_counter()
        work(*arguments)
        if self.captioner.device.type == "cuda":
            torch.cuda.synchronize(self.captioner.device)
        self.processes.wait()
        return time.perf_counter() - start

    def train(self, epoch: int) -> None:
        """Take the steps of one epoch."""
        self.trainer.progress.epoch = epoch
        self.captioner.train()
        self.losses += [self.trainer.train_step([batch]) for batch in self.trainer.batches()]

    def infer(self) -> dict[str, str]:
        """Read, encode and caption this process's part of the images."""
        captions, own = {}, self.processes.share(self.paths)
        for start in range(0, len(own), self.args.batch_size):
            batch = own[start : start + self.args.batch_size]
            pixels = read_pixels(self.captioner.transform, batch).to(self.captioner.device)
            texts = caption_features(
                self.captioner,
                self.tokenizer,
                self.captioner.encode(pixels),
                self.args.beam_size,
                self.args.max_new_tokens,
            )
            captions |= dict(zip((path.name for path in batch), texts, strict=True))
        return captions

    def measure(self) -> None:
        """Train, caption, and leave rates, losses, adapter and captions in the folder."""
        warm_up = [self.timed(self.train, 0)]
        training = [self.timed(self.train, epoch) for epoch in range(1, 1 + self.args.epochs)] or warm_up
        adapter = {name: tensor.cpu() for name, tensor in self.captioner.adapter_state().items()}
        prepare(self.captioner.merge(), "fp32")
        captions = {k: v for part in self.processes.gather(self.infer()) for k, v in part.items()}  # warm-up too
        inference = [self.timed(self.infer) for _ in range(self.args.epochs)]
        if self.processes.first:
            count = len(self.paths)
            save_file(adapter, self.folder / "adapter.safetensors")
            write_json(
                self.folder / "result.json",
                {
                    "captions/s": CAPTIONS * count / median(training),
                    "images/s": count / median(inference),
                    "losses": self.losses,
                    "captions": dict(sorted(captions.items())),
                },
            )


def start(count: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure in ``count`` processes of one thread each; return what they found, the adapter with it."""
    names = ("images", "epochs", "batch_size", "beam_size", "max_new_tokens", "lora_rank", "device")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)) if count > 1 else ()
    command = [sys.executable, *several, "-m", "bench.processes", "--worker", str(folder), *flags]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{count} processes ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    adapter = load_file(folder / "adapter.safetensors")
    return {**json.loads((folder / "result.json").read_text()), "adapter": adapter}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, int]:
    """Return how far two results are apart: in the losses, in the adapter, and how many captions differ."""
    loss = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    weight = max((ours["adapter"][k] - tensor).abs().max().item() for k, tensor in theirs["adapter"].items())
    return loss, weight, sum(ours["captions"][k] != text for k, text in theirs["captions"].items())


def compare(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """Start every number of processes in turn; return a row of medians each, and whether all results are equal."""
    results: dict[int, list[dict[str, Any]]] = {count: [] for count in args.processes}
    for _ in range(args.repeats):
        for count, found in results.items():
            found.append(start(count, args, folder))
    base, rows, equal = args.processes[0], [], True
    for count, found in results.items():
        loss, weight, captions = differences(found[0], results[base][0])
        equal &= loss <= LOSS and weight <= WEIGHT and captions == 0
        if count != base:
            print(
                f"{count} processes against {base}: losses differ by {loss:.1e}, weights by {weight:.1e}, "
                f"captions of {captions} images"
            )
        row: dict[str, Any] = {"processes": count}
        for what, key in (("training, captions/s", "captions/s"), ("inference, images/s", "images/s")):
            rate, alone = (median(result[key] for result in results[n]) for n in (count, base))
            row |= {what: rate, f"{what.split(',')[0]} efficiency": f"{rate * base / (alone * count):.0%}"}
        rows.append(row)
    return rows, equal


@cli.command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 where results differ between numbers of processes."""
    args = build_parser().parse_args(argv)
    for name in ("images", "epochs", "batch_size", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    device = pick_device(args.device)
    torch.set_num_threads(1)
    if args.worker:
        with distributed.join(device) as processes:
            Job(args, processes, device).measure()
        return 0
    if args.tiny:
        vars(args).update(TINY, repeats=1, epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), "train", args.images, seed=0, workers=1)
        rows, equal = compare(args, Path(folder))
    if not args.tiny:
        report(
            f"Several processes: micro models, batches of {args.batch_size} images with {CAPTIONS} captions each, "
            f"beam {args.beam_size}, median of {args.repeats} starts",
            rows,
            device,
            args.out,
        )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
