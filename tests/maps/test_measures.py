"""measures.py: measures of maps whose scores are known, and their means, intervals and tests over images."""

import numpy as np
import pytest

from captioning.maps.measures import (
    FIXED,
    THRESHOLDS,
    MeasuredMaps,
    average_precision,
    baselines,
    coverage,
    inside,
    interval,
    measure_map,
    p_value,
    per_image,
    value,
)

WINDOW, GRID = (0.0, 0.0, 80.0, 60.0), (6, 8)  # cells of 10 pixels


def planted(row, column):
    grid = np.full(GRID, 0.01)
    grid[row, column] = 1.0
    return grid


def ratios(boxes, *maps):
    """The measures of maps that all belong to the same boxes."""
    covered = coverage(boxes, WINDOW, GRID)
    measured = [measure_map(word_map, boxes, covered, WINDOW) for word_map in maps]
    found = MeasuredMaps.stack(measured, np.full(len(maps), covered.mean())).ratios()
    return {name: value(ratio) for name, ratio in found.items()}


def test_coverage_is_the_share_of_each_cell():
    covered = coverage([(10, 20, 20, 10)], WINDOW, GRID)
    assert covered.sum() == 2
    assert covered[2, 1] == covered[2, 2] == 1
    assert coverage([(10, 20, 5, 10)], WINDOW, GRID)[2, 1] == 0.5
    twice = coverage([(10, 20, 20, 10), (10, 20, 20, 10)], WINDOW, GRID)
    assert np.array_equal(twice, covered)


def test_boxes_outside_the_crop_do_not_count():
    assert coverage([(0, 0, 10, 10)], (40, 30, 80, 60), GRID).sum() == 0


def test_pointing_needs_the_peak_inside_a_box_of_the_right_orientation():
    boxes = [(10, 20, 20, 10)]
    assert ratios(boxes, planted(2, 1))["pointing"] == 1
    assert ratios(boxes, planted(1, 2))["pointing"] == 0


def test_points_on_the_border_of_a_box_are_inside():
    found = inside([(10, 20, 20, 10), (0, 0, 1, 1)], np.array([0, 10, 30, 31]), np.array([1, 30]))
    assert found.tolist() == [[True, False, False, False], [False, True, True, False]]


def test_measures_of_a_perfect_and_of_a_flat_map():
    boxes = [(10, 20, 20, 10)]
    covered = coverage(boxes, WINDOW, GRID)
    perfect, flat, wrong = (ratios(boxes, m) for m in (covered, np.ones(GRID), planted(5, 7)))
    assert {n: v for n, v in perfect.items() if n != "mass_ratio"} == dict.fromkeys(
        ("pointing", "iou", "iou_fixed", "precision"), 1.0
    )
    assert perfect["mass_ratio"] == pytest.approx(48 / 2)
    assert flat["mass_ratio"] == pytest.approx(1.0)
    assert flat["iou"] == flat["iou_fixed"] == flat["precision"] == pytest.approx(2 / 48)
    assert (wrong["pointing"], wrong["iou"]) == (0.0, 0.0)


def test_the_map_upside_down_has_nothing():
    boxes = [(10, 20, 20, 10)]
    inverted = ratios(boxes, 1 - coverage(boxes, WINDOW, GRID))
    assert inverted["mass_ratio"] == inverted["pointing"] == inverted["iou"] == 0
    assert inverted["precision"] == pytest.approx(2 / 48)  # the boxes' cells come last


def test_the_fixed_threshold_is_half_of_the_maximum_and_the_best_one_is_chosen():
    assert THRESHOLDS[FIXED] == pytest.approx(0.5)
    boxes = [(10, 20, 20, 10)]
    dim = np.where(coverage(boxes, WINDOW, GRID) > 0, 0.4, 0.0)
    dim[2, 1] = 1.0  # half of the box is above half of the maximum
    found = ratios(boxes, dim)
    assert (found["iou"], found["iou_fixed"]) == (1.0, 0.5)


def test_scores_are_means_over_words():
    assert ratios([(10, 20, 10, 10)], *(planted(*at) for at in ((2, 1), (0, 0), (2, 1), (5, 5))))["pointing"] == 0.5


def test_average_precision_by_hand_and_with_ties():
    wanted = np.array([[1, 0, 1, 0]])
    assert average_precision(np.array([[4, 3, 2, 1]]), wanted) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([[1, 2, 3, 4]]), wanted) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average_precision(np.array([[5, 5, 1, 1]]), wanted) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average_precision(np.array([[5, 5, 1, 1]]), wanted[:, ::-1]) == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_average_precision_counts_the_cells_that_are_half_covered_or_the_most_covered_one():
    word_map = np.array([[3.0, 2, 1]])
    assert average_precision(word_map, np.array([[1, 0.5, 0.4]])) == 1
    assert average_precision(word_map, np.array([[0.2, 0.1, 0]])) == 1


def test_baselines_know_nothing_of_the_word():
    one, two = [(30, 20, 20, 20)], [(35, 25, 10, 10)]
    found = baselines([(boxes, WINDOW) for boxes in (one, two)], GRID)
    assert found["centre"] == 1.0
    assert found["mean image"] >= 0.5
    assert found["random"] == pytest.approx((4 + 4) / 48 / 2)  # borders count: 4 centres each


# -------------------------------------------------------------------------------------------------------- over images


def test_the_mean_over_images_is_the_measure_however_many_words_an_image_has():
    ratio, images = (np.array([1.0, 1, 0, 2]), np.array([1.0, 2, 1, 4])), ["a", "a", "a", "b"]
    scores = per_image(ratio, images)
    assert scores.keys() == {"a", "b"}
    assert np.mean(list(scores.values())) == pytest.approx(value(ratio)) == 0.5
    assert scores["a"] == scores["b"] == pytest.approx(0.5)  # 2 of 4 in both


def test_an_interval_is_over_images_and_not_over_words():
    """Ten words of one image say no more than one: with two images, each word counted once, the interval was narrow."""
    hits = np.repeat([1.0, 0.0], 50)
    ratio = hits, np.ones(100)
    assert interval(ratio, np.repeat(["a", "b"], 50)) == pytest.approx((0, 1))
    low, high = interval(ratio, [str(n) for n in range(100)])
    assert 0.39 < low < 0.42 and 0.58 < high < 0.61


def test_the_paired_test_sees_a_small_difference_on_the_same_images_and_none_between_a_spec_and_itself():
    generator = np.random.default_rng(0)
    hard, images = generator.random(200), [str(n) for n in range(200)]
    one, two = (hard, np.ones(200)), (np.clip(hard - 0.02, 0, 1), np.ones(200))
    assert p_value(one, two, images) < 0.01
    assert p_value(one, one, images) == 1
