"""The frozen image encoder: a timm vision transformer with its own preprocessing."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captioning.checkpoints import read_state_dict
from captioning.clip_names import openai_names, trained_with_quick_gelu
from captioning.imports import import_guarded
from captioning.messages import first_line, some
from captioning.profiles import download_part
from captioning.tensors import copy_exactly

log = logging.getLogger(__name__)

RANDOM = "random"  # the one word that asks for an encoder without trained weights
RANDOM_ENCODER_SEED = 20241127  # random encoders are the same in training and in inference
PREPROCESSING = ("crop_pct", "crop_mode", "interpolation", "mean", "std")


def build_encoder(name: str, weights: str | None, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the timm ViT ``name`` without its head, frozen and in eval mode.

    Args:
        name: any timm ViT; the pretrained tag may follow a dot.
        weights: what ``read_state_dict`` reads, in the layout of timm, open_clip, OpenAI or transformers; None for
            timm's pretrained weights from the hub; or ``random``, which tests and shape checks ask for by name.
        kwargs: further arguments of ``timm.create_model``, such as ``img_size``; those in PREPROCESSING override the
            model's own preprocessing.

    Raises:
        ValueError: an unknown name, a model that is no ViT, or weights that do not fit or cannot be fetched.
        FileNotFoundError: ``weights`` does not exist.
    """
    timm = import_guarded("timm")
    kwargs = dict(kwargs or {})
    if not timm.is_model(name.split(".")[0]):
        similar = some(timm.list_models(f"*{name.split('.')[0][:12]}*")[:5])
        raise ValueError(f"--encoder {name}: timm knows no such model (similar: {similar})")
    overlay: dict[str, Any] = {key: kwargs.pop(key) for key in PREPROCESSING if key in kwargs}
    if "img_size" in kwargs:
        overlay["input_size"] = (3, kwargs["img_size"], kwargs["img_size"])
    file = None if weights in (None, RANDOM) else weights
    if file is not None and not Path(file).exists():
        raise FileNotFoundError(
            f"--encoder-weights {file}: no such file; run `bash hw3_download.sh {download_part(file)}`, or name another"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_ENCODER_SEED)
        try:
            encoder = timm.create_model(
                name, pretrained=weights is None, pretrained_cfg_overlay=overlay, num_classes=0, **kwargs
            )
        except (RuntimeError, OSError, TypeError, ValueError) as error:
            hint = "; run `bash hw3_download.sh p2`, or name a file with --encoder-weights" if weights is None else ""
            raise ValueError(f"--encoder {name}: it could not be built ({first_line(error)}){hint}") from error
    if not hasattr(encoder, "num_prefix_tokens") or not hasattr(encoder.patch_embed, "grid_size"):
        raise ValueError(f"--encoder {name}: not a vision transformer; choose one of timm's vit_* models")
    if file is not None:
        _load_weights(encoder, name, file)
    if weights != RANDOM:
        _check_origin(timm, encoder, name, file)
    return encoder.requires_grad_(False).eval()


def _load_weights(encoder: nn.Module, name: str, path: str) -> None:
    """Fill a headless encoder from a local file; all its tensors and no others but the head's must be there.

    timm itself loads headless models with strict=False, which silently leaves random what the file lacks.
    """
    state = openai_names(read_state_dict(path))  # never timm's own reader, which would run a pickle's code
    what = f"--encoder-weights {path}: they do not fit {name}"
    family = importlib.import_module(type(encoder).__module__)
    rename = getattr(family, "checkpoint_filter_fn", lambda state, model: state)  # open_clip's names to timm's
    try:
        state = rename(state, encoder)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{what} ({first_line(error)})") from error
    state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    copy_exactly(encoder.state_dict(), state, what, "give the weights of that model")


def _check_origin(timm: Any, encoder: Any, name: str, file: str | None) -> None:
    """Warn where weights say that they are another encoder's of the same shape, which has other features."""
    runs = f"{encoder.pretrained_cfg['architecture']}.{encoder.pretrained_cfg.get('tag')}"
    meant = _origin(timm, runs, file)
    if meant != runs:
        weights = f"--encoder-weights {file}" if file else "its weights"
        log.warning("--encoder %s: runs as %s, and %s are by all signs those of %s", name, runs, weights, meant)


def _origin(timm: Any, runs: str, file: str | None) -> str:
    """Return MODEL.TAG that weights are said to be by their file's name, config.json or form; ``runs`` if by none.

    OpenAI's and some others' want QuickGELU, and timm runs GELU under the plain name; tags bring preprocessing too.
    """
    architecture, _, tag = (Path(file).stem if file else runs).partition(".")
    quick: bool | None = True  # the twin that timm has with this tag was trained so
    if file and not timm.is_model(architecture):
        architecture, _, tag = runs.partition(".")
        quick = trained_with_quick_gelu(file)
        if quick is None or quick == ("_quickgelu_" in architecture):
            return runs
        tag = "openai" if quick else tag
    plain = architecture.replace("_clip_quickgelu_", "_clip_")
    twins = [plain.replace("_clip_", "_clip_quickgelu_"), plain] if quick else [plain]
    return next((f"{twin}.{tag}" for twin in twins if timm.models.is_model_pretrained(f"{twin}.{tag}")), runs)


def build_transform(encoder: nn.Module) -> Callable[[Any], torch.Tensor]:
    """Return the encoder's own evaluation preprocessing: PIL image to (3, H, W) float tensor."""
    timm_data = import_guarded("timm.data")
    # The model, not its name: given a string, timm silently answers with ImageNet's mean, std and crop.
    return timm_data.create_transform(**timm_data.resolve_model_data_config(encoder), is_training=False)


def preprocessing_by_name(encoder: str) -> dict[str, Any]:
    """Return the preprocessing that timm answers with when asked by name: not the model's own, but ImageNet's.

    The report was trained like that; the values are stored in the adapter's config, so inference has them too.
    """
    found = import_guarded("timm.data").resolve_data_config({}, model=encoder)
    return {key: found[key] for key in PREPROCESSING}
