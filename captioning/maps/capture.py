"""What a model gives for the maps of one caption, and which of its layers and heads are used.

A ``Capture`` is kept from one pass over image and caption. Whatever only some methods need is there only where it was
asked for: the rows of the image itself, gradients, hidden states, the attention of a generic caption. A ``Probe`` asks
the model again, with other image tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Chosen = list[tuple[int, list[int]]]  # layers, each with the heads of it that are used


@dataclass(frozen=True)
class Choices:
    """What a method is told.

    Attributes:
        method: its name.
        layers: as :func:`parse_layers` reads them: ``"all"``, ``"last"``, ``"3"``, ``"2-5"``.
        heads: as :meth:`Heads.parse` reads them: ``"max"``, ``"mean"``, ``"2"``, ``"top3"``.
        row: ``predict`` or ``own``: which row of a token.
    """

    method: str = "raw"
    layers: str = "last"
    heads: str = "mean"
    row: str = "predict"


@dataclass(frozen=True)
class Probe:
    """A model that is asked again for one caption, with other image tokens: the image is encoded only once.

    Attributes:
        image: (N, C): the image's tokens as the language model gets them, projected.
        patches: (P,): which of them are patches, row by row of the grid.
        tokens: the T ids of the caption.
        logits: of image tokens (B, N, C) the logits (B, T, V) that predict the caption. Where gradients are on, they
            flow back to the image tokens.
    """

    image: torch.Tensor
    patches: torch.Tensor
    tokens: list[int]
    logits: Callable[[torch.Tensor], torch.Tensor]

    def log_probs(self, image: torch.Tensor) -> torch.Tensor:
        """Return the log-probability (B, T) of each token of the caption after image tokens (B, N, C), float32."""
        logits = self.logits(image).float()  # (B, T, V)
        wanted = torch.tensor(self.tokens, device=logits.device).expand(len(image), -1)
        return -F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")


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
        hidden: what each layer hands on, (S, C) of all positions; None unless asked for.
        read_out: hidden states (n, C) to the logits (n, T) of the caption's tokens: last norm and output layer.
        generic: the capture of a caption that fits every image; None unless asked for.
        probe: asks the model again; None where there is no model.
        local_heads: the model's localisation heads, (layer, head) pairs; None where there is no model.
        linked: reads the caption again for weights of all rows and logits between which gradients flow from row to row,
            not only within one; None where there is no model.
    """

    weights: list[torch.Tensor]
    logits: torch.Tensor
    tokens: list[int]
    patches: torch.Tensor
    grid: tuple[int, int]
    gradients: tuple[torch.Tensor, ...] | None = None
    hidden: list[torch.Tensor] | None = None
    read_out: Callable[[torch.Tensor], torch.Tensor] | None = None
    generic: Capture | None = None
    probe: Callable[[], Probe] | None = None
    local_heads: Callable[[], Sequence[tuple[int, int]]] | None = None
    linked: Callable[[], tuple[list[torch.Tensor], torch.Tensor]] | None = None

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
    """How heads become one map: ``max`` or ``mean`` of all, one ``index``, the best ``top``, or the ``local`` ones.

    ``local`` is the mean of the model's localisation heads (localisation.py).
    """

    rule: str
    number: int = 0

    @classmethod
    def parse(cls, text: str, count: int) -> Heads:
        """Read ``max``, ``mean``, ``local``, a head's number or ``topK``; ValueError when it isn't one of ``count``."""
        if text in ("max", "mean", "local"):
            return cls(text)
        top = re.fullmatch(r"top ?(\d+)", text)
        if top and int(top[1]) > 0:
            return cls("top", int(top[1]))
        single = re.fullmatch(r"(?:head )?(\d+)", text)
        if not single:
            raise ValueError(f"--heads {text}: use max, mean, local, a head's number, or topK such as top3")
        if int(single[1]) >= count:
            raise ValueError(f"--heads {text}: the model has heads 0 to {count - 1}")
        return cls("index", int(single[1]))

    def __str__(self) -> str:
        return {"index": f"head {self.number}", "top": f"top {self.number}"}.get(self.rule, self.rule)

    def choose(self, part: torch.Tensor, layers: Sequence[int]) -> Chosen:
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
