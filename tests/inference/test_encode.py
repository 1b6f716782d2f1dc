"""encode.py: pixels on their way to the device."""

from types import SimpleNamespace

import pytest
import torch

from captioning.inference.encode import StreamEncoder


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_without_a_stream_the_copy_of_the_pixels_is_waited_for(device, monkeypatch):
    """On MPS a copy that nothing waits for reads pixels that are freed already: captions of wrong pixels, silently."""
    copies = []

    def to(tensor, *where, non_blocking=False):
        copies.append((where, non_blocking))
        return tensor

    captioner = SimpleNamespace(device=torch.device(device), encode=lambda pixels: pixels.flatten(2).mT)
    encoder = StreamEncoder(captioner, "fp32")
    monkeypatch.setattr(torch.Tensor, "to", to)
    (encoded,) = encoder.encode([torch.ones(3, 4, 4)])
    assert encoded.features.shape == (16, 3)
    assert copies == [((torch.device(device),), False)]
