"""The suite as a Python call: load a captioner or LLaVA, caption, explain, score. ``captioning`` has these names.

Captions are those of p2_infer.py and p1_llava_caption.py, maps those of p3_attention.py, scores those of evaluate.py:
all of them call the same functions. docs/python.md shows the use. Arguments that are flags of the scripts have their
names, and messages on them name the flags.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

from PIL import Image

from captioning.data.annotations import Annotations, load_annotations, load_predictions
from captioning.data.images import as_rgb, load_image
from captioning.data.tokenizer import Tokenizer
from captioning.device import pick_device
from captioning.inference.batches import Job
from captioning.inference.captions import check_vocabulary
from captioning.inference.jobs import Search, captioner_job, llava_job
from captioning.inference.wording import Wording
from captioning.maps.attention import Explanation
from captioning.maps.explainers import (
    CaptionerExplainer,
    Explainer,
    LlavaExplainer,
    choices,
    choose_spec,
    explain,
    specs_to_show,
)
from captioning.models.adapter import load_captioner, read_adapter
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.models.inference_weights import prepare
from captioning.models.llava import MAX_NEW_TOKENS, PROMPTS, Llava, check_prompt, load_llava
from captioning.profiles import PROFILES
from captioning.scoring.chair import Chair
from captioning.scoring.clipscore import ClipScorer
from captioning.scoring.evaluator import DEFAULT_METRICS, Evaluation, Evaluator

T = TypeVar("T")
Picture = str | os.PathLike | Image.Image
MODELS = ("captioner", "llava")
ADAPTERS = ("best.safetensors", "adapter.safetensors", "adapter/adapter.safetensors")  # of a run; of p2_export.py


class Model(ABC):
    """A model that captions and explains images: what :func:`load` returns.

    Attributes:
        name: ``p2``, the tuned captioner, or ``p1``, LLaVA.
        beam_size, max_new_tokens: what :meth:`caption` takes where nothing is given: those of the model's script.
    """

    name: str
    beam_size: int
    max_new_tokens: int

    @overload
    def caption(self, images: Picture, beam_size: int | None = None, **options: Any) -> str: ...

    @overload
    def caption(self, images: Sequence[Picture], beam_size: int | None = None, **options: Any) -> list[str]: ...

    def caption(
        self,
        images: Picture | Sequence[Picture],
        beam_size: int | None = None,
        max_new_tokens: int | None = None,
        n_best: int = 0,
        batch_size: int = 16,
        **wording: Any,
    ) -> str | list[str]:
        """Return the caption of an image, or the captions of a list of images.

        Args:
            images: a path or a PIL image, or a list of them; EXIF rotation is applied, transparency laid on white.
            beam_size: live beams; 1 is greedy search. None: 5, with LLaVA 1.
            max_new_tokens: longest caption in tokens. None: 30, with LLaVA 200.
            n_best: return each caption as ``captioning.data.ranked.Ranked``, a string that carries this many best
                captions in ``ranked``: pairs of text and confidence, the mean log-probability of its tokens.
            batch_size: images at once.
            wording: ``min_new_tokens``, ``no_repeat_ngram``, ``repetition_penalty``: what captions may not say.

        Raises:
            OSError, ValueError: an image is missing or cannot be read, or an option makes no sense.
        """
        items: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        search = Search(beam_size or self.beam_size, max_new_tokens or self.max_new_tokens, Wording(**wording), n_best)
        if n_best > search.beam_size:
            raise ValueError(f"n_best={n_best}: {search.beam_size} beams find no more than {search.beam_size}")
        job, found = self._job(search), []
        for first in range(0, len(items), batch_size):
            prepared = [job.prepare(open_picture(item)) for item in items[first : first + batch_size]]
            found += job.caption(prepared if job.begin is None else job.begin(prepared))
        return found if isinstance(images, list | tuple) else found[0]

    def explain(
        self,
        image: Picture,
        caption: str | None = None,
        all_maps: bool = False,
        beam_size: int | None = None,
        max_new_tokens: int | None = None,
        **spec: str,
    ) -> Explanation:
        """Return the words of an image's caption and which pixels each looked at.

        ``explanation.words`` are W words, ``explanation.maps`` (W, gh, gw) their maps, which cover
        ``explanation.window`` of the image. ``maps.viewer.write([explanation], FILE, TITLE)`` makes a page of it,
        ``maps.figures.word_grid(explanation, FILE)`` a picture.

        Args:
            image: a path or a PIL image.
            caption: what to explain; None: the model's own caption.
            all_maps: add the maps by every method and many layers and heads, as ``explanation.word_maps``.
            beam_size, max_new_tokens: of the model's own caption, as for :meth:`caption`.
            spec: ``method``, ``layers``, ``heads``, ``row``, as p3_attention.py's; None or left out: its defaults.

        Raises:
            OSError, ValueError: the image is missing or cannot be read; the caption is empty; the model has no such
                layers or heads.
        """
        explainer = self._explainer(beam_size or self.beam_size, max_new_tokens or self.max_new_tokens)
        default = choose_spec(self.name, **spec)
        specs = specs_to_show(default, explainer.n_layer) if all_maps else [default]
        source = as_rgb(image) if isinstance(image, Image.Image) else Path(image)
        return explain(explainer, source, specs, caption)[0]

    def map_choices(self) -> dict[str, dict[str, list[str]]]:
        """Return what :meth:`explain` takes: by ``method`` its ``layers`` and ``heads``; "" alone where it has none."""
        explainer = self._explainer(self.beam_size, self.max_new_tokens)
        return choices(self.name, explainer.n_layer, explainer.n_head)

    @abstractmethod
    def _job(self, search: Search) -> Job: ...

    @abstractmethod
    def _explainer(self, beam_size: int, max_new_tokens: int) -> Explainer: ...


class TunedCaptioner(Model):
    """The trained captioner.

    Args:
        read: reads it again, LoRA merged. Weights for captions are prepared irreversibly (``inference_weights``), so
            those for maps are read once more when the first map is asked for.
        tokenizer: the decoder's.
        precision: of captions: ``auto``, ``fp32`` or ``bf16``.
    """

    name, beam_size, max_new_tokens = "p2", 5, 30

    def __init__(self, read: Callable[[], Captioner], tokenizer: Tokenizer, precision: str = "auto") -> None:
        self._read, self.tokenizer, self.precision = read, tokenizer, precision
        self.captioner = read()
        check_vocabulary(tokenizer, self.captioner.decoder)
        self.precision = prepare(self.captioner, precision)

    @functools.cached_property
    def _unprepared(self) -> Captioner:
        return self._read()

    def _job(self, search: Search) -> Job:
        return captioner_job(self.captioner, self.tokenizer, search, self.precision)

    def _explainer(self, beam_size: int, max_new_tokens: int) -> Explainer:
        return CaptionerExplainer(self._unprepared, self.tokenizer, beam_size, max_new_tokens)


class LlavaCaptioner(Model):
    """LLaVA, asked by ``prompt``, which may be changed at any time."""

    name, beam_size, max_new_tokens = "p1", 1, MAX_NEW_TOKENS

    def __init__(self, llava: Llava, prompt: str = PROMPTS[1]) -> None:
        self.llava, self.prompt = llava, check_prompt(prompt)

    def _job(self, search: Search) -> Job:
        return llava_job(self.llava, check_prompt(self.prompt), search)

    def _explainer(self, beam_size: int, max_new_tokens: int) -> Explainer:
        return LlavaExplainer(self.llava, check_prompt(self.prompt), beam_size, max_new_tokens)


# --- loading --------------------------------------------------------------------------------------------------------


def load(source: str | os.PathLike, model: str = "captioner", device: str = "auto", **options: Any) -> Model:
    """Load a model that captions and explains images.

    Args:
        source: of the captioner: an adapter file, the folder of a run or of p2_export.py, or the name of a profile:
            ``micro`` (drawings; its adapter is in the repository) or ``full``. Of LLaVA: a folder, that of
            p2_export.py too, a hub id, or a profile.
        model: ``captioner`` or ``llava``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        options: further arguments of :func:`load_tuned` or of :func:`load_zero_shot`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or files do not belong together.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r}: use one of {', '.join(MODELS)}")
    return (load_tuned if model == "captioner" else load_zero_shot)(source, device, **options)


