"""scst.py: advantages, beams as samples, the gradient, and a reward that rises."""

import launched
import numpy as np
import pytest
import torch
from runs import records, same, train, weights

from captioning.data.batches import pack_captions
from captioning.data.tokenizer import Tokenizer
from captioning.distributed import ALONE
from captioning.inference.captions import caption_features
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.scoring import evaluator
from captioning.training.rewards import CiderReward
from captioning.training.run_folder import read_run
from captioning.training.scst import advantages, beams, weighted_loss
from decoder import LoraConfig, build_decoder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


@pytest.fixture
def captioner(tiny_profile):
    torch.manual_seed(0)
    lora = LoraConfig(4, 4.0)
    config = CaptionerConfig(tiny_profile.encoder, tiny_profile.encoder_kwargs, "random", lora=lora)
    return Captioner(config, build_decoder(tiny_profile.decoder, lora)).eval()


def test_each_sample_is_compared_with_the_others_and_not_with_itself():
    found = advantages(np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert found[0] == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert found[1] == pytest.approx([0, 0, 0])


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


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A short run with cross-entropy, to start from."""
    out = tmp_path_factory.mktemp("xe") / "run"
    assert train(out, "--epochs", 1, "--no-cls") == 0
    return out


def tune(out, start, *flags):
    flags = ("--objective", "scst", "--samples", 3, *flags)
    return train(out, *flags, "--init-adapter", start / "best.safetensors")


def test_the_reward_rises_and_the_captioner_takes_over_what_the_adapter_has(start, tmp_path):
    """The reward is the share of tokens with an even id, which a few steps can teach even a tiny random model."""
    out = tmp_path / "run"
    flags = ("--epochs", "6", "--lr", "0.003", "--patience", "0", "--xe-weight", "0")
    with launched.patched(launched.even(ALONE)):
        assert tune(out, start, *flags) == 0
    config = read_run(out).config
    assert (config["train"]["lora_rank"], config["captioner"]["use_cls"]) == (4, False)
    rewards = [e["reward"] for e in records(out, "epoch") if e["epoch"]]
    assert abs(rewards[0] - 0.7) < 0.15
    assert rewards[-1] > rewards[0] + 0.25


def test_a_run_logs_what_is_asked_and_begins_with_the_captioner_as_it_came(start, tmp_path):
    out = tmp_path / "run"
    assert tune(out, start, "--epochs", "1") == 0
    before, after = records(out, "epoch")
    assert (before["epoch"], after["epoch"]) == (0, 1)
    measures = {"val_cider", "greedy_cider", "length", "repeated_2", "reference_length", "reference_repeated_2"}
    assert measures <= before.keys() & after.keys()
    assert "reward" in after
    assert read_run(out).objective == "scst"


def test_what_does_not_help_is_not_kept_and_training_stops(start, tmp_path, monkeypatch):
    scores = iter([0.9, 0.0, 0.3, 0.0, 0.2, 0.0])  # beam and greedy of each validation
    monkeypatch.setattr(evaluator, "cider", lambda references, predictions: (next(scores), {}))
    out = tmp_path / "run"
    assert tune(out, start, "--epochs", "5", "--patience", "2", "--lr", "0.01") == 0
    assert [e["epoch"] for e in records(out, "epoch")] == [0, 1, 2]
    assert same(weights(out, "best"), weights(start, "best"))
    assert not same(weights(out, "last"), weights(start, "best"))
    assert read_run(out).name == "run"  # stopped early is not unfinished


def test_cross_entropy_beside_the_rewards_keeps_the_references_likely(start, tmp_path, monkeypatch):
    monkeypatch.setattr(CiderReward, "__call__", lambda self, images, samples, more: np.zeros(len(samples)))
    losses = {}
    for weight in ("0", "2"):
        out = tmp_path / weight
        assert tune(out, start, "--epochs", "2", "--lr", "0.01", "--xe-weight", weight, "--patience", "0") == 0
        losses[weight] = [e["val_loss"] for e in records(out, "epoch")]
    assert len(set(losses["0"])) == 1  # equal rewards teach nothing
    assert losses["2"][2] < losses["2"][0] - 0.1
