"""Training on a fake GPU: the steps of an epoch, as the trainers take them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from fake_gpu import FakeGpu, name_of  # first: it loads the hooks before torch  # isort: skip

import torch
from PIL import Image
from stage import CAPTIONS, FULL, Facts, Ids, build, captions, described

import decoder as decoder_module
from captioning.data.annotations import Sample
from captioning.data.batches import IGNORED, PackedBatch
from captioning.device import product_dtype
from captioning.inference.encode import cached_features
from captioning.inference.search import Step
from captioning.models.captioner import Captioner
from captioning.training import scst
from captioning.training.config import SCST_NUMBERS, SETTINGS, TrainConfig
from captioning.training.loading import Split
from captioning.training.run_folder import RunFolder
from captioning.training.setup import free_encoder
from captioning.training.trainer import Trainer


@contextmanager
def split_of(captioner: Captioner, images: int) -> Iterator[Split]:
    """A split whose images are copies of one file, so that one row of features serves all."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        Image.new("RGB", (240, 240), "teal").save(path)
        samples = [Sample(number, path, ("a",) * CAPTIONS) for number in range(images)]
        features = cached_features(captioner, [path] * images, Path(folder) / "cache")
        yield Split(samples, captions(images), features)


def train(gpu: FakeGpu, config: TrainConfig, layers: int = 2, kind: type[Trainer] = Trainer) -> Facts:
    """Train an epoch of a few steps, and return what the last full one cost."""
    gpu.ledger.phase = ""  # of what comes before the first step
    captioner = build(gpu, config, layers)
    captioner.attention = config.attention
    config = replace(config, log_every=1000, save_every=1000)
    images = 10 if config.batch_by == "captions" else 2 * config.batch_size
    with gpu.rehearsed(), split_of(captioner, images) as split, tempfile.TemporaryDirectory() as out:
        count_targets(gpu)
        trainer = kind(captioner, Ids(), split, split, config, RunFolder(Path(out)))
        books = Books(gpu, trainer)
        trainer.train_epoch(mock.MagicMock())
        return books.facts()


def validate(gpu: FakeGpu) -> Facts:
    """Take what validation computes: the loss of two batches, and captions of two images."""
    gpu.ledger.phase = "validation"
    captioner, config = build(gpu, SETTINGS["best"]), replace(SETTINGS["best"], max_new_tokens=8)
    with gpu.rehearsed() as ledger, split_of(captioner, 32) as split, tempfile.TemporaryDirectory() as out:
        count_targets(gpu)
        trainer = Trainer(captioner, Ids(), split, split, config, RunFolder(Path(out)))
        before = ledger.snapshot()
        trainer.sanity_check()
    return described(ledger.kernels - before[0], ledger.waits - before[1])


def count_targets(gpu: FakeGpu) -> None:
    """Let boolean indexing find as many rows as the newest batch has targets."""
    plain = PackedBatch.__init__

    def counted(batch: PackedBatch, *args: Any, **kwargs: Any) -> None:
        plain(batch, *args, **kwargs)
        if batch.targets.device.type == "cpu":
            targets = int((batch.targets != IGNORED).sum())
            gpu.ledger.kept = lambda mask: targets

    gpu.replace(PackedBatch, "__init__", counted)


def train_rewarded(gpu: FakeGpu) -> Facts:
    """Take steps of self-critical training, whose captions are searched for first, and count a step of that search."""
    config = replace(SETTINGS["best"], **SCST_NUMBERS, objective="scst", max_new_tokens=8)
    starts: list[int] = []
    plain = scst.within_vocabulary

    def booked(step: Step, size: int) -> Step:
        def decode(*args: torch.Tensor) -> torch.Tensor:
            starts.append(gpu.ledger.kernels.total())
            return inner(*args)

        inner = plain(step, size)
        return decode

    gpu.replace(scst, "within_vocabulary", booked)
    facts = train(gpu, config, kind=scst.ScstTrainer)
    facts["counts"]["kernels of a search's step"] = starts[-2] - starts[-3]
    return facts


