"""All scores of predictions against references and images, as a library.

An `Evaluator` holds what prediction files are scored against. Its ``evaluate`` looks each metric up in `METRICS`, calls
its function with a `Context` (the evaluator and one file's predictions), and collects what they return as `Evaluation`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from captioning.data.annotations import Annotations, check_keys, find_images
from captioning.device import ran_out_of_memory
from captioning.messages import some
from captioning.scoring.cache import ReferenceSide, cached_image_features, cached_reference_side, make_reference_side
from captioning.scoring.caption_stats import caption_statistics
from captioning.scoring.chair import LABELS as CHAIR_LABELS
from captioning.scoring.chair import Chair
from captioning.scoring.cider import DocumentFrequencies, cider_d
from captioning.scoring.clipscore import (
    ClipScorer,
    clip_scores,
    image_features,
    named_scores,
    ref_clip_scores,
    text_features,
)
from captioning.scoring.coco_metrics import Scores, bleu, meteor, rouge_l, spice
from captioning.scoring.significance import CONFIDENCE, Comparison
from captioning.scoring.tokenizers import TOKENIZERS, pick_tokenizer, ptb_tokenize

log = logging.getLogger(__name__)

DEFAULT_METRICS = ("cider", "clipscore")  # those that reports quote
NO_BOXES = "CHAIR needs --boxes FILE, COCO instances; --boxes references counts only what the references name"
DONE_TO_LONG = {"truncate": "were cut for it", "mean": "were taken in windows, whose mean counts"}


# --- what comes out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """What a metric's function returns: its scores, and where they come from."""

    scores: Sequence[Scores]  # by label
    made_by: Mapping[str, str | None]  # tokenizer; or CLIP's model, device, precision, prompt; or CHAIR's files
    counts: Mapping[str, int] = field(default_factory=dict)  # of captions that could only be scored in part
    details: Mapping[str, Mapping[str, list[str]]] = field(default_factory=dict)  # by image, what is behind its score


