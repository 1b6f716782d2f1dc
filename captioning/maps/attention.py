"""From attention weights to word maps: methods, layers, heads, words, and the way back to the original's pixels.

Rows are what looks, columns what is looked at. In a causal decoder the row at a token's position *predicts the next*
token, so a token has two rows, "predict" (the position before it, where it was chosen) and "own" (its own position,
where it has been read); they are different maps (He et al. 2022, arXiv 2210.10914), and both are offered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

METHODS = ("raw", "rollout", "grad", "relative")
ROWS = ("predict", "own")
Window = tuple[float, float, float, float]


# --- what a picture is made of --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """One way of looking: the maps of all words by one method over some layers and heads.

    Attributes:
        method: ``raw``, ``rollout``, ``grad`` or ``relative``.
        layers: the layers taken, as one reads them: ``"3"``, ``"2-3"``, ``"all"``.
        heads: ``"max"``, ``"mean"``, ``"head 2"``, ``"top 3"``.
        maps: (W, gh, gw) float32, one grid a word, not negative; scale as the method has it.
    """

    method: str
    layers: str
    heads: str
    maps: np.ndarray


@dataclass(frozen=True)
class Explained:
    """An image, its caption in words, and the maps of every view.

    Attributes:
        path: the image file.
        caption: the whole caption.
        words: its W words, as titles.
        views: at least one; the first is the default.
        window: (left, top, right, bottom) in pixels of the *original* image: what the model's grid covers. It is less
            than the image where preprocessing crops, and never more.
        model: "p1" or "p2".
        notes: more to tell, such as ``{"CLIPScore": "0.81"}``.
        image_mass: (W,) share of the word's attention that falls on the image at all (default view), in 0..1.
    """

    path: Path
    caption: str
    words: list[str]
    views: list[View]
    window: Window
    model: str
    notes: dict[str, str] = field(default_factory=dict)
    image_mass: np.ndarray | None = None


# --- what a model hands out -----------------------------------------------------------------------------------------


@dataclass
class Capture:
    """The attention of one caption behind one image, from a single pass over both.

    Attributes:
        weights: one (1, nh, R, S) tensor a layer, rows summing to 1. The last T + 1 rows belong to the caption: first
            the position that predicts its first token, then its T tokens. ``whole``: the rows are all S positions.
        logits: (T + 1, V) of the caption's rows.
        tokens: the T ids of the caption.
        patches: (P,) columns that are image patches, row by row of the grid.
        grid: (gh, gw), gh * gw = P.
    """

    weights: list[torch.Tensor]
    logits: torch.Tensor
    tokens: list[int]
    patches: torch.Tensor
    grid: tuple[int, int]
    gradients: tuple[torch.Tensor, ...] | None = None  # of every token's own logit, when asked for

    @property
    def whole(self) -> bool:
        """Whether the image's own rows are there too, which rollout needs."""
        return self.weights[0].shape[2] == self.weights[0].shape[3]

    @property
    def n_layer(self) -> int:
        """The number of layers."""
        return len(self.weights)

    @property
    def n_head(self) -> int:
        """The number of heads a layer."""
        return self.weights[0].shape[1]

    def rows(self, row: str) -> slice:
        """Return which of the last T + 1 rows are the tokens' ``predict`` or ``own`` rows."""
        return slice(0, len(self.tokens)) if row == "predict" else slice(1, len(self.tokens) + 1)

    def caption_rows(self, layer: int) -> torch.Tensor:
        """Return the caption's rows of a layer, (nh, T + 1, S), detached."""
        return self.weights[layer].detach()[0, :, -len(self.tokens) - 1 :].float()

    def image_part(self, row: str) -> torch.Tensor:
        """Return the attention of every layer and head on every patch: (L, nh, T, P)."""
        rows = self.rows(row)
        return torch.stack([self.caption_rows(n)[:, rows][..., self.patches] for n in range(self.n_layer)])


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

    def chosen(self, part: torch.Tensor, layers: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Return ``(layer, heads)`` pairs of what counts, from the attention on the patches (L, nh, T, P).

        ``top`` takes, over all ``layers``, the heads that look at the image at all (more than the average head) and
        look at one place (lowest entropy over the patches), as Kang et al. 2025 find localisation heads.
        """
        if self.rule == "index":
            return [(layer, [self.number]) for layer in layers]
        if self.rule != "top":
            return [(layer, list(range(part.shape[1]))) for layer in layers]
        mass = part.sum(-1)  # (L, nh, T)
        share = part / mass.clamp(min=1e-12)[..., None]
        entropy = -(share * share.clamp(min=1e-12).log()).sum(-1).mean(-1)  # (L, nh)
        mass = mass.mean(-1)  # (L, nh)
        pairs = [(layer, head) for layer in layers for head in range(part.shape[1])]
        looking = [pair for pair in pairs if mass[pair] >= torch.stack([mass[p] for p in pairs]).mean()]
        best = sorted(looking, key=lambda pair: float(entropy[pair]))[: self.number]
        return [(layer, [h for at, h in best if at == layer]) for layer in layers if layer in {at for at, _ in best}]

    def reduce(self, weights: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
        """Reduce (nh, …) to (…)."""
        kept = weights[list(heads)]
        return kept.amax(0) if self.rule == "max" else kept.mean(0)


# --- methods --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What to compute: the method, layers as text, heads as text, and which row of a token."""

    method: str = "raw"
    layers: str = "last"
    heads: str = "mean"
    row: str = "predict"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method {self.method}: use one of {', '.join(METHODS)}")
        if self.row not in ROWS:
            raise ValueError(f"--row {self.row}: use one of {', '.join(ROWS)}")

    @property
    def needs_whole(self) -> bool:
        """Whether the image's own rows must be captured."""
        return self.method == "rollout"

    @property
    def needs_gradients(self) -> bool:
        """Whether the capture must keep its graph."""
        return self.method == "grad"


def token_maps(capture: Capture, look: Look, generic: torch.Tensor | None = None) -> torch.Tensor:
    """Return one map a token of the caption: (T, P), not negative.

    ``raw`` is the attention itself. ``relative`` divides it by what every word gets: ``generic`` (P,), or else the mean
    over the caption's tokens; that takes sink patches away, which light up for every word. ``rollout`` follows
    attention back through the layers (Abnar and Zuidema 2020). ``grad`` weighs it by the gradient of the token's own
    logit, keeps what speaks for the token and sums over layers (after Chefer et al. 2021, whose rule also passes
    relevance from token to token; here every token answers for its own row, the predicting one).
    """
    layers = parse_layers(look.layers, capture.n_layer)
    heads = Heads.parse(look.heads, capture.n_head)
    part = capture.image_part(look.row)
    chosen = heads.chosen(part, layers)
    if look.method == "rollout":
        return _rollout(capture, chosen, heads)[capture.rows(look.row)][:, capture.patches]
    if look.method == "grad":
        return _gradient(capture, chosen, heads)
    maps = torch.stack([heads.reduce(part[layer], which) for layer, which in chosen]).mean(0)  # (T, P)
    if look.method == "relative":
        common = maps.mean(0) if generic is None else generic
        return maps / (common + common.mean())  # the added mean keeps patches that nobody looks at from exploding
    return maps


def _rollout(capture: Capture, chosen: list[tuple[int, list[int]]], heads: Heads) -> torch.Tensor:
    """Return (T + 1, S): where the caption's rows look when every layer keeps half of what it had."""
    if not capture.whole:
        raise ValueError("rollout needs the attention of the image's own rows; capture the whole sequence")
    size = capture.weights[0].shape[-1]
    flow = torch.eye(size, device=capture.weights[0].device)
    for layer, which in chosen:
        step = heads.reduce(capture.weights[layer].detach()[0].float(), which)
        step = step / step.sum(-1, keepdim=True)  # a maximum over heads does not sum to 1
        flow = (0.5 * step + 0.5 * torch.eye(size, device=step.device)) @ flow
    return flow[-len(capture.tokens) - 1 :]


def _gradient(capture: Capture, chosen: list[tuple[int, list[int]]], heads: Heads) -> torch.Tensor:
    """Return (T, P): relevance of the patches for each token's own logit, whose row is the predicting one.

    The captures pass no gradient from one caption row to another, so one backward pass of the sum of all tokens' logits
    gives every row the gradient of its own token alone.
    """
    if not capture.logits.requires_grad:
        raise ValueError("grad needs a capture with gradients")
    if capture.gradients is None:
        count = len(capture.tokens)
        own = capture.logits[range(count), capture.tokens].float().sum()
        capture.gradients = torch.autograd.grad(own, capture.weights)
    rows, relevance = capture.rows("predict"), 0.0
    for layer, which in chosen:
        gradient = capture.gradients[layer][0, :, -len(capture.tokens) - 1 :]  # (nh, T + 1, S)
        step = heads.reduce((capture.caption_rows(layer) * gradient).clamp(min=0), which)  # (T + 1, S)
        relevance = relevance + step[rows][:, capture.patches]
    return relevance


# --- words ----------------------------------------------------------------------------------------------------------


def words_of(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> list[tuple[str, list[int]]]:
    """Return the caption's words between white space, each with the indices of its tokens.

    Grouped by position and never by text: a word that comes twice stays two words. A token that holds only white space
    belongs to the word behind it; what belongs to no word (a token that decodes to nothing) is left out.
    """
    words: list[tuple[str, list[int]]] = []
    before, pending = "", []
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


def word_maps(maps: torch.Tensor, groups: Sequence[Sequence[int]], grid: tuple[int, int]) -> np.ndarray:
    """Return the mean over each word's tokens as grids: (T, P) to (W, gh, gw) float32."""
    merged = torch.stack([maps[list(group)].mean(0) for group in groups])
    return merged.reshape(len(groups), *grid).float().cpu().numpy()


# --- pixels ---------------------------------------------------------------------------------------------------------


def crop_window(size: tuple[int, int], resized: int | None, crop: tuple[int, int]) -> Window:
    """Return what of an image of ``size`` (width, height) a model sees that resizes and crops it.

    Args:
        size: of the original, in pixels.
        resized: length of the shorter side after resizing; None when the image is squashed to ``crop`` as a whole.
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
