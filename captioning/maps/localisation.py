"""Localisation heads: the few heads of a model that point at what a word names, chosen once and kept in a file.

Kang et al., CVPR 2025, arXiv 2503.06287. For each word of a calibration set the heads that look at the image enough
(up to where the sorted attention bends) are ranked by the spatial entropy of their maps: one compact patch of attention
is low, many scattered ones are high. The heads that are chosen most often are the model's localisation heads, whatever
the image; ``--heads local`` uses them, with any method that has heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from captioning.files import read_json, write_json
from captioning.maps.capture import Capture

COUNT = 3  # localisation heads of a model
PER_WORD = 10  # chosen for a word, at most; of few heads a quarter


@dataclass(frozen=True)
class LocalHeads:
    """The localisation heads of a model.

    Attributes:
        heads: (layer, head), the one chosen most often first.
        shares: in which share of the words each was chosen.
        images, words: size of the calibration set.
    """

    heads: tuple[tuple[int, int], ...]
    shares: tuple[float, ...]
    images: int
    words: int


def components(above: torch.Tensor) -> torch.Tensor:
    """Return (n, gh, gw) numbers of the connected parts of masks (n, gh, gw), diagonals included; 0 where False."""
    numbers = torch.arange(1.0, above[0].numel() + 1).reshape(above[0].shape) * above
    while True:
        grown = F.max_pool2d(numbers[:, None], 3, 1, 1)[:, 0] * above
        if torch.equal(grown, numbers):
            return numbers.long()
        numbers = grown


def spatial_entropy(maps: torch.Tensor) -> torch.Tensor:
    """Return (n,): the entropy of the sizes of the connected parts of maps (n, gh, gw) above their mean."""
    parts = components(maps > maps.mean((1, 2), keepdim=True)).flatten(1)
    sizes = torch.zeros(len(maps), parts.shape[1] + 1).scatter_add_(1, parts, torch.ones(parts.shape))[:, 1:]
    shares = sizes / sizes.sum(1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(1)


def bend(values: torch.Tensor) -> float:
    """Return where the sorted values bend most: the one farthest below the line from the least to the greatest."""
    ordered = values.sort().values
    line = torch.linspace(float(ordered[0]), float(ordered[-1]), len(ordered))
    return float(ordered[(line - ordered).argmax()])


def votes(capture: Capture) -> torch.Tensor:
    """Return (L, nh): how many of the caption's tokens choose each head."""
    part = capture.image_part("predict")  # (L, nh, T, P)
    layers, heads, count, _ = part.shape
    part = part.flatten(0, 1)
    mass = part.sum(-1).mean(-1)  # (L * nh,)
    looking = ((mass > bend(mass)) | (mass == mass.max())).nonzero()[:, 0]
    found = torch.zeros(layers * heads)
    chosen = min(PER_WORD, max(1, len(looking) // 4))
    for t in range(count):
        entropy = spatial_entropy(part[looking, t].reshape(-1, *capture.grid))
        found[looking[entropy.argsort(stable=True)[:chosen]]] += 1
    return found.reshape(layers, heads)


def choose_heads(captures: Iterable[Capture]) -> LocalHeads:
    """Return the localisation heads by the captions of a calibration set; ValueError where it is empty."""
    total, images, words = torch.zeros(()), 0, 0
    for capture in captures:
        total, images, words = total + votes(capture), images + 1, words + len(capture.tokens)
    if not images:
        raise ValueError("no caption to choose the localisation heads by")
    order = total.flatten().argsort(descending=True, stable=True)[:COUNT].tolist()
    heads = tuple(divmod(number, total.shape[1]) for number in order)
    return LocalHeads(heads, tuple(round(float(total[head]) / words, 4) for head in heads), images, words)


def write_heads(path: Path, found: LocalHeads) -> None:
    """Write a model's localisation heads as JSON."""
    write_json(path, asdict(found))


def read_heads(path: Path | None, n_layer: int, n_head: int) -> tuple[tuple[int, int], ...]:
    """Return the (layer, head) pairs that :func:`write_heads` wrote for a model of such a size.

    Raises:
        FileNotFoundError: there is no such file, or no place for one.
        ValueError: it is damaged, or another model's.
    """
    remedy = "choose them once: p3_attention.py --find-heads"
    if path is None or not path.is_file():
        raise FileNotFoundError(f"--heads local: {path or 'the model'} has no localisation heads; {remedy}")
    content = read_json(path)
    try:
        heads = tuple((int(layer), int(head)) for layer, head in content["heads"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: no localisation heads of a model; {remedy}") from error
    if not heads or not all(0 <= layer < n_layer and 0 <= head < n_head for layer, head in heads):
        raise ValueError(f"{path}: heads of another model: this one has {n_layer} layers of {n_head}; {remedy}")
    return heads
