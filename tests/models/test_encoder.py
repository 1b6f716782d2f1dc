"""encoder.py: the model's own preprocessing, weights from local files that must fit, and reproducible random ones."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_ENCODER, TINY_ENCODER_KWARGS
from torch import nn

from captioning.imports import import_guarded
from captioning.models.encoder import build_encoder, build_transform
from captioning.tensors import fingerprint


def test_a_random_encoder_is_the_same_every_time_and_leaves_the_callers_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS)
    assert torch.equal(torch.rand(1), expected)
    second = build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS)
    assert fingerprint(first.state_dict()) == fingerprint(second.state_dict())


def test_preprocessing_is_the_models_own_and_not_imagenets():
    """resolve_data_config with the model's *name* silently answers with ImageNet's mean, std and crop of 0.875."""
    transform = build_transform(build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS))
    shown = repr(transform)
    assert "0.4815" in shown  # OpenAI's mean
    assert "48" in shown
    other = build_encoder(TINY_ENCODER, "random", {**TINY_ENCODER_KWARGS, "mean": (0.5, 0.5, 0.5)})
    assert "0.5000" in repr(build_transform(other))


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("vit_of_no_one", "random", ValueError, "--encoder vit_of_no_one"),
        ("resnet18", "random", ValueError, "not a vision transformer"),
        (TINY_ENCODER, "gone.safetensors", FileNotFoundError, "--encoder-weights gone.safetensors"),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(name, weights, error, message):
    with pytest.raises(error, match=message):
        build_encoder(name, weights, {} if name == "resnet18" else TINY_ENCODER_KWARGS)


def test_encoder_weights_come_from_a_local_file_and_must_fit(tmp_path):
    encoder = build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS)
    torch.manual_seed(9)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    file = tmp_path / "encoder.safetensors"
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, file)
    loaded = build_encoder(TINY_ENCODER, str(file), TINY_ENCODER_KWARGS)
    assert fingerprint(loaded.state_dict()) == fingerprint(encoder.state_dict())
    for depth in (1, 3):  # timm loads headless models with strict=False: block 3 would be random, or block 2 unused
        with pytest.raises(ValueError, match=r"encoder\.safetensors: they do not fit.*blocks\."):
            build_encoder(TINY_ENCODER, str(file), {**TINY_ENCODER_KWARGS, "depth": depth})
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        build_encoder(TINY_ENCODER, str(tmp_path / "cut.safetensors"), TINY_ENCODER_KWARGS)


def test_open_clips_names_are_understood(tmp_path):
    """The micro encoder is stored as its whole open_clip model; its vision tower is what the captioner takes."""
    open_clip = import_guarded("open_clip")
    torch.manual_seed(4)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 48}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(24, vision, text).eval()
    file = tmp_path / "open_clip_model.safetensors"
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, file)
    encoder = build_encoder(TINY_ENCODER, str(file), TINY_ENCODER_KWARGS)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        pooled = encoder.forward_features(pixels)[:, 0] @ clip.visual.proj
        assert torch.allclose(pooled, clip.encode_image(pixels), atol=1e-5)
