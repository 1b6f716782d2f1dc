"""What several files here share: a tiny CLIP with its scorer, and seven pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scoring_examples import STEMS

from captioning.imports import import_guarded
from captioning.scoring.clipscore import ClipScorer


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP in open_clip's folder format; its patch dropout changes scores if it runs in train mode."""
    open_clip = import_guarded("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    config["vision_cfg"]["patch_dropout"] = 0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = open_clip.model.CLIP(**config)
        for parameter in model.visual.parameters():  # the default initialisation hardly looks at the image
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Seven pictures of smooth noise: landscape and portrait, colour, grey and transparent, JPEG and PNG."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i, stem in enumerate(STEMS):
        noise = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        picture = noise.resize((80, 50) if i % 2 else (40, 90), Image.Resampling.BICUBIC)
        picture.convert({3: "L", 4: "RGBA"}.get(i, "RGB")).save(folder / f"{stem}.png")
    return folder


@pytest.fixture(scope="session")
def paths(images):
    return {stem: images / f"{stem}.png" for stem in STEMS}


@pytest.fixture(scope="session")
def scorer(clip_folder):
    return ClipScorer(str(clip_folder), None, torch.device("cpu"))
