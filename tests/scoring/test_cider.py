"""cider.py: pycocoevalcap's scorer on random captions, the definition's edges, token ids as rewards need them."""

import numpy as np
import pytest

from captioning.scoring.cider import DocumentFrequencies, cider_d

WORDS = ["a", "the", "red", "dog", "cat", "on", "table", "runs", "x", "y", "z", "über"]


def random_captions(generator, count, longest=14):
    return [list(generator.choice(WORDS, size=generator.integers(longest + 1))) for _ in range(count)]


def random_corpus(seed, images=60):
    generator = np.random.default_rng(seed)
    references = [random_captions(generator, generator.integers(1, 7)) for _ in range(images)]
    candidates = random_captions(generator, images)
    for place in range(0, images, 5):  # some are right, and some repeat themselves
        candidates[place] = references[place][0] * (1 + place % 2)
    return references, candidates


def pycocoevalcap_scores(references, candidates):
    from pycocoevalcap.cider.cider import Cider

    joined = {place: [" ".join(caption) for caption in group] for place, group in enumerate(references)}
    return Cider().compute_score(joined, {place: [" ".join(caption)] for place, caption in enumerate(candidates)})[1]


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocoevalcap(seed):
    references, candidates = random_corpus(seed)
    expected = pycocoevalcap_scores(references, candidates)
    assert expected.max() > 1
    assert cider_d(references, candidates) == pytest.approx(expected, abs=1e-12)


def test_words_of_every_image_weigh_exactly_nothing():
    """log(N) taken twice in different ways leaves 1e-16 instead of 0, which a division by the norm blows up to 1."""
    for images in range(1, 200, 7):
        references = [[["a"], ["a", "a"]]] * images
        assert cider_d(references, [["a"]] * images).tolist() == [0.0] * images


def test_empty_and_unknown_candidates():
    references = [[["a", "red", "dog"]], [["the", "cat"]], [[], ["a", "cat"]]]
    candidates = [[], ["never", "seen", "never", "seen"], []]
    assert cider_d(references, candidates).tolist() == [0.0, 0.0, 0.0]
    assert cider_d(references, [["a", "red", "dog"], *candidates[1:]]) == pytest.approx(
        pycocoevalcap_scores(references, [["a", "red", "dog"], *candidates[1:]]), abs=1e-12
    )
    assert cider_d([[[]]], [[]]).tolist() == [0.0]
    assert cider_d([], []).tolist() == []


def test_frequencies_of_another_corpus_serve_a_batch_with_several_candidates_an_image():
    """A reward takes frequencies from the training set once, and scores a few samples of a few images at a time."""
    references, candidates = random_corpus(9)
    frequencies = DocumentFrequencies(references)
    whole = cider_d(references, candidates)
    places = [7, 7, 3, 50, 7]
    samples = [candidates[7], candidates[0], candidates[3], candidates[50], candidates[7]]
    batch = cider_d([references[place] for place in places], samples, frequencies)
    assert batch[[0, 2, 3, 4]] == pytest.approx(whole[[7, 3, 50, 7]], abs=1e-12)
    for _ in range(2):  # scoring teaches the frequencies nothing
        assert cider_d(references, candidates, frequencies) == pytest.approx(whole, abs=1e-12)


def test_token_ids_score_as_words_do():
    references, candidates = random_corpus(3)
    number = {word: 50_000 + 7 * place for place, word in enumerate(WORDS)}
    as_ids = [[[number[word] for word in caption] for caption in group] for group in references]
    scores = cider_d(as_ids, [[number[word] for word in caption] for caption in candidates])
    assert scores == pytest.approx(cider_d(references, candidates), abs=1e-12)


def test_frequencies_count_images_and_not_captions():
    frequencies = DocumentFrequencies([[["a", "a"], ["a"]], [["a", "b"]], [["c"]]])
    (owner, gram, weight, _), *_ = frequencies.counts([["a", "a", "c", "new"]])
    assert owner.tolist() == [0, 0, 0]
    assert sorted(weight.tolist()) == pytest.approx(sorted([2 * np.log(3 / 2), np.log(3), np.log(3)]))
    assert len(set(gram.tolist())) == 3


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="2 candidates and 1 groups"):
        cider_d([[["a"]]], [["a"], ["b"]])
    with pytest.raises(ValueError, match="number 1 has none"):
        cider_d([[["a"]], []], [["a"], ["b"]])
