"""by_activation.py: token activation maps on planted hidden states, and what a model says at its own positions."""

import pytest
import torch

from captioning.maps.attention import MapSpec, token_maps
from captioning.maps.by_activation import unexplained
from captioning.maps.capture import Capture
from captioning.maps.filters import rank_gaussian

GRID, P, T = (8, 8), 64, 3
HERE, THERE = 18, 45  # patches


def planted(hidden, layers=1):
    """A capture whose hidden states are what its positions say of the T tokens, behind one position of a prompt."""
    weights = [torch.zeros(1, 1, T + 1, 1 + P + 1 + T) for _ in range(layers)]
    return Capture(
        weights,
        torch.zeros(T + 1, 9),
        [4, 5, 4],
        torch.arange(1, 1 + P),
        GRID,
        hidden=hidden,
        read_out=lambda states: states,
    )


def says(**places):
    """What the positions say of each token: nothing but where ``places`` has {position: value} for token tN."""
    states = torch.zeros(1 + P + 1 + T, T)
    for name, values in places.items():
        for position, value in values.items():
            states[position, int(name[1:])] = value
    return states


def blob(centre):
    """Positions of the 3 x 3 patches around one, nearly alike: a rank filter keeps its middle."""
    y, x = divmod(centre, GRID[1])
    return {1 + (y + i) * GRID[1] + x + j: 6.0 - abs(i) - abs(j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def test_tam_points_where_the_position_says_the_token():
    maps = token_maps(planted([says(t0=blob(HERE), t1=blob(THERE))]), MapSpec("tam"))
    assert maps.shape == (T, P)
    assert maps[0].argmax() == HERE and maps[1].argmax() == THERE and maps[2].sum() == 0


def test_tam_takes_away_what_an_earlier_token_explains():
    """Token 1 is said where token 0 is, and at a place of its own; token 0's position says token 1 too."""
    both = {**blob(HERE), **{position: value / 2 for position, value in blob(THERE).items()}}
    own = P + 2  # the position of token 0
    assert token_maps(planted([says(t0=blob(HERE), t1=both)]), MapSpec("tam"))[1].argmax() == HERE
    explained = token_maps(planted([says(t0=blob(HERE), t1={**both, own: 1.0})]), MapSpec("tam"))[1]
    assert explained.argmax() == THERE and explained[HERE] < 1e-6


def test_an_earlier_occurrence_of_a_token_explains_nothing():
    image, text = torch.rand(2, P), torch.ones(2, 2)
    assert torch.equal(unexplained(image, text, torch.tensor([7, 7])), image)
    one, two = unexplained(image, text, torch.tensor([7, 8]))
    assert torch.equal(one, image[0])
    scale = (image[0] @ image[1]) / image[0].square().sum()  # least squares of one map on the other
    assert torch.allclose(two, (image[1] - scale * image[0]).clamp(min=0), atol=1e-6)


def test_the_filter_removes_single_patches_and_keeps_even_maps():
    single = torch.zeros(1, P)
    single[0, 7] = 9.0
    assert rank_gaussian(single, GRID).max() < 9.0 / 2
    even = torch.full((2, P), 3.0)
    assert torch.allclose(rank_gaussian(even, GRID), even)
    assert rank_gaussian(torch.zeros(1, P), GRID).max() == 0


def test_tam_reads_the_layers_that_are_asked_for():
    capture = planted([says(t0=blob(HERE)), says(t0=blob(THERE))], layers=2)
    assert token_maps(capture, MapSpec("tam"))[0].argmax() == THERE
    assert token_maps(capture, MapSpec("tam", "0"))[0].argmax() == HERE
    with pytest.raises(ValueError, match="tam needs a capture with hidden states"):
        token_maps(planted(None), MapSpec("tam"))


def test_sink_patches_are_found_by_their_hidden_states_and_left_out():
    states = torch.ones(1 + P + 1 + T, 16)
    states[[0, 1 + HERE], 3] = 30.0  # as the first position: a sink
    states[1 + THERE, 5] = 30.0  # huge elsewhere
    capture = planted([states])
    capture.weights[0][..., 1 + HERE], capture.weights[0][..., 1 + THERE] = 0.6, 0.3
    assert (token_maps(capture, MapSpec("raw")).argmax(1) == HERE).all()
    maps = token_maps(capture, MapSpec("sinkless"))
    assert (maps.argmax(1) == THERE).all() and maps[:, HERE].max() == 0
    capture.hidden = [torch.ones_like(states)]
    assert torch.equal(token_maps(capture, MapSpec("sinkless")), token_maps(capture, MapSpec("raw")))
    capture.hidden = None
    with pytest.raises(ValueError, match="sinkless needs a capture with hidden states"):
        token_maps(capture, MapSpec("sinkless"))
