"""Everything under the scripts. Read the subpackages in this order:

data        images, caption files, tokens, batches, and the cache of the encoder's tokens
models      the captioner (frozen encoder, projector, GPT-2 with LoRA from decoder.py), its adapter file, and LLaVA
inference   search, and the captions of a folder
training    settings, trainer, rewards, run folders
scoring     CIDEr, CLIPScore and other metrics
maps        which pixels each word looked at
scale       millions of images, in shards
report      all results on one page
kernels     attention and linear layers that are faster than torch's own

The modules beside them are shared by all. From Python::

    from captioning import load, score

    captioner = load("runs/best")                # or an adapter file, an exported folder, a profile; model="llava"
    captioner.caption("photo.jpg", beam_size=5)  # or a PIL image, or a list of either
    captioner.explain("photo.jpg")               # its words and their maps

docs/python.md has more; the names are in ``captioning.api``, which is imported when one of them is first used.
"""

import sys
from typing import TYPE_CHECKING, Any

from captioning import cli  # needs the standard library only

if TYPE_CHECKING:
    from captioning.api import load, score

__all__ = ["load", "score"]

if sys.excepthook is sys.__excepthook__:  # a script in a Python without torch says so in one line
    sys.excepthook = cli.excepthook


def __getattr__(name: str) -> Any:
    """Import what ``__all__`` names when it is first asked for: torch alone takes a second."""
    if name not in __all__:
        raise AttributeError(f"module 'captioning' has no attribute {name!r}")
    from captioning import api

    return getattr(api, name)
