"""faithfulness.py: a planted model that looks at known patches, and models whose layers are shuffled and come back."""

import numpy as np
import pytest
import torch
from torch import nn

from captioning.maps.capture import Probe
from captioning.maps.faithfulness import (
    STEPS,
    deletion_and_insertion,
    probabilities,
    randomised,
    rank_correlation,
    removals,
)

GRID, HERE = (4, 4), 5  # the word depends on patch 5 alone


@pytest.fixture
def probe():
    """CLS and 16 patches; the caption's second token has probability 0.9 while patch 5 is there, and else 0.5."""
    image = torch.zeros(17, 2)
    image[1 + HERE, 0] = 16.0  # the mean patch has 1
    asked = []

    def logits(images):
        asked.append(len(images))
        sees = images[:, 1 + HERE, 0] > 8
        likely = torch.where(sees, 0.9, 0.5)
        both = torch.stack([likely, 1 - likely], -1).log()  # (B, V)
        return torch.stack([torch.zeros_like(both), both], 1)  # (B, T, V)

    found = Probe(image, torch.arange(1, 17), [0, 0], logits)
    object.__setattr__(found, "asked", asked)
    return found


def at(patch):
    return np.eye(16)[patch].reshape(GRID)


def test_patches_go_and_come_back_in_the_maps_order():
    word_map = np.arange(16.0).reshape(GRID)
    away = removals(word_map, 4)
    assert away.shape == (2, 5, 16)
    assert away[0].sum(1).tolist() == [0, 4, 8, 12, 16] and away[1].sum(1).tolist() == [16, 12, 8, 4, 0]
    assert away[0, 1].nonzero()[:, 0].tolist() == [12, 13, 14, 15]
    assert torch.equal(away[1], ~away[0])


def test_steps_need_not_divide_the_patches():
    away = removals(np.random.default_rng(0).random((3, 3)), 8)
    assert away[0].sum(1).tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_a_word_is_probable_while_what_it_depends_on_is_there(probe):
    away = torch.zeros(2, 16, dtype=torch.bool)
    away[1, HERE] = True
    assert probabilities(probe, away, [1]).tolist() == pytest.approx([0.9, 0.5])
    assert probabilities(probe, away, [0, 1]).tolist() == pytest.approx([0.45, 0.25])  # both tokens' product


def test_the_right_map_has_the_least_deletion_and_the_most_insertion(probe):
    """By the right map the first of 8 steps takes the patch: one end of that step is high, all others are low."""
    step = 1 / STEPS
    assert deletion_and_insertion(probe, at(HERE), [1]) == pytest.approx((0.5 + 0.4 * step / 2, 0.9 - 0.4 * step / 2))
    wrong = np.arange(16.0).reshape(GRID)
    wrong[1, 1] = -1  # patch 5 comes last
    assert deletion_and_insertion(probe, wrong, [1]) == pytest.approx((0.9 - 0.4 * step / 2, 0.5 + 0.4 * step / 2))
    assert sum(probe.asked) == 2 * 2 * (STEPS + 1)


def test_rank_correlation_by_hand_and_with_ties():
    values = np.array([[3.0, 1], [2, 4]])
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert rank_correlation(np.array([1, 1, 2, 3]), np.array([5, 5, 6, 7])) == pytest.approx(1)
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([1, 2, 4, 3])) == pytest.approx(0.8)
    assert rank_correlation(values, np.ones((2, 2))) == 0


def test_randomised_layers_keep_their_scale_and_come_back():
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = {name: values.clone() for name, values in layers.state_dict().items()}
    with pytest.raises(KeyError), randomised(layers):
        for name, values in layers.state_dict().items():
            assert not torch.equal(values, before[name])
            assert torch.equal(values.flatten().sort().values, before[name].flatten().sort().values)
        assert torch.is_grad_enabled()  # maps by gradient are made within
        raise KeyError
    assert all(torch.equal(values, before[name]) for name, values in layers.state_dict().items())
