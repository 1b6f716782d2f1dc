"""by_agreement.py: planted layers that agree on one place, and what their blur does to a map."""

import numpy as np
import pytest
import torch

from captioning.maps.attention import CaptionAttention, Capture, MapSpec, token_maps
from captioning.maps.by_agreement import POINTS, _blur

GRID, T = (3, 4), 1
P = 12


def capture(*layers, speaks_for=None):
    """Weights of a token on the patches by layer; its logit is the sum over layers of those on ``speaks_for``."""
    weights = [torch.zeros(1, 1, T + 1, P + T + 1) for _ in layers]
    for weight, patches in zip(weights, layers, strict=True):
        for patch, value in patches.items():
            weight[0, 0, :, patch] = value
        weight.requires_grad_()
    on = sum(weight[0, 0, 0, patch] for weight in weights for patch in speaks_for or range(P))
    logits = torch.zeros(T + 1, 2).index_put((torch.tensor([0]), torch.tensor([1])), on)
    return Capture(weights, logits, [1], torch.arange(P), GRID)


def peak(found, spec):
    word_map = CaptionAttention(found, [("a", [0])]).maps(spec)[0]
    return tuple(int(at) * GRID[0] // word_map.shape[0] for at in np.unravel_index(word_map.argmax(), word_map.shape))


def test_a_place_that_all_layers_look_at_beats_places_that_one_does_much():
    """Each layer looks most elsewhere, and at patch (1, 2) a little: the mean of attention points elsewhere."""
    found = capture({0: 0.9, 6: 0.2}, {11: 0.8, 6: 0.2}, {8: 0.9, 6: 0.2})
    assert peak(found, MapSpec("raw", "all")) != (1, 2)
    assert peak(found, MapSpec("agree", "all")) == (1, 2)


def test_what_speaks_for_the_word_counts_as_much_as_what_is_looked_at():
    found = capture({0: 0.5, 11: 0.5}, {0: 0.5, 11: 0.5}, speaks_for=[11])
    assert peak(found, MapSpec("agree", "all")) == (2, 3)


def test_maps_have_more_points_than_patches_and_are_positive():
    maps = token_maps(capture({0: 0.5}, {5: 0.5}), MapSpec("agree", "all"))
    assert maps.shape == (T, P * POINTS**2) and maps.min() > 0
    words = CaptionAttention(capture({0: 0.5}), [("a", [0]), ("b", [0])]).maps(MapSpec("agree", "0"))
    assert words.shape == (2, 3 * POINTS, 4 * POINTS)


def test_a_blurred_map_has_its_maximum_at_the_centre_of_its_patch_or_between_patches():
    one = _blur(5) @ torch.tensor([0, 0, 1.0, 0, 0])
    assert one.argmax() == 2 * POINTS + POINTS // 2
    assert torch.allclose(one, one.flip(0))
    assert torch.allclose(_blur(5).sum(1), torch.ones(5 * POINTS))
    two = _blur(6) @ torch.tensor([0, 0, 1.0, 1.0, 0, 0])
    assert abs(float((two * torch.arange(18)).sum() / two.sum()) - 8.5) < 1e-5


def test_a_layer_that_looks_at_nothing_is_no_veto_and_gradients_are_needed():
    assert peak(capture({6: 0.5}, {}), MapSpec("agree", "all")) == (1, 2)
    found = capture({6: 0.5})
    found.logits = found.logits.detach()
    with pytest.raises(ValueError, match="agree needs a capture with gradients"):
        token_maps(found, MapSpec("agree", "0"))
