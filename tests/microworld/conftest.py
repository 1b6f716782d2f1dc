"""Scenes that the tests of composer and captions share."""

import pytest

from microworld.composer import make_scene


@pytest.fixture(scope="session")
def scenes():
    """(scene, captions) of five hundred scenes a split."""
    return {split: [make_scene(split, 0, n) for n in range(500)] for split in ("train", "val", "val_novel")}


@pytest.fixture(scope="session")
def all_scenes(scenes):
    return [pair for pairs in scenes.values() for pair in pairs]
