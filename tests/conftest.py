"""Fixtures for the files that need a whole captioner: a tiny micro world, a tiny random GPT-2, a profile of both."""

import os
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub, whatever the user's shell has set

import chromium
import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_ENCODER, TINY_ENCODER_KWARGS, VOCAB_SIZE

from captioning import device
from captioning.profiles import PROFILES, Profile
from captioning.scoring import evaluator
from decoder import Decoder, DecoderConfig, gpt2_state_dict
from microworld.scenes import generate


@pytest.fixture(autouse=True, scope="session")
def cache_elsewhere(tmp_path_factory):
    """What the profiles keep beside the scripts is kept elsewhere, apart from what users have there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, profile in PROFILES.items():
            patch.setitem(PROFILES, name, replace(profile, cache=str(tmp_path_factory.mktemp("cache"))))
        yield


@pytest.fixture(scope="session")
def tokenizer_folder():
    """The micro world's encoder.json and vocab.bpe, which are in the repository."""
    return PROFILES["micro"].tokenizer


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A dozen training and eight validation scenes in COCO layout."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 12), ("val", 8)):
        generate(folder, split, count, seed=7, workers=1)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder_file(tmp_path_factory):
    """A random GPT-2 of two layers and two heads with the micro tokenizer's vocabulary."""
    path = tmp_path_factory.mktemp("decoder") / "decoder_model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        decoder = Decoder(DecoderConfig(vocab_size=VOCAB_SIZE, n_positions=160, n_embd=128, n_layer=2, n_head=2))
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.ndim > 1:  # with GPT-2's own 0.02 a network this small hardly mixes its tokens
                    parameter.normal_(std=0.1)
    save_file(gpt2_state_dict(decoder), path)
    return path


@pytest.fixture(scope="session")
def tiny_profile(tmp_path_factory, tiny_data, tiny_decoder_file, tokenizer_folder):
    """A profile of the tiny data and models; the encoder is random, and says so."""
    return Profile(
        data=str(tiny_data),
        decoder_files=(str(tiny_decoder_file),),
        tokenizer=tokenizer_folder,
        encoder=TINY_ENCODER,
        encoder_weights="random",
        encoder_kwargs=TINY_ENCODER_KWARGS,
        clip_model="ViT-B-32-quickgelu",
        clip_weights="openai",
        llava=PROFILES["micro"].llava,
        cache=str(tmp_path_factory.mktemp("cache")),
        chair_words=PROFILES["micro"].chair_words,
    )


@pytest.fixture(scope="module")
def micro(tiny_profile):
    """The tiny profile stands in for the micro one: only a profile names an encoder's arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "micro", tiny_profile)
        yield


@pytest.fixture(autouse=True)
def no_listed_gpus(monkeypatch):
    """No script stops at a GPU that the tests' torch does not see."""
    monkeypatch.setattr(device, "listed_gpus", lambda: 0)


def constant_cider(references, predictions):
    return 0.5, {}


@pytest.fixture
def constant_score(monkeypatch):
    """Every validation of a training has the same CIDEr."""
    monkeypatch.setattr(evaluator, "cider", constant_cider)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, tiny_profile):
    """A run of two epochs that nothing interrupted, with ``constant_score``; a test that changes it takes a copy."""
    from runs import train  # it imports all that trains

    out = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "micro", tiny_profile)
        patch.setattr(evaluator, "cider", constant_cider)
        assert train(out) == 0
    return out


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, where there is one."""
    if chromium.ABSENT:
        pytest.skip(chromium.ABSENT)
    with chromium.started() as shown:
        yield shown


@pytest.fixture
def bf16_processor(monkeypatch):
    """A processor with bf16 products of its own, and models so wide as to take them by themselves: the tiny ones."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(device, "FULL_WIDTH", 1)
