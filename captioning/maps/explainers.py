"""Both captioners behind one interface for attention maps: caption an image, read a caption with its attention kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from captioning.data.images import load_image
from captioning.data.tokenizer import Tokenizer
from captioning.imports import import_guarded
from captioning.inference.captions import caption_features
from captioning.maps.attention import (
    METHODS,
    ROWS,
    CaptionAttention,
    Capture,
    Explanation,
    MapSpec,
    Window,
    WordMaps,
    crop_window,
    words_of,
)
from captioning.models.captioner import Captioner
from captioning.models.llava import Llava

GENERIC = "A picture."  # true of every image: the attention of its words shows what is looked at in any case
# What --grounding found best on scenes of the split `train` (p1: 500, p2: 1,500).
DEFAULTS = {"p1": MapSpec("grad", "all", "mean"), "p2": MapSpec("raw", "all", "mean")}
REPORTED = {"p1": MapSpec("raw", "last", "max"), "p2": MapSpec("raw", "last", "mean")}  # the original report's choices
MANY_LAYERS = 6  # how many single layers the viewer and the grounding table offer, evenly spread


class CaptionerExplainer:
    """The trained captioner.

    Args:
        captioner: merged, on its device.
        tokenizer: the decoder's.
        beam_size: of the search.
        max_new_tokens: length limit of a caption.
    """

    name = "p2"

    def __init__(self, captioner: Captioner, tokenizer: Tokenizer, beam_size: int, max_new_tokens: int) -> None:
        self.captioner, self.tokenizer = captioner, tokenizer
        self.beam_size, self.max_new_tokens = beam_size, max_new_tokens
        timm_data = import_guarded("timm.data")
        config = timm_data.resolve_model_data_config(captioner.encoder)
        height, width = config["input_size"][1:]
        if config["crop_mode"] not in ("center", "squash"):
            raise ValueError(
                f"--encoder preprocesses with crop mode {config['crop_mode']}, which cannot be undone here"
            )
        self.n_layer, self.n_head = captioner.decoder.config.n_layer, captioner.decoder.config.n_head
        self._crop = (width, height)
        squash = config["crop_mode"] == "squash"
        self._resized = None if squash else int(min(width, height) / config["crop_pct"])

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Return the encoder's tokens (1, N, D) of an image."""
        return self.captioner.encode(self.captioner.transform(image)[None].to(self.captioner.device))

    def caption(self, inputs: torch.Tensor) -> list[int]:
        """Return the ids of a prepared image's caption."""
        (text,) = caption_features(self.captioner, self.tokenizer, inputs, self.beam_size, self.max_new_tokens)
        return self.tokens(text)

    def tokens(self, text: str) -> list[int]:
        """Return a caption's ids."""
        return self.tokenizer.encode(text)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, white space kept."""
        return self.tokenizer.decode(list(tokens))

    def capture(self, inputs: torch.Tensor, tokens: list[int], whole: bool = False) -> Capture:
        """Read a caption after a prepared image and keep its attention; ``whole``: that of all rows."""
        ids = [self.tokenizer.eos_id, *tokens]
        weights, logits = self.captioner.attend(inputs, ids, whole)
        patches = self.captioner.patch_columns.to(logits.device)
        return Capture(weights, logits, tokens, patches, self.captioner.grid)

    def window(self, size: tuple[int, int]) -> Window:
        """Return which part of an image of ``size`` (width, height) the model sees."""
        return crop_window(size, self._resized, self._crop)


class LlavaExplainer:
    """LLaVA.

    Args:
        llava: the model.
        prompt: the question that it answers, with ``<image>`` in it.
        num_beams: of its search.
        max_new_tokens: length limit of an answer.
    """

    name = "p1"

    def __init__(self, llava: Llava, prompt: str, num_beams: int, max_new_tokens: int) -> None:
        self.llava, self.prompt = llava, prompt
        self.num_beams, self.max_new_tokens = num_beams, max_new_tokens
        text = llava.model.config.text_config
        self.n_layer, self.n_head = text.num_hidden_layers, text.num_attention_heads
        images = llava.processor.image_processor
        if images.do_center_crop:
            self._crop = (images.crop_size["width"], images.crop_size["height"])
            self._resized = images.size["shortest_edge"]
        else:
            self._crop, self._resized = (images.size["width"], images.size["height"]), None

    def prepare(self, image: Image.Image) -> Any:
        """Return image and prompt as the model takes them."""
        return self.llava.row(image, self.prompt)

    def caption(self, inputs: Any) -> list[int]:
        """Return the ids of the answer on a prepared image."""
        return self.llava.generate([inputs], self.num_beams, self.max_new_tokens, keep_past=True)[0]

    def tokens(self, text: str) -> list[int]:
        """Return an answer's ids; one space separates it from ``ASSISTANT:``."""
        answer = self.llava.before_answer + text
        return self.llava.processor.tokenizer(answer, add_special_tokens=False).input_ids

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, white space kept."""
        return self.llava.processor.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def capture(self, inputs: Any, tokens: list[int], whole: bool = False) -> Capture:
        """Read an answer after a prepared image and prompt and keep its attention; ``whole``: that of all rows."""
        weights, logits = self.llava.attend(inputs, tokens, whole)
        patches = (inputs.input_ids == self.llava.image_token_id).nonzero()[:, 0].to(logits.device)
        vision = self.llava.model.config.vision_config
        side = vision.image_size // vision.patch_size
        if self.llava.model.config.vision_feature_select_strategy == "full":
            patches = patches[1:]  # CLS comes first
        if side * side != len(patches):
            raise ValueError(f"the prompt holds {len(patches)} image tokens, the vision tower has {side} x {side}")
        return Capture(weights, logits, tokens, patches, (side, side))

    def window(self, size: tuple[int, int]) -> Window:
        """Return which part of an image of ``size`` (width, height) the model sees."""
        return crop_window(size, self._resized, self._crop)


Explainer = LlavaExplainer | CaptionerExplainer


def read(
    explainer: Explainer, inputs: Any, tokens: list[int], specs: Sequence[MapSpec], relative_to: str = "words"
) -> CaptionAttention:
    """Read ``tokens`` once after a prepared image, keeping what ``specs`` need.

    Args:
        explainer: the model.
        inputs: what ``explainer.prepare`` made of the image.
        tokens: the caption.
        specs: which maps will be asked for.
        relative_to: ``words`` or ``generic``: what the method ``relative`` divides by.

    Raises:
        ValueError: the caption has no word.
    """
    words = words_of(tokens, explainer.text)
    if not words:
        raise ValueError("the caption has no word to explain")
    methods = {spec.method for spec in specs}
    with torch.set_grad_enabled("grad" in methods):
        capture = explainer.capture(inputs, tokens, whole="rollout" in methods)
    generic = None
    if relative_to == "generic":
        with torch.no_grad():
            generic = explainer.capture(inputs, explainer.tokens(GENERIC))
    return CaptionAttention(capture, words, generic)


def explain(
    explainer: Explainer,
    picture: Path | Image.Image,
    specs: Sequence[MapSpec],
    caption: str | None = None,
    relative_to: str = "words",
    notes: dict[str, str] | None = None,
) -> tuple[Explanation, CaptionAttention]:
    """Return the maps of every spec for an image, and the attention that they were made from.

    Args:
        explainer: the model.
        picture: the image file, or the image itself, upright RGB.
        specs: which maps; the first is the default.
        caption: what to explain; None for the model's own caption.
        relative_to: ``words`` or ``generic``: what the method ``relative`` divides by.
        notes: further facts to show.

    Raises:
        OSError: the image is missing or must not be read.
        ValueError: it is damaged, or the caption is empty.
    """
    photo, path = (picture, Path("image")) if isinstance(picture, Image.Image) else (None, picture)
    image = photo or load_image(path)
    inputs = explainer.prepare(image)
    tokens = explainer.caption(inputs) if caption is None else explainer.tokens(caption)
    text = explainer.text(tokens).strip()
    if not text:
        raise ValueError(f"{path}: the caption is empty")
    attention = read(explainer, inputs, tokens, specs, relative_to)
    return Explanation(
        path=path,
        caption=text,
        words=[word for word, _ in attention.words],
        word_maps=[WordMaps(spec, np.maximum(attention.maps(spec), 0).astype(np.float32)) for spec in specs],
        window=explainer.window(image.size),
        model=explainer.name,
        notes=notes or {},
        image_mass=attention.image_mass(specs[0]),
        photo=photo,
    ), attention


# --- which specs to offer ---


def layer_choices(count: int) -> list[str]:
    """Return layers to choose from: single ones, evenly spread; the upper half; all."""
    singles = sorted({round(n) for n in np.linspace(0, count - 1, min(count, MANY_LAYERS))})
    return [*map(str, singles), f"{count // 2}-{count - 1}", "all"]


def specs_to_compare(n_layer: int, n_head: int) -> list[MapSpec]:
    """Return what the grounding table compares: every method over layers, rules for heads, and rows."""
    specs = [
        MapSpec(method, layers, heads, row)
        for method in ("raw", "relative")
        for layers in layer_choices(n_layer)
        for heads in ("mean", "max", "top3")
        for row in ROWS
    ]
    specs += [MapSpec("raw", str(n_layer - 1), str(head)) for head in range(n_head)]
    specs += [MapSpec("rollout", layers, "mean", row) for layers in layer_choices(n_layer)[-2:] for row in ROWS]
    specs += [MapSpec("grad", layers, heads) for layers in layer_choices(n_layer)[-3:] for heads in ("mean", "max")]
    return specs


def specs_to_show(default: MapSpec, n_layer: int) -> list[MapSpec]:
    """Return what the viewer offers, the default first: the methods that are not slow."""
    specs = [default]
    for method, of in METHODS.items():
        layers = layer_choices(n_layer) if method in ("raw", "relative") else ["all"]
        heads = ("mean", "max") if of.heads else ("mean",)
        specs += [MapSpec(method, layer, head, default.row) for layer in layers for head in heads if not of.slow]
    return list(dict.fromkeys(specs))
