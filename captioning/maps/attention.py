"""From attention weights to word maps: methods, layers, heads, words, and the way back to the original's pixels.

Five words of this package:

    MapSpec           what to compute: the method, the layers, the heads, and which of a token's two rows
    Capture           what a model gives: the attention weights and logits of one caption, from one pass
    CaptionAttention  a capture and the words of its caption; it makes the maps of any spec
    WordMaps          the maps of all words of a caption by one spec
    Explanation       an image, its caption and its WordMaps: what figures.py and viewer.py draw

Rows of an attention matrix are queries, columns are keys. In a causal decoder the row at a token's position *predicts
the next* token, so a token has two rows: "predict" (the position before it, where it was chosen) and "own" (its own
position, where it has been read). Their maps differ (He et al. 2022, arXiv 2210.10914), and both are offered.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Method:
    """A map method as help texts, pages and docs have it, and which choices of a :class:`MapSpec` its maps depend on.

    Attributes:
        about: what the map of a word is, in a line.
        layers, heads: whether they can be chosen.
        slow: it takes many passes over the model: made when asked for, never among all of a page's maps.
    """

    about: str
    layers: bool = True
    heads: bool = True
    slow: bool = False


METHODS = {
    "raw": Method("the word's attention"),
    "rollout": Method("attention followed back through the layers (Abnar and Zuidema 2020)"),
    "grad": Method("attention times the gradient of the word's own logit (after Chefer et al. 2021)"),
    "relative": Method("attention divided by what every word gets: removes patches that light up for all of them"),
}
ROWS = ("predict", "own")
Window = tuple[float, float, float, float]


@dataclass(frozen=True)
class MapSpec:
    """What to compute.

    Attributes:
        method: one of ``METHODS``; see :func:`token_maps`.
        layers: as :func:`parse_layers` reads them: ``"all"``, ``"last"``, ``"3"``, ``"2-5"``.
        heads: as :meth:`Heads.parse` reads them: ``"max"``, ``"mean"``, ``"2"``, ``"top3"``.
        row: ``predict`` or ``own``: which row of a token.
    """

    method: str = "raw"
    layers: str = "last"
    heads: str = "mean"
    row: str = "predict"

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
class Capture:
    """The attention of one caption on everything before it, from a single pass over image and caption.

    Attributes:
        weights: a (1, nh, R, S) tensor per layer, rows summing to 1. The last T + 1 rows belong to the caption: first
            the position that predicts its first token, then its T tokens. R is T + 1, or S with the image's own rows.
        logits: (T + 1, V) of the caption's rows.
        tokens: the T ids of the caption.
        patches: (P,) columns that are image patches, row by row of the grid.
        grid: (gh, gw), gh * gw = P.
        gradients: of the sum of every token's own logit by ``weights``; computed when a spec first needs them.
    """

    weights: list[torch.Tensor]
    logits: torch.Tensor
    tokens: list[int]
    patches: torch.Tensor
    grid: tuple[int, int]
    gradients: tuple[torch.Tensor, ...] | None = None

    @property
    def has_image_rows(self) -> bool:
        """Whether the rows of the whole sequence are there, which rollout needs."""
        return self.weights[0].shape[2] == self.weights[0].shape[3]

    @property
    def n_layer(self) -> int:
        """The number of layers."""
        return len(self.weights)

    @property
    def n_head(self) -> int:
        """The number of heads per layer."""
        return self.weights[0].shape[1]

    def rows(self, row: str) -> slice:
        """Return which of the last T + 1 rows are the tokens' ``predict`` or ``own`` rows."""
        return slice(0, len(self.tokens)) if row == "predict" else slice(1, len(self.tokens) + 1)

    def caption_rows(self, layer: int) -> torch.Tensor:
        """Return the caption's rows of a layer, (nh, T + 1, S), detached."""
        return self.weights[layer].detach()[0, :, -len(self.tokens) - 1 :].float()

    @functools.cached_property
    def on_patches(self) -> torch.Tensor:
        """The caption's rows on every patch, (L, nh, T + 1, P) on the CPU: a GPU would be waited for at every look."""
        return torch.stack([self.caption_rows(n)[..., self.patches] for n in range(self.n_layer)]).cpu()

    def image_part(self, row: str) -> torch.Tensor:
        """Return the attention of every layer and head on every patch: (L, nh, T, P) on the CPU."""
        return self.on_patches[:, :, self.rows(row)]


