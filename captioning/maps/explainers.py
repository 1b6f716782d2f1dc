"""Both captioners behind one interface for attention maps: caption an image, read a caption with its attention kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
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
from captioning.maps.capture import Probe
from captioning.maps.localisation import LocalHeads, choose_heads, read_heads
from captioning.messages import first_line
from captioning.models.captioner import Captioner
from captioning.models.llava import Llava

GENERIC = "A picture."  # true of every image: the attention of its words shows what is looked at in any case
# What was best on scenes of the split `train` (p1: 60, p2: 100).
DEFAULTS = {"p1": MapSpec("agree", "all", "max"), "p2": MapSpec("agree", "all", "mean")}
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

    @property
    def heads_file(self) -> Path | None:
        """Where the localisation heads are kept: beside the adapter."""
        return self.captioner.source and self.captioner.source.with_suffix(".heads.json")

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

    def capture(self, inputs: torch.Tensor, tokens: list[int], whole: bool = False, hidden: bool = False) -> Capture:
        """Read a caption after a prepared image and keep its attention.

        ``whole``: that of all rows; ``hidden``: all positions' hidden states too, (S, C) of every layer.
        """
        captioner, ids = self.captioner, [self.tokenizer.eos_id, *tokens]
        with kept_outputs(captioner.decoder.h if hidden else ()) as states:
            weights, logits = captioner.attend(inputs, ids, whole)
        patches = captioner.patch_columns.to(logits.device)
        capture = Capture(weights, logits, tokens, patches, captioner.grid)
        capture.hidden = [torch.cat(parts, 1)[0] for parts in states] if hidden else None
        capture.read_out = functools.partial(captioner.read_out, tokens=tokens)
        capture.local_heads = functools.partial(read_heads, self.heads_file, self.n_layer, self.n_head)
        capture.linked = functools.cache(torch.enable_grad()(lambda: captioner.attend(inputs, ids, True, linked=True)))
        capture.probe = functools.cache(
            lambda: Probe(captioner.prefix(inputs)[0].detach(), patches, tokens, lambda x: captioner.ask(x, ids))
        )
        return capture

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

    @property
    def heads_file(self) -> Path:
        """Where the localisation heads are kept: in the model's folder, or for a hub id among the runs."""
        name = Path(self.llava.model.name_or_path)
        return name / "localisation_heads.json" if name.is_dir() else Path("runs", f"{name.name}.heads.json")

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

    def capture(self, inputs: Any, tokens: list[int], whole: bool = False, hidden: bool = False) -> Capture:
        """Read an answer after a prepared image and prompt and keep its attention.

        ``whole``: that of all rows; ``hidden``: all positions' hidden states too, (S, C) of every layer: image and
        prompt are read once more for them, and they take 170 MB at LLaVA-7B's size in float16.
        """
        llava = self.llava
        if hidden and not whole:
            inputs = replace(inputs, past=None)
        with kept_outputs(llava.layers if hidden else ()) as states:
            weights, logits = llava.attend(inputs, tokens, whole)
        patches = (inputs.input_ids == llava.image_token_id).nonzero()[:, 0].to(logits.device)
        vision = llava.model.config.vision_config
        side = vision.image_size // vision.patch_size
        full = llava.model.config.vision_feature_select_strategy == "full"
        patches = patches[full:]  # CLS comes first
        if side * side != len(patches):
            raise ValueError(f"the prompt holds {len(patches)} image tokens, the vision tower has {side} x {side}")
        capture = Capture(weights, logits, tokens, patches, (side, side))
        capture.hidden = [torch.cat(parts, 1)[0] for parts in states] if hidden else None
        capture.read_out = functools.partial(llava.read_out, tokens=tokens)
        capture.local_heads = functools.partial(read_heads, self.heads_file, self.n_layer, self.n_head)
        capture.linked = functools.cache(torch.enable_grad()(lambda: llava.attend(inputs, tokens, True, linked=True)))
        capture.probe = functools.cache(
            lambda: Probe(
                llava.image_tokens(inputs), patches - patches[0] + full, tokens, lambda x: llava.ask(inputs, x, tokens)
            )
        )
        return capture

    def window(self, size: tuple[int, int]) -> Window:
        """Return which part of an image of ``size`` (width, height) the model sees."""
        return crop_window(size, self._resized, self._crop)


