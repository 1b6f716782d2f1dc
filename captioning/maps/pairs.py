"""The best and the worst pair of image and caption by CLIPScore, from evaluate.py's scores per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.files import composed, read_json


@dataclass(frozen=True)
class Pair:
    """An image and a caption with its CLIPScore, a title, and the references of the image."""

    title: str
    path: Path
    caption: str
    references: Sequence[str]
    clipscore: float


def read_per_image(path: Path) -> dict[str, dict[str, Any]]:
    """Read what ``evaluate.py --per-image`` wrote: by file name without extension a caption and its scores.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or an image lacks CLIPScore or caption.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--best-worst {path}: no such file; write it with evaluate.py --per-image")
    try:
        scores = read_json(path)
    except ValueError as error:
        raise ValueError(f"--best-worst {path}: {error}") from error
    rows = scores.values() if isinstance(scores, dict) else []
    if not rows or not all(map(_is_scored, rows)):
        raise ValueError(
            f"--best-worst {path}: needs CLIPScore and caption of every image, as evaluate.py --per-image "
            "OUT.json writes them"
        )
    return {composed(key): row for key, row in scores.items()}


def _is_scored(row: Any) -> bool:
    """Whether a row has what is drawn; an empty caption is a caption."""
    return (
        isinstance(row, dict) and isinstance(row.get("caption"), str) and isinstance(row.get("CLIPScore"), int | float)
    )


def best_and_worst(
    scores: Mapping[str, Mapping[str, Any]], paths: Mapping[str, Path], references: Mapping[str, Sequence[str]]
) -> list[Pair]:
    """Return the pair with the highest CLIPScore and that with the lowest; all arguments by stem."""
    ranked = sorted(scores, key=lambda stem: scores[stem]["CLIPScore"])
    return [
        Pair(title, paths[stem], scores[stem]["caption"], references.get(stem, []), scores[stem]["CLIPScore"])
        for title, stem in (("Top-1", ranked[-1]), ("Last-1", ranked[0]))
    ]
