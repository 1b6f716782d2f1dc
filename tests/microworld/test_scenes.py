"""microworld/scenes.py: the same files for everyone, in COCO's layout."""

import json
import random

import pytest
import torch
from PIL import Image

from captioning.data.annotations import load_split
from microworld.composer import make_scene
from microworld.scene import SIZE
from microworld.scenes import generate, main, make_image
from microworld.things import KINDS


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
