"""clipcache.py: features are computed once an image, and never taken for those of another image, model or precision."""

import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from captioning.scoring import clip_cache as clipcache
from captioning.scoring.clip_cache import cached_image_features


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(path)
    return paths


@pytest.fixture
def encoded(monkeypatch):
    """Replace CLIP by the mean red of a picture, and return the list of what it was asked for."""
    asked = []

    def features(scorer, paths, batch_size):
        asked.extend(path.stem for path in paths)
        return torch.tensor([[float(Image.open(path).getpixel((0, 0))[0]), scorer.scale] for path in paths])

    monkeypatch.setattr(clipcache, "image_features", features)
    return asked


def scorer(**changes):
    parts = {"model_name": "m", "fingerprint": "f", "preprocess": "p", "precision": "fp32", "scale": 1.0}
    return SimpleNamespace(**{**parts, "device": torch.device("cpu"), **changes})


def test_an_image_is_encoded_once_by_its_content(tmp_path, pictures, encoded):
    folder = tmp_path / "cache"
    first = cached_image_features(scorer(), pictures, 2, folder)
    assert first[:, 0].tolist() == [0.0, 40.0, 80.0]
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[0].read_bytes())
    again = cached_image_features(scorer(), [copy, pictures[2]], 2, folder)
    assert torch.equal(again, first[[0, 2]])
    assert encoded == ["a", "b", "c"]
    Image.new("RGB", (4, 4), (200, 0, 0)).save(pictures[1])  # another picture under the same name
    assert cached_image_features(scorer(), pictures, 2, folder)[:, 0].tolist() == [0.0, 200.0, 80.0]
    assert encoded == ["a", "b", "c", "b"]


@pytest.mark.parametrize("change", ["model_name", "fingerprint", "preprocess", "precision"])
def test_another_model_never_gets_these_features(tmp_path, pictures, encoded, change):
    cached_image_features(scorer(), pictures, 2, tmp_path / "cache")
    other = cached_image_features(scorer(**{change: "other"}, scale=2.0), pictures, 2, tmp_path / "cache")
    assert other[:, 1].tolist() == [2.0] * 3
    assert len(encoded) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_a_damaged_file_is_named_and_made_anew(tmp_path, pictures, encoded, caplog, damage):
    folder = tmp_path / "cache"
    first = cached_image_features(scorer(), pictures, 2, folder)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes({"cut": bytes(content[:-3]), "flipped": bytes(content), "text": b"no safetensors"}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached_image_features(scorer(), pictures, 2, folder), first)
    assert f"{file} is damaged" in caplog.text
    assert len(encoded) == 6
    cached_image_features(scorer(), pictures, 2, folder)
    assert len(encoded) == 6


def test_a_folder_that_cannot_be_written_costs_time_and_no_score(tmp_path, pictures, encoded, caplog):
    (tmp_path / "file").write_text("")
    features = cached_image_features(scorer(), pictures, 2, tmp_path / "file" / "cache")
    assert features[:, 0].tolist() == [0.0, 40.0, 80.0]
    assert "not written" in caplog.text
