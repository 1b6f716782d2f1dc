"""Does a map name what the word depends on? Measures that ask the model and need no boxes.

Three questions to a map. Take away the patches that it names, in its order: does the word's probability fall, and does
it rise when they are given back (deletion and insertion, Petsiuk et al. 2018, arXiv 1806.07421)? Is it another map when
the model's layers are randomised (Adebayo et al. 2018, arXiv 1810.03292)? Does it rank patches as occlusion does?

As in ``by_probing`` the image is encoded once, and a patch is taken away by making its token the image's mean token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from captioning.data.images import load_image
from captioning.maps.attention import CaptionAttention, MapSpec
from captioning.maps.by_probing import log_probs_without
from captioning.maps.capture import Probe
from captioning.maps.explainers import CaptionerExplainer, Explainer, read
from captioning.maps.grounding import GroundedCaption

if TYPE_CHECKING:
    from PIL import Image

STEPS = 8  # equal steps in which all patches go
OCCLUSION = MapSpec("occlusion")


class Faithfulness(NamedTuple):
    """Of one word's map.

    Attributes:
        deletion: mean probability of the word while patches go, the map's largest values first; less is better.
        insertion: the same while they come back in that order; more is better.
        random_layers: rank correlation with the map of a model with randomised layers; near 0 is as it should be.
        occlusion: rank correlation with the map by occlusion; 1 is the same order.
    """

    deletion: float
    insertion: float
    random_layers: float
    occlusion: float


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation of two maps of one size; ties share a rank. A flat map's is 0."""
    one, two = (_ranks(values.ravel()) for values in (first, second))
    scale = one.std() * two.std()
    return float(((one - one.mean()) * (two - two.mean())).mean() / scale) if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def removals(word_map: np.ndarray, steps: int = STEPS) -> torch.Tensor:
    """Return (2, steps + 1, P) bool, which patches are away: by deletion none to all, by insertion all to none.

    Both take the patches of a map (gh, gw) in its order, the largest value first.
    """
    order = np.argsort(-word_map.ravel(), kind="stable")
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))
    done = np.round(np.linspace(0, len(order), steps + 1))[:, None]  # so many patches have gone, or come back
    return torch.from_numpy(np.stack([place < done, place >= done]))


def probabilities(probe: Probe, away: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Return (B,): the probability of a word, its caption's tokens by number, without the patches ``away`` (B, P)."""
    return log_probs_without(probe, away)[:, list(tokens)].sum(1).exp().cpu()


def deletion_and_insertion(probe: Probe, word_map: np.ndarray, tokens: Sequence[int]) -> tuple[float, float]:
    """Return the areas under the word's probability by the share of patches that have gone, and that are back."""
    away = removals(word_map)
    curves = probabilities(probe, away.flatten(0, 1), tokens).unflatten(0, away.shape[:2])  # (2, steps + 1)
    deletion, insertion = torch.trapezoid(curves.double(), dx=1 / STEPS).tolist()
    return deletion, insertion


@contextlib.contextmanager
def randomised(layers: Iterable[torch.nn.Module], seed: int = 0) -> Iterator[None]:
    """Within, the values of each weight of ``layers`` are shuffled: scales stay, what was learned is gone.

    The weights are kept on the CPU meanwhile, and come back to the last bit.
    """
    weights = [p for layer in layers for p in layer.parameters() if p.is_floating_point()]
    kept = [weight.detach().to("cpu", copy=True) for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    shuffled = (values.flatten()[torch.randperm(values.numel(), generator=generator)] for values in kept)
    try:
        for weight, values in zip(weights, shuffled, strict=True):
            weight.data.copy_(values.view_as(weight))
        yield
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.data.copy_(values)


# --- of many words --------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A word, a spec or None for random values, and what the model says of the word's map."""

    image: str
    number: int
    text: str
    kind: str
    spec: MapSpec | None
    faithful: Faithfulness


def ask(explainer: Explainer, samples: Sequence[GroundedCaption], specs: Sequence[MapSpec]) -> list[Asked]:
    """Return for every word that ``samples`` mention how faithful its map by every spec is, and one of random values.

    An image that cannot be read is left out: whoever measures maps against boxes has named it.
    """
    images = [(sample, image) for sample in samples for image in _image(sample.path)]
    with randomised(layers_of(explainer)):
        random_maps = [_maps(explainer, sample, image, specs)[0] for sample, image in images]
    found, generator = [], np.random.default_rng(0)
    for (sample, image), random in zip(tqdm(images, "ask the model", disable=None), random_maps, strict=True):
        maps, attention = _maps(explainer, sample, image, [*specs, OCCLUSION])
        assert attention.capture.probe is not None  # occlusion has used it
        probe, words = attention.capture.probe(), sample.caption.split()
        for mention in sample.mentions:
            causal, tokens = maps[OCCLUSION][mention.word], attention.words[mention.word][1]
            for spec in (*specs, None):
                word_map = generator.random(causal.shape) if spec is None else maps[spec][mention.word]
                faithful = Faithfulness(
                    *deletion_and_insertion(probe, word_map, tokens),
                    float("nan") if spec is None else rank_correlation(word_map, random[spec][mention.word]),
                    rank_correlation(word_map, causal),
                )
                found.append(Asked(str(sample.path), mention.word, words[mention.word], mention.kind, spec, faithful))
    return found


def layers_of(explainer: Explainer) -> Iterable[torch.nn.Module]:
    """Return the layers of the model's language model."""
    return explainer.captioner.decoder.h if isinstance(explainer, CaptionerExplainer) else explainer.llava.layers


def _image(path: Path) -> list[Image.Image]:
    with contextlib.suppress(ValueError, OSError):
        return [load_image(path)]
    return []


def _maps(
    explainer: Explainer, sample: GroundedCaption, image: Image.Image, specs: Sequence[MapSpec]
) -> tuple[dict[MapSpec, np.ndarray], CaptionAttention]:
    """Return the maps by every spec, with one value for each patch, and what they were made from."""
    attention = read(explainer, explainer.prepare(image), explainer.tokens(sample.caption), specs)
    return {spec: _on_patches(attention.maps(spec), attention.capture.grid) for spec in specs}, attention


def _on_patches(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    finer = maps.shape[1] // grid[0]
    return maps.reshape(len(maps), grid[0], finer, grid[1], finer).mean((2, 4))
