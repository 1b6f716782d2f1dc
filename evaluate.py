"""Score captions: CIDEr-D, CLIPScore, RefCLIPScore, BLEU, METEOR, ROUGE-L, SPICE. A library and a command line.

CIDEr asks how far a caption says what people said of the image, each n-gram weighed by how rare it is among all the
references; CLIPScore asks CLIP how well the caption fits the picture and needs no reference. Both give one number an
image, and their means are what is reported:

    python evaluate.py --pred_file pred.json --images_root images/val --annotation_file val.json
    CIDEr: 0.8844035428513431 | CLIPScore: 0.6921499633789062

Standard output holds that line and what --bootstrap and --compare add below it; which tokenizer, model and precision
made the numbers stands on standard error and in the --json file.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import io
import logging
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioning.cli import BAD_INPUT, PARTIAL, FlagParser, command, pick_device, setup_logging, write_json, write_text
from captioning.data.annotations import (
    Annotations,
    check_keys,
    find_images,
    load_annotations,
    load_predictions,
    load_references,
    shared_images,
    some,
)
from captioning.profiles import PROFILES
from captioning.scoring import coco_metrics as cocometrics
from captioning.scoring import ptb
from captioning.scoring.cache import ReferenceSide, cached_reference_side, make_reference_side
from captioning.scoring.caption_stats import caption_statistics
from captioning.scoring.cider import DocumentFrequencies, cider_d
from captioning.scoring.clip_cache import cached_image_features
from captioning.scoring.clipscore import (
    PRECISIONS,
    ClipScorer,
    clip_scores,
    clipscore,
    image_features,
    named_scores,
    ref_clip_scores,
    text_features,
)
from captioning.scoring.significance import CONFIDENCE, Comparison, bootstrap_interval, compare

__all__ = [
    "Annotations",
    "ClipScorer",
    "Evaluation",
    "Evaluator",
    "check_keys",
    "cider",
    "clipscore",
    "evaluate_predictions",
    "load_annotations",
    "load_predictions",
    "load_references",
    "main",
    "parse_metrics",
    "ptb_tokenize",
]

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
TOKENIZERS = {
    "ptb-java": "Stanford CoreNLP 3.4.1 PTBTokenizer (Java), lower-cased, punctuation dropped",
    "ptb": "pure Python port of the PTB rules, lower-cased, punctuation dropped",
}


# ---------------------------------------------------------------------------------------------------------- the words


def pick_tokenizer(name: str = "auto") -> str:
    """Return ``ptb-java`` or ``ptb``; ``auto`` takes Java's where Java and pycocoevalcap (it has the jar) are there.

    Raises:
        ValueError: ``name`` is none of the three.
    """
    if name == "auto":
        java = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None
        return "ptb-java" if java else "ptb"
    if name not in TOKENIZERS:
        raise ValueError(f"--tokenizer {name}: use auto, {' or '.join(TOKENIZERS)}")
    return name


def ptb_tokenize(captions: Mapping[str, Sequence[str]], tokenizer: str = "auto") -> dict[str, list[str]]:
    """Tokenize ``{key: captions}`` as COCO's evaluation does: Penn Treebank tokens, lower case, no punctuation.

    Returns each caption's tokens joined by single spaces. Errors are those of ``cocometrics.ptb_java``.
    """
    tokenize = {"ptb-java": cocometrics.ptb_java, "ptb": ptb.tokenize}[pick_tokenizer(tokenizer)]
    tokenized = iter(tokenize([caption for group in captions.values() for caption in group]))
    return {key: [next(tokenized) for _ in group] for key, group in captions.items()}


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


# --------------------------------------------------------------------------------------------------------- evaluation


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
        return [(label, *scored) for label, scored in zip(METRICS["bleu"], cocometrics.bleu(*self.words), strict=True)]

    def meteor(self) -> Scored:
        return [("METEOR", *cocometrics.meteor(*self.words))]

    def rouge(self) -> Scored:
        return [("ROUGE-L", *cocometrics.rouge_l(*self.words))]

    def spice(self) -> Scored:
        return [("SPICE", *cocometrics.spice(*self.words))]

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


# ------------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = FlagParser(description="Score captions: CIDEr, CLIPScore, RefCLIPScore, BLEU, METEOR, ROUGE-L, SPICE.")
    parser.add_argument("--pred-file", required=True, help="predictions: {file name without extension: caption}")
    parser.add_argument("--images-root", help="folder of the images; only CLIPScore and RefCLIPScore need it")
    parser.add_argument("--annotation-file", required=True, help="COCO-style references of exactly those images")
    parser.add_argument("--metrics", default=",".join(DEFAULT_METRICS), help=f"{','.join(METRICS)}, or all")
    parser.add_argument("--tokenizer", default="auto", help="ptb-java, ptb (pure Python), or auto: Java's if there")
    parser.add_argument("--allow-partial", action="store_true", help="score the images that both files name; says so")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="add intervals from N resamples of the images")
    parser.add_argument("--compare", metavar="OTHER", help="other predictions: paired test, --pred-file minus OTHER")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--train-annotations", metavar="FILE", help="count captions copied from these references")
    parser.add_argument("--json", metavar="OUT", help="write the scores and what made them here")
    parser.add_argument("--per-image", metavar="OUT", help="write every image's scores here, best first: .json or .csv")
    parser.add_argument("--html", metavar="OUT", help="write a page of best, worst and random images here")
    parser.add_argument("--clip-model", help="open_clip name, or folder with open_clip_config.json (the profile's)")
    parser.add_argument("--clip-weights", help="open_clip tag or file (the profile's; a folder has its own)")
    parser.add_argument("--clip-prompt", default="", help='put before each caption; the paper has "A photo depicts "')
    parser.add_argument("--batch-size", type=int, default=64, help="images per CLIP forward pass")
    parser.add_argument(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep CLIP's features of the images, and the references' tokens and document "
        "frequencies, in the profile's cache folder",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="CLIP's; auto: fp16 on CUDA, else fp32")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="full", help="sets names and paths only")
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuse wrong flags before anything slow starts."""
    parse_metrics(args.metrics)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.bootstrap is not None and args.bootstrap < 2:
        raise ValueError(f"--bootstrap {args.bootstrap}: must be at least 2; 1000 is usual")
    if args.per_image and Path(args.per_image).suffix not in (".json", ".csv"):
        raise ValueError(f"--per-image {args.per_image}: must end in .json or .csv")
    if args.html and not args.images_root:
        raise ValueError(f"--html {args.html}: needs --images-root, whose pictures it shows")


