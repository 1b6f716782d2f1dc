"""pairs.py: the best and the worst caption by CLIPScore, and what is no file of scores."""

import json
from pathlib import Path

import pytest

from captioning.maps.pairs import best_and_worst, read_per_image

ROWS = (("a", 0.5, "A."), ("b", 1, ""), ("c", 0, "C."))
SCORES = {stem: {"CLIPScore": score, "caption": caption} for stem, score, caption in ROWS}


def test_the_pair_with_the_highest_and_the_lowest_score(tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    scores = read_per_image(tmp_path / "scores.json")
    best, worst = best_and_worst(scores, {stem: Path(f"{stem}.jpg") for stem in "abc"}, {"c": ["one", "two"]})
    assert (best.title, best.path.name, best.caption, best.references, best.clipscore) == ("Top-1", "b.jpg", "", [], 1)
    assert (worst.title, worst.path.name, worst.references) == ("Last-1", "c.jpg", ["one", "two"])


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"a": {"CIDEr": 1}}', '{"a": {"CLIPScore": "1"}}'])
def test_other_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ValueError, match=r"--best-worst .*scores\.json"):
        read_per_image(tmp_path / "scores.json")
    with pytest.raises(FileNotFoundError, match=r"evaluate\.py --per-image"):
        read_per_image(tmp_path / "none.json")
