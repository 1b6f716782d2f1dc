"""scst.py: rewards, advantages, draws behind a shared prefix, the gradient, and a reward that rises."""

import json

import launched
import numpy as np
import pytest
import torch

from captioning.data.annotations import load_split
from captioning.data.batches import pack_captions
from captioning.data.tokenizer import Tokenizer
from captioning.distributed import ALONE
from captioning.inference.captions import caption_features
from captioning.models.adapter import read_adapter
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.profiles import MICRO_WEIGHTS, PROFILES
from captioning.scoring import evaluator, tokenizers
from captioning.scoring.clipscore import ClipScorer
from captioning.training import setup
from captioning.training.rewards import CiderReward, ClipReward, repeats
from captioning.training.run_folder import read_run
from captioning.training.scst import advantages, beams, weighted_loss
from decoder import LoraConfig, build_decoder
from p2_train import main

EOS = 0


@pytest.fixture(autouse=True, scope="module")
def micro(tiny_profile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "micro", tiny_profile)
        yield


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """Validations tokenize without the start of Java."""
    monkeypatch.setattr(tokenizers, "pick_tokenizer", lambda name: "ptb")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


@pytest.fixture
def captioner(tiny_profile):
    torch.manual_seed(0)
    lora = LoraConfig(4, 4.0)
    config = CaptionerConfig(tiny_profile.encoder, tiny_profile.encoder_kwargs, "random", lora=lora)
    return Captioner(config, build_decoder(tiny_profile.decoder, lora)).eval()


def random_captions(rng, images, words=12):
    return [[rng.integers(1, words, size=rng.integers(4, 9)).tolist() for _ in range(3)] for _ in range(images)]


# ---------------------------------------------------------------------------------------------------------- rewards


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


