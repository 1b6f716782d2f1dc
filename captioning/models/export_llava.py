"""A trained captioner as a LLaVA that stock transformers loads: it is one, with a GPT-2 for its language model.

Image tokens, a projector, a causal language model: ``LlavaForConditionalGeneration`` has a place for all of them but
one. Its CLIP tower hands out what its layers compute *before* its final norm, and captioners of the last layer are fed
after it. So the tower gets one more layer whose MLP is that norm: an MLP of ``act(a) - act(-a)`` is the identity, for
GELU and QuickGELU alike. Times ``SCALE`` its output drowns what the layer's residual connection adds, and the projector
divides by ``SCALE`` again, a power of two, so that nothing is rounded by it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captioning.files import write_text
from captioning.imports import import_guarded
from captioning.models.captioner import Captioner
from captioning.models.llava import quiet
from decoder import gpt2_state_dict

SCALE = 2.0**30
IMAGE_TOKEN = "<image>"
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


# --- the vision tower -------------------------------------------------------------------------------------------------


def check_tower(encoder: Any, name: str) -> None:
    """Raise ValueError where transformers' CLIP tower cannot compute what a timm ViT does; the message says why."""
    blocks, config = list(encoder.blocks), encoder.pretrained_cfg
    norms = [encoder.norm_pre, encoder.norm, *(norm for block in blocks for norm in (block.norm1, block.norm2))]
    lacks = {
        "has no norm before its first layer": not isinstance(encoder.norm_pre, nn.LayerNorm),
        "has no final norm": not isinstance(encoder.norm, nn.LayerNorm),
        "has norms with different eps": len({getattr(norm, "eps", None) for norm in norms}) > 1,
        "has a bias in its patch embedding": encoder.patch_embed.proj.bias is not None,
        "has no CLS token, or more tokens beside the patches": encoder.num_prefix_tokens != 1,
        "has no position for its CLS token": encoder.pos_embed is None
        or encoder.pos_embed.shape[1] != encoder.patch_embed.num_patches + 1,
        "scales its layers' outputs": any(not isinstance(block.ls1, nn.Identity) for block in blocks),
        "normalises queries and keys": any(not isinstance(block.attn.q_norm, nn.Identity) for block in blocks),
        "has another MLP": any(type(block.mlp).__name__ != "Mlp" or not _activation(block) for block in blocks),
        "is preprocessed in another way": config.get("interpolation") not in RESAMPLE
        or not (config.get("crop_mode", "center") == "center" or _squeezes(config)),
    }
    found = [reason for reason, is_so in lacks.items() if is_so]
    if found:
        raise ValueError(f"--adapter: its encoder {name} has no place in transformers' CLIP tower: it {found[0]}")


def _squeezes(preprocessing: Mapping[str, Any]) -> bool:
    """Whether the whole picture is squeezed into a square."""
    return preprocessing["crop_mode"] == "squash" and preprocessing["crop_pct"] == 1


def _activation(block: Any) -> str | None:
    return {"GELU": "gelu", "QuickGELU": "quick_gelu"}.get(type(block.mlp.act).__name__)


def tower_config(encoder: Any, final_norm: bool) -> dict[str, Any]:
    """Return the arguments of ``CLIPVisionConfig``; with ``final_norm`` there is a layer more."""
    return {
        "hidden_size": encoder.embed_dim,
        "intermediate_size": encoder.blocks[0].mlp.fc1.out_features,
        "num_hidden_layers": len(encoder.blocks) + int(final_norm),
        "num_attention_heads": encoder.blocks[0].attn.num_heads,
        "image_size": encoder.patch_embed.img_size[0],
        "patch_size": encoder.patch_embed.patch_size[0],
        "hidden_act": _activation(encoder.blocks[0]),
        "layer_norm_eps": encoder.norm.eps,
    }


@torch.no_grad()
def fill_tower(tower: Any, encoder: Any, final_norm: bool) -> None:
    """Copy a timm ViT into transformers' CLIP tower."""
    embeddings = tower.embeddings
    embeddings.class_embedding.copy_(encoder.cls_token[0, 0])
    embeddings.patch_embedding.weight.copy_(encoder.patch_embed.proj.weight)
    embeddings.position_embedding.weight.copy_(encoder.pos_embed[0])
    pairs = [(tower.pre_layrnorm, encoder.norm_pre), (tower.post_layernorm, encoder.norm)]
    for layer, block in zip(tower.encoder.layers, encoder.blocks, strict=False):
        pairs += [(layer.layer_norm1, block.norm1), (layer.layer_norm2, block.norm2)]
        pairs += [(layer.mlp.fc1, block.mlp.fc1), (layer.mlp.fc2, block.mlp.fc2)]
        pairs.append((layer.self_attn.out_proj, block.attn.proj))
        products = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        for product, weight, bias in zip(
            products, block.attn.qkv.weight.chunk(3), _bias(block.attn.qkv).chunk(3), strict=True
        ):
            product.weight.copy_(weight)
            product.bias.copy_(bias)
    for theirs, ours in pairs:
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)
    if final_norm:
        _make_norm(tower.encoder.layers[-1], encoder.norm)


