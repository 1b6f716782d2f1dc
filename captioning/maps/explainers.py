"""Both captioners behind one interface for attention maps: caption an image, read a caption with its attention kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from captioning.data.tokenizer import Tokenizer
from captioning.imports import import_guarded
from captioning.inference.captions import caption_features
from captioning.maps.attention import (
    METHODS,
    Capture,
    Explained,
    Look,
    View,
    Window,
    crop_window,
    token_maps,
    word_maps,
    words_of,
)
from captioning.models.captioner import Captioner
from captioning.models.llava import Llava

GENERIC = "A picture."  # what every image is: the attention of its words says what is looked at in any case
# What --grounding found best on scenes of the split `train` (p1: 500, p2: 1,500); the README reports the split `val`.
DEFAULTS = {"p1": Look("grad", "all", "mean", "predict"), "p2": Look("raw", "all", "mean", "predict")}
REPORT = {  # the report's own choices, for the grounding table
    "p1": Look("raw", "last", "max", "predict"),
    "p2": Look("raw", "last", "mean", "predict"),
}
MANY_LAYERS = 6  # so many single layers are offered in viewer and table, evenly spread


class P2Explainer:
    """The trained captioner.

    Args:
        captioner: merged, on its device.
        tokenizer: the decoder's.
        beam_size: of the search that writes captions.
        max_new_tokens: the longest caption.
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

    def caption(self, inputs: list[torch.Tensor]) -> list[list[int]]:
        """Return captions' ids of prepared images."""
        texts = caption_features(self.captioner, self.tokenizer, torch.cat(inputs), self.beam_size, self.max_new_tokens)
        return [self.tokens(text) for text in texts]

    def tokens(self, text: str) -> list[int]:
        """Return a caption's ids."""
        return self.tokenizer.encode(text)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, white space kept."""
        return self.tokenizer.decode(list(tokens))

    def capture(self, inputs: torch.Tensor, tokens: list[int], whole: bool = False) -> Capture:
        """Read a caption behind a prepared image and keep where it looked."""
        ids = [self.tokenizer.eos_id, *tokens]
        weights, logits = self.captioner.attend(inputs, ids, whole)
        grid = tuple(self.captioner.encoder.patch_embed.grid_size)
        return Capture(weights, logits, tokens, self.captioner.patch_columns.to(logits.device), grid)

    def window(self, size: tuple[int, int]) -> Window:
        """Return what the model sees of an image of ``size`` (width, height)."""
        return crop_window(size, self._resized, self._crop)


class P1Explainer:
    """LLaVA.

    Args:
        llava: the model.
        prompt: what it answers.
        num_beams: of its search.
        max_new_tokens: the longest answer.
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

    def caption(self, inputs: list[Any]) -> list[list[int]]:
        """Return answers' ids of prepared images."""
        return self.llava.generate(inputs, self.num_beams, self.max_new_tokens, keep_past=True)

    def tokens(self, text: str) -> list[int]:
        """Return an answer's ids; one space stands between ``ASSISTANT:`` and the answer."""
        return self.llava.processor.tokenizer(f" {text}", add_special_tokens=False).input_ids

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, white space kept."""
        return self.llava.processor.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def capture(self, inputs: Any, tokens: list[int], whole: bool = False) -> Capture:
        """Read an answer behind a prepared image and prompt and keep where it looked."""
        weights, logits = self.llava.attend(inputs, tokens, whole)
        patches = (inputs.input_ids == self.llava.image_token_id).nonzero()[:, 0].to(logits.device)
        vision = self.llava.model.config.vision_config
        side = vision.image_size // vision.patch_size
        if side * side != len(patches):
            raise ValueError(f"the prompt holds {len(patches)} image tokens, the vision tower has {side} x {side}")
        return Capture(weights, logits, tokens, patches, (side, side))

    def window(self, size: tuple[int, int]) -> Window:
        """Return what the model sees of an image of ``size`` (width, height)."""
        return crop_window(size, self._resized, self._crop)


Explainer = P1Explainer | P2Explainer


@dataclass
class Reading:
    """One caption read behind one image: its capture, its words, and the generic caption's attention on demand."""

    capture: Capture
    words: list[tuple[str, list[int]]]
    generic: Callable[[Look], torch.Tensor] | None = None

    def maps(self, look: Look) -> np.ndarray:
        """Return (W, gh, gw): one map a word."""
        common = self.generic(look) if self.generic and look.method == "relative" else None
        maps = token_maps(self.capture, look, common)
        return word_maps(maps, [indices for _, indices in self.words], self.capture.grid)

    def image_mass(self, look: Look) -> np.ndarray:
        """Return (W,): the share of each word's attention, mean over layers and heads, that falls on the image."""
        mass = self.capture.image_part(look.row).sum(-1).mean((0, 1))  # (T,)
        return np.array([float(mass[indices].mean()) for _, indices in self.words], np.float32)


