"""Training batches: captions packed after their image, and the order in which images or captions come.

A training sequence holds one image and those of its captions that are in the batch, ``[prefix | caption 1 | … |
caption k]``. Every caption attends to the prefix and to itself only, and its positions restart after the prefix, so one
pass gives exactly the losses and gradients of k separate sequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from captioning.data.annotations import Sample

IGNORED = -100  # the label that torch's cross_entropy leaves out


class Batch(NamedTuple):
    """What one pass learns from: the places of B images in their split, and of each the captions, as token ids."""

    images: list[int]
    captions: list[list[list[int]]]


@dataclass
class PackedBatch:
    """Captions of B images, those of one image side by side in a row of S tokens; long tensors, (B, S) but for slots.

    Attributes:
        inputs: ``BOS tokens`` of every caption, then padding.
        targets: ``tokens EOS`` of every caption, -100 on padding.
        positions: 0, 1, … for every caption; the model adds the length of the prefix.
        segments: number of the caption, from 1; 0 on padding. A token sees its own segment and the prefix.
        slots: (B, k, T), the index in the row of each token of each caption, -1 past its end; None if unknown.
        kept: (n,), which of the B * S places have a target, in order; None: the device is asked, and waited for.
        longest: tokens of the longest caption, BOS included; None if unknown.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    slots: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    longest: int | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the batch on ``device``."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """Return the batch with ``function`` of each of its tensors."""
        changed: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed)

    def places(self, bos: bool = False) -> torch.Tensor:
        """Return which places of ``targets``, flattened, are no padding: (n,).

        With ``bos`` they are those of ``[BOS | targets]``, (B, 1 + S), flattened, where BOS is a target too.
        """
        kept = self.kept
        if kept is None:
            kept = (self.targets.flatten() != IGNORED).nonzero()[:, 0]
        if not bos:
            return kept
        rows, length = self.targets.shape
        first = torch.arange(rows, device=kept.device) * (1 + length)
        return torch.cat([first, kept + kept // length + 1]).sort().values

    def positions_with_prefix(self, count: int) -> torch.Tensor:
        """Return the positions (B, P+S) of ``[prefix of count tokens | captions]``."""
        prefix = torch.arange(count, device=self.positions.device).expand(len(self.positions), -1)
        return torch.cat([prefix, self.positions + count], 1)

    def mask_with_prefix(self, count: int) -> torch.Tensor:
        """Return what each token of ``[prefix of count tokens | captions]`` may see: bool (B, 1, P+S, P+S)."""
        # The prefix is segment 0 and padding is segment -1, so that "same segment or prefix" is one comparison.
        padding = torch.where(self.segments == 0, -1, self.segments)
        segments = torch.nn.functional.pad(padding, (count, 0))  # (B, P+S)
        total = segments.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=segments.device).tril()
        related = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
        return (related & causal)[:, None]


def packed_length(captions: Sequence[Sequence[int]]) -> int:
    """Return how many tokens the captions of an image take in a row: each has one more, BOS before or EOS after it."""
    return sum(len(caption) + 1 for caption in captions)


def pack_captions(batch: Sequence[Sequence[Sequence[int]]], eos_id: int, pad_to_multiple: int = 1) -> PackedBatch:
    """Pack ``batch[image][caption]`` (token ids without specials) into rows of one common length S.

    Args:
        batch: captions of B images.
        eos_id: both BOS and EOS. It also fills the padding, where segment 0 and target -100 keep it unseen.
        pad_to_multiple: S is rounded up to a multiple of this, for fewer distinct shapes.

    Raises:
        ValueError: the batch is empty, an image has no caption, or ``pad_to_multiple`` is below 1.
    """
    if not batch or not all(batch):
        raise ValueError("every image of a batch needs at least one caption, and a batch at least one image")
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple is {pad_to_multiple}; it must be 1 or more")
    longest = max(map(packed_length, batch))
    length = -(-longest // pad_to_multiple) * pad_to_multiple
    shape = (len(batch), length)
    inputs, targets = np.full(shape, eos_id, np.int64), np.full(shape, IGNORED, np.int64)  # (B, S)
    positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)  # (B, S)
    grid = max(map(len, batch)), max(len(caption) + 1 for captions in batch for caption in captions)
    slots = np.full((len(batch), *grid), -1, np.int64)  # (B, k, T)
    for row, captions in enumerate(batch):
        start = 0
        for number, caption in enumerate(captions, start=1):
            span = slice(start, start + len(caption) + 1)
            inputs[row, span] = [eos_id, *caption]
            targets[row, span] = [*caption, eos_id]
            positions[row, span] = np.arange(len(caption) + 1)
            segments[row, span] = number
            slots[row, number - 1, : len(caption) + 1] = np.arange(span.start, span.stop)
            start = span.stop
    arrays = {"inputs": inputs, "targets": targets, "positions": positions, "segments": segments, "slots": slots}
    arrays["kept"] = np.flatnonzero(targets != IGNORED)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return PackedBatch(**tensors, longest=grid[1])


def captions_of_epoch(
    captions: Sequence[Sequence[list[int]]], per_image: int | None, seed: int, epoch: int
) -> list[list[list[int]]]:
    """Return the captions that ``epoch`` shows of every image: ``per_image`` of them, or all (None, or it has fewer).

    Epochs cycle through a fixed shuffled order of an image's captions, so each is shown equally often.

    Raises:
        ValueError: ``per_image`` is below 1.
    """
    if per_image is not None and per_image < 1:
        raise ValueError(f"--captions-per-image {per_image}: must be 1 or more, or left out for all")
    shown = []
    for index, group in enumerate(captions):
        count = len(group) if per_image is None else min(per_image, len(group))
        order = np.arange(len(group))
        if count < len(group):
            order = np.roll(np.random.default_rng((seed, index)).permutation(len(group)), -epoch * count)
        shown.append([group[i] for i in order[:count]])
    return shown


def length_grouped_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return batches of indices of similar length, every index once, in an order drawn from ``seed`` and ``epoch``.

    Indices are shuffled, then sorted by length only within pools of 32 batches, so that a batch has little padding and
    still other members in every epoch.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: must be 1 or more")
    rng = np.random.default_rng((seed, epoch))
    order, length_of = rng.permutation(len(lengths)), np.asarray(lengths)
    pool_size = 32 * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), pool_size):
        pool = order[start : start + pool_size]
        pool = pool[np.argsort(length_of[pool], kind="stable")]
        batches += [pool[i : i + batch_size].tolist() for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def caption_batches(captions: Sequence[Sequence[list[int]]], batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """Return batches of ``batch_size`` captions, every caption once, in an order drawn from ``seed`` and ``epoch``.

    Captions are shuffled over all images, and the last batch may be smaller. Those of one image that meet in
    a batch stand together, so that they share its prefix.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: must be 1 or more")
    flat = [(image, caption) for image, group in enumerate(captions) for caption in group]
    order = np.random.default_rng((seed, epoch)).permutation(len(flat))
    batches = []
    for start in range(0, len(flat), batch_size):
        groups: dict[int, list[list[int]]] = defaultdict(list)
        for place in order[start : start + batch_size]:
            image, caption = flat[place]
            groups[image].append(caption)
        batches.append(Batch(list(groups), list(groups.values())))
    return batches


def shuffle_captions(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Give the captions of each image to another image: the blind baseline, which can learn only the language.

    The images form one random cycle, and each passes its captions to the next, so none keeps its own.

    Raises:
        ValueError: there are fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"captions of {len(samples)} image(s) cannot be given to another image; two are needed")
    order = np.random.default_rng(seed).permutation(len(samples))
    shuffled = list(samples)
    for source, target in zip(order, np.roll(order, -1), strict=True):
        shuffled[target] = replace(samples[target], captions=samples[source].captions)
    return shuffled
