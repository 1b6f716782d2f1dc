"""What training/test_distributed.py launches in several processes: a JSON file says which training runs to make."""

import contextlib
import json
import math
import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np

import p2_train
from captioning import distributed
from captioning.device import pick_device
from captioning.models.captioner import Captioner
from captioning.profiles import PROFILES, Profile
from captioning.scoring import evaluator, tokenizers
from captioning.training.rewards import CiderReward
from captioning.training.trainer import Trainer


def poison(processes):
    """Make the loss of step 2 no number, in the last process alone; alone or not, the step must be skipped by all."""
    step, loss = Trainer.train_step, Captioner.loss
    now = {}

    def train_step(trainer, batches):
        now["step"] = trainer.progress.step
        return step(trainer, batches)

    def spoilt(captioner, *args):
        bad = captioner.training and now["step"] == 1 and processes.rank == processes.count - 1
        return loss(captioner, *args) * (math.nan if bad else 1)

    return {(Trainer, "train_step"): train_step, (Captioner, "loss"): spoilt}


def terminate(processes, after=3):
    """Send SIGTERM to the last process in its fourth step."""
    step = Trainer.train_step

    def train_step(trainer, batches):
        if trainer.progress.step == after and processes.rank == processes.count - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, batches)

    return {(Trainer, "train_step"): train_step}


def watch(processes):
    """Make sure that nothing but the gradients of what is trained, once a step, and a few numbers travel."""
    step, reduce = Trainer.train_step, distributed.dist.all_reduce
    sizes = []

    def all_reduce(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    def train_step(trainer, batches):
        names = [
            n
            for n in trainer.captioner.trainable()
            if n.startswith("projector.") or trainer.progress.epoch >= trainer.config.projector_epochs
        ]
        trained = sum(trainer.captioner.get_parameter(name).numel() for name in names)
        sizes.clear()
        loss = step(trainer, batches)
        assert sizes == [1, trained], (sizes, trained)
        return loss

    return {(Trainer, "train_step"): train_step, (distributed.dist, "all_reduce"): all_reduce}


def even(processes):
    """Reward tokens with an even id, since captions of an untrained decoder earn nothing."""

    def reward(self, images, samples, more):
        return np.array([np.mean([token % 2 == 0 for token in sample]) for sample in samples])

    return {(CiderReward, "__call__"): reward}


def digest(references, predictions):
    """Stand for a score that tells every two sets of captions apart."""
    assert references.keys() == predictions.keys()
    return zlib.crc32(json.dumps(predictions).encode()) / 2**32, {}


FAULTS = {
    "poison": poison,
    "terminate": terminate,
    "terminate_later": lambda processes: terminate(processes, 7),
    "watch": watch,
    "even": even,
}


@contextlib.contextmanager
def patched(changes):
    before = {place: getattr(*place) for place in changes}
    try:
        for (owner, name), value in changes.items():
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)


def train(processes, argv, fault=None):
    """Train as ``p2_train.main`` does between joining the processes and parting; return its exit code."""
    with patched(FAULTS[fault](processes) if fault else {}):
        return p2_train.train(p2_train.build_parser().parse_args(argv), processes)


def main(jobs):
    """Make every run of ``jobs``: (flags, fault or None, exit code)."""
    job = json.loads(Path(jobs).read_text())
    PROFILES["micro"] = Profile(**job["profile"])
    evaluator.cider = digest
    tokenizers.pick_tokenizer = lambda name: "ptb"  # no Java
    with distributed.join(pick_device("cpu")) as processes:
        for argv, fault, code in job["runs"]:
            found = train(processes, argv, fault)
            assert found == code, (argv, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
