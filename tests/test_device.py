"""Devices that are not there are refused by name; one seed sets every generator."""

import random

import numpy as np
import pytest
import torch

from captioning.device import pick_device, seed_everything


def test_pick_device_auto_prefers_cuda_then_mps_then_cpu(monkeypatch):
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device() == torch.device(expected)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "xpu", "a toaster"])
def test_pick_device_refuses_what_is_not_there(monkeypatch, name):
    """`mps` on a machine without one used to pass, and died later with a torch traceback."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--device {name}.*cpu"):
        pick_device(name)


def test_pick_device_knows_how_many_gpus_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"--device cuda:2.*sees 2"):
        pick_device("cuda:2")


def test_seed_everything_repeats_every_generator():
    def draw():
        seed_everything(2**32 + 5)  # numpy takes 32 bits only
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the global one is meant

    assert draw() == draw()
