"""microworld/composer.py: kinds, colours, boxes and relations of scenes hold what they promise."""

from microworld.composer import held_out
from microworld.scene import SIZE
from microworld.things import COLOURS, KINDS, PLACES


def test_splits_share_no_scene(scenes):
    seen = {split: {repr(scene) for scene, _ in pairs} for split, pairs in scenes.items()}
    assert all(len(unique) == 500 for unique in seen.values())
    assert not seen["train"] & seen["val"]


def test_held_out_pairs_are_in_val_novel_always_and_elsewhere_never(scenes):
    for split, pairs in scenes.items():
        for scene, _ in pairs:
            novel = {(t.kind, t.colour) for t in scene.things() if held_out(t.kind, t.colour)}
            assert bool(novel) == (split == "val_novel"), scene
            assert novel <= {(scene.main.kind.name, scene.main.colour)}, scene  # one new thing at a time


def test_every_coloured_kind_has_one_held_out_colour_and_every_colour_a_share_of_them():
    coloured = [kind.name for kind in KINDS.values() if kind.coloured]
    pairs = [(kind, colour) for kind in coloured for colour in COLOURS if held_out(kind, colour)]
    assert [kind for kind, _ in pairs] == coloured
    assert {colour for _, colour in pairs} == set(COLOURS)


def test_all_kinds_colours_places_and_relations_occur(scenes):
    train = [scene for scene, _ in scenes["train"]]
    things = [thing for scene in train for thing in scene.things()]
    assert {thing.kind for thing in things} == KINDS.keys()
    assert len(KINDS) >= 28
    assert {thing.colour for thing in things} == {*COLOURS, None}
    assert len(COLOURS) >= 10
    assert {scene.place for scene in train} == set(PLACES)
    assert len(PLACES) >= 6
    assert {scene.relation for scene in train} == {"", "left", "right", "on", "under", "above", "below"}


def test_kinds_stand_only_where_they_may_and_are_coloured_if_they_can_be(all_scenes):
    for scene, _ in all_scenes:
        for thing in scene.things():
            assert scene.place in KINDS[thing.kind].places, scene
            assert (thing.colour is not None) == KINDS[thing.kind].coloured


def test_boxes_are_inside_the_picture_and_ids_are_unique(all_scenes):
    for scene, _ in all_scenes:
        things = scene.things()
        assert sorted(t.id for t in things) == list(range(len(things)))
        for thing in things:
            x, y, width, height = thing.box
            assert width > 8, thing
            assert height > 8, thing
            assert x >= 0, thing
            assert y >= 0, thing
            assert x + width <= SIZE + 0.1, thing  # boxes are rounded to a tenth of a pixel
            assert y + height <= SIZE + 0.1, thing


def test_relations_hold_between_the_boxes(all_scenes):
    for scene, _ in all_scenes:
        if not scene.relation:
            continue
        (x, y, w, h), (ox, oy, ow, oh) = scene.main.things[0].box, scene.other.things[0].box
        holds = {
            "left": x + w <= ox,
            "right": ox + ow <= x,
            "above": y + h <= oy,
            "below": oy + oh <= y,
            "on": y < oy + 0.6 * oh and ox < x + w / 2 < ox + ow,
            "under": ox < x + w / 2 < ox + ow and y > oy,
        }
        assert holds[scene.relation], scene
