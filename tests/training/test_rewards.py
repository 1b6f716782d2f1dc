"""rewards.py: CIDEr-D on token ids as pycocoevalcap has it, its guards, and CLIPScore."""

import numpy as np
import pytest

from captioning.data.annotations import load_split
from captioning.profiles import MICRO_WEIGHTS
from captioning.scoring.clipscore import ClipScorer
from captioning.training.rewards import CiderReward, ClipReward, repeats

EOS = 0


def random_captions(rng, images, words=12):
    return [[rng.integers(1, words, size=rng.integers(4, 9)).tolist() for _ in range(3)] for _ in range(images)]


def test_the_reward_is_pycocoevalcaps_cider_on_the_same_tokens():
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    rng = np.random.default_rng(0)
    groups = random_captions(rng, 30)
    samples = [[*rng.permutation(group[0]).tolist(), EOS] for group in groups]
    reward = CiderReward(groups, EOS)

    def text(tokens):
        return " ".join(f"t{token}" for token in tokens)

    references = {i: [text([*c, EOS]) for c in group] for i, group in enumerate(groups)}
    wanted = cider.Cider().compute_score(references, {i: [text(s)] for i, s in enumerate(samples)})[1]
    found = reward.cider(range(30), samples)
    assert np.abs(found - wanted).max() < 1e-6
    assert found.std() > 0.1
    # A batch has few images, and the document frequencies stay those of the training set.
    assert reward.cider([7, 7, 3], [samples[7], samples[7], samples[3]]) == pytest.approx(wanted[[7, 7, 3]], abs=1e-6)


def test_an_ending_in_the_middle_of_a_phrase_costs_reward():
    rng = np.random.default_rng(1)
    groups = random_captions(rng, 20)
    reward = CiderReward(groups, EOS)
    whole = groups[0][0]
    ended, cut, early = reward([0, 0, 0], [[*whole, EOS], whole, [*whole[:-2], EOS]])
    assert ended > cut
    assert ended > early


def test_repetition_beyond_what_is_usual_earns_nothing():
    groups = [[[1, 2, 3, 1, 2, 4]], [[5, 6, 7, 8]]]
    reward = CiderReward(groups, EOS)
    once, twice = reward([0, 0], [[1, 2, 3, 1, 2, 4, EOS], [1, 2, 3, 1, 2, 1, 2, EOS]])
    assert once > 0
    assert twice == 0
    rare = [[[1, 2, 3, 1, 2, 4], [1, 2, 3, 4], [1, 2, 4]], [[5, 6, 7, 8]]]  # one of three repeats a bigram
    assert CiderReward(rare, EOS)([0], [[1, 2, 3, 1, 2, 4, EOS]]) == 0
    assert [repeats(t) for t in ([], [1], [1, 1, 1], [1, 2, 1, 2])] == [0, 0, 1, 1]


def test_a_caption_shorter_than_its_references_is_damped_and_a_longer_one_is_not():
    groups = [[[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]], [[7, 8, 9, 10]]]  # a mean length of 6 with EOS
    samples = [[1, 2, EOS], [1, 2, 3, 4, 5, EOS], [1, 2, 3, 4, 5, 6, 8, EOS]]
    images = [0, 0, 0]
    assert CiderReward(groups, EOS).penalty(images, samples) == pytest.approx([np.exp(1 - 6 / 3), 1, 1])
    assert CiderReward(groups, EOS, 2).penalty(images, samples)[0] == pytest.approx(np.exp(-2))
    plain = CiderReward(groups, EOS, 0)
    assert plain(images, samples) == pytest.approx(plain.cider(images, samples))


def test_the_guards_hold_for_reward_of_another_kind_too():
    groups = [[[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]], [[7, 8, 9, 10]]]
    samples, images = [[1, 2, EOS], [1, 2, 3, 4, 5, EOS], [1, 2, 1, 2, 1, 2, EOS]], [0, 0, 0]
    reward = CiderReward(groups, EOS)
    gained = reward(images, samples, np.full(3, 2.0)) - reward(images, samples)
    assert gained == pytest.approx([2 * np.exp(-1), 2, 0])


def test_the_clip_reward_prefers_the_pictures_own_caption(tiny_data):
    samples = load_split(tiny_data, "train")
    scorer = ClipScorer(str(MICRO_WEIGHTS / "scorer"), None)
    reward = ClipReward(scorer, [s.path for s in samples])
    own = reward(range(len(samples)), [s.captions[0] for s in samples])
    other = reward(range(len(samples)), [s.captions[0] for s in reversed(samples)])
    assert own.mean() > other.mean() + 0.2