Explainer = LlavaExplainer | CaptionerExplainer


@contextlib.contextmanager
def kept_outputs(layers: Iterable[torch.nn.Module]) -> Iterator[list[list[torch.Tensor]]]:
    """Within, keep what each layer returns at every call, (1, length, C), detached: image and caption may be two."""
    kept: list[list[torch.Tensor]] = []
    hooks = []

    def keep(output: Any, place: list[torch.Tensor]) -> None:
        place.append((output[0] if isinstance(output, tuple) else output).detach())

    for layer in layers:
        kept.append([])
        hooks.append(layer.register_forward_hook(lambda _, __, output, place=kept[-1]: keep(output, place)))
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def read(explainer: Explainer, inputs: Any, tokens: list[int], specs: Sequence[MapSpec]) -> CaptionAttention:
    """Read ``tokens`` once after a prepared image, keeping what ``specs`` need.

    Args:
        explainer: the model.
        inputs: what ``explainer.prepare`` made of the image.
        tokens: the caption.
        specs: which maps will be asked for.

    Raises:
        ValueError: the caption has no word.
    """
    words = words_of(tokens, explainer.text)
    if not words:
        raise ValueError("the caption has no word to explain")
    needs = {need for spec in specs for need in METHODS[spec.method].needs}
    with torch.set_grad_enabled("gradient" in needs):
        capture = explainer.capture(inputs, tokens, whole="whole" in needs, hidden="hidden" in needs)
    if "generic" in needs:
        with torch.no_grad():
            capture.generic = explainer.capture(inputs, explainer.tokens(GENERIC))
    return CaptionAttention(capture, words)


def find_local_heads(explainer: Explainer, pictures: Iterable[Image.Image]) -> LocalHeads:
    """Choose a model's localisation heads by its own captions of a calibration set; see localisation.py."""

    def captures() -> Iterator[Capture]:
        for picture in pictures:
            inputs = explainer.prepare(picture)
            tokens = explainer.caption(inputs)
            if explainer.text(tokens).strip():
                yield explainer.capture(inputs, tokens)

    with torch.no_grad():
        return choose_heads(captures())