def read(explainer: Explainer, inputs: Any, tokens: list[int], looks: Sequence[Look], relative_to: str) -> Reading:
    """Read ``tokens`` behind a prepared image once, keeping what ``looks`` need.

    Args:
        explainer: the model.
        inputs: what ``explainer.prepare`` made of the image.
        tokens: the caption.
        looks: what will be asked of the reading.
        relative_to: ``words`` or ``generic``: what the method ``relative`` divides by.

    Raises:
        ValueError: the caption is empty.
    """
    words = words_of(tokens, explainer.text)
    if not words:
        raise ValueError("the caption has no word to explain")
    gradients = any(look.needs_gradients for look in looks)
    with torch.set_grad_enabled(gradients):
        capture = explainer.capture(inputs, tokens, whole=any(look.needs_whole for look in looks))
    generic = None
    if relative_to == "generic":
        with torch.no_grad():
            common = explainer.capture(inputs, explainer.tokens(GENERIC))

        def generic(look: Look) -> torch.Tensor:
            return token_maps(common, Look("raw", look.layers, look.heads, look.row)).mean(0)

    return Reading(capture, words, generic)


def explain(
    explainer: Explainer,
    path: Path,
    image: Image.Image,
    reading: Reading,
    looks: Sequence[Look],
    notes: dict[str, str] | None = None,
) -> Explained:
    """Return the maps of every look, the first being the default."""
    views = [
        View(look.method, look.layers, look.heads, np.maximum(reading.maps(look), 0).astype(np.float32))
        for look in looks
    ]
    return Explained(
        path=path,
        caption=explainer.text(reading.capture.tokens).strip(),
        words=[word for word, _ in reading.words],
        views=views,
        window=explainer.window(image.size),
        model=explainer.name,
        notes=notes or {},
        image_mass=reading.image_mass(looks[0]),
    )


# --- choices of looks ---


def some_layers(count: int) -> list[str]:
    """Return layers to choose from: single ones evenly spread, the upper half, and all."""
    singles = sorted({round(n) for n in np.linspace(0, count - 1, min(count, MANY_LAYERS))})
    return [*map(str, singles), f"{count // 2}-{count - 1}", "all"]


def many_looks(n_layer: int, n_head: int, rows: Sequence[str]) -> list[Look]:
    """Return what the grounding table compares: every method over layers, head rules and rows."""
    looks = [
        Look(method, layers, heads, row)
        for method in ("raw", "relative")
        for layers in some_layers(n_layer)
        for heads in ("mean", "max", "top3")
        for row in rows
    ]
    looks += [Look("raw", str(n_layer - 1), str(head), rows[0]) for head in range(n_head)]
    looks += [Look("rollout", layers, "mean", row) for layers in some_layers(n_layer)[-2:] for row in rows]
    looks += [Look("grad", layers, heads) for layers in some_layers(n_layer)[-3:] for heads in ("mean", "max")]
    return looks


def shown_looks(default: Look, n_layer: int) -> list[Look]:
    """Return the views of the viewer, the default first."""
    looks = [default]
    for method in METHODS:
        layers = some_layers(n_layer) if method in ("raw", "relative") else ["all"]
        looks += [Look(method, layer, heads, default.row) for layer in layers for heads in ("mean", "max")]
    return list(dict.fromkeys(looks))