@dataclass
class Evaluation:
    """What was computed: of every metric the mean and the scores by image, or why it has none."""

    images: int
    means: dict[str, float] = field(default_factory=dict)  # {"CIDEr": 0.88, "CLIPScore": 0.69}
    per_image: dict[str, dict[str, float]] = field(default_factory=dict)  # metric to {stem: score}
    errors: dict[str, str] = field(default_factory=dict)
    details: dict[str, Mapping[str, list[str]]] = field(default_factory=dict)  # by image: CHAIR's objects
    made_by: dict[str, str | None] = field(default_factory=dict)  # tokenizer; CLIP's model, …; CHAIR's files
    annotated: int | None = None  # how many images the annotations name, where fewer were scored
    counts: dict[str, int] = field(default_factory=dict)  # references, empty and long captions
    statistics: dict[str, Any] = field(default_factory=dict)  # caption_stats.caption_statistics
    reference_statistics: dict[str, Any] = field(default_factory=dict)  # the same of people's captions
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    comparison: dict[str, Comparison] = field(default_factory=dict)

    def add(self, labels: Sequence[str], scored: Scored, stems: Iterable[str]) -> None:
        """Take in what a metric returned for the images ``stems``; ValueError where a score is not finite."""
        for label, (mean, scores) in zip(labels, scored.scores, strict=True):
            by_image = dict(zip(stems, scores, strict=True))
            lost = [stem for stem, score in by_image.items() if not math.isfinite(score)]
            if lost or not math.isfinite(mean):
                raise ValueError(f"{label} of {len(lost)} images is not a finite number: {some(lost)}")
            self.means[label], self.per_image[label] = mean, by_image
        self.made_by.update(scored.made_by)
        self.counts.update(scored.counts)
        self.details.update(scored.details)

    def line(self) -> str:
        """The line that reports quote: ``CIDEr: 0.88… | CLIPScore: 0.69…``, with every digit."""
        return self.marked(" | ".join(f"{metric}: {mean}" for metric, mean in self.means.items()))

    def marked(self, line: str) -> str:
        """Return ``line``, with a mark where not all annotated images were scored."""
        return line if self.annotated is None else f"{line} | PARTIAL: {self.images} of {self.annotated} images"

    def lines(self, images: bool = True) -> list[str]:
        """The line that reports quote, then intervals and comparison; with ``images``, those that differ most."""
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
        parts = ["tokenizer {tokenizer}".format(**self.made_by)] if "tokenizer" in self.made_by else []
        if "clip_model" in self.made_by:
            maker = "{clip_model} on {device} in {precision} (fp16: other fourth digit), long captions: {clip_long}"
            parts.append(maker.format(**self.made_by))
        if "chair_words" in self.made_by:
            parts.append("objects: {chair_objects}; words of {chair_words}".format(**self.made_by))
        return self.marked(" | ".join(parts))

    def ranking(self, predictions: Mapping[str, str]) -> dict[str, dict[str, float | str | list[str]]]:
        """Return ``{stem: {metric: score, "caption": caption}}``, best CLIPScore (or else the first metric) first.

        With CHAIR, also the objects behind it.
        """
        leading = "CLIPScore" if "CLIPScore" in self.means else next(iter(self.means))
        best = 1 if leading in LOWER_IS_BETTER else -1
        order = sorted(predictions, key=lambda stem: (best * self.per_image[leading][stem], stem))
        return {
            stem: {
                **{metric: scores[stem] for metric, scores in self.per_image.items()},
                "caption": predictions[stem],
                **self.details.get(stem, {}),
            }
            for stem in order
        }

    def summary(self) -> dict[str, Any]:
        """Everything needed to quote the numbers: means, counts, model, device, precision, tokenizer, versions."""
        packages = ["torch", "torchvision", "open_clip_torch", "pillow"] if "clip_model" in self.made_by else ["torch"]
        packages += ["pycocoevalcap"] if importlib.util.find_spec("pycocoevalcap") else []
        return {
            **self.means,
            "images": self.images,
            **({} if self.annotated is None else {"partial": f"{self.images} of {self.annotated} images"}),
            "metrics": list(self.means),
            "errors": self.errors,
            "counts": self.counts,
            **self.made_by,
            **({"captions": self.statistics} if self.statistics else {}),
            **({"references": self.reference_statistics} if self.reference_statistics else {}),
            **({"intervals": self.intervals, "confidence": CONFIDENCE} if self.intervals else {}),
            **({"comparison": {k: v.summary() for k, v in self.comparison.items()}} if self.comparison else {}),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        }


# --- what goes in ---------------------------------------------------------------------------------------------------


