"""by_probing.py: models whose words depend on one patch are asked again, and the maps point there."""

from dataclasses import replace

import pytest
import torch

from captioning.maps.attention import MapSpec, token_maps
from captioning.maps.capture import Capture, Probe

GRID, P, C, V = (4, 7), 28, 3, 7
SEEN = (8, 19)  # the patch that each of the two tokens depends on
SINK = 24  # a patch that is looked at for every token and says nothing
PROBING = ("occlusion", "ig")


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


def test_integrated_gradients_add_up_to_what_the_image_adds():
    """The shares of all patches are the difference between the image and its mean token; here every one is positive."""
    capture, _ = planted()
    probe = capture.probe()
    mean = probe.image.clone()
    mean[probe.patches] = probe.image[probe.patches].mean(0)
    added = (probe.log_probs(probe.image[None]) - probe.log_probs(mean[None]))[0]
    assert torch.allclose(token_maps(capture, MapSpec("ig")).sum(1), added, rtol=0.05)


def test_a_model_without_gradients_is_named():
    capture, _ = planted()
    probe = capture.probe()
    capture.probe = lambda: replace(probe, logits=lambda x: probe.logits(x).detach())
    with pytest.raises(ValueError, match="ig needs gradients"):
        token_maps(capture, MapSpec("ig"))
