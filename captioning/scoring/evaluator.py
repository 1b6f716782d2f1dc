"""All scores of predictions against references and images, as a library."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from captioning.data.annotations import (
    Annotations,
    check_keys,
    find_images,
)
from captioning.messages import some
from captioning.scoring import coco_metrics
from captioning.scoring.cache import (
    ReferenceSide,
    cached_image_features,
    cached_reference_side,
    make_reference_side,
)
from captioning.scoring.caption_stats import caption_statistics
from captioning.scoring.cider import DocumentFrequencies, cider_d

from captioning.scoring.clipscore import (
    ClipScorer,
    clip_scores,
    image_features,
    named_scores,
    ref_clip_scores,
    text_features,
)
from captioning.scoring.coco_metrics import rouge_l
from captioning.scoring.significance import CONFIDENCE, Comparison
from captioning.scoring.tokenizers import TOKENIZERS, pick_tokenizer, ptb_tokenize

log = logging.getLogger(__name__)

METRICS = {  # what --metrics takes and what the results call it, in the order of the results
    "cider": ("CIDEr",),
    "clipscore": ("CLIPScore",),
    "refclipscore": ("RefCLIPScore",),
    "bleu": ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"),
    "meteor": ("METEOR",),
    "rouge": ("ROUGE-L",),
    "spice": ("SPICE",),
}


CLIP_METRICS = ("clipscore", "refclipscore")  # computed beside the others, which are of words alone


DEFAULT_METRICS = ("cider", "clipscore")  # the report's line


NO_MEANS = {*METRICS["bleu"], *METRICS["meteor"]}  # of the corpus, and not the mean of its images


def cider(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, str], tokenizer: str = "auto"
) -> tuple[float, dict[str, float]]:
    """Return CIDEr-D, the mean over the images and ``{key: score}``: pycocoevalcap's ``Cider`` on PTB tokens.

    The document frequencies come from the references given, so scores of different image sets are not comparable, and
    a single image always scores 0. Values lie between 0 and 10 (Vedantam et al. 2015; n = 1..4, sigma = 6, clipped).

    Raises:
        FileNotFoundError, ChildProcessError: as ``cocometrics.ptb_java``.
        ValueError: the keys differ, or an image has no reference with a word in it.
    """
    check_keys(references, predictions)
    candidates = ptb_tokenize({key: [predictions[key]] for key in references}, tokenizer)
    return _cider(ptb_tokenize(references, tokenizer), {key: caption for key, (caption,) in candidates.items()})


def _cider(
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, str],
    frequencies: DocumentFrequencies | None = None,
) -> tuple[float, dict[str, float]]:
    if len(references) == 1:
        log.warning("CIDEr of a single image is 0 by definition: every n-gram occurs in all (one) images")
    wordless = [key for key, captions in references.items() if not any(captions)]
    if wordless or not references:
        raise ValueError(f"CIDEr needs references with words; {len(wordless)} images have none: {some(wordless)}")
    words = [[caption.split() for caption in captions] for captions in references.values()]
    scores = cider_d(words, [candidates[key].split() for key in references], frequencies)
    return float(scores.mean()), dict(zip(references, scores.tolist(), strict=True))


@dataclass
class Evaluation:
    """What was computed: the mean and the scores by image of every metric, and why another one has none."""

    images: int
    means: dict[str, float] = field(default_factory=dict)  # {"CIDEr": 0.88, "CLIPScore": 0.69}
    per_image: dict[str, dict[str, float]] = field(default_factory=dict)  # metric to {stem: score}
    errors: dict[str, str] = field(default_factory=dict)
    clip: dict[str, str | None] = field(default_factory=dict)  # ClipScorer.description of the scorer used
    tokenizer: str = ""  # that made the words, where a metric used words
    annotated: int | None = None  # how many images the annotations name, where fewer were scored
    counts: dict[str, int] = field(default_factory=dict)  # references, empty and truncated captions
    statistics: dict[str, Any] = field(default_factory=dict)  # wording.caption_statistics
    reference_statistics: dict[str, Any] = field(default_factory=dict)  # the same of people's captions
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    comparison: dict[str, Comparison] = field(default_factory=dict)

    def add(self, metric: str, mean: float, scores: Mapping[str, float]) -> None:
        """Take in a metric's mean (or corpus score) and its scores by image; ValueError where one is not finite."""
        lost = [stem for stem, score in scores.items() if not math.isfinite(score)]
        if lost or not math.isfinite(mean):
            raise ValueError(f"{metric} of {len(lost)} images is not a finite number: {some(lost)}")
        self.means[metric], self.per_image[metric] = mean, dict(scores)

    def line(self) -> str:
        """The line that reports quote: ``CIDEr: 0.88… | CLIPScore: 0.69…``, every digit kept."""
        return self.marked(" | ".join(f"{metric}: {mean}" for metric, mean in self.means.items()))

    def marked(self, line: str) -> str:
        """Return ``line``, with a mark where not all annotated images were scored."""
        return line if self.annotated is None else f"{line} | PARTIAL: {self.images} of {self.annotated} images"

    def lines(self, images: bool = True) -> list[str]:
        """The report's line, and below it intervals and comparison, with ``images`` the images that differ most."""
        lines = [self.line()]
        for metric, (low, high) in self.intervals.items():
            lines.append(self.marked(f"{metric}: {CONFIDENCE:.0%} interval [{low}, {high}]"))
        for metric, result in self.comparison.items():
            lines.append(self.marked(result.line(metric)))
            if images:
                lines += [self.marked(f"{metric} {change:+.6f} {image}") for image, change in result.largest]
        return lines

    def origin(self) -> str:
        """One line on what made the numbers: tokenizer, CLIP model, device, precision."""
        parts = [f"tokenizer {self.tokenizer}: {TOKENIZERS[self.tokenizer]}"] if self.tokenizer else []
        if self.clip:
            parts.append("{clip_model} on {device} in {precision} (fp16: other fourth digit)".format(**self.clip))
        return self.marked(" | ".join(parts))

    def ranking(self, predictions: Mapping[str, str]) -> dict[str, dict[str, float | str]]:
        """Return ``{stem: {metric: score, "caption": caption}}``, best CLIPScore (or else the first metric) first."""
        leading = "CLIPScore" if "CLIPScore" in self.means else next(iter(self.means))
        order = sorted(predictions, key=lambda stem: (-self.per_image[leading][stem], stem))
        return {
            stem: {**{metric: scores[stem] for metric, scores in self.per_image.items()}, "caption": predictions[stem]}
            for stem in order
        }

    def summary(self) -> dict[str, Any]:
        """Everything needed to quote the numbers: means, counts, model, device, precision, tokenizer, versions."""
        packages = ["torch", "torchvision", "open_clip_torch", "pillow"] if self.clip else ["torch"]
        packages += ["pycocoevalcap"] if importlib.util.find_spec("pycocoevalcap") else []
        return {
            **self.means,
            "images": self.images,
            **({} if self.annotated is None else {"partial": f"{self.images} of {self.annotated} images"}),
            "metrics": list(self.means),
            "errors": self.errors,
            "counts": self.counts,
            **({"tokenizer": f"{self.tokenizer}: {TOKENIZERS[self.tokenizer]}"} if self.tokenizer else {}),
            **self.clip,
            **({"captions": self.statistics} if self.statistics else {}),
            **({"references": self.reference_statistics} if self.reference_statistics else {}),
            **({"intervals": self.intervals, "confidence": CONFIDENCE} if self.intervals else {}),
            **({"comparison": {k: v.summary() for k, v in self.comparison.items()}} if self.comparison else {}),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }


