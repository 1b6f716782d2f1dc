"""localisation.py: compact maps have a low spatial entropy, and the heads that have them are chosen and kept."""

import json
import math

import pytest
import torch

from captioning.maps.attention import MapSpec, token_maps
from captioning.maps.capture import Capture
from captioning.maps.localisation import bend, choose_heads, components, read_heads, spatial_entropy, write_heads

GRID, P, T = (6, 6), 36, 3


def spots(*cells):
    found = torch.full((P,), 1e-4)
    found[list(cells)] = 0.2
    return found.reshape(GRID)


def test_parts_touch_at_sides_and_corners():
    numbers = components(torch.stack([spots(0, 7, 8, 20), spots(5, 6)]) > 0.1)
    assert len(numbers[0].unique()) == 3  # the background, the chain of three, and one alone
    assert len(numbers[1].unique()) == 3  # the end of a row does not touch the next row's start


def test_one_compact_part_has_no_entropy_and_scattered_ones_have_much():
    entropy = spatial_entropy(torch.stack([spots(7, 8, 13, 14), spots(0, 5, 30, 35), spots(0, 1, 2, 35)]))
    assert entropy[0] == 0
    assert entropy[1] == pytest.approx(math.log(4))
    assert entropy[2] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_the_bend_of_sorted_values():
    assert bend(torch.tensor([9.0, 0.3, 0.1, 0.2, 8.0, 0.4])) == pytest.approx(0.4)


def capture():
    """Two layers of four heads: 1.2 looks at one place, 0.1 at many, the rest hardly at the image."""
    weights = [torch.full((1, 4, T + 1, P + 4), 1e-5) for _ in range(2)]
    weights[1][0, 2, :, :P] = spots(7, 8, 13).flatten()
    weights[0][0, 1, :, :P] = spots(0, 10, 20, 30).flatten()
    return Capture(weights, torch.zeros(T + 1, 9), [1, 2, 3], torch.arange(P), GRID)


def test_the_head_that_points_is_found_kept_and_used(tmp_path):
    found = choose_heads([capture(), capture()])
    assert found.heads[0] == (1, 2) and found.shares[0] == 1.0
    assert (found.images, found.words) == (2, 2 * T)
    file = tmp_path / "best.heads.json"
    write_heads(file, found)
    assert read_heads(file, 2, 4) == found.heads
    one = capture()
    one.local_heads = lambda: [(1, 2)]
    expected = token_maps(one, MapSpec("raw", "1", "2"))
    assert torch.equal(token_maps(one, MapSpec("raw", "all", "local")), expected)
    with pytest.raises(ValueError, match=r"in layers \[1\], not 0"):
        token_maps(one, MapSpec("raw", "0", "local"))
    with pytest.raises(ValueError, match="no model with localisation heads"):
        token_maps(capture(), MapSpec("raw", "all", "local"))


def test_bad_files_are_named(tmp_path):
    file = tmp_path / "heads.json"
    with pytest.raises(FileNotFoundError, match=r"heads\.json has no localisation heads; .*--find-heads"):
        read_heads(file, 2, 4)
    with pytest.raises(FileNotFoundError, match="the model has no localisation heads"):
        read_heads(None, 2, 4)
    for content in ({"heads": [[0, "x"]]}, {"heads": 3}, [1], {"else": 1}):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"heads\.json: no localisation heads of a model"):
            read_heads(file, 2, 4)
    for content in ({"heads": [[2, 0]]}, {"heads": [[0, 4]]}, {"heads": []}):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"heads\.json: heads of another model"):
            read_heads(file, 2, 4)
    with pytest.raises(ValueError, match="no caption"):
        choose_heads([])