def load_tuned(
    source: str | os.PathLike,
    device: str = "auto",
    precision: str = "auto",
    profile: str | None = None,
    decoder: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    encoder_weights: str | None = None,
    allow_other_decoder: bool = False,
) -> TunedCaptioner:
    """Load the tuned captioner; ``source`` and ``device`` as for :func:`load`, the others as flags of p2_infer.py.

    ``profile`` names the decoder and the tokenizer where these are not given; None: the one whose encoder the adapter
    was trained on.
    """
    adapter = adapter_file(PROFILES[str(source)].adapter if source in PROFILES else source)
    of = PROFILES[profile or profile_of(read_adapter(adapter)[0])]
    frozen = (Path(decoder or of.decoder), encoder_weights)
    read = functools.partial(
        load_captioner, adapter, *frozen, pick_device(device), of.encoder_weights, allow_other_decoder
    )
    return TunedCaptioner(read, Tokenizer(tokenizer or of.tokenizer), precision)


def load_zero_shot(
    source: str | os.PathLike,
    device: str = "auto",
    dtype: str = "auto",
    prompt: str = PROMPTS[1],
    revision: str | None = None,
    load_in_4bit: bool = False,
) -> LlavaCaptioner:
    """Load LLaVA; ``source`` and ``device`` as for :func:`load`, the others as flags of p1_llava_caption.py."""
    where, name = pick_device(device), PROFILES[str(source)].llava if source in PROFILES else os.fspath(source)
    if (Path(name) / "llava" / "config.json").is_file():  # a folder of p2_export.py
        name = str(Path(name) / "llava")
    return LlavaCaptioner(load_llava(name, where, dtype, revision, load_in_4bit), prompt)


