"""Training and inference in several processes against one, each with one thread (or one GPU): how much faster?

    python -m bench.processes --out bench/processes      micro models: captions/s of training, images/s of inference
    python -m bench.processes --tiny                 are losses, adapters and captions equal? no times

Training is the trainer's own step with cached features, batches split over the processes and gradients summed;
inference reads, encodes and captions images by beam search, as p2_infer.py does. What is timed runs after a warm-up,
between two points where all processes wait for each other; starting them and loading models is left out. Efficiency is
the rate of N processes over N times that of one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.common import draw_scenes, make_parser, report, timed
from captioning import distributed
from captioning.cli import FlagParser, command, positive_int
from captioning.data.annotations import load_split
from captioning.data.tokenizer import Tokenizer, encode_captions
from captioning.device import pick_device, seed_everything
from captioning.distributed import ALONE, Processes
from captioning.files import read_json, write_json
from captioning.inference.captions import caption_features
from captioning.inference.encode import cached_features, read_pixels
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.inference_weights import prepare
from captioning.profiles import PROFILES, ROOT
from captioning.training.config import TrainConfig
from captioning.training.loading import Split
from captioning.training.run_folder import RunFolder
from captioning.training.trainer import Trainer
from decoder import build_decoder
from microworld.steps import flags

CAPTIONS, BEAMS, TOKENS = 5, 5, 20  # captions an image in training; beams and longest caption in inference
LOSS, WEIGHT = 1e-5, 5e-5  # how far losses and weights may differ: floats are added in another order
TINY = {"images": 10, "epochs": 1, "batch_size": 4, "repeats": 1}


def build_parser() -> FlagParser:
    """Return the command line."""
    parser = make_parser("processes", __doc__, repeats=5)
    add = parser.add_argument
    text = "how many to compare; the first is what the others are compared with"
    add("--processes", type=positive_int, nargs="+", default=[1, 2], metavar="N", help=text)
    add("--images", type=positive_int, default=64, help="of an epoch, and to caption")
    add("--epochs", type=positive_int, default=4, help="timed epochs of one start")
    add("--batch-size", type=positive_int, default=16, help="images of a step, over all processes together")
    add("--tiny", action="store_true", help="compare losses, adapters and captions only; no times")
    add("--worker", type=Path, metavar="FOLDER", help="be one of the processes that this script starts, in FOLDER")
    return parser


class Job:
    """What one process of several measures: a trainer on the scenes of a folder, and inference with what it trained."""

    def __init__(self, args: argparse.Namespace, folder: Path, processes: Processes, device: torch.device) -> None:
        self.args, self.processes, self.folder = args, processes, folder
        profile = PROFILES["micro"]
        config = replace(TrainConfig(), batch_size=args.batch_size, lora_dropout=0.0, epochs=1 + args.epochs)
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

    def timed(self, work: Callable[..., Any], *arguments: Any) -> float:
        """Return the seconds until all processes have done their part."""

        def all_parts() -> None:
            timed(lambda: work(*arguments), self.captioner.device)
            self.processes.wait()

        self.processes.wait()
        return timed(all_parts)

    def train(self, epoch: int) -> None:
        """Take the steps of one epoch."""
        self.trainer.progress.epoch = epoch
        self.captioner.train()
        groups = [[batch] for batch in self.trainer.batches()]
        self.losses += [self.trainer.train_step(loaded) for loaded in self.trainer.train_loader.steps(groups)]

    def infer(self) -> dict[str, str]:
        """Read, encode and caption this process's part of the images."""
        captions: dict[str, str] = {}
        own = self.processes.share(self.paths)
        for start in range(0, len(own), self.args.batch_size):
            batch = own[start : start + self.args.batch_size]
            pixels = read_pixels(self.captioner.transform, batch).to(self.captioner.device)
            texts = caption_features(self.captioner, self.tokenizer, self.captioner.encode(pixels), BEAMS, TOKENS)
            captions |= dict(zip((path.name for path in batch), texts, strict=True))
        return captions

    def measure(self) -> None:
        """Train, caption, and leave rates, losses, adapter and captions in the folder."""
        self.train(0)  # warm-up
        training = [self.timed(self.train, epoch) for epoch in range(1, 1 + self.args.epochs)]
        adapter = {name: tensor.cpu() for name, tensor in self.captioner.adapter_state().items()}
        prepare(self.captioner.merge(), "fp32")
        captions = {k: v for part in self.processes.gather(self.infer()) for k, v in part.items()}  # warm-up too
        inference = [self.timed(self.infer) for _ in range(self.args.epochs)]
        if self.processes.first:
            count = len(self.paths)
            rates = {"captions/s": CAPTIONS * count / median(training), "images/s": count / median(inference)}
            save_file(adapter, self.folder / "adapter.safetensors")
            found = {**rates, "losses": self.losses, "captions": dict(sorted(captions.items()))}
            write_json(self.folder / "result.json", found)


def start(count: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure in ``count`` processes of one thread each; return what they found, the adapter with it."""
    if count == 1:
        Job(args, folder, ALONE, pick_device(args.device)).measure()
    else:
        options = {name: getattr(args, name) for name in ("images", "epochs", "batch_size", "device")}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [*launcher, "-m", "bench.processes", *flags(worker=folder, **options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{count} processes ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return {**read_json(folder / "result.json"), "adapter": load_file(folder / "adapter.safetensors")}


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


@command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 where results differ between numbers of processes."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    torch.set_num_threads(1)
    if args.worker:
        with distributed.join(device) as processes:
            Job(args, args.worker, processes, device).measure()
        return 0
    if args.tiny:
        vars(args).update(TINY)
    with tempfile.TemporaryDirectory() as folder:
        draw_scenes(Path(folder), args.images, "train")
        rows, equal = compare(args, Path(folder))
    if not args.tiny:
        what = f"batches of {args.batch_size} images with {CAPTIONS} captions each, beam {BEAMS}"
        title = f"Several processes: micro models, {what}, median of {args.repeats} starts"
        report(title, rows, device, args.out)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
