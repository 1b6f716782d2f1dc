"""Every training here is one of the tiny models, and none starts Java."""

import pytest

from captioning.scoring import tokenizers


@pytest.fixture(autouse=True, scope="module")
def micro(micro):
    """The tiny profile stands in for the micro one everywhere here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "pick_tokenizer", lambda name: "ptb")
        yield