def test_each_sample_is_compared_with_the_others_and_not_with_itself():
    found = advantages(np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert found[0] == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert found[1] == pytest.approx([0, 0, 0])


# ------------------------------------------------------------------------------------------------------------- draws


def test_beams_are_what_a_beam_search_finds_with_eos_unless_cut(captioner, tokenizer):
    features = torch.randn(2, *captioner.feature_shape, generator=torch.Generator().manual_seed(3))
    groups = beams(captioner, tokenizer, features, 3, 6)
    for group, best in zip(groups, caption_features(captioner, tokenizer, features, 3, 6), strict=True):
        assert len({tuple(caption) for caption in group}) == 3
        assert tokenizer.decode([t for t in group[0] if t != tokenizer.eos_id]) == best
        assert all(caption[-1] == tokenizer.eos_id or len(caption) == 6 for caption in group)


def test_the_loss_is_minus_weight_times_log_probability_and_a_cut_sample_is_not_taught_to_end(captioner, tokenizer):
    eos = tokenizer.eos_id
    features = torch.randn(1, *captioner.feature_shape, generator=torch.Generator().manual_seed(3))
    samples, weights = [[[5, 6, eos], [7, 8, 9]]], [[2.0, -1.0]]
    total = 0.0
    for sample, weight in zip(samples[0], weights[0], strict=True):
        bare = [t for t in sample if t != eos]
        log_probs = captioner.log_probs(features, pack_captions([[bare]], eos))
        total += weight * log_probs[: len(sample)].sum().item()
    loss = weighted_loss(captioner, features, samples, weights, eos)
    assert loss.item() == pytest.approx(-total, abs=1e-4)


def test_with_equal_weights_the_loss_is_cross_entropys(captioner, tokenizer):
    eos = tokenizer.eos_id
    features = torch.randn(2, *captioner.feature_shape, generator=torch.Generator().manual_seed(3))
    captions = [[[5, 6], [7, 8, 9]], [[3], [4, 4]]]
    ended = [[[*caption, eos] for caption in group] for group in captions]
    loss = weighted_loss(captioner, features, ended, [[1 / 12] * 2] * 2, eos)
    assert loss.item() == pytest.approx(captioner.loss(features, pack_captions(captions, eos)).item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- training

SMALL = (
    "--profile",
    "micro",
    "--device",
    "cpu",
    "--batch-size",
    "4",
    "--val-images",
    "4",
    "--beam-size",
    "2",
    "--max-new-tokens",
    "8",
    "--log-every",
    "1",
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A short run with cross-entropy, to start from."""
    out = tmp_path_factory.mktemp("xe") / "run"
    assert main([*SMALL, "--epochs", "1", "--lora-rank", "4", "--no-cls", "--out", str(out)]) == 0
    return out / "best.safetensors"


def tune(out, adapter, *flags):
    return main(
        [*SMALL, "--objective", "scst", "--samples", "3", "--init-adapter", str(adapter), "--out", str(out), *flags]
    )


def epochs(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "epoch"]


def test_the_reward_rises_and_the_captioner_takes_over_what_the_adapter_has(begun, tmp_path):
    """The reward is the share of tokens with an even id, which a few steps can teach even a tiny random model."""
    out = tmp_path / "run"
    flags = ("--epochs", "6", "--lr", "0.003", "--patience", "0", "--xe-weight", "0")
    with launched.patched(launched.even(ALONE)):
        assert tune(out, begun, *flags) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["train"]["lora_rank"], config["captioner"]["use_cls"]) == (4, False)
    rewards = [e["reward"] for e in epochs(out) if e["epoch"]]
    assert abs(rewards[0] - 0.7) < 0.15
    assert rewards[-1] > rewards[0] + 0.25


def test_a_run_logs_what_is_asked_and_begins_with_the_captioner_as_it_came(begun, tmp_path):
    out = tmp_path / "run"
    assert tune(out, begun, "--epochs", "1") == 0
    before, after = epochs(out)
    assert (before["epoch"], after["epoch"]) == (0, 1)
    measures = {"val_cider", "greedy_cider", "length", "repeated_2", "reference_length", "reference_repeated_2"}
    assert measures <= before.keys() & after.keys()
    assert "reward" in after
    assert read_run(out).objective == "scst"


def test_what_does_not_help_is_not_kept_and_training_stops(begun, tmp_path, monkeypatch):
    scores = iter([0.9, 0.0, 0.3, 0.0, 0.2, 0.0])  # beam and greedy of each validation
    monkeypatch.setattr(evaluator, "cider", lambda references, predictions: (next(scores), {}))
    out = tmp_path / "run"
    assert tune(out, begun, "--epochs", "5", "--patience", "2", "--lr", "0.01") == 0
    assert [e["epoch"] for e in epochs(out)] == [0, 1, 2]
    kept, start, last = (scst_state(p) for p in (out / "best.safetensors", begun, out / "last.safetensors"))
    assert all(torch.equal(kept[name], start[name]) for name in start)
    assert any(not torch.equal(last[name], start[name]) for name in start)
    assert read_run(out).name == "run"  # stopped early is not unfinished


def test_cross_entropy_beside_the_rewards_keeps_the_references_likely(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(CiderReward, "__call__", lambda self, images, samples, more: np.zeros(len(samples)))
    losses = {}
    for weight in ("0", "2"):
        out = tmp_path / weight
        assert tune(out, begun, "--epochs", "2", "--lr", "0.01", "--xe-weight", weight, "--patience", "0") == 0
        losses[weight] = [e["val_loss"] for e in epochs(out)]
    assert len(set(losses["0"])) == 1  # equal rewards teach nothing
    assert losses["2"][2] < losses["2"][0] - 0.1


def scst_state(path):
    return read_adapter(path)[1]


def test_bad_starts_are_refused_by_flag(begun, tmp_path, capsys):
    assert main([*SMALL, "--objective", "scst", "--out", str(tmp_path / "a")]) == 2
    assert "--init-adapter" in capsys.readouterr().err
    assert tune(tmp_path / "b", tmp_path / "gone.safetensors") == 2
    assert "gone.safetensors" in capsys.readouterr().err
    assert tune(tmp_path / "c", begun, "--lora-rank", "8") == 2
    assert "--lora-rank 8" in capsys.readouterr().err
    assert tune(tmp_path / "e", begun, "--report-faithful", "--lora-alpha", "32") == 2
    assert "preprocessing" in capsys.readouterr().err  # the weights are the same, what they are fed with is not
    assert tune(tmp_path / "d", begun, "--samples", "1") == 2
    assert "--samples 1" in capsys.readouterr().err


def test_a_clip_reward_needs_a_clip(begun, tmp_path, monkeypatch, capsys):
    def no_clip(*args):
        raise FileNotFoundError("no CLIP here")

    monkeypatch.setattr(setup, "ClipScorer", no_clip)
    assert tune(tmp_path / "a", begun, "--clip-reward", "1", "--epochs", "1") == 2
    assert "no CLIP here" in capsys.readouterr().err


def test_the_clip_reward_prefers_the_pictures_own_caption(tiny_data):
    samples = load_split(tiny_data, "train")
    scorer = ClipScorer(str(MICRO_WEIGHTS / "scorer"), None)
    reward = ClipReward(scorer, [s.path for s in samples])
    own = reward(range(len(samples)), [s.captions[0] for s in samples])
    other = reward(range(len(samples)), [s.captions[0] for s in reversed(samples)])
    assert own.mean() > other.mean() + 0.2
