"""caption_stats.py: every statistic by hand."""

import pytest

from captioning.scoring.caption_stats import caption_statistics

CAPTIONS = ["a red dog", "a red dog and a red cat", "", "a cat"]


def test_statistics_by_hand():
    found = caption_statistics(CAPTIONS, ["a cat", "a dog"])
    assert (found["captions"], found["empty"], found["shortest"], found["longest"]) == (4, 1, 0, 7)
    assert found["mean_length"] == 12 / 4
    assert found["vocabulary"] == 5  # a red dog and cat
    assert found["distinct_1"] == 5 / 12
    assert found["distinct_2"] == 6 / 9  # "a red" thrice and "red dog" twice, of 9 bigrams
    assert found["repeated_1"] == 1 / 4
    assert found["repeated_2"] == 1 / 4  # "a red" in the second
    assert found["repeated_3"] == 0
    assert found["copied"] == 1 / 4
    assert found["different_captions"] == 4


def test_no_training_captions_no_share_of_copies():
    assert "copied" not in caption_statistics(CAPTIONS)
    assert caption_statistics(CAPTIONS, [])["copied"] == 0


def test_nothing_has_statistics_too():
    found = caption_statistics([])
    assert found["captions"] == 0
    assert found["distinct_4"] == pytest.approx(0)
