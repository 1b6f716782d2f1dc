"""clip_names.py: transformers' CLIP under OpenAI's names, and what says which activation weights want."""

import json

import pytest
import torch
from tiny import write_torchscript

from captioning.clip_names import openai_names, trained_with_quick_gelu
from captioning.imports import import_guarded

VISION = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 48, "patch_size": 16}
TEXT = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 38, "eos_token_id": 39}


@pytest.fixture(scope="module")
def theirs():
    """A tiny CLIP of transformers."""
    transformers = import_guarded("transformers")
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)
    return transformers.CLIPModel(config)


def open_clip_layout():
    """The names and shapes of open_clip's CLIP of the same size, which are OpenAI's."""
    open_clip = import_guarded("open_clip")
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 48}
    text = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
    return {name: tensor.shape for name, tensor in open_clip.CLIP(24, vision, text).state_dict().items()}


def test_all_names_and_shapes_are_openais(theirs):
    """Numbers are compared in the tests of the encoder and of CLIPScore."""
    ours = openai_names(theirs.state_dict())
    assert {name: tensor.shape for name, tensor in ours.items()} == open_clip_layout()
    assert torch.equal(ours["visual.proj"], theirs.visual_projection.weight.T)


def test_a_vision_tower_is_below_visual_in_whichever_layout(theirs):
    wanted = {name for name in open_clip_layout() if name.startswith("visual.") and name != "visual.proj"}
    tower = theirs.vision_model.state_dict()
    assert openai_names(tower).keys() == wanted
    assert openai_names({f"vision_model.{name}": t for name, t in tower.items()}).keys() == wanted
    alone = {name.removeprefix("visual."): tensor for name, tensor in openai_names(tower).items()}
    assert openai_names(alone).keys() == wanted


def test_position_ids_of_old_files_are_left_out(theirs):
    old = {"vision_model.embeddings.position_ids": torch.arange(10)[None], **theirs.state_dict()}
    assert openai_names(old).keys() == open_clip_layout().keys()


def test_other_names_stay():
    others = {"blocks.0.norm1.weight": torch.ones(2), "cls_token": torch.ones(1, 1, 2)}
    assert openai_names(others) == others


@pytest.mark.parametrize(
    ("config", "quick"),
    [
        ({"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}}, True),
        ({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}, False),
        ({"model_type": "clip", "vision_config": {}}, True),  # transformers' default
        ({"model_type": "clip_vision_model", "hidden_act": "gelu"}, False),
        ({"model_type": "gpt2", "activation_function": "gelu"}, None),
        ({}, None),
    ],
)
def test_config_json_says_the_activation(tmp_path, config, quick):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert trained_with_quick_gelu(tmp_path) is quick
    assert trained_with_quick_gelu(tmp_path / "model.safetensors") is quick


def test_a_files_name_and_form_say_the_activation(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    write_torchscript({"visual.proj": torch.ones(1)}, tmp_path / "b.pt")
    names = ("a.pt", "ViT-B-32.OpenAI.safetensors", "b.pt")
    assert [trained_with_quick_gelu(tmp_path / name) for name in names] == [None, True, True]