def explain(
    explainer: Explainer,
    picture: Path | Image.Image,
    specs: Sequence[MapSpec],
    caption: str | None = None,
    notes: dict[str, str] | None = None,
) -> tuple[Explanation, CaptionAttention]:
    """Return the maps of every spec for an image, and the attention that they were made from.

    Args:
        explainer: the model.
        picture: the image file, or the image itself, upright RGB.
        specs: which maps; the first is the default.
        caption: what to explain; None for the model's own caption.
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
    attention = read(explainer, inputs, tokens, specs)
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


def explain_each(
    explainer: Explainer, picture: Path | Image.Image, specs: Sequence[MapSpec], caption: str | None = None, **more: Any
) -> tuple[Explanation, CaptionAttention, dict[MapSpec, str]]:
    """As :func:`explain`, with why the specs are left out that the model cannot serve; the first must be served."""
    try:
        return *explain(explainer, picture, specs, caption, **more), {}
    except ValueError:
        explanation, attention = explain(explainer, picture, specs[:1], caption, **more)
    absent = {}
    for spec in specs[1:]:
        try:
            explanation.word_maps.extend(explain(explainer, picture, [spec], explanation.caption, **more)[0].word_maps)
        except ValueError as error:
            absent[spec] = first_line(error)
    return explanation, attention, absent


# --- which specs to offer ---


def choose_spec(model: str, **choices: str | None) -> MapSpec:
    """Return what a model's maps are by default, with what ``choices`` change: method, layers, heads, row.

    Another method than the default's begins with its own layers.

    Raises:
        ValueError: layers or heads are chosen for a method that has none.
    """
    given: Any = {name: value for name, value in choices.items() if value is not None}
    spec = MapSpec(**{"method": DEFAULTS[model].method, **given})
    useless = [name for name in ("layers", "heads") if name in given and name not in spec.choices()]
    if useless:
        raise ValueError(f"--{useless[0]} makes no difference to --method {spec.method}; leave it out")
    own = METHODS[spec.method].layers or "all"
    start = DEFAULTS[model] if spec.method == DEFAULTS[model].method else MapSpec(layers=own)
    return replace(start, **{"method": spec.method, **given})


def layer_choices(count: int) -> list[str]:
    """Return layers to choose from: single ones, evenly spread; the upper half; all."""
    singles = sorted({round(n) for n in np.linspace(0, count - 1, min(count, MANY_LAYERS))})
    return [*map(str, singles), f"{count // 2}-{count - 1}", "all"]


def specs_to_compare(n_layer: int, n_head: int, slow: bool = False) -> list[MapSpec]:
    """Return what the grounding table compares: every method over layers, rules for heads, and rows; ``slow``: all."""
    specs = [
        MapSpec(method, layers, heads, row)
        for method in ("raw", "relative", "generic")
        for layers in layer_choices(n_layer)
        for heads in ("mean", "max", "top3")
        for row in ROWS
    ]
    specs += [MapSpec("raw", str(n_layer - 1), str(head)) for head in range(n_head)]
    specs += [MapSpec("rollout", layers, "mean", row) for layers in layer_choices(n_layer)[-2:] for row in ROWS]
    specs += [MapSpec("grad", layers, heads) for layers in layer_choices(n_layer)[-3:] for heads in ("mean", "max")]
    specs += [MapSpec("agree", layers, heads) for layers in layer_choices(n_layer)[-2:] for heads in ("mean", "max")]
    specs += [MapSpec("sinkless", layers, row=row) for layers in layer_choices(n_layer)[-2:] for row in ROWS]
    specs += [MapSpec("tam", layers) for layers in ["last", *layer_choices(n_layer)[1:]]]
    specs += [MapSpec(name) for name, method in METHODS.items() if method.slow and slow]
    return specs


def choices(model: str, n_layer: int, n_head: int) -> dict[str, dict[str, list[str]]]:
    """Return by method its ``layers`` and ``heads`` to choose from, its defaults first; "" alone where it has none."""
    layers = ["all", f"{n_layer // 2}-{n_layer - 1}", *map(str, range(n_layer))]
    every = {"layers": layers, "heads": ["mean", "max", "top3", "local", *map(str, range(n_head))]}
    found = {}
    for method in METHODS:
        own = choose_spec(model, method=method).choices()
        found[method] = {
            name: list(dict.fromkeys([own[name], *values])) if name in own else [""] for name, values in every.items()
        }
    return found


def specs_of_methods(model: str, chosen: MapSpec) -> list[MapSpec]:
    """Return what the contact sheet compares: every method, ``chosen`` for its own, others as they are by default."""
    return [chosen if method == chosen.method else choose_spec(model, method=method) for method in METHODS]


def specs_to_show(default: MapSpec, n_layer: int) -> list[MapSpec]:
    """Return what the viewer offers, the default first: the methods that are not slow."""
    specs = [default]
    for method, of in METHODS.items():
        layers = layer_choices(n_layer) if method in ("raw", "relative", "generic") else [of.layers or "all"]
        heads = ("mean", "max") if of.heads else ("mean",)
        specs += [MapSpec(method, layer, head, default.row) for layer in layers for head in heads if not of.slow]
    return list(dict.fromkeys(specs))
