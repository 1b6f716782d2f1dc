"""A caption with its score and the captions that came after it; plain text to whatever does not ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class Ranked(str):
    """The best caption of an image, which carries all that were asked for, best first, with their scores.

    A score is the mean log-probability that the model gives to the caption's tokens, EOS included where it ended.
    """

    __slots__ = ("ranked",)
    ranked: tuple[tuple[str, float], ...]

    def __new__(cls, ranked: Iterable[tuple[str, float]]) -> Ranked:
        """Make it of (caption, score) pairs, at least one; scores are kept to the sixth digit."""
        pairs = tuple((text, round(score, 6)) for text, score in ranked)
        caption = super().__new__(cls, pairs[0][0])
        caption.ranked = pairs
        return caption

    def __getnewargs__(self) -> tuple[Any]:  # type: ignore[override]  # for pickle
        return (self.ranked,)

    def as_json(self) -> list[dict[str, Any]]:
        """Return ``[{"caption": …, "score": …}, …]``, best first."""
        return [{"caption": text, "score": score} for text, score in self.ranked]


def record_of(caption: str) -> dict[str, Any]:
    """Return the fields of a caption in JSON: ``caption``, and ``ranked`` where it carries scores."""
    return {"caption": caption, **({"ranked": caption.as_json()} if isinstance(caption, Ranked) else {})}


def caption_of(record: Mapping[str, Any]) -> str:
    """Return the caption of what :func:`record_of` made. Raises KeyError or TypeError where it is something else."""
    if record.get("ranked") is None:
        return record["caption"]
    return Ranked((row["caption"], row["score"]) for row in record["ranked"])
