"""bench/features.py: both ways store the same features, and what would not is found."""

import pytest

from bench import features
from captioning.models.captioner import Captioner


@pytest.mark.parametrize("off", [1.0, 1.01])
def test_features_of_both_ways_are_equal_or_the_benchmark_fails(off, monkeypatch, capsys):
    encode, cached = Captioner.encode, features.cached_features

    def ours(*args):
        with monkeypatch.context() as patch:
            patch.setattr(Captioner, "encode", lambda captioner, pixels: off * encode(captioner, pixels))
            return cached(*args)

    monkeypatch.setattr(features, "cached_features", ours)
    assert features.main(["--tiny", "--images", "3", "--device", "cpu"]) == (off != 1)
    assert "largest relative difference" in capsys.readouterr().out
