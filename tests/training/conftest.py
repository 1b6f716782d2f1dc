"""Every training here is one of the tiny models, and none starts Java."""

import pytest

from captioning.profiles import PROFILES
from captioning.scoring import tokenizers


@pytest.fixture(autouse=True, scope="module")
def micro(tiny_profile):
    """The tiny profile stands in for the micro one: only a profile names an encoder's arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "micro", tiny_profile)
        patch.setattr(tokenizers, "pick_tokenizer", lambda name: "ptb")
        yield
