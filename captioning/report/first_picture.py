"""The picture at the head of the page: an image, its captions by both models, and where each looked for a word."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.maps.attention import Explanation
from captioning.maps.figures import with_map
from captioning.maps.saved import load_maps
from captioning.report.document import Figure, Row
from captioning.report.sections import MODELS, world

SIDE = 560  # pixels of the longer side of each picture
WORDS = "grounding_words.npz"  # of --grounding, in the same folder: no maps
LETTERS = 4  # of the shortest word to show: "a" and "the" look at nothing of their own
SAME_WORD = (
    "the first image whose captions share a word of four letters or more, and of such words the one whose maps are "
    "most concentrated"
)
OTHER_WORDS = "no two captions share a word, so each map is the most concentrated one of its caption"
Pair = tuple[Explanation, Explanation]  # of one image, by LLaVA and by the captioner


def first_picture(root: Path, size: str) -> list[Row]:
    """Return an image with its captions by both models and a map of each; nothing where no image has them."""
    pairs = list(_explained(root / "attention"))
    if not pairs:
        return []
    pair, places = next(((pair, places) for pair in pairs if (places := _shared_word(*pair))), (pairs[0], None))
    why = SAME_WORD if places else OTHER_WORDS
    figures = []
    for explanation, place in zip(pair, places or map(_lit_word, pair), strict=True):
        photo, lit = with_map(explanation, place, SIDE)
        name, word = MODELS[explanation.model], _plain(explanation.words[place])
        caption = f"{name}: “{explanation.caption}” The map of “{word}” is by {explanation.word_maps[0].spec}."
        figures.append(Figure(f"first_{explanation.model}", _png(lit), f"Where {name} looked for {word}", caption))
    where = world(size) + " world" * (size == "micro")
    scene = Figure("first_image", _png(photo), "The image without a map", f"{pair[0].path.name} ({where})")
    return [Row([scene, *figures], f"An image as both models caption it, and what they looked at for a word: {why}.")]


def _explained(folder: Path) -> Iterator[Pair]:
    """Yield the maps by both models of each image that has both and is where it was."""
    for file in sorted((folder / "p1").glob("*.npz")):
        other = folder / "p2" / file.name
        if file.name == WORDS:
            continue
        if other.is_file() and (pair := (load_maps(file), load_maps(other)))[0].path.is_file():
            yield pair


def _shared_word(one: Explanation, two: Explanation) -> tuple[int, int] | None:
    """Return where the word of both captions with the most concentrated maps is in each; None where there is none."""
    first, second = _places(one), _places(two)
    shared = [(first[word], second[word]) for word in first if word in second and len(word) >= LETTERS]
    return max(shared, key=lambda at: _concentration(one, at[0]) * _concentration(two, at[1]), default=None)


def _lit_word(explanation: Explanation) -> int:
    """Return where the word with the most concentrated map is."""
    return max(range(len(explanation.words)), key=lambda place: _concentration(explanation, place))


def _places(explanation: Explanation) -> dict[str, int]:
    """Return the first place of each word of a caption."""
    return {_plain(word).lower(): place for place, word in reversed(list(enumerate(explanation.words)))}


def _plain(word: str) -> str:
    return re.sub(r"^\W+|\W+$", "", word)


def _concentration(explanation: Explanation, place: int) -> float:
    """Return 1 where a word's map is one cell, and 1 / cells where it is even."""
    found = explanation.word_maps[0].maps[place]
    return float(np.square(found / (found.sum() or 1)).sum())


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