def adapter_file(source: str | os.PathLike) -> Path:
    """Return the adapter that a file or folder is or holds. Raises FileNotFoundError for a folder without one."""
    path = Path(source)
    if not path.is_dir():
        return path
    found = next((path / name for name in ADAPTERS if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: the folder holds no adapter: none of {', '.join(ADAPTERS)}")
    return found


def profile_of(config: CaptionerConfig) -> str:
    """Return the profile whose encoder a captioner has: ``micro`` with all of its arguments, or else ``full``."""
    micro = PROFILES["micro"]
    same = config.encoder == micro.encoder and micro.encoder_kwargs.items() <= config.encoder_kwargs.items()
    return "micro" if same else "full"


def open_picture(picture: Picture) -> Image.Image:
    """Return a picture as upright 8-bit RGB. Raises OSError or ValueError as ``data.images.load_image``."""
    return as_rgb(picture) if isinstance(picture, Image.Image) else load_image(picture)


# --- scores ---------------------------------------------------------------------------------------------------------

Captions = Mapping[str, str] | Sequence[str] | str | os.PathLike
References = Mapping[str, Sequence[str]] | Sequence[Sequence[str]] | str | os.PathLike
Pictures = Mapping[str, str | os.PathLike] | Sequence[str | os.PathLike] | str | os.PathLike


def score(
    predictions: Captions,
    references: References,
    images: Pictures | None = None,
    metrics: Sequence[str] | None = None,
    profile: str = "full",
    device: str = "auto",
    tokenizer: str = "auto",
    boxes: str | os.PathLike | None = None,
) -> Evaluation:
    """Score captions as evaluate.py does; ``.means`` has the scores, ``.per_image`` those of each image.

    Args:
        predictions: one caption an image: ``{key: text}``, a list, or a file.
        references: people's captions of the same images: ``{key: [texts]}``, a list of lists, or a file.
        images: the pictures, for CLIPScore: ``{key: path}``, a list of paths, or their folder. Whatever is given as
            lists is in one order; files and a folder go by names.
        metrics: as ``--metrics``; None: CIDEr, CLIPScore where there are images, and CHAIR where there are boxes.
        profile: whose CLIP model and words for objects: ``full`` or ``micro``.
        device: where that runs.
        tokenizer: as ``--tokenizer``.
        boxes: as ``--boxes``, for CHAIR.

    Raises:
        OSError, ValueError: a file is missing or damaged, keys differ, or a metric cannot be computed.
    """
    annotations = _annotations(references, images)
    if isinstance(predictions, str | os.PathLike):
        captions = load_predictions(predictions, annotations)
    else:
        captions = _keyed(predictions)
    clip, named = PROFILES[profile], (annotations.file_names, annotations.ids)
    wanted = (*DEFAULT_METRICS[: 1 if images is None else None], *(["chair"] if boxes else []))
    evaluator = Evaluator(
        annotations,
        images if isinstance(images, str | os.PathLike) else None if images is None else Path(),
        lambda: ClipScorer(clip.clip_model, clip.clip_weights, pick_device(device)),
        tokenizer=tokenizer,
        chair=Chair.of_files(clip.chair_words, os.fspath(boxes), *named) if boxes else None,
    )
    result = evaluator.evaluate(captions, metrics or wanted)
    if result.errors:
        raise ValueError("; ".join(f"{metric}: {error}" for metric, error in result.errors.items()))
    return result


def _annotations(references: References, images: Pictures | None) -> Annotations:
    """Return references with the names of their pictures, relative to the folder of the images."""
    if isinstance(references, str | os.PathLike):
        found = load_annotations(references)
    else:
        by_key = {key: list(texts) for key, texts in _keyed(references).items()}
        found = Annotations(by_key, {key: key for key in by_key})
    if images is None or isinstance(images, str | os.PathLike):
        return found
    return replace(found, file_names={key: str(Path(path).absolute()) for key, path in _keyed(images).items()})


def _keyed(values: Mapping[str, T] | Sequence[T]) -> dict[str, T]:
    return dict(values) if isinstance(values, Mapping) else {str(n): value for n, value in enumerate(values)}
