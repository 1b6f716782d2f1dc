"""cache.py: nothing is computed twice or taken for another's, and scores stay the same."""

import ast
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from captioning.scoring import cache
from captioning.scoring.cache import cached_image_features, cached_reference_side, make_reference_side
from captioning.scoring.cider import DocumentFrequencies, cider_d
from captioning.tensors import read_tensors, write_tensors

# --- references -----------------------------------------------------------------------------------------------------


REFERENCES = {
    "a": ["A red ball.", "the ball is red", "a ball"],
    "b": ["Two blue cubes; one is small.", "two cubes"],
    "c": ["a red cube"],
}


@pytest.fixture
def tokenized(monkeypatch):
    """Replace the tokenizers by a simple one; return the list of the images that it is called for."""
    asked = []

    def tokenize(references, tokenizer):
        asked.extend(references)
        return {stem: [caption.lower().strip(".") for caption in group] for stem, group in references.items()}

    monkeypatch.setattr(cache, "ptb_tokenize", tokenize)
    return asked


def scores(side):
    words = [[caption.split() for caption in group] for group in side.tokens.values()]
    return cider_d(words, [["a", "red", "ball"], ["two", "unseen", "cubes"], ["a", "red", "cube"]], side.frequencies)


def test_references_are_tokenized_once_with_the_same_scores(tmp_path, tokenized):
    plain = make_reference_side(REFERENCES, "ptb")
    first = cached_reference_side(REFERENCES, "ptb", tmp_path)
    tokenized.clear()
    second = cached_reference_side(REFERENCES, "ptb", tmp_path)
    assert tokenized == []
    assert plain.tokens == first.tokens == second.tokens
    assert scores(plain).tolist() == scores(first).tolist() == scores(second).tolist()
    assert scores(plain).max() > 1


def test_images_under_other_names_have_the_same_references(tmp_path, tokenized):
    cached_reference_side(REFERENCES, "ptb", tmp_path)
    tokenized.clear()
    renamed = {stem.upper(): group for stem, group in REFERENCES.items()}
    found = cached_reference_side(renamed, "ptb", tmp_path)
    assert list(found.tokens) == ["A", "B", "C"]
    assert tokenized == []


@pytest.mark.parametrize(
    "other",
    [
        {**REFERENCES, "c": ["a red cub"]},
        {**REFERENCES, "a": ["A red ball.", "the ball is red"]},
        {"a": REFERENCES["a"][:1], "b": [*REFERENCES["a"][1:], *REFERENCES["b"]], "c": REFERENCES["c"]},
        dict(reversed(REFERENCES.items())),
    ],
    ids=["word", "fewer", "regrouped", "order"],
)
def test_other_references_are_tokenized_again(tmp_path, tokenized, other):
    cached_reference_side(REFERENCES, "ptb", tmp_path)
    found = cached_reference_side(other, "ptb", tmp_path)
    assert len(tokenized) == 6
    assert found.tokens == make_reference_side(other, "ptb").tokens


def test_another_tokenizer_or_version_is_another_entry(tmp_path, tokenized, monkeypatch):
    cached_reference_side(REFERENCES, "ptb", tmp_path)
    cached_reference_side(REFERENCES, "ptb-java", tmp_path)
    assert len(tokenized) == 6
    monkeypatch.setattr(cache, "version", lambda name: "0.0")
    cached_reference_side(REFERENCES, "ptb-java", tmp_path)
    assert len(tokenized) == 9
    monkeypatch.setattr(cache, "sha256_of", lambda file: "0" * 64)  # as if the code were another
    cached_reference_side(REFERENCES, "ptb", tmp_path)
    assert len(tokenized) == 12