@dataclass
class CaptionAttention:
    """A capture with the words of its caption.

    Attributes:
        capture: of the caption.
        words: each word with the indices of its tokens.
        generic: of a caption that fits every image; ``relative`` divides by its attention, or, without it, by the mean
            over the caption's own tokens.
    """

    capture: Capture
    words: list[tuple[str, list[int]]]
    generic: Capture | None = None

    def maps(self, spec: MapSpec) -> np.ndarray:
        """Return one map per word: (W, gh, gw) float32."""
        common = None
        if self.generic is not None and spec.method == "relative":
            common = token_maps(self.generic, replace(spec, method="raw")).mean(0)
        maps = token_maps(self.capture, spec, common)  # (T, P)
        merged = torch.stack([maps[indices].mean(0) for _, indices in self.words])
        return merged.reshape(len(self.words), *self.capture.grid).numpy()

    def image_mass(self, spec: MapSpec) -> np.ndarray:
        """Return (W,): the share of each word's attention, mean over layers and heads, that falls on the image."""
        mass = self.capture.image_part(spec.row).sum(-1).mean((0, 1))  # (T,)
        return np.array([float(mass[indices].mean()) for _, indices in self.words], np.float32)


# --- which layers and heads -----------------------------------------------------------------------------------------


def parse_layers(text: str, count: int) -> list[int]:
    """Return the layers that ``all``, ``last``, ``3``, ``-1`` or ``2-5`` names, of ``count`` (from 0).

    Raises:
        ValueError: it names none, or one that does not exist.
    """
    if text == "all":
        return list(range(count))
    if text == "last":
        return [count - 1]
    span = re.fullmatch(r"(\d+)-(\d+)", text)
    single = re.fullmatch(r"-?\d+", text)
    if not span and not single:
        raise ValueError(f"--layers {text}: use all, last, a number such as 3, or a range such as 2-5")
    first, last = (int(span[1]), int(span[2])) if span else (int(text), int(text))
    if single and first < 0:
        first = last = first + count
    if not 0 <= first <= last < count:
        raise ValueError(f"--layers {text}: the model has layers 0 to {count - 1}")
    return list(range(first, last + 1))


