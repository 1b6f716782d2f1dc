"""ranked.py: captions with scores are text to all that do not ask, and survive files and processes."""

import json
import pickle

import pytest

from captioning.data.part_files import read_part, write_part
from captioning.data.ranked import Ranked, caption_of, record_of

PAIRS = (("a red bike", -0.25), ("a bike", -1.0000004))


def test_it_is_the_best_caption_and_carries_the_others():
    caption = Ranked(PAIRS)
    assert caption == "a red bike"
    assert json.dumps(caption) == '"a red bike"'
    assert caption.as_json() == [{"caption": "a red bike", "score": -0.25}, {"caption": "a bike", "score": -1.0}]


def test_it_survives_json_and_pickle():
    caption = Ranked(PAIRS)
    for back in (caption_of(json.loads(json.dumps(record_of(caption)))), pickle.loads(pickle.dumps(caption))):
        assert back == caption
        assert back.ranked == caption.ranked
    assert record_of("plain") == {"caption": "plain"}
    assert not isinstance(caption_of({"caption": "plain"}), Ranked)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_parts_hold_scores_and_those_without_a_row_have_the_same_columns(tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    part, empty = tmp_path / f"0.{suffix}", tmp_path / f"1.{suffix}"
    write_part(part, [("a", Ranked(PAIRS))], ranked=True)
    write_part(empty, [], ranked=True)
    ((key, caption),) = read_part(part)
    assert (key, caption, caption.ranked) == ("a", "a red bike", Ranked(PAIRS).ranked)
    assert list(read_part(empty)) == []
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.read_schema(part) == parquet.read_schema(empty)
        assert parquet.read_schema(part).names == ["key", "caption", "ranked"]
    write_part(part, [("a", "plain")])
    assert list(read_part(part)) == [("a", "plain")]
