"""What training/test_distributed.py launches in several processes: a JSON file says which trainings to run."""

import contextlib
import json
import math
import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

import p2_train
from captioning import distributed
from captioning.data.feature_cache import CacheSpec, FeatureCache
from captioning.device import pick_device
from captioning.models.captioner import Captioner
from captioning.profiles import PROFILES, Profile
from captioning.scoring import evaluator, tokenizers
from captioning.training.rewards import CiderReward
from captioning.training.trainer import Trainer


def poison(processes):
    """Make the loss of step 2 NaN, in the last process only; with others or not, all must skip the step."""
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
        assert sizes == [trained, 1], (sizes, trained)
        return loss

    return {(Trainer, "train_step"): train_step, (distributed.dist, "all_reduce"): all_reduce}


def even(processes):
    """Reward tokens with an even id, since captions of an untrained decoder earn nothing."""

    def reward(self, images, samples, more):
        return np.array([np.mean([token % 2 == 0 for token in sample]) for sample in samples])

    return {(CiderReward, "__call__"): reward}


def digest(references, predictions):
    """Stand for a score that is another for every two sets of captions."""
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


def exchange(crew):
    """Check every exchange of three processes."""
    rank, count = crew.rank, crew.count
    assert (count, crew.first) == (3, rank == 0)
    assert torch.distributed.get_backend() == "gloo"
    assert [list(crew.share(range(n))) for n in (7, 1)] == [list(range(rank, 7, 3)), [0] if rank == 0 else []]
    assert crew.gather(f"of {rank}") == ["of 0", "of 1", "of 2"]
    assert crew.from_first(lambda: torch.full((2,), rank)).tolist() == [0, 0]
    assert crew.total(rank, 0.25) == [3.0, 0.75]
    assert math.isnan(crew.total(math.nan if rank == 2 else 1.0)[0])
    assert crew.any(rank == 1)
    assert not crew.any(False)
    done = []
    assert crew.spread(lambda i: done.append(i) or i * i, range(8)) == [i * i for i in range(8)]
    assert done == list(range(rank, 8, 3))
    assert crew.spread(str, []) == []
    a, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3))
    a.grad = torch.full((2, 2), float(rank))
    b.grad = torch.ones(3) if rank == 1 else None  # a process without an image has no gradient
    crew.sum_gradients([a, b])
    assert a.grad.tolist() == [[3.0, 3.0]] * 2
    assert b.grad.tolist() == [1.0] * 3


def fail(crew):
    """Check that an error of one process is raised there and ends the others silently."""

    def work():
        if crew.rank:
            raise ValueError(f"process {crew.rank} has no image")

    refused(crew, 1, "process 1 has no image", lambda: crew.together(work))
    differs = "captions differ between process 0 and process 2"
    refused(crew, 0, differs, lambda: crew.together(lambda: crew.check_same("captions", 7 if crew.rank == 2 else 8)))


def refused(crew, rank, message, work):
    """Check that ``work`` is refused with this message in the process ``rank``, and that the others exit."""
    try:
        work()
    except ValueError as error:
        assert crew.rank == rank, error
        assert message in str(error)
    except SystemExit as stop:
        assert crew.rank != rank
        assert stop.code == 2
    else:
        raise AssertionError(f"not refused: {message}")


def share_a_cache(crew, folder):
    """Check that several processes encode each image once, and together refuse one that is broken."""
    if crew.first:
        for number in range(11):
            (folder / f"image{number:02d}").write_text(str(number))
    crew.wait()
    paths, encoded = sorted(folder.glob("image*")), []

    def encode(batch):
        encoded.extend(batch)
        if any(path.read_text() == "broken" for path in batch):
            raise ValueError(f"{batch[0].name} is broken")
        return torch.stack([torch.full((2, 3), float(path.read_text())) for path in batch])

    def open_cache(paths, name="cache", limit=math.inf):
        encoded.clear()
        spec = CacheSpec(folder / name, {"encoder": "e"}, (2, 3), limit=limit, batch_size=2)
        return FeatureCache.open(spec, paths, encode, crew)

    open_cache(paths, limit=7 * 12)
    assert sorted(path for part in crew.gather(encoded) for path in part) == paths[:7]
    cache = open_cache(paths)
    assert sorted(path for part in crew.gather(encoded) for path in part) == paths[7:]
    assert cache.gather(range(len(paths)))[:, 0, 0].tolist() == [float(path.read_text()) for path in paths]
    open_cache(paths)
    assert not encoded
    crew.wait()
    if crew.first:
        (folder / "image-late").write_text("broken")
    crew.wait()
    refused(crew, 0, "image-late is broken", lambda: open_cache([folder / "image-late", *paths]))
    # As on two machines without a common file system.
    refused(crew, 2, "does not see the features", lambda: open_cache(paths, f"cache-{crew.rank // 2}"))


def main(jobs):
    """Do what the file ``jobs`` says: trainings as (flags, fault or None, exit code), and checks of exchanges."""
    job = json.loads(Path(jobs).read_text())
    PROFILES["micro"] = Profile(**job["profile"])
    evaluator.cider = digest
    tokenizers.pick_tokenizer = lambda name: "ptb"  # no Java
    with distributed.join(pick_device("cpu")) as processes:
        if "exchanges" in job:
            exchange(processes)
            fail(processes)
            share_a_cache(processes, Path(job["exchanges"]))
            Path(job["exchanges"], f"done{processes.rank}").touch()
        for argv, fault, code in job["runs"]:
            found = train(processes, argv, fault)
            assert found == code, (argv, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
