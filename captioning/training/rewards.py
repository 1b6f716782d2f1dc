"""Rewards of captions: CIDEr-D and CLIPScore, guarded against what they invite."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch

from captioning.distributed import ALONE, Processes
from captioning.scoring.cider import DocumentFrequencies, cider_d
from captioning.scoring.clipscore import CLIPSCORE_WEIGHT, ClipScorer, image_features, text_features


class CiderReward:
    """CIDEr-D of token ids against an image's training captions, guarded against repetition and brevity.

    Args:
        captions: by image, its captions as token ids without EOS.
        eos: id that ends every finished caption, and counts as a token.
        brevity: exponent of the brevity penalty; 0 leaves it out.
    """

    def __init__(self, captions: Sequence[Sequence[Sequence[int]]], eos: int, brevity: float = 1.0) -> None:
        self.brevity = brevity
        self.references = [[(*caption, eos) for caption in group] for group in captions]
        self.frequencies = DocumentFrequencies(self.references)
        self.usual_repeats = [median(map(repeats, group)) for group in self.references]
        self.mean_lengths = np.array([np.mean([len(c) for c in group]) for group in self.references])

    def __call__(
        self, images: Sequence[int], samples: Sequence[Sequence[int]], more: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Return the rewards (n,) of ``samples``, each of the image of the same place; finished ones end with EOS.

        ``more`` (n,) is a reward of another kind, to which the guards apply as well.
        """
        earned = (self.cider(images, samples) + more) * self.penalty(images, samples)
        return np.where(self.excessive(images, samples), 0.0, earned)

    def cider(self, images: Sequence[int], samples: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the plain CIDEr-D (n,)."""
        return cider_d([self.references[i] for i in images], samples, self.frequencies)

    def excessive(self, images: Sequence[int], samples: Sequence[Sequence[int]]) -> np.ndarray:
        """Return which samples repeat more bigrams than most references of their image: (n,), booleans."""
        return np.array([repeats(s) > self.usual_repeats[i] for i, s in zip(images, samples, strict=True)])

    def penalty(self, images: Sequence[int], samples: Sequence[Sequence[int]]) -> np.ndarray:
        """Return BLEU's brevity penalty against the references' mean length, to the power ``brevity``: (n,)."""
        lengths = np.array([len(s) for s in samples])
        return np.exp(self.brevity * np.minimum(0, 1 - self.mean_lengths[list(images)] / np.maximum(lengths, 1)))


class ClipReward:
    """CLIPScore of texts against training images; each process computes the features of a part of them, once."""

    def __init__(self, scorer: ClipScorer, paths: Sequence[Any], processes: Processes = ALONE) -> None:
        self.scorer = scorer
        size = -(-len(paths) // processes.count)
        parts = [paths[start : start + size] for start in range(0, len(paths), size)]
        self.images = torch.cat(processes.spread(lambda part: image_features(scorer, part), parts))

    def __call__(self, images: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        """Return ``2.5 * max(cos, 0)`` of each text with the image of the same place: (n,)."""
        cosines = (self.images[list(images)] * text_features(self.scorer, texts)).sum(-1)
        return (CLIPSCORE_WEIGHT * cosines.clamp(min=0)).numpy()


def repeats(tokens: Sequence[int]) -> int:
    """Return how many bigrams of ``tokens`` have occurred in it before."""
    return max(len(tokens) - 1, 0) - len(set(pairwise(tokens)))