def test_every_file_that_decides_on_tokens_is_part_of_the_key():
    """A changed tokenizer must never read old tokens: neither its file nor one that it imports may be left out."""
    folder, found, open_ = Path(cache.__file__).parent, set(), {"tokenizers.py", "cider.py"}
    while open_:
        found.add(name := open_.pop())
        for node in ast.walk(ast.parse((folder / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("captioning.scoring"):
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                files = {f"{module.split('.')[-1]}.py" for module in modules}
                open_ |= {file for file in files if (folder / file).is_file()} - found
    assert found == {"tokenizers.py", "cider.py", "java.py", "ptb.py"}
    assert {*cache.SOURCES["ptb"]} == found - {"java.py"}
    assert {*cache.SOURCES["ptb-java"]} == found - {"ptb.py"}


def damaged(content, how):
    if how == "cut":
        return content[:-5]
    if how == "text":
        return b"no safetensors"
    if how == "checksum":
        return content.replace(b'"digest"', b'"dogest"', 1)
    flipped = bytearray(content)
    flipped[-1] ^= 1
    return bytes(flipped)


@pytest.mark.parametrize("how", ["cut", "text", "checksum", "flipped"])
def test_a_damaged_file_is_reported_and_made_again(tmp_path, tokenized, caplog, how):
    first = cached_reference_side(REFERENCES, "ptb", tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damaged(file.read_bytes(), how))
    with caplog.at_level(logging.WARNING):
        found = cached_reference_side(REFERENCES, "ptb", tmp_path)
    assert f"{file} is damaged or stale" in caplog.text
    assert found.tokens == first.tokens
    assert scores(found).tolist() == scores(first).tolist()
    tokenized.clear()
    cached_reference_side(REFERENCES, "ptb", tmp_path)
    assert tokenized == []


def test_an_undamaged_file_of_other_references_is_noticed(tmp_path, tokenized, caplog):
    cached_reference_side(REFERENCES, "ptb", tmp_path)
    (file,) = tmp_path.iterdir()
    tensors, texts = read_tensors(file)
    write_tensors(file, tensors, {"references": "f" * len(texts["references"])})
    with caplog.at_level(logging.WARNING):
        cached_reference_side(REFERENCES, "ptb", tmp_path)
    assert "of other references" in caplog.text
    assert len(tokenized) == 6


def test_only_the_sets_used_last_are_kept(tmp_path, tokenized, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 2)
    sets = [{"a": [f"caption {number}"], "b": ["other"]} for number in range(4)]
    for references in sets:
        cached_reference_side(references, "ptb", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    tokenized.clear()
    cached_reference_side(sets[-1], "ptb", tmp_path)
    assert tokenized == []


def test_a_folder_that_cannot_be_written_costs_time_and_no_score(tmp_path, tokenized, caplog):
    (tmp_path / "file").write_text("")
    found = cached_reference_side(REFERENCES, "ptb", tmp_path / "file" / "cache")
    assert found.tokens == make_reference_side(REFERENCES, "ptb").tokens
    assert "not written" in caplog.text


def test_frequencies_come_back_from_their_arrays():
    words = [[caption.split() for caption in group] for group in REFERENCES.values()]
    counted = DocumentFrequencies(words)
    restored = DocumentFrequencies.restore(words, counted.arrays())
    for ours, theirs in zip(restored.counts(words[0]), counted.counts(words[0]), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="document frequencies are codes_1"):
        DocumentFrequencies.restore(words, {"codes_1": np.zeros(1, dtype=np.int64)})


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(path)
    return paths


@pytest.fixture
def encoded(monkeypatch):
    """Replace CLIP by the mean red of a picture, and return the list of the images that it is called for."""
    asked = []

    def features(scorer, paths, batch_size):
        asked.extend(path.stem for path in paths)
        return torch.tensor([[float(Image.open(path).getpixel((0, 0))[0]), scorer.scale] for path in paths])

    monkeypatch.setattr(cache, "image_features", features)
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


def test_features_of_pixels_read_otherwise_are_never_served(tmp_path, pictures, encoded, monkeypatch):
    for number in (1, 2, 2):
        monkeypatch.setattr(cache, "LOADER", number)
        cached_image_features(scorer(), pictures, 2, tmp_path / "cache")
    assert len(encoded) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_damaged_features_are_reported_and_made_again(tmp_path, pictures, encoded, caplog, damage):
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


def test_features_that_cannot_be_written_cost_time_and_no_score(tmp_path, pictures, encoded, caplog):
    (tmp_path / "file").write_text("")
    features = cached_image_features(scorer(), pictures, 2, tmp_path / "file" / "cache")
    assert features[:, 0].tolist() == [0.0, 40.0, 80.0]
    assert "not written" in caplog.text


def test_features_of_the_last_version_are_passed_over(tmp_path, pictures, encoded, caplog):
    """Its checksum was in another form."""
    folder = tmp_path / "cache"
    first = cached_image_features(scorer(), pictures, 2, folder)
    (file,) = folder.iterdir()
    texts = {"images": json.dumps(["0" * 64]), "sha256": "1" * 64}
    save_file({"features": torch.zeros(1, 2)}, file, metadata=texts)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached_image_features(scorer(), pictures, 2, folder), first)
    assert "it is of another version" in caplog.text
    assert read_tensors(file)[1].keys() == {"images"}
    cached_image_features(scorer(), pictures, 2, folder)
    assert len(encoded) == 6