def _read(args: argparse.Namespace) -> tuple[Annotations, dict[str, dict[str, str]]]:
    """Return the annotations and the predictions by file, cut down to shared images under --allow-partial."""
    annotations = load_annotations(args.annotation_file)
    files = [args.pred_file, *([args.compare] if args.compare else [])]
    predictions = {name: load_predictions(name) for name in files}
    if args.allow_partial:
        for name in files:
            annotations, predictions[name] = shared_images(annotations, predictions[name])
        for name in files:
            annotations, predictions[name] = shared_images(annotations, predictions[name])
    return annotations, predictions


def _make_evaluator(args: argparse.Namespace, annotations: Annotations) -> Evaluator:
    device, profile = pick_device(args.device), PROFILES[args.profile]
    model = args.clip_model or profile.clip_model
    weights = args.clip_weights or (None if Path(model).is_dir() else profile.clip_weights)
    return Evaluator(
        annotations,
        args.images_root,
        lambda: ClipScorer(model, weights, device, args.precision),
        args.batch_size,
        args.tokenizer,
        args.clip_prompt,
        Path(profile.cache) if args.cache else None,
    )


def _add_uncertainty(args: argparse.Namespace, result: Evaluation, other: Evaluation | None) -> None:
    """Fill in intervals and comparison, for the metrics that are means over images."""
    for metric in (metric for metric in result.means if metric not in NO_MEANS):
        scores = result.per_image[metric]
        if args.bootstrap is not None:
            result.intervals[metric] = bootstrap_interval(np.array([*scores.values()]), args.bootstrap, args.seed)
        if other is not None and metric in other.means:
            result.comparison[metric] = compare(scores, other.per_image[metric], seed=args.seed)


def _add_statistics(
    evaluator: Evaluator,
    result: Evaluation,
    predictions: Mapping[str, str],
    training: Mapping[str, Sequence[str]] | None,
) -> None:
    """Fill in what the captions are like; without their words the scores still stand."""
    try:
        result.statistics = evaluator.statistics(predictions, training)
        known = evaluator.reference_side.tokens.values()
        result.reference_statistics = caption_statistics([caption for group in known for caption in group])
    except (ValueError, OSError) as error:
        result.errors["captions"] = str(error)
        log.error("caption statistics not computed: %s", error)
    else:
        copied = result.statistics.get("copied")
        if copied is not None:
            log.info("%s", result.marked(f"{copied:.2%} of the captions equal a training caption"))


def _write(args: argparse.Namespace, evaluator: Evaluator, result: Evaluation, predictions: dict[str, str]) -> None:
    if args.json:
        write_json(args.json, result.summary())
    ranking = result.ranking(predictions)
    if args.per_image and args.per_image.endswith(".csv"):
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(["image", *result.means, "caption"])
        rows.writerows([stem, *row.values()] for stem, row in ranking.items())
        write_text(args.per_image, table.getvalue())
    elif args.per_image:
        write_json(args.per_image, ranking)
    if args.html:
        from captioning.scoring import gallery

        references, lines = evaluator.annotations.references, result.lines(images=False)
        write_text(args.html, gallery.page(ranking, references, evaluator.paths, lines, result.origin(), args.seed))


@command
def main(argv: list[str] | None = None) -> int:
    """Score a prediction file; return 0, 3 (``PARTIAL``) where one metric failed, 2 where none could be computed."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    _check(args)
    annotated = len(load_annotations(args.annotation_file).references)
    annotations, files = _read(args)
    training = load_references(args.train_annotations) if args.train_annotations else None
    evaluator = _make_evaluator(args, annotations)
    predictions = files[args.pred_file]
    result = evaluator.evaluate(predictions, parse_metrics(args.metrics))
    if not result.means:
        return BAD_INPUT
    if len(annotations.references) < annotated:
        result.annotated = annotated
    other = evaluator.evaluate(files[args.compare], parse_metrics(args.metrics)) if args.compare else None
    _add_uncertainty(args, result, other)
    if args.json or training:
        _add_statistics(evaluator, result, predictions, training)
    log.info("%s", result.origin())
    print("\n".join(result.lines()))
    _write(args, evaluator, result, predictions)
    return PARTIAL if result.errors or (other and other.errors) else 0


if __name__ == "__main__":
    sys.exit(main())
