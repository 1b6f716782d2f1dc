"""by_probing.py: models whose words depend on one patch are asked again, and the maps point there."""

import pytest
import torch

from captioning.maps.attention import METHODS, MapSpec, token_maps
from captioning.maps.capture import Capture, Probe

GRID, P, C, V = (4, 7), 28, 3, 7
SEEN = (8, 19)  # the patch that each of the two tokens depends on
PROBING = [name for name, method in METHODS.items() if method.slow]


def planted(sign=1.0):
    """A model that gives the token 2 + t the more (or the less) the more patch SEEN[t] has of feature 0."""
    generator = torch.Generator().manual_seed(3)
    image = 0.1 * torch.rand(1 + P, C, generator=generator)  # a CLS token comes first
    image[1:][list(SEEN), 0] = 4.0
    rows = []

    def logits(x):
        rows.append(len(x))
        found = torch.zeros(len(x), 2, V)
        for t, patch in enumerate(SEEN):
            found[:, t, 2 + t] = sign * x[:, 1 + patch, 0]
        return found

    capture = Capture([torch.zeros(1, 1, 3, 1 + P + 3)], torch.zeros(3, V), [2, 3], torch.arange(1, 1 + P), GRID)
    capture.probe = lambda: Probe(image, torch.arange(1, 1 + P), capture.tokens, logits)
    return capture, rows


@pytest.mark.parametrize("method", PROBING)
def test_a_word_that_depends_on_one_patch_has_its_map_there(method):
    capture, rows = planted()
    maps = token_maps(capture, MapSpec(method))
    assert maps.shape == (2, P) and (maps >= 0).all()
    assert maps.argmax(1).tolist() == list(SEEN)
    assert maps[0, SEEN[1]] < 1e-6  # nothing of the one word at the other's patch
    assert max(rows) > 1  # several questions at once


@pytest.mark.parametrize("method", PROBING)
def test_what_speaks_against_a_word_is_no_part_of_its_map(method):
    capture, _ = planted(sign=-1.0)
    assert token_maps(capture, MapSpec(method))[:, list(SEEN)].max() == 0


@pytest.mark.parametrize("method", PROBING)
def test_without_a_model_to_ask(method):
    capture, _ = planted()
    capture.probe = None
    with pytest.raises(ValueError, match=f"{method} asks the model again"):
        token_maps(capture, MapSpec(method))
