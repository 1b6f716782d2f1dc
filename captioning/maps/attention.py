"""From what a model gives to word maps: methods, words, and the way back to the original's pixels.

Five words of this package:

    MapSpec           what to compute: the method, the layers, the heads, and which of a token's two rows
    Capture           what a model gives: attention weights, logits and more of one caption, from one pass (capture.py)
    CaptionAttention  a capture and the words of its caption; it makes the maps of any spec
    WordMaps          the maps of all words of a caption by one spec
    Explanation       an image, its caption and its WordMaps: what figures.py and viewer.py draw

Rows of an attention matrix are queries, columns are keys. In a causal decoder the row at a token's position *predicts
the next* token, so a token has two rows: "predict" (the position before it, where it was chosen) and "own" (its own
position, where it has been read). Their maps differ (He et al. 2022, arXiv 2210.10914), and both are offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from captioning.maps.by_activation import sinkless, tam
from captioning.maps.by_agreement import agree
from captioning.maps.by_attention import chefer, generic, grad, raw, relative, rollout
from captioning.maps.by_probing import ig, occlusion
from captioning.maps.capture import Capture, Choices, Heads, parse_layers

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["METHODS", "ROWS", "CaptionAttention", "Capture", "Explanation", "Heads", "MapSpec", "Method", "WordMaps"]
__all__ += ["Window", "cell_centres", "crop_window", "parse_layers", "token_maps", "words_of"]


@dataclass(frozen=True)
class Method:
    """A map method as help texts, pages and docs have it, and which choices of a :class:`MapSpec` its maps depend on.

    Attributes:
        about: what the map of a word is, in a line.
        maps: of a capture and a spec (T, P) on the CPU, not negative; or (T, n n P) with n x n points in each patch.
        needs: what a capture must hold beside the attention of the caption's rows: ``whole`` (the image's rows too),
            ``gradient``, ``hidden`` (states), ``generic`` (another caption's attention).
        layers: the default of ``--layers``; empty where they cannot be chosen.
        heads: whether they can be chosen.
        slow: it takes many passes over the model: made when asked for, never among all of a page's maps.
    """

    about: str
    maps: Callable[[Capture, MapSpec], torch.Tensor]
    needs: frozenset[str] = frozenset()
    layers: str = "all"
    heads: bool = True
    slow: bool = False


METHODS = {
    "raw": Method("the word's attention", raw),
    "rollout": Method(
        "attention followed back through the layers (Abnar and Zuidema 2020)",
        rollout,
        frozenset({"whole"}),
    ),
    "grad": Method(
        "attention times the gradient of the word's own logit (after Chefer et al. 2021)",
        grad,
        frozenset({"gradient"}),
    ),
    "agree": Method(
        "where all layers' attention and its gradients agree, blurred between patches",
        agree,
        frozenset({"gradient"}),
    ),
    "relative": Method(
        "attention divided by what every word gets: removes patches that light up for all of them",
        relative,
    ),
    "generic": Method(
        "attention divided by that of a generic caption (after Zhang et al. 2025)",
        generic,
        frozenset({"generic"}),
    ),
    "sinkless": Method(
        "attention without sink patches, whose hidden states are huge in a few dimensions (Kang et al. 2025)",
        sinkless,
        frozenset({"hidden"}),
    ),
    "tam": Method(
        "what the image's positions say of the word, less what earlier words explain (Li et al. 2025)",
        tam,
        frozenset({"hidden"}),
        layers="last",
        heads=False,
    ),
    "chefer": Method(
        "relevance passed from token to token through attention and its gradients (Chefer et al. 2021)",
        chefer,
        slow=True,
    ),
    "occlusion": Method(
        "how far the word's log-probability falls where patches are masked (Zeiler and Fergus 2014)",
        occlusion,
        layers="",
        heads=False,
        slow=True,
    ),
    "ig": Method(
        "gradients by the image's tokens, integrated from their mean (Sundararajan et al. 2017)",
        ig,
        layers="",
        heads=False,
        slow=True,
    ),
}
ROWS = ("predict", "own")
Window = tuple[float, float, float, float]


@dataclass(frozen=True)
class MapSpec(Choices):
    """What to compute: a method, one of ``METHODS``, whose functions say what they do, and what it is told."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method {self.method}: use one of {', '.join(METHODS)}")
        if self.row not in ROWS:
            raise ValueError(f"--row {self.row}: use one of {', '.join(ROWS)}")

    def __str__(self) -> str:
        return ", ".join([self.method, *(f"{name} {value}" for name, value in self.choices().items())])

    def choices(self) -> dict[str, str]:
        """Return the ``layers`` and ``heads``, where the method depends on them."""
        return {name: getattr(self, name) for name in ("layers", "heads") if getattr(METHODS[self.method], name)}


