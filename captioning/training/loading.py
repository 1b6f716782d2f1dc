"""The data of a training step: read and packed on the CPU, ahead of the step where a GPU works meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from captioning.data.annotations import Sample
from captioning.data.batches import Batch, PackedBatch, pack_captions
from captioning.data.feature_cache import FeatureCache
from captioning.device import moved, page_locked
from captioning.distributed import Processes
from captioning.read_ahead import read_ahead


@dataclass
class Split:
    """One split, ready to train or validate on: samples, their caption tokens, and the encoder's tokens of each."""

    samples: list[Sample]
    captions: list[list[list[int]]]
    features: FeatureCache
    unreadable: int = 0  # images that are left out

    @classmethod
    def of_readable(cls, samples: list[Sample], captions: list[list[list[int]]], features: FeatureCache) -> Split:
        """Return the split of those samples whose images could be read."""
        if (left_out := len(samples) - len(features.readable)) == 0:
            return cls(samples, captions, features)
        kept = features.readable
        return cls([samples[i] for i in kept], [captions[i] for i in kept], features.only(kept), left_out)

    def tokens(self, indices: Sequence[int], device: torch.device) -> torch.Tensor:
        """Return the encoder's tokens of some samples: (B, N, D), float32."""
        return moved(self.features.gather(list(indices)), device).float()


@dataclass(frozen=True)
class LoadedBatch:
    """A batch, and this process's part of it in main memory, from where a GPU gets it without a wait.

    Attributes:
        batch: all of it.
        own: the places in the batch of this process's b images; there may be none.
        features: their encoder tokens as they are stored, (b, N, D); None without images.
        packed: their captions; likewise.
    """

    batch: Batch
    own: Sequence[int]
    features: torch.Tensor | None
    packed: PackedBatch | None

    @property
    def captions(self) -> list[list[list[int]]]:
        """Captions of this process's images, as token ids."""
        return [self.batch.captions[place] for place in self.own]

    def on(self, device: torch.device) -> tuple[torch.Tensor, PackedBatch]:
        """Return encoder tokens (b, N, D) in float32, converted on the device, and captions."""
        assert self.features is not None and self.packed is not None
        return moved(self.features, device).float(), self.packed.each(lambda tensor: moved(tensor, device))


class Loader:
    """Loads batches of a split.

    Args:
        split: whose.
        eos: id of EOS.
        device: where they go.
        processes: those that share a batch.
    """

    def __init__(self, split: Split, eos: int, device: torch.device, processes: Processes) -> None:
        self.split, self.eos, self.device, self.processes = split, eos, device, processes

    def load(self, batch: Batch) -> LoadedBatch:
        """Load this process's part of a batch."""
        own = self.processes.share(range(len(batch.images)))
        if not own:
            return LoadedBatch(batch, own, None, None)
        features = self.split.features.gather([batch.images[place] for place in own])
        packed = pack_captions([batch.captions[place] for place in own], self.eos, pad_to_multiple=8)
        return LoadedBatch(
            batch, own, page_locked(features, self.device), packed.each(lambda tensor: page_locked(tensor, self.device))
        )

    def steps(self, groups: Sequence[Sequence[Batch]]) -> Iterator[list[LoadedBatch]]:
        """Yield the batches of each step, loaded: beside a GPU in a thread, while it works on the steps before.

        On a CPU a thread would only take time from the step, and images that the cache has no room for are encoded
        by the device, which is not for two threads at once.
        """
        if self.device.type == "cpu" or not self.split.features.complete:
            yield from ([self.load(batch) for batch in group] for group in groups)
            return
        for [(_, future)] in read_ahead(groups, lambda group: [self.load(batch) for batch in group], 1, threads=1):
            yield future.result()
