"""encode.py: pixels on their way to the device, and the numbers that features are computed in."""

import threading
from types import SimpleNamespace

import pytest
import torch
from tiny import make_captioner

from captioning.data.images import load_image
from captioning.inference.encode import StreamEncoder, cached_features
from captioning.models.captioner import Captioner
from captioning.models.inference_weights import prepare


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


def test_features_are_cached_with_products_in_tf32_which_training_does_not_get(tmp_path, images, monkeypatch):
    captioner, seen, encode = make_captioner(), [], Captioner.encode

    def noted(captioner, pixels):
        seen.append((torch.backends.cuda.matmul.allow_tf32, threading.current_thread() is threading.main_thread()))
        return encode(captioner, pixels)

    monkeypatch.setattr(Captioner, "encode", noted)
    cached_features(captioner, images, tmp_path / "cache")
    cached_features(captioner, images, tmp_path / "none", limit=0).gather([2, 0])
    assert seen == [(True, True)] * 2  # on the main thread: the setting is the whole process's
    assert not torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(Captioner, "encode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cached_features(captioner, images, tmp_path / "none")
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(("precision", "most"), [("fp32", 2**-11), ("bf16", 2**-6)])
def test_inference_sees_what_training_saw_but_for_rounding(precision, most, tmp_path, images):
    """The cache keeps float32's features in float16, and p2_infer.py encodes in its --precision (docs/training.md)."""
    captioner = make_captioner()
    kept = cached_features(captioner, images, tmp_path / "cache").gather(range(len(images))).float()
    prepare(captioner.merge(), precision)
    encoder = StreamEncoder(captioner, precision)
    seen = encoder.gather(encoder.encode([captioner.transform(load_image(path)) for path in images])).float()
    error = (seen - kept).norm(dim=-1) / kept.norm(dim=-1)  # of each token
    assert 0 < error.max() < most