@dataclass(frozen=True)
class WordMaps:
    """The maps of all W words of a caption by one spec: (W, gh, gw) float32, not negative, on the method's scale."""

    spec: MapSpec
    maps: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """An image, its caption in words, and the maps of those words.

    Attributes:
        path: the image file; its name alone where ``photo`` is given.
        caption: its text.
        words: its W words, as titles.
        word_maps: at least one; the first is the default.
        window: (left, top, right, bottom) in pixels of the *original* image: what the model's grid covers. It is less
            than the image where preprocessing crops, and never more.
        model: "p1" or "p2".
        notes: further facts to show, such as ``{"CLIPScore": "0.81"}``.
        image_mass: (W,) share of each word's attention that falls on the image at all (of the default maps), in 0..1.
        photo: the image itself, upright RGB, where it is no file.
    """

    path: Path
    caption: str
    words: list[str]
    word_maps: list[WordMaps]
    window: Window
    model: str
    notes: dict[str, str] = field(default_factory=dict)
    image_mass: np.ndarray | None = None
    photo: Image.Image | None = None

    @property
    def maps(self) -> np.ndarray:
        """The default maps, (W, gh, gw)."""
        return self.word_maps[0].maps


@dataclass
class CaptionAttention:
    """A capture with the words of its caption.

    Attributes:
        capture: of the caption.
        words: each word with the indices of its tokens.
    """

    capture: Capture
    words: list[tuple[str, list[int]]]

    def maps(self, spec: MapSpec) -> np.ndarray:
        """Return one map per word: (W, gh, gw) float32, or finer by a whole factor where the method's maps are."""
        maps = token_maps(self.capture, spec)  # (T, n n P)
        merged = torch.stack([maps[indices].mean(0) for _, indices in self.words])
        gh, gw = self.capture.grid
        finer = math.isqrt(maps.shape[1] // (gh * gw))
        return merged.reshape(len(self.words), finer * gh, finer * gw).numpy()

    def image_mass(self, spec: MapSpec) -> np.ndarray:
        """Return (W,): the share of each word's attention, mean over layers and heads, that falls on the image."""
        mass = self.capture.image_part(spec.row).sum(-1).mean((0, 1))  # (T,)
        return np.array([float(mass[indices].mean()) for _, indices in self.words], np.float32)


def token_maps(capture: Capture, spec: MapSpec) -> torch.Tensor:
    """Return one map per token of the caption: (T, P), or finer as ``Method.maps``, on the CPU, not negative.

    Raises:
        ValueError: the spec names layers or heads that the model lacks, or the capture lacks what the method needs.
    """
    return METHODS[spec.method].maps(capture, spec)


# --- words ----------------------------------------------------------------------------------------------------------


def words_of(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> list[tuple[str, list[int]]]:
    """Return the caption's words between white space, each with the indices of its tokens.

    Grouped by position and never by text: a word that comes twice stays two words. A token that holds only white space
    belongs to the word after it; a token that decodes to nothing belongs to none.
    """
    words: list[tuple[str, list[int]]] = []
    pending: list[int] = []
    before = ""
    for index in range(len(tokens)):
        text = decode(list(tokens[: index + 1]))
        piece = text[len(before) :]
        before = text
        starts = not words or piece[:1].isspace() or bool(pending)
        if not piece.strip():
            pending = [*pending, index] if piece else pending
            continue
        if starts:
            words.append((piece.strip(), [*pending, index]))
        else:
            word, indices = words[-1]
            words[-1] = (word + piece.strip(), [*indices, index])
        pending = []
    return words


# --- pixels ---------------------------------------------------------------------------------------------------------


def crop_window(size: tuple[int, int], resized: int | None, crop: tuple[int, int]) -> Window:
    """Return which part of an image of ``size`` (width, height) is left after resizing and a centre crop.

    Args:
        size: of the original, in pixels.
        resized: length of the shorter side after resizing; None when the image is squashed to ``crop``.
        crop: (width, height) of the centre crop.

    Raises:
        ValueError: the crop is larger than the resized image, which preprocessing would pad.
    """
    width, height = size
    if resized is None:
        return 0.0, 0.0, float(width), float(height)
    scale = min(width, height) / resized  # original pixels in one resized pixel
    w, h = crop[0] * scale, crop[1] * scale
    if w > width + scale or h > height + scale:
        raise ValueError(f"preprocessing crops {crop} of an image resized to {resized}, which would pad it")
    w, h = min(w, width), min(h, height)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def cell_centres(window: Window, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the x of the grid's gw columns and the y of its gh rows, in pixels of the original."""
    left, top, right, bottom = window
    gh, gw = grid
    return left + (np.arange(gw) + 0.5) * (right - left) / gw, top + (np.arange(gh) + 0.5) * (bottom - top) / gh