def _bias(linear: nn.Linear) -> torch.Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _make_norm(layer: Any, norm: nn.LayerNorm) -> None:
    """Make a layer of the tower return ``norm`` of its input times ``SCALE``, beside which the input itself is lost."""
    width = norm.normalized_shape[0]
    for parameter in layer.parameters():
        parameter.zero_()
    layer.layer_norm1.weight.fill_(1)
    layer.layer_norm2.weight.copy_(norm.weight)
    layer.layer_norm2.bias.copy_(norm.bias)
    identity = torch.eye(width)
    layer.mlp.fc1.weight[: 2 * width].copy_(torch.cat([identity, -identity]))
    layer.mlp.fc2.weight[:, : 2 * width].copy_(torch.cat([identity, -identity], 1) * SCALE)


# --- the model --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def build_llava(captioner: Captioner, end_id: int, image_id: int) -> Any:
    """Return a ``LlavaForConditionalGeneration`` that computes what a captioner does.

    Args:
        captioner: LoRA merged, with an encoder that ``check_tower`` allows.
        end_id: the token that begins and ends every caption.
        image_id: the token that stands for an image token in a prompt.
    """
    transformers = import_guarded("transformers")
    config, encoder, decoder = captioner.config, captioner.encoder, captioner.decoder
    final_norm = config.encoder_layer == -1
    shape = {**asdict(decoder.config), "bos_token_id": end_id, "eos_token_id": end_id, "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(**tower_config(encoder, final_norm)),
                text_config=transformers.GPT2Config(**shape),
                image_token_index=image_id,
                image_seq_length=captioner.n_prefix,
                projector_hidden_act="linear",
                vision_feature_layer=config.encoder_layer,
                vision_feature_select_strategy="full" if config.use_cls else "default",
                multimodal_projector_bias=True,
                tie_word_embeddings=False,
            )
        ).eval()
    fill_tower(getattr(model.model.vision_tower, "vision_model", model.model.vision_tower), encoder, final_norm)
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    first.weight.copy_(captioner.projector.weight / (SCALE if final_norm else 1))
    first.bias.copy_(captioner.projector.bias)
    second.weight.copy_(torch.eye(second.in_features))
    second.bias.zero_()
    state = gpt2_state_dict(decoder, untied=True)
    model.lm_head.weight.copy_(state.pop("lm_head.weight", state["wte.weight"]))
    model.model.language_model.load_state_dict(state)
    return model


# --- processor and folder ------------------------------------------------------------------------------------------


def build_processor(captioner: Captioner, tokenizer: Any) -> Any:
    """Return a ``LlavaProcessor`` that prepares pictures as the captioner does, by Pillow."""
    transformers = import_guarded("transformers")
    settings = import_guarded("timm.data").resolve_model_data_config(captioner.encoder)
    side = settings["input_size"][-1]
    square, squeezes = {"height": side, "width": side}, _squeezes(settings)
    images = transformers.CLIPImageProcessorPil(
        size=square if squeezes else {"shortest_edge": int(side / settings["crop_pct"])},
        do_center_crop=not squeezes,
        crop_size=square,
        resample=RESAMPLE[settings["interpolation"]],
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )
    return transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=captioner.encoder.patch_embed.patch_size[0],
        vision_feature_select_strategy="full" if captioner.config.use_cls else "default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=IMAGE_TOKEN + tokenizer.bos_token,  # whatever was said: captions answer no question
    )


def write_llava(out: Path, captioner: Captioner, tokenizer: Any, card: str, search: Mapping[str, Any]) -> None:
    """Write the folder ``out``, which appears when it is complete.

    Args:
        out: must not exist.
        captioner: LoRA merged.
        tokenizer: the decoder's as transformers', with ``IMAGE_TOKEN``.
        card: the model card.
        search: arguments of ``GenerationConfig``: beams, length.

    Raises:
        ValueError: transformers' CLIP tower cannot be the captioner's encoder.
    """
    transformers = import_guarded("transformers")
    if captioner.config.pool != 1:
        raise ValueError(
            f"--adapter: it was trained with --pool {captioner.config.pool}, and transformers' LLaVA averages no "
            "patches; --no-llava writes the other two folders"
        )
    check_tower(captioner.encoder, captioner.config.encoder)
    end = tokenizer.eos_token_id
    model = build_llava(captioner, end, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, do_sample=False, **search
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        folder = Path(name) / out.name
        with quiet(transformers):
            model.save_pretrained(folder)
        build_processor(captioner, tokenizer).save_pretrained(folder)
        write_text(folder / "README.md", card)
        folder.rename(out)
