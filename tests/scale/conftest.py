"""Tars of pictures and an adapter for the files about shards."""

import pytest
import torch
from shard_runs import pictures, write_tar

from captioning.models.captioner import Captioner, CaptionerConfig
from decoder import LoraConfig, build_decoder


@pytest.fixture
def tars(tmp_path):
    """Three tars of 5, 7 and 4 images, grey levels 0 to 15."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, (first, last) in enumerate([(0, 5), (5, 12), (12, 16)]):
        write_tar(folder / f"{number}.tar", pictures(first, last))
    return folder / "{0..2}.tar"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_profile):
    """An untrained adapter of the tiny captioner; its captions differ from image to image all the same."""
    torch.manual_seed(0)
    lora = LoraConfig(4, 4.0)
    config = CaptionerConfig(tiny_profile.encoder, tiny_profile.encoder_kwargs, "random", lora=lora)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    Captioner(config, build_decoder(tiny_profile.decoder, lora)).save_adapter(path)
    return path
