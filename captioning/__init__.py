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

The modules beside them are shared by all. From Python, ``models.load_captioner`` and ``inference.caption_features``
caption images, and ``evaluate.Evaluator`` scores; docs/design.md and docs/scoring.md have examples.
"""

import sys

from captioning import cli  # needs the standard library only

if sys.excepthook is sys.__excepthook__:  # a script in a Python without torch says so in one line
    sys.excepthook = cli.excepthook
