"""CLIP checkpoints of other libraries: their names for the same tensors, and the activation that they want."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from captioning.checkpoints import State, transformers_config
from captioning.torchscript import is_torchscript

_TO_OPENAI = (  # transformers' names, and OpenAI's, which open_clip and timm read
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # the misspelling is theirs
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"\.layer_norm(?=[12]\.)", ".ln_"),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)
_TRANSPOSED = ("visual.proj", "text_projection")  # transformers has linear layers there, OpenAI matrices
_QUERY = re.compile(r"\.q_proj\.(?=weight$|bias$)")


def openai_names(state: Mapping[str, torch.Tensor]) -> State:
    """Return a CLIP's tensors as OpenAI's package names them; a vision tower alone is below ``visual.``.

    What is no CLIP of transformers, and no vision tower of OpenAI's layout by itself, comes back as it is.
    """
    if "class_embedding" in state and "conv1.weight" in state:
        return {f"visual.{name}": tensor for name, tensor in state.items()}
    if "embeddings.class_embedding" in state:  # CLIPVisionModel
        state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    if "vision_model.embeddings.class_embedding" not in state:
        return dict(state)
    named: State = {}
    for name, tensor in state.items():
        for theirs, ours in _TO_OPENAI:
            name = re.sub(theirs, ours, name)
        if not name.endswith("position_ids"):  # 0, 1, 2, …
            named[name] = tensor.T if name in _TRANSPOSED else tensor
    for name in [name for name in named if _QUERY.search(name)]:  # query, key and value are one matrix
        parts = [_QUERY.sub(f".{part}_proj.", name) for part in "qkv"]
        if all(part in named for part in parts):
            named[_QUERY.sub(".in_proj_", name)] = torch.cat([named.pop(part) for part in parts])
    return named


def trained_with_quick_gelu(path: str | os.PathLike) -> bool | None:
    """Whether CLIP weights were trained with QuickGELU, as OpenAI's; None where nothing at ``path`` says it."""
    config = transformers_config(path)
    if config.get("model_type") in ("clip", "clip_vision_model"):
        return config.get("vision_config", config).get("hidden_act", "quick_gelu") == "quick_gelu"
    if "openai" in Path(path).name.lower() or (Path(path).is_file() and is_torchscript(Path(path))):
        return True
    return None