@dataclass
class Evaluator:
    """Scores prediction files against the same images: references, pictures and model are read once, and when needed.

    ``make_scorer`` is called only for CLIPScore and only once all images are known to exist.
    """

    annotations: Annotations
    images_root: str | os.PathLike | None = None
    make_scorer: Callable[[], ClipScorer] = ClipScorer
    batch_size: int = 64
    tokenizer: str = "auto"
    clip_prompt: str = ""
    cache: Path | None = None  # folder of CLIP's image features, and of the references' side, from earlier runs

    def __post_init__(self) -> None:
        self.tokenizer = pick_tokenizer(self.tokenizer)

    def evaluate(self, predictions: Mapping[str, str], metrics: Sequence[str] = DEFAULT_METRICS) -> Evaluation:
        """Score ``{stem: caption}``; a metric that cannot be computed is logged and does not stop the others.

        Raises:
            ValueError: predictions and annotations do not name the same images, or a metric is unknown.
        """
        wanted = parse_metrics(",".join(metrics))
        check_keys(self.annotations.references, predictions)
        predictions = {stem: predictions[stem] for stem in self.annotations.references}
        empty = [stem for stem, caption in predictions.items() if not caption.strip()]
        if empty:
            log.warning("%d of %d predicted captions are empty: %s", len(empty), len(predictions), some(empty))
        references = sum(map(len, self.annotations.references.values()))
        result = Evaluation(len(predictions), counts={"references": references, "empty": len(empty)})
        run = _Run(self, predictions, result)
        for metric, scored in run.all(wanted).items():
            try:
                for label, mean, scores in scored():
                    result.add(label, mean, dict(zip(predictions, scores, strict=True)))
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                for label in METRICS[metric]:
                    result.errors[label] = str(error)
                log.error("%s not computed: %s", "/".join(METRICS[metric]), error)
        return result

    def tokenize(self, predictions: Mapping[str, str]) -> dict[str, str]:
        """Return the tokens of each predicted caption."""
        tokens = ptb_tokenize({stem: [caption] for stem, caption in predictions.items()}, self.tokenizer)
        return {stem: caption for stem, (caption,) in tokens.items()}

    def statistics(
        self, predictions: Mapping[str, str], training: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, Any]:
        """Return ``wording.caption_statistics`` of predictions, with copies from ``training`` references if given."""
        tokens = None if training is None else ptb_tokenize(training, self.tokenizer)
        known = None if tokens is None else [caption for captions in tokens.values() for caption in captions]
        return caption_statistics([*self.tokenize(predictions).values()], known)

    @functools.cached_property
    def reference_side(self) -> ReferenceSide:
        """The tokens of each image's references, and in how many images their n-grams occur."""
        references, tokenize = self.annotations.references, functools.partial(ptb_tokenize, tokenizer=self.tokenizer)
        if self.cache is None:
            return make_reference_side(references, tokenize)
        return cached_reference_side(references, self.tokenizer, tokenize, self.cache / "references")

    @functools.cached_property
    def paths(self) -> dict[str, Path]:
        """Each image's file."""
        return find_images(self.annotations, self.images_root)

    @functools.cached_property
    def scorer(self) -> ClipScorer:
        """The CLIP model, loaded when the images are known to be there."""
        assert self.paths
        return self.make_scorer()

    @functools.cached_property
    def images(self) -> torch.Tensor:
        """Unit-length features of the images ``(n, dim)``, in the order of the references."""
        paths = list(self.paths.values())
        if self.cache is None:
            return image_features(self.scorer, paths, self.batch_size)
        return cached_image_features(self.scorer, paths, self.batch_size, self.cache / "clip")

    @functools.cached_property
    def reference_features(self) -> torch.Tensor:
        """Unit-length features of all references, image by image."""
        captions = [caption for group in self.annotations.references.values() for caption in group]
        return text_features(self.scorer, captions, self.batch_size, self.clip_prompt)


