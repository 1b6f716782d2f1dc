"""What captions are like, whatever the pictures show: length, vocabulary, variety, repetition, copying."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


def caption_statistics(captions: Sequence[str], training_captions: Iterable[str] | None = None) -> dict[str, Any]:
    """Return statistics of tokenized captions (tokens with single spaces between).

    ``distinct_n`` is the number of different n-grams over the number of all, in all captions (Li et al. 2016);
    ``repeated_n`` the share of captions in which an n-gram occurs twice; ``copied`` the share that equals one of
    ``training_captions``, which are tokenized too. A share of nothing is 0.
    """
    tokens = [caption.split() for caption in captions]
    lengths = [len(words) for words in tokens]
    statistics: dict[str, Any] = {
        "captions": len(tokens),
        "empty": lengths.count(0),
        "mean_length": _share(sum(lengths), len(lengths)),
        "shortest": min(lengths, default=0),
        "longest": max(lengths, default=0),
        "vocabulary": len({word for words in tokens for word in words}),
        "different_captions": len(set(captions)),
    }
    for n in (1, 2, 3, 4):
        grams = [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for words in tokens]
        everywhere = Counter(gram for counts in grams for gram in counts.elements())
        statistics[f"distinct_{n}"] = _share(len(everywhere), everywhere.total())
        statistics[f"repeated_{n}"] = _share(sum(max(counts.values(), default=0) > 1 for counts in grams), len(grams))
    if training_captions is not None:
        known = set(training_captions)
        statistics["copied"] = _share(sum(caption in known for caption in captions), len(captions))
    return statistics


def _share(part: float, total: float) -> float:
    return part / total if total else 0.0
