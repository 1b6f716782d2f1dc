"""significance.py: intervals and p-values against what theory and exhaustive enumeration say."""

import itertools

import numpy as np
import pytest

from captioning.scoring.significance import Comparison, bootstrap_interval, compare


def test_the_interval_has_the_width_that_theory_gives():
    scores = np.random.default_rng(1).normal(3, 2, size=400)
    low, high = bootstrap_interval(scores, 4000)
    half = 1.96 * scores.std() / 20
    assert (low, high) == (pytest.approx(scores.mean() - half, rel=0.02), pytest.approx(scores.mean() + half, rel=0.02))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(2)
    held = 0
    for trial in range(300):
        low, high = bootstrap_interval(generator.exponential(1, size=80), 300, seed=trial)
        held += low <= 1 <= high
    assert 0.88 <= held / 300 <= 0.98


def test_draws_in_blocks_are_as_good_as_at_once(monkeypatch):
    from captioning.scoring import significance

    scores = np.arange(100.0)
    whole = bootstrap_interval(scores, 2000)
    monkeypatch.setattr(significance, "BLOCK", 250)
    assert bootstrap_interval(scores, 2000) == pytest.approx(whole, abs=0.7)
    assert bootstrap_interval(scores, 2000, seed=3) == bootstrap_interval(scores, 2000, seed=3)


def test_the_p_value_is_that_of_all_sign_patterns():
    generator = np.random.default_rng(4)
    first = {str(k): float(v) for k, v in enumerate(generator.normal(0.4, 1, size=10))}
    second = dict.fromkeys(first, 0.0)
    values = np.array([*first.values()])
    sums = np.array([abs(np.dot(signs, values)) for signs in itertools.product([-1, 1], repeat=10)])
    exact = (sums >= abs(values.sum()) - 1e-12).mean()
    assert 0.02 < exact < 0.98
    assert compare(first, second, 20_000).p_value == pytest.approx(exact, abs=0.015)


def test_wins_ties_losses_and_the_largest_differences():
    first = {"a": 1.0, "b": 0.5, "c": 0.0, "d": 2.0}
    second = {"d": 2.0, "c": 3.0, "b": 0.25, "a": 0.5}
    result = compare(first, second, 100)
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.difference == pytest.approx((0.5 + 0.25 - 3.0) / 4)
    assert result.low <= result.difference <= result.high
    assert result.largest == [("c", -3.0), ("a", 0.5), ("b", 0.25)]
    assert "2 wins, 1 ties, 1 losses" in result.line("CIDEr")
    assert result.summary()["largest"] == {"c": -3.0, "a": 0.5, "b": 0.25}
    assert compare(second, first, 100).difference == pytest.approx(-result.difference)


def test_equal_captioners_differ_by_nothing():
    same = {"a": 1.0, "b": 2.0}
    assert compare(same, same, 50) == Comparison(0.0, 0.0, 0.0, 1.0, 0, 2, 0, [])


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="--bootstrap 1"):
        bootstrap_interval(np.ones(3), 1)
    with pytest.raises(ValueError, match="at least one image"):
        bootstrap_interval(np.array([]), 10)
    with pytest.raises(ValueError, match="same images"):
        compare({"a": 1.0}, {"b": 1.0})
