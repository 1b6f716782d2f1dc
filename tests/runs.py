"""Trainings of the tiny captioner through the command line, and what they leave in their folders."""

import json
import os

import torch

from captioning.models.adapter import read_adapter
from captioning.training.trainer import Trainer
from p2_train import main

STEPS = 3  # of an epoch: 12 images in batches of 4
SMALL = (
    "--profile micro --device cpu --batch-size 4 --epochs 2 --lora-rank 4 --val-images 4 --beam-size 2 "
    "--max-new-tokens 8 --log-every 1"
)


def train(out, *flags):
    """Train for two epochs, or by other flags; return the exit code."""
    return main([*SMALL.split(), "--out", str(out), *map(str, flags)])


def records(out, *kinds):
    """Return the lines of metrics.jsonl, all or of these kinds, without the one number that a clock makes."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if not kinds or line["kind"] in kinds]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in chosen]


def weights(out, name):
    """Return the tensors of the ``best`` or the ``last`` adapter."""
    return read_adapter(out / f"{name}.safetensors")[1]


def same(ours, theirs):
    """Whether two state dicts are equal to the last bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_same_run(out, other):
    """The same numbers and the same adapters, to the last bit."""
    assert records(out) == records(other)
    for name in ("best", "last"):
        assert same(weights(out, name), weights(other, name)), name


def signal_at(monkeypatch, step, number):
    """Send ourselves a signal in the middle of ``step``."""
    take = Trainer.train_step

    def interrupted(trainer, batches):
        if trainer.progress.step == step:
            os.kill(os.getpid(), number)
        return take(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
