"""encoder.py: the model's own preprocessing, weights from local files that must fit, and reproducible random ones."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_ENCODER, TINY_ENCODER_KWARGS, write_torchscript
from torch import nn

from captioning.clip_names import openai_names
from captioning.imports import import_guarded
from captioning.models.encoder import build_encoder, build_transform
from captioning.profiles import PRESETS
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


# --- the forms in which people have weights -------------------------------------------------------------------------

QUICK = "vit_base_patch32_clip_quickgelu_224.openai"


def transformers_tower(activation="quick_gelu"):
    """A CLIPVisionModel of the tiny encoder's shape, and its tokens after the last norm."""
    transformers = import_guarded("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=16,
        hidden_act=activation,
    )
    torch.manual_seed(6)
    tower = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        tokens = tower.post_layernorm(tower(pixels).last_hidden_state)
    return tower, pixels, tokens


@pytest.mark.parametrize(("activation", "name"), [("quick_gelu", QUICK), ("gelu", TINY_ENCODER)])
def test_transformers_vision_tower_gives_the_same_tokens(tmp_path, caplog, activation, name):
    tower, pixels, tokens = transformers_tower(activation)
    tower.save_pretrained(tmp_path)
    with torch.inference_mode():
        found = build_encoder(name, str(tmp_path), TINY_ENCODER_KWARGS).forward_features(pixels)
        other = QUICK if name == TINY_ENCODER else TINY_ENCODER
        assert not caplog.records
        wrong = build_encoder(other, str(tmp_path), TINY_ENCODER_KWARGS).forward_features(pixels)
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)
    assert (wrong - tokens).abs().max() > 1e-2
    (record,) = caplog.records
    assert record.getMessage() == (
        f"--encoder {other}: runs as {other}, and --encoder-weights {tmp_path} are by all signs those of {name}"
    )


def test_a_whole_clip_of_transformers_gives_its_vision_tower(tmp_path):
    transformers = import_guarded("transformers")
    tower, pixels, tokens = transformers_tower()
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40, "eos_token_id": 39}
    config = transformers.CLIPConfig(
        vision_config=tower.config.to_dict(), text_config={**text, "bos_token_id": 38}, projection_dim=24
    )
    clip = transformers.CLIPModel(config)
    clip.vision_model.load_state_dict(tower.state_dict())
    torch.save({"model": {f"module.{k}": v for k, v in clip.state_dict().items()}, "epoch": 1}, tmp_path / "clip.PT")
    encoder = build_encoder(QUICK, str(tmp_path / "clip.PT"), TINY_ENCODER_KWARGS)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.forward_features(pixels), tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [TINY_ENCODER, QUICK])
def test_openais_archive_loads_and_under_gelu_is_warned_of(tmp_path, caplog, name):
    tower, pixels, tokens = transformers_tower()
    state = openai_names(tower.state_dict()) | {"input_resolution": torch.tensor(48)}
    write_torchscript({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "ViT.pt")
    encoder = build_encoder(name, str(tmp_path / "ViT.pt"), TINY_ENCODER_KWARGS)
    if name == TINY_ENCODER:
        assert f"ViT.pt are by all signs those of {QUICK}" in caplog.text
        return
    assert not caplog.records
    with torch.inference_mode():
        torch.testing.assert_close(encoder.forward_features(pixels), tokens, rtol=0.02, atol=0.02)  # half precision


@pytest.mark.parametrize(
    ("name", "file", "meant"),
    [
        ("vit_base_patch32_clip_224", "vit_base_patch32_clip_224.openai", QUICK),
        (TINY_ENCODER, "vit_base_patch32_clip_224.openai", QUICK),
        (QUICK, "vit_base_patch32_clip_224.openai", None),
        (QUICK, "vit_base_patch32_clip_224.laion2b", "vit_base_patch32_clip_224.laion2b"),
        ("vit_base_patch32_clip_224.laion2b", "vit_base_patch32_clip_224.laion2b", None),
        ("vit_base_patch32_clip_224", "vit_base_patch32_clip_224.my_own", None),
        ("vit_base_patch32_clip_224", "open_clip_model", None),
        ("vit_base_patch32_clip_224", "CLIP-of-OpenAI", QUICK),
    ],
)
def test_weights_of_another_encoder_by_the_files_name_are_warned_of(tmp_path, caplog, name, file, meant):
    path = tmp_path / f"{file}.safetensors"
    save_file(build_encoder(name, "random", TINY_ENCODER_KWARGS).state_dict(), path)
    assert not caplog.records
    build_encoder(name, str(path), TINY_ENCODER_KWARGS)
    assert [meant] * len(caplog.records) == [record.getMessage().split(" those of ")[1] for record in caplog.records]
    assert bool(caplog.records) == bool(meant)


@pytest.mark.parametrize(
    ("setting", "resize", "mean"),
    [("best-336", "size=(336, 336)", 0.5), ("best-h", "size=224", 0.4815), ("best-g", "size=224", 0.4815)],
)
def test_the_presets_have_their_own_preprocessing_and_activation(setting, resize, mean):
    """None has OpenAI's weights, so none wants QuickGELU. At 336 pixels the whole picture is squeezed, not cropped."""
    timm = import_guarded("timm")
    assert timm.models.is_model_pretrained(PRESETS[setting])
    with torch.device("meta"):
        encoder = timm.create_model(PRESETS[setting], num_classes=0)
    shown = repr(build_transform(encoder))
    assert resize in shown and f"{mean:.4f}" in shown and "bicubic" in shown
    assert type(encoder.blocks[0].mlp.act).__name__ == "GELU"
