"""microworld/drawing.py and things.py: every thing is drawn in its colour, inside its box, and can be seen."""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from microworld.composer import make_scene
from microworld.drawing import render
from microworld.pen import Pen
from microworld.scene import SIZE
from microworld.things import COLOURS, KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_is_drawn_in_its_colour_and_inside_its_box(kind):
    size, box = 240, (60, 60, 120, 120)
    drawings = {}
    for colour, flip in (("red", False), ("red", True), ("blue", False)):
        image = Image.new("RGB", (size, size), (1, 2, 3))
        KINDS[kind].draw(Pen(ImageDraw.Draw(image), box, COLOURS[colour], flip))
        drawings[colour, flip] = image
        drawn = (np.asarray(image) != (1, 2, 3)).any(-1)  # (H, W)
        inside = drawn[60:180, 60:180].sum().item()
        assert inside > 0.1 * 120 * 120
        assert drawn.sum().item() - inside <= 0.05 * inside  # an edge may stand out a little
    same = drawings["red", False].tobytes() == drawings["blue", False].tobytes()
    assert same == (not KINDS[kind].coloured)


@pytest.mark.parametrize("index", range(6))
def test_every_thing_of_a_scene_can_be_seen_in_its_box(index):
    """Redrawing the scene without a thing changes pixels where the thing is, so nothing hides it altogether."""
    scene, _ = make_scene("train", 0, index)
    whole = render(scene, random.Random(0))
    assert whole.size == (SIZE, SIZE)
    for group in scene.groups():
        for thing in list(group.things):
            group.things.remove(thing)
            without = render(scene, random.Random(0))
            group.things.append(thing)
            x, y, width, height = thing.box
            box = tuple(map(round, (x, y, x + width, y + height)))
            before, after = (np.asarray(image.crop(box)) for image in (whole, without))
            changed = (before != after).any(-1).sum()
            assert changed > 0.05 * width * height, thing