@dataclass(frozen=True)
class Heads:
    """How the heads of a layer become one map: ``max`` or ``mean`` of all, one ``index``, or the best ``top``."""

    rule: str
    number: int = 0

    @classmethod
    def parse(cls, text: str, count: int) -> Heads:
        """Read ``max``, ``mean``, a head's number, or ``topK``; ValueError when it isn't one of ``count``."""
        if text in ("max", "mean"):
            return cls(text)
        top = re.fullmatch(r"top ?(\d+)", text)
        if top and int(top[1]) > 0:
            return cls("top", int(top[1]))
        single = re.fullmatch(r"(?:head )?(\d+)", text)
        if not single:
            raise ValueError(f"--heads {text}: use max, mean, a head's number, or topK such as top3")
        if int(single[1]) >= count:
            raise ValueError(f"--heads {text}: the model has heads 0 to {count - 1}")
        return cls("index", int(single[1]))

    def __str__(self) -> str:
        return {"index": f"head {self.number}", "top": f"top {self.number}"}.get(self.rule, self.rule)

    def choose(self, part: torch.Tensor, layers: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Return the ``(layer, heads)`` pairs to use, given the attention on the patches (L, nh, T, P).

        ``top`` takes, of the heads of all ``layers`` with at least the average attention on the image, those that
        concentrate it most (lowest entropy over the patches), as Kang et al. 2025 find localisation heads.
        """
        if self.rule == "index":
            return [(layer, [self.number]) for layer in layers]
        if self.rule != "top":
            return [(layer, list(range(part.shape[1]))) for layer in layers]
        part = part[list(layers)]  # (l, nh, T, P)
        mass = part.sum(-1)  # (l, nh, T)
        share = part / mass.clamp(min=1e-12)[..., None]
        entropy = -(share * share.clamp(min=1e-12).log()).sum(-1).mean(-1).flatten()  # (l * nh)
        mass = mass.mean(-1).flatten()
        looking = (mass >= mass.mean()).nonzero()[:, 0]
        best: dict[int, list[int]] = {}
        for pair in looking[entropy[looking].argsort(stable=True)][: self.number].tolist():
            best.setdefault(layers[pair // part.shape[1]], []).append(pair % part.shape[1])
        return sorted(best.items())

    def reduce(self, weights: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        """Reduce (nh, …) to (…)."""
        kept = torch.stack([weights[head] for head in heads])  # a list as index would be copied to the device first
        return kept.amax(0) if self.rule == "max" else kept.mean(0)


# --- methods --------------------------------------------------------------------------------------------------------


def token_maps(capture: Capture, spec: MapSpec, generic: torch.Tensor | None = None) -> torch.Tensor:
    """Return one map per token of the caption: (T, P) on the CPU, not negative.

    ``raw`` is the attention itself. ``relative`` divides it by what every word gets: ``generic`` (P,), or else the mean
    over the caption's tokens; that removes sink patches, which light up for every word. ``rollout`` follows attention
    back through the layers (Abnar and Zuidema 2020). ``grad`` multiplies it by the gradient of the token's own logit,
    keeps the positive part and sums over layers (after Chefer et al. 2021, whose rule also passes relevance from token
    to token; here a token's relevance comes from its own row alone, always the predicting one).

    Raises:
        ValueError: the spec names layers or heads that the model lacks, or the capture lacks what the method needs.
    """
    layers = parse_layers(spec.layers, capture.n_layer)
    heads = Heads.parse(spec.heads, capture.n_head)
    part = capture.image_part(spec.row)
    chosen = heads.choose(part, layers)
    if spec.method == "rollout":
        return _rollout(capture, chosen, heads)[capture.rows(spec.row)][:, capture.patches].cpu()
    if spec.method == "grad":
        return _gradient(capture, chosen, heads).cpu()
    maps = torch.stack([heads.reduce(part[layer], which) for layer, which in chosen]).mean(0)  # (T, P)
    if spec.method == "relative":
        common = maps.mean(0) if generic is None else generic
        return maps / (common + common.mean())  # the added mean keeps patches that no word looks at from exploding
    return maps


def _rollout(capture: Capture, chosen: list[tuple[int, list[int]]], heads: Heads) -> torch.Tensor:
    """Return (T + 1, S): where the caption's rows look when every layer keeps half of its input (the residual)."""
    if not capture.has_image_rows:
        raise ValueError("rollout needs the attention of the image's own rows; capture all rows")
    size = capture.weights[0].shape[-1]
    flow = torch.eye(size, device=capture.weights[0].device)
    for layer, which in chosen:
        step = heads.reduce(capture.weights[layer].detach()[0].float(), which)
        step = step / step.sum(-1, keepdim=True)  # a maximum over heads does not sum to 1
        flow = (0.5 * step + 0.5 * torch.eye(size, device=step.device)) @ flow
    return flow[-len(capture.tokens) - 1 :]


def _gradient(capture: Capture, chosen: list[tuple[int, list[int]]], heads: Heads) -> torch.Tensor:
    """Return (T, P): relevance of the patches for each token's own logit, whose row is the predicting one.

    A capture passes no gradient from one caption row to another, so a single backward pass of the sum of all tokens'
    logits gives every row the gradient of its own token alone.
    """
    if not capture.logits.requires_grad:
        raise ValueError("grad needs a capture with gradients")
    if capture.gradients is None:
        count = len(capture.tokens)
        own = capture.logits[range(count), capture.tokens].float().sum()
        capture.gradients = torch.autograd.grad(own, capture.weights)
    rows, steps = capture.rows("predict"), []
    for layer, which in chosen:
        gradient = capture.gradients[layer][0, :, -len(capture.tokens) - 1 :]  # (nh, T + 1, S)
        step = heads.reduce((capture.caption_rows(layer) * gradient).clamp(min=0), which)  # (T + 1, S)
        steps.append(step[rows][:, capture.patches])
    return functools.reduce(torch.add, steps)


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