def cache(gpu: FakeGpu, images: int = 32) -> Facts:
    """Encode two batches of images into a feature cache."""
    captioner = build(gpu, SETTINGS["best"])
    with tempfile.TemporaryDirectory() as folder, gpu.rehearsed() as ledger:
        paths = [Path(folder) / f"{number}.png" for number in range(images)]
        for number, path in enumerate(paths):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
        features = cached_features(captioner, paths, Path(folder) / "cache")
        assert features.gather([0]).dtype == torch.float16
        facts = described(ledger.kernels, ledger.waits)
        free_encoder(captioner, Split([], [], features))
    facts["counts"]["encoder's tensors left"] = sum(p.device.type == "cuda" for p in captioner.encoder.parameters())
    return facts


class Books:
    """Books each step of a trainer by phase, and looks at the gradients that its optimiser gets."""

    def __init__(self, gpu: FakeGpu, trainer: Trainer) -> None:
        self.gpu, self.trainer = gpu, trainer
        self.ledger, self.optimizer = gpu.ledger, trainer.optimizer
        self.ends: list[tuple[Counter, Counter]] = []
        self.wrong: list[str] = []
        self.ledger.phase = "forward"
        self.optimizer.register_step_pre_hook(self.before_update)
        self.optimizer.register_step_post_hook(self.after_update)
        plain = torch.Tensor.backward

        def backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            self.loss = tensor
            self.ledger.phase = "backward"
            plain(tensor, *args, **kwargs)
            self.ledger.phase = "between"

        gpu.replace(torch.Tensor, "backward", backward)
        merged = decoder_module._merged_weight

        def merging(layer: Any) -> torch.Tensor:
            phase, self.ledger.phase = self.ledger.phase, "merging"
            weight = merged(layer)
            self.ledger.phase = phase
            return weight

        gpu.replace(decoder_module, "_merged_weight", merging)

    def before_update(self, *args: Any) -> None:
        """Check every gradient."""
        for name, parameter in self.trainer.captioner.trainable().items():
            grad = parameter.grad
            found = None if grad is None else (grad.device.type, grad.dtype, grad.shape)
            if found != ("cuda", torch.float32, parameter.shape):
                self.wrong.append(f"{name}: {found}")
        self.ledger.phase = "optimiser"

    def after_update(self, *args: Any) -> None:
        """Close a step's books."""
        self.ends.append(self.ledger.snapshot())
        self.ledger.phase = "forward"

    def facts(self) -> Facts:
        """Return what the last step cost, and what is wrong with gradients and types."""
        (kernels, waits), (kernels_before, waits_before) = self.ends[-1], self.ends[-2]
        step = kernels - kernels_before
        wanted = name_of(product_dtype(self.trainer.device, self.trainer.config.precision))
        booked = [(name, dtype) for phase, name, dtype in self.ledger.products if phase not in ("", "merging")]
        linear = {dtype for name, dtype in booked if name in ("mm", "addmm", "addmm_")}  # the sum is merged in float32
        self.wrong += [f"products in {dtype}, not {wanted}" for dtype in linear - {wanted}]
        self.wrong += [] if self.loss.dtype == torch.float32 else [f"a loss in {self.loss.dtype}"]
        return described(step, waits - waits_before, self.wrong)


def train_full(gpu: FakeGpu) -> Facts:
    """Train `best` at full size, and find the cost of a layer from a decoder of fewer."""
    few, facts = (train(gpu, SETTINGS["best"], layers) for layers in (2, FULL.n_layer))
    for phase in ("forward", "backward"):
        more = facts["counts"][phase] - few["counts"][phase]
        facts["counts"][f"{phase} of a layer"] = more // (FULL.n_layer - 2)
    return facts