@dataclass
class Evaluator:
    """Scores prediction files against the same images: references, pictures and model are read once, and when needed.

    ``make_scorer`` is called only for CLIP's metrics and only when all images are known to exist.
    """

    annotations: Annotations
    images_root: str | os.PathLike | None = None
    make_scorer: Callable[[], ClipScorer] = ClipScorer
    batch_size: int = 64
    tokenizer: str = "auto"
    clip_prompt: str = ""
    cache: Path | None = None  # folder of CLIP's image features, and of the references' side, from earlier runs
    chair: Chair | None = None  # words for objects, and boxes; only CHAIR needs them

    def __post_init__(self) -> None:
        self.tokenizer = pick_tokenizer(self.tokenizer)

    def evaluate(self, predictions: Mapping[str, str], metrics: Sequence[str] = DEFAULT_METRICS) -> Evaluation:
        """Score ``{stem: caption}``; a metric that cannot be computed is logged and does not stop the others.

        Raises:
            ValueError: predictions and annotations do not name the same images, or a metric is unknown.
        """
        wanted = parse_metrics(",".join(metrics), self.chair is not None)
        check_keys(self.annotations.references, predictions)
        predictions = {stem: predictions[stem] for stem in self.annotations.references}
        empty = [stem for stem, caption in predictions.items() if not caption.strip()]
        if empty:
            log.warning("%d of %d predicted captions are empty: %s", len(empty), len(predictions), some(empty))
        references = sum(map(len, self.annotations.references.values()))
        result = Evaluation(len(predictions), counts={"references": references, "empty": len(empty)})
        context = Context(self, predictions)
        with ThreadPoolExecutor(1) as on_words, ThreadPoolExecutor(1) as by_clip:  # one metric at a time in each
            pools = {name: by_clip if METRICS[name].by_clip else on_words for name in wanted}
            futures = {name: pool.submit(METRICS[name].compute, context) for name, pool in pools.items()}
        for name, future in futures.items():
            labels = METRICS[name].labels
            try:
                result.add(labels, future.result(), predictions)
            except (ValueError, OSError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not ran_out_of_memory(error):
                    raise
                result.errors.update(dict.fromkeys(labels, str(error)))
                log.error("%s not computed: %s", "/".join(labels), error)
        return result

    def tokenize(self, predictions: Mapping[str, str]) -> dict[str, str]:
        """Return the tokens of each predicted caption."""
        tokens = ptb_tokenize({stem: [caption] for stem, caption in predictions.items()}, self.tokenizer)
        return {stem: caption for stem, (caption,) in tokens.items()}

    def statistics(
        self, predictions: Mapping[str, str], training: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, Any]:
        """Return ``caption_statistics`` of predictions, with copies from ``training`` references if given."""
        known = None if training is None else chain(*ptb_tokenize(training, self.tokenizer).values())
        return caption_statistics([*self.tokenize(predictions).values()], known)

    @functools.cached_property
    def reference_side(self) -> ReferenceSide:
        """The tokens of each image's references, and in how many images their n-grams occur."""
        if self.cache is None:
            return make_reference_side(self.annotations.references, self.tokenizer)
        return cached_reference_side(self.annotations.references, self.tokenizer, self.cache / "references")

    @functools.cached_property
    def objects(self) -> dict[str, set[str]]:
        """The objects of each image, for CHAIR; ValueError where nothing says which words are objects."""
        if self.chair is None:
            raise ValueError(NO_BOXES)
        return self.chair.there(self.annotations.references)

    @functools.cached_property
    def paths(self) -> dict[str, Path]:
        """Each image's file."""
        return find_images(self.annotations, self.images_root)

    @functools.cached_property
    def scorer(self) -> ClipScorer:
        """The CLIP model, loaded when the images are known to exist."""
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


@dataclass
class Context:
    """What the metrics of one prediction file are computed from; each part is made when a metric first needs it.

    Metrics on words and metrics by CLIP run in two threads, and no part of this or of the evaluator serves both.
    """

    evaluator: Evaluator
    predictions: dict[str, str]  # {stem: caption}, in the order of the references

    @functools.cached_property
    def words(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """The tokens of the references and of the predictions."""
        return self.evaluator.reference_side.tokens, self.evaluator.tokenize(self.predictions)

    def on_words(self, *scores: Scores) -> Scored:
        """Return scores by label, of ``words``, with their origin."""
        tokenizer = self.evaluator.tokenizer
        return Scored(scores, {"tokenizer": f"{tokenizer}: {TOKENIZERS[tokenizer]}"})

    @functools.cached_property
    def texts(self) -> torch.Tensor:
        """Unit-length features of the predicted captions ``(n, dim)``."""
        evaluator, captions = self.evaluator, list(self.predictions.values())
        return text_features(evaluator.scorer, captions, evaluator.batch_size, evaluator.clip_prompt)

    @functools.cached_property
    def long(self) -> list[str]:
        """The images whose caption is longer than CLIP's context."""
        stems, prompt = list(self.predictions), self.evaluator.clip_prompt
        longer = self.evaluator.scorer.truncated([prompt + caption for caption in self.predictions.values()])
        found = [stems[index] for index in longer]
        if found:
            done = DONE_TO_LONG[self.evaluator.scorer.long]
            log.warning("%d captions are longer than CLIP's context and %s: %s", len(found), done, some(found))
        return found

    def by_clip(self, label: str, scores: torch.Tensor) -> Scored:
        """Return scores ``(n,)``, their mean and their origin; ValueError where one is not finite."""
        values = list(named_scores(label, self.predictions, scores).values())
        made_by = {**self.evaluator.scorer.description, "clip_prompt": self.evaluator.clip_prompt}
        count = {"truncate": "truncated", "mean": "averaged"}[self.evaluator.scorer.long]
        return Scored([(sum(values) / len(values), values)], made_by, {count: len(self.long)})


# --- the metrics ----------------------------------------------------------------------------------------------------


def _cider(context: Context) -> Scored:
    mean, scores = _cider_of_tokens(*context.words, context.evaluator.reference_side.frequencies)
    return context.on_words((mean, list(scores.values())))


def _clipscore(context: Context) -> Scored:
    return context.by_clip("CLIPScore", clip_scores(context.evaluator.images, context.texts))


def _ref_clipscore(context: Context) -> Scored:
    evaluator = context.evaluator
    counts = [len(group) for group in evaluator.annotations.references.values()]
    scores = clip_scores(evaluator.images, context.texts)
    scores = ref_clip_scores(scores, context.texts, evaluator.reference_features, counts)
    return context.by_clip("RefCLIPScore", scores)


def _chair(context: Context) -> Scored:
    there, chair = context.evaluator.objects, context.evaluator.chair
    assert chair is not None  # or there would be no objects
    scores, details = chair.score(context.predictions, there)
    return Scored(scores, {**chair.origin}, details=details)


class Metric(NamedTuple):
    """How a metric is named in the results and computed."""

    labels: tuple[str, ...]
    compute: Callable[[Context], Scored]
    by_clip: bool = False  # else on words; the two kinds are computed at the same time
    of_corpus: tuple[str, ...] = ()  # labels of scores that are no mean over the images


BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
METRICS = {  # by the name that --metrics takes, in the order of the results
    "cider": Metric(("CIDEr",), _cider),
    "clipscore": Metric(("CLIPScore",), _clipscore, by_clip=True),
    "refclipscore": Metric(("RefCLIPScore",), _ref_clipscore, by_clip=True),
    "bleu": Metric(BLEU, lambda c: c.on_words(*bleu(*c.words)), of_corpus=BLEU),
    "meteor": Metric(("METEOR",), lambda c: c.on_words(meteor(*c.words)), of_corpus=("METEOR",)),
    "rouge": Metric(("ROUGE-L",), lambda c: c.on_words(rouge_l(*c.words))),
    "spice": Metric(("SPICE",), lambda c: c.on_words(spice(*c.words))),
    "chair": Metric(CHAIR_LABELS, _chair, of_corpus=CHAIR_LABELS[1:]),
}
MEANS_OF_IMAGES = {label for metric in METRICS.values() for label in metric.labels if label not in metric.of_corpus}
LOWER_IS_BETTER = CHAIR_LABELS[:2]


def parse_metrics(text: str, boxes: bool = False) -> list[str]:
    """Return the metrics in ``"cider,clipscore"`` or ``"all"``, in the order of ``METRICS``.

    ``all`` has CHAIR only where there are boxes (or what stands for them).

    Raises:
        ValueError: one is unknown, or there is none, or CHAIR without boxes.
    """
    wanted = {name.strip().lower() for name in text.split(",")}
    if wanted == {"all"}:
        return [metric for metric in METRICS if boxes or metric != "chair"]
    if not wanted <= METRICS.keys():
        raise ValueError(f"--metrics {text}: unknown; choose from {', '.join(METRICS)}, with a comma between, or all")
    if "chair" in wanted and not boxes:
        raise ValueError(f"--metrics {text}: {NO_BOXES}")
    return [metric for metric in METRICS if metric in wanted]


# --- in one call ----------------------------------------------------------------------------------------------------


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


def cider(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, str], tokenizer: str = "auto"
) -> tuple[float, dict[str, float]]:
    """Return CIDEr-D, the mean over the images and ``{key: score}``: pycocoevalcap's ``Cider`` on PTB tokens.

    The document frequencies come from the references given, so scores of different image sets are not comparable, and
    a single image always scores 0. Values lie between 0 and 10 (Vedantam et al. 2015; n = 1..4, sigma = 6, clipped).

    Raises:
        FileNotFoundError, ChildProcessError: as ``tokenizers.ptb_java``.
        ValueError: the keys differ, or an image has no reference with a word in it.
    """
    check_keys(references, predictions)
    candidates = ptb_tokenize({key: [predictions[key]] for key in references}, tokenizer)
    return _cider_of_tokens(
        ptb_tokenize(references, tokenizer), {key: caption for key, (caption,) in candidates.items()}
    )


def _cider_of_tokens(
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
