"""microworld: the same scenes for everyone, captions that are true of them, boxes and mentions that hold."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from captioning.data.annotations import load_split
from captioning.data.tokenizer import Tokenizer
from captioning.models.llava import PROMPTS
from microworld.composer import held_out, make_scene
from microworld.drawing import render
from microworld.instructions import KEY_OBJECTS, SHORT, conversation
from microworld.pen import Pen
from microworld.scene import SIZE
from microworld.scenes import generate, main, make_image
from microworld.things import COLOURS, KINDS, PLACES

MANY = 500
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}


@pytest.fixture(scope="module")
def scenes():
    """(scene, captions) of five hundred scenes a split."""
    return {split: [make_scene(split, 0, n) for n in range(MANY)] for split in ("train", "val", "val_novel")}


@pytest.fixture(scope="module")
def all_scenes(scenes):
    return [pair for pairs in scenes.values() for pair in pairs]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ the same for everyone


def test_a_scene_depends_on_split_seed_and_index_alone():
    image, _, captions = make_image("val", 3, 5)
    random.seed(1)
    torch.manual_seed(1)
    again, _, same = make_image("val", 3, 5)
    assert image.tobytes() == again.tobytes()
    assert [c.text for c in captions] == [c.text for c in same]
    for split, seed, index in (("train", 3, 5), ("val", 4, 5), ("val", 3, 6)):
        other, _, texts = make_image(split, seed, index)
        assert other.tobytes() != image.tobytes()
        assert [c.text for c in texts] != [c.text for c in captions]


def test_the_number_of_processes_and_of_scenes_changes_nothing(tmp_path):
    for name, count, workers in (("one", 6, 1), ("two", 6, 2), ("more", 7, 1)):
        generate(tmp_path / name, "val", count, 3, workers)
    one, two, more = (files(tmp_path / name) for name in ("one", "two", "more"))
    assert one == two
    assert len(one) == 7
    assert all(more[name] == content for name, content in one.items() if name.endswith(".jpg"))


def test_splits_share_no_scene(scenes):
    seen = {split: {repr(scene) for scene, _ in pairs} for split, pairs in scenes.items()}
    assert all(len(unique) == MANY for unique in seen.values())
    assert not seen["train"] & seen["val"]


# ------------------------------------------------------------------------------------------------------ what is in them


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


# ------------------------------------------------------------------------------------------------------------- captions


def test_five_captions_mostly_distinct_of_eight_to_twelve_words(scenes):
    captions = [caption for _, five in scenes["train"] for caption in five]
    assert all(len(five) == 5 for _, five in scenes["train"])
    distinct = [len({caption.text for caption in five}) for _, five in scenes["train"]]
    assert min(distinct) >= 2
    assert sum(distinct) > 4.8 * MANY
    assert 8 <= sum(len(caption.words) for caption in captions) / len(captions) <= 12
    assert max(len(caption.words) for caption in captions) <= 30


def test_mentions_point_at_words_that_name_their_things(all_scenes):
    for scene, captions in all_scenes:
        things = {thing.id: thing for thing in scene.things()}
        for caption in captions:
            words = caption.text.rstrip(".").lower().split()  # as the annotation file has them
            assert len(words) == len(caption.words)
            assert any(mention.role == "noun" for mention in caption.mentions)
            for mention in caption.mentions:
                word, named = words[mention.word], [things[i] for i in mention.things]
                plural = len(named) > 1
                for thing in named:
                    expected = {
                        "noun": {names[plural] for names in KINDS[thing.kind].names()},
                        "colour": {thing.colour},
                        "size": {"small"} if thing.size == "small" else {"big", "large"},
                        "count": {key for key, count in COUNTS.items() if count == len(named)},
                    }[mention.role]
                    assert word in expected, (caption.text, mention)


def test_every_colour_and_thing_that_a_caption_names_is_a_mention(all_scenes):
    """A caption that names a colour or a thing outside of its mentions would go unchecked above."""
    nouns = {name for kind in KINDS.values() for pair in kind.names() for name in pair}
    for _, captions in all_scenes:
        for caption in captions:
            marked = {mention.word for mention in caption.mentions}
            named = {n for n, word in enumerate(caption.words) if word in COLOURS or word in nouns}
            others = {caption.words[n : n + 2] == ["green", "meadow"] for n in named - marked}  # part of a place's name
            assert others <= {True}, caption.text


def test_what_captions_say_of_left_right_above_and_below_is_true(all_scenes):
    true = {
        ("left", "of"): lambda a, b: a[0] + a[2] <= b[0],
        ("right", "of"): lambda a, b: b[0] + b[2] <= a[0],
        ("above",): lambda a, b: a[1] + a[3] <= b[1],
        ("beneath",): lambda a, b: a[1] + a[3] > b[1] + 0.5 * b[3],
        ("top", "of"): lambda a, b: a[1] < b[1] + 0.6 * b[3],
    }
    seen = set()
    for scene, captions in all_scenes:
        boxes = {thing.id: thing.box for thing in scene.things()}
        for caption in captions:
            nouns = [m for m in caption.mentions if m.role == "noun"]
            for n in range(len(caption.words)):
                for phrase, holds in true.items():
                    if tuple(caption.words[n : n + len(phrase)]) == phrase:
                        before = [m for m in nouns if m.word < n][-1]
                        after = next(m for m in nouns if m.word > n)
                        assert holds(boxes[before.things[0]], boxes[after.things[0]]), caption.text
                        seen.add(phrase)
    assert seen == set(true)


def test_captions_are_sentences_with_the_right_article(all_scenes):
    for _, captions in all_scenes:
        for caption in captions:
            text = caption.text
            assert text[0].isupper(), text
            assert text.endswith("."), text
            assert "  " not in text
            for article, word in zip(caption.words, caption.words[1:], strict=False):
                if article in ("a", "an"):
                    assert (article == "an") == (word[0] in "aeiou"), text


def test_captions_fit_the_tokenizer_and_come_back_from_it(scenes, tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    for _, captions in scenes["val_novel"][:100]:
        for caption in captions:
            ids = tokenizer.encode(caption.text)
            assert tokenizer.decode(ids) == caption.text
            assert len(ids) <= 40


# ------------------------------------------------------------------------------------------------------------- drawings


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


# ---------------------------------------------------------------------------------------------------------------- files


def test_the_command_line_writes_cocos_layout(tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--split", "val_novel", "--count", "3", "--seed", "2", "--workers", "1"]
    assert main(argv) == 0
    assert str(tmp_path / "val_novel.json") in capsys.readouterr().out
    samples = load_split(tmp_path, "val_novel")
    assert [sample.path.name for sample in samples] == [f"{n:012d}.jpg" for n in range(3)]
    assert all(len(sample.captions) == 5 for sample in samples)
    for sample in samples:
        with Image.open(sample.path) as image:
            assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")


def test_the_annotation_file_says_what_the_scenes_hold(tiny_data):
    content = json.loads((tiny_data / "train.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects = {row["id"]: row for row in content["objects"]}
    assert len(objects) == len(content["objects"])
    assert len({row["id"] for row in content["annotations"]}) == len(content["annotations"]) == 5 * 12
    for index, row in enumerate(content["scenes"]):
        scene, captions = make_scene("train", 7, index)
        assert (row["image_id"], row["place"], row["relation"]) == (index, scene.place, scene.relation)
        assert {objects[i]["category_id"] for i in row["main"]} == {list(KINDS).index(scene.main.kind.name)}
        mine = [o for o in objects.values() if o["image_id"] == index]
        drawn = {(t.kind, t.colour, t.size, t.box) for t in scene.things()}
        assert {(names[o["category_id"]], o["colour"], o["size"], tuple(o["bbox"])) for o in mine} == drawn
        texts = [a["caption"] for a in content["annotations"] if a["image_id"] == index]
        assert texts == [caption.text for caption in captions]
    for annotation in content["annotations"]:
        for mention in annotation["mentions"]:
            assert mention["word"] < len(annotation["caption"].split())
            assert all(objects[i]["image_id"] == annotation["image_id"] for i in mention["objects"])


@pytest.mark.parametrize("flags", [("--count", "0"), ("--count", "-4")])
def test_a_count_below_one_is_refused(flags, tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--split", "val", *flags]) == 2
    assert "--count" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- questions, answers


@pytest.fixture(scope="module")
def taught():
    """Scenes with their questions and answers."""
    made = [make_scene("pretrain", 4, k) for k in range(300)]
    return [(s, conversation(s, [c.text for c in cs], random.Random(k))) for k, (s, cs) in enumerate(made)]


def test_every_style_is_asked_and_both_of_the_reports_prompts(taught):
    questions = {question for _, pairs in taught for question, _ in pairs}
    assert set(PROMPTS.values()) <= questions
    for start in ("How many", "Where", "What colour"):
        assert any(question.startswith(start) for question in questions)


def test_counts_and_colours_are_true(taught):
    numbers = {"no": 0, "one": 1, **COUNTS}
    counted = 0
    for scene, pairs in taught:
        for _, answer in pairs:
            words = answer.rstrip(".").split()
            if answer.startswith("There") and len(words) == 4 and words[2] in numbers:
                things = [t for t in scene.things() if words[3] in KINDS[t.kind].names()[0]]
                assert len(things) == numbers[words[2]], answer
                counted += 1
            if words[-1] in COLOURS and len(words) == 4 and words[0] == "The":
                assert any(words[1] in KINDS[t.kind].names()[0] and t.colour == words[3] for t in scene.things()), (
                    answer
                )
    assert counted > 150


def test_key_objects_are_all_named_and_at_more_length(taught):
    for scene, pairs in taught:
        answer = next(a for q, a in pairs if q in KEY_OBJECTS)
        for group in scene.groups():
            assert any(name in answer.lower() for names in group.kind.names() for name in names), answer
        assert answer[0].isupper()
        assert answer.endswith(".")
    short = [len(a.split()) for _, pairs in taught for q, a in pairs if q in SHORT]
    long = [len(a.split()) for _, pairs in taught for q, a in pairs if q in KEY_OBJECTS]
    assert sum(long) / len(long) > 1.3 * sum(short) / len(short)