Scored = list[tuple[str, float, Sequence[float]]]  # label, the corpus' score, those of the images in order


class _Run:
    """The metrics of one prediction file, a method by the name of each; what several of them need is made once."""

    def __init__(self, evaluator: Evaluator, predictions: Mapping[str, str], result: Evaluation) -> None:
        self.evaluator, self.predictions, self.result = evaluator, predictions, result

    def all(self, metrics: Sequence[str]) -> dict[str, Callable[[], Scored]]:
        """Compute every metric, those of CLIP and those of words at the same time; a call returns one's or raises."""
        with ThreadPoolExecutor(1) as with_clip, ThreadPoolExecutor(1) as of_words:  # one after the other in each
            futures = {
                metric: (with_clip if metric in CLIP_METRICS else of_words).submit(getattr(self, metric))
                for metric in metrics
            }
        return {metric: future.result for metric, future in futures.items()}

    @functools.cached_property
    def words(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        words = self.evaluator.reference_side.tokens, self.evaluator.tokenize(self.predictions)
        self.result.tokenizer = self.evaluator.tokenizer
        return words

    @functools.cached_property
    def texts(self) -> torch.Tensor:
        evaluator, captions = self.evaluator, list(self.predictions.values())
        self.result.clip.update(evaluator.scorer.description, clip_prompt=evaluator.clip_prompt)
        cut = evaluator.scorer.truncated([evaluator.clip_prompt + caption for caption in captions])
        self.result.counts["truncated"] = len(cut)
        if cut:
            names = some([list(self.predictions)[place] for place in cut])
            log.warning("%d captions are longer than CLIP's context and were cut for it: %s", len(cut), names)
        return text_features(evaluator.scorer, captions, evaluator.batch_size, evaluator.clip_prompt)

    def cider(self) -> Scored:
        mean, scores = _cider(*self.words, self.evaluator.reference_side.frequencies)
        return [("CIDEr", mean, list(scores.values()))]

    def bleu(self) -> Scored:
        return [(label, *scored) for label, scored in zip(METRICS["bleu"], coco_metrics.bleu(*self.words), strict=True)]

    def meteor(self) -> Scored:
        return [("METEOR", *coco_metrics.meteor(*self.words))]

    def rouge(self) -> Scored:
        return [("ROUGE-L", *rouge_l(*self.words))]

    def spice(self) -> Scored:
        return [("SPICE", *coco_metrics.spice(*self.words))]

    def clipscore(self) -> Scored:
        scores = clip_scores(self.evaluator.images, self.texts)
        return [_mean("CLIPScore", self.predictions, scores)]

    def refclipscore(self) -> Scored:
        images, texts, references = self.evaluator.images, self.texts, self.evaluator.reference_features
        counts = [len(group) for group in self.evaluator.annotations.references.values()]
        scores = ref_clip_scores(clip_scores(images, texts), texts, references, counts)
        return [_mean("RefCLIPScore", self.predictions, scores)]


def _mean(label: str, keys: Mapping[str, str], scores: torch.Tensor) -> tuple[str, float, list[float]]:
    values = list(named_scores(label, keys, scores).values())
    return label, sum(values) / len(values), values


def evaluate_predictions(
    predictions: Mapping[str, str],
    annotations: Annotations,
    metrics: Sequence[str] = DEFAULT_METRICS,
    images_root: str | os.PathLike | None = None,
    make_scorer: Callable[[], ClipScorer] = ClipScorer,
    batch_size: int = 64,
) -> Evaluation:
    """Score one ``{stem: caption}``; see ``Evaluator``, which serves several, and its ``evaluate`` for errors."""
    return Evaluator(annotations, images_root, make_scorer, batch_size).evaluate(predictions, metrics)


def parse_metrics(text: str) -> list[str]:
    """Return the metrics in ``"cider,clipscore"`` or ``"all"``, in the order of ``METRICS``.

    Raises:
        ValueError: one is unknown, or there is none.
    """
    wanted = {name.strip().lower() for name in text.split(",")}
    if wanted == {"all"}:
        return list(METRICS)
    if not wanted <= METRICS.keys():
        raise ValueError(f"--metrics {text}: unknown; choose from {', '.join(METRICS)}, with a comma between, or all")
    return [metric for metric in METRICS if metric in wanted]
