"""`make try`: captions and maps from the adapter that ships, of drawings and of pictures given."""

import json
import re

import pytest
from PIL import Image

from captioning import load
from captioning.data.listing import list_images
from microworld import recipes, try_it


def test_it_draws_captions_and_explains(tmp_path, capsys):
    Image.new("RGB", (70, 50), "navy").save(tmp_path / "mine.jpg")
    assert try_it.main([str(tmp_path / "mine.jpg"), "--out", str(tmp_path / "out"), "--count", "2"]) == 0
    scenes, printed = list_images(tmp_path / "out" / "scenes"), capsys.readouterr().out.splitlines()
    captions = load("micro", device="cpu").caption([tmp_path / "mine.jpg", *scenes])
    found = [match.groups() for line in printed if (match := re.match(r"(mine\.jpg|scene\d\.png) +(.*)", line))]
    assert found == list(zip(["mine.jpg", "scene1.png", "scene2.png"], captions, strict=True))
    assert sum("a person: " in line for line in printed) == 2
    page = (tmp_path / "out" / "try.html").read_text()
    assert all(json.dumps(caption)[1:-1] in page for caption in captions) and "://" not in page


def test_the_scenes_are_of_no_split():
    assert try_it.SEED not in {0, *recipes.SCENE_SEEDS.values()}


@pytest.mark.parametrize(("name", "content", "code"), [("broken.jpg", b"no picture", 3), ("absent.jpg", None, 3)])
def test_a_picture_that_cannot_be_read_is_named_and_the_rest_is_shown(name, content, code, tmp_path, capsys, caplog):
    if content:
        (tmp_path / name).write_bytes(content)
    assert try_it.main([str(tmp_path / name), "--out", str(tmp_path / "out"), "--count", "1"]) == code
    assert name in caplog.text and "scene1.png" in capsys.readouterr().out
    assert (tmp_path / "out" / "try.html").is_file()


def test_an_adapter_that_is_not_there_is_one_line(tmp_path, capsys):
    assert try_it.main(["--adapter", str(tmp_path / "none.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert "none.safetensors: no such file" in capsys.readouterr().err
