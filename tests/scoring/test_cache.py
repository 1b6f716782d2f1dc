"""refcache.py: references are tokenized once and never taken for others, and scores stay the same."""

import logging

import numpy as np
import pytest

from captioning.scoring import cache as refcache
from captioning.scoring.cache import cached_reference_side, make_reference_side
from captioning.scoring.cider import DocumentFrequencies, cider_d
from captioning.tensors import read_tensors, write_tensors

REFERENCES = {
    "a": ["A red ball.", "the ball is red", "a ball"],
    "b": ["Two blue cubes; one is small.", "two cubes"],
    "c": ["a red cube"],
}


@pytest.fixture
def tokenized():
    """Return a tokenizer that lists the images it was asked for."""

    def tokenize(references):
        tokenize.asked += list(references)
        return {stem: [caption.lower().strip(".") for caption in group] for stem, group in references.items()}

    tokenize.asked = []
    return tokenize


def scores(side):
    words = [[caption.split() for caption in group] for group in side.tokens.values()]
    return cider_d(words, [["a", "red", "ball"], ["two", "unseen", "cubes"], ["a", "red", "cube"]], side.frequencies)


def test_references_are_tokenized_once_with_the_same_scores(tmp_path, tokenized):
    plain = make_reference_side(REFERENCES, tokenized)
    first = cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    tokenized.asked.clear()
    second = cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    assert tokenized.asked == []
    assert plain.tokens == first.tokens == second.tokens
    assert scores(plain).tolist() == scores(first).tolist() == scores(second).tolist()
    assert scores(plain).max() > 1


def test_images_under_other_names_have_the_same_references(tmp_path, tokenized):
    cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    tokenized.asked.clear()
    renamed = {stem.upper(): group for stem, group in REFERENCES.items()}
    found = cached_reference_side(renamed, "ptb", tokenized, tmp_path)
    assert list(found.tokens) == ["A", "B", "C"]
    assert tokenized.asked == []


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
def test_other_references_are_tokenized_themselves(tmp_path, tokenized, other):
    cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    found = cached_reference_side(other, "ptb", tokenized, tmp_path)
    assert len(tokenized.asked) == 6
    assert found.tokens == make_reference_side(other, tokenized).tokens


def test_another_tokenizer_or_version_is_another_entry(tmp_path, tokenized, monkeypatch):
    cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    cached_reference_side(REFERENCES, "ptb-java", tokenized, tmp_path)
    assert len(tokenized.asked) == 6
    monkeypatch.setattr(refcache, "version", lambda name: "0.0")
    cached_reference_side(REFERENCES, "ptb-java", tokenized, tmp_path)
    assert len(tokenized.asked) == 9
    monkeypatch.setitem(refcache.SOURCES, "ptb", ("ptb",))  # as if the code were another
    cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    assert len(tokenized.asked) == 12


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
def test_a_damaged_file_is_named_and_made_anew(tmp_path, tokenized, caplog, how):
    first = cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damaged(file.read_bytes(), how))
    with caplog.at_level(logging.WARNING):
        found = cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    assert f"{file} is damaged or stale" in caplog.text
    assert found.tokens == first.tokens
    assert scores(found).tolist() == scores(first).tolist()
    tokenized.asked.clear()
    cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    assert tokenized.asked == []


def test_a_whole_file_of_other_references_is_noticed(tmp_path, tokenized, caplog):
    cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    (file,) = tmp_path.iterdir()
    tensors, texts = read_tensors(file)
    write_tensors(file, tensors, {"references": "f" * len(texts["references"])})
    with caplog.at_level(logging.WARNING):
        cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path)
    assert "of other references" in caplog.text
    assert len(tokenized.asked) == 6


def test_only_the_sets_used_last_are_kept(tmp_path, tokenized, monkeypatch):
    monkeypatch.setattr(refcache, "KEPT", 2)
    sets = [{"a": [f"caption {number}"], "b": ["other"]} for number in range(4)]
    for references in sets:
        cached_reference_side(references, "ptb", tokenized, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    tokenized.asked.clear()
    cached_reference_side(sets[-1], "ptb", tokenized, tmp_path)
    assert tokenized.asked == []


def test_a_folder_that_cannot_be_written_costs_time_and_no_score(tmp_path, tokenized, caplog):
    (tmp_path / "file").write_text("")
    found = cached_reference_side(REFERENCES, "ptb", tokenized, tmp_path / "file" / "cache")
    assert found.tokens == make_reference_side(REFERENCES, tokenized).tokens
    assert "not written" in caplog.text


def test_frequencies_come_back_from_their_arrays():
    words = [[caption.split() for caption in group] for group in REFERENCES.values()]
    counted = DocumentFrequencies(words)
    restored = DocumentFrequencies.restore(words, counted.arrays())
    for ours, theirs in zip(restored.counts(words[0]), counted.counts(words[0]), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="document frequencies are codes_1"):
        DocumentFrequencies.restore(words, {"codes_1": np.zeros(1, dtype=np.int64)})
