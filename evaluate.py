"""Score captions: CIDEr-D, CLIPScore, RefCLIPScore, BLEU, METEOR, ROUGE-L, SPICE, CHAIR. A library and commands.

CIDEr asks how far a caption says what people said of the image, each n-gram weighted by how rare it is among all the
references; CLIPScore asks CLIP how well the caption fits the picture and needs no reference. Both give one number per
image, and their means are reported:

    python evaluate.py --pred_file pred.json --images_root images/val --annotation_file val.json
    CIDEr: 0.8844035428513431 | CLIPScore: 0.6921499633789062

Standard output is that line and what --bootstrap and --compare add below it. Which tokenizer, model and precision made
the numbers goes to standard error and to the --json file. The scores themselves are in captioning/scoring.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from captioning.cli import (
    BAD_INPUT,
    PARTIAL,
    FlagParser,
    add_annotation_file,
    add_common_flags,
    command,
    positive_int,
    setup_logging,
)
from captioning.data.annotations import (
    Annotations,
    check_keys,
    load_annotations,
    load_predictions,
    load_references,
    predicted_split,
    references_beside,
    shared_images,
)
from captioning.data.names import NAMES_ARE
from captioning.device import pick_device
from captioning.files import check_writable, write_csv, write_json, write_text
from captioning.messages import listed
from captioning.profiles import PROFILES
from captioning.scoring.caption_stats import caption_statistics
from captioning.scoring.chair import Chair
from captioning.scoring.clipscore import LONG, PRECISIONS, ClipScorer, clipscore
from captioning.scoring.evaluator import (
    DEFAULT_METRICS,
    LOWER_IS_BETTER,
    MEANS_OF_IMAGES,
    METRICS,
    Evaluation,
    Evaluator,
    cider,
    evaluate_predictions,
    parse_metrics,
)
from captioning.scoring.significance import bootstrap_interval, compare
from captioning.scoring.tokenizers import ptb_tokenize

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

log = logging.getLogger("captioning")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = FlagParser(
        description="Score captions: CIDEr, CLIPScore, RefCLIPScore, BLEU, METEOR, ROUGE-L, SPICE, CHAIR."
    )
    parser.add_argument("--pred-file", required=True, help="predictions: any layout of docs/scoring.md, or p2_infer's")
    parser.add_argument("--images-root", help="folder of the images; only CLIPScore and RefCLIPScore need it")
    add_annotation_file(parser, "references of exactly those images")
    parser.add_argument("--split", metavar="NAME", help="of a file with splits, as Karpathy's (the one predicted)")
    parser.add_argument(
        "--pred-keys", choices=NAMES_ARE, default="auto", help="what predictions call images by, where it could be both"
    )
    parser.add_argument("--metrics", default=",".join(DEFAULT_METRICS), help=f"{','.join(METRICS)}, or all")
    parser.add_argument("--boxes", metavar="FILE", help="chair: COCO instances; or `references`, for these alone")
    parser.add_argument("--chair-words", metavar="FILE", help="chair: words for objects (the profile's list)")
    parser.add_argument("--tokenizer", default="auto", help="ptb-java, ptb (pure Python), or auto: Java's if installed")
    parser.add_argument("--allow-partial", action="store_true", help="score only the images that all files name")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="add intervals from N resamples of the images")
    parser.add_argument("--compare", metavar="OTHER", help="other predictions: paired test, --pred-file minus OTHER")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--train-annotations", metavar="FILE", help="count captions copied from these references")
    parser.add_argument("--json", metavar="OUT", help="write the scores and what made them here")
    parser.add_argument("--per-image", metavar="OUT", help="write every image's scores here, best first: .json or .csv")
    parser.add_argument(
        "--save",
        action="store_true",
        help="write both beside the predictions: NAME_scores.json and NAME_per_image.json, where report.py looks",
    )
    parser.add_argument("--html", metavar="OUT", help="write a page of best, worst and random images here")
    parser.add_argument("--clip-model", help="open_clip name, or folder with open_clip_config.json (the profile's)")
    parser.add_argument("--clip-weights", help="open_clip tag or file (the profile's; a folder has its own)")
    parser.add_argument("--clip-prompt", default="", help='put before each caption; the paper has "A photo depicts "')
    parser.add_argument(
        "--clip-long", choices=LONG, default=LONG[0], help="captions beyond CLIP's context: cut, or the mean of windows"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per CLIP forward pass")
    parser.add_argument(
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep CLIP's features of the images, and the references' tokens and document frequencies, in the "
        "profile's cache folder",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="CLIP's; auto: fp16 on CUDA, else fp32")
    add_common_flags(parser)
    return parser


def _metrics(args: argparse.Namespace) -> list[str]:
    return parse_metrics(args.metrics, bool(args.boxes))


def _check(args: argparse.Namespace) -> None:
    """Settle where --save writes, and refuse wrong flags before anything slow starts."""
    args.annotation_file = args.annotation_file or references_beside(args.images_root)
    if args.save:
        predictions = Path(args.pred_file)
        args.json = args.json or str(predictions.with_name(f"{predictions.stem}_scores.json"))
        args.per_image = args.per_image or str(predictions.with_name(f"{predictions.stem}_per_image.json"))
    metrics = _metrics(args)
    if args.boxes and "chair" not in metrics:
        raise ValueError(f"--boxes {args.boxes}: is for --metrics chair, which {args.metrics} lacks")
    if args.bootstrap is not None and args.bootstrap < 2:
        raise ValueError(f"--bootstrap {args.bootstrap}: must be at least 2; 1000 is usual")
    if args.per_image and Path(args.per_image).suffix not in (".json", ".csv"):
        raise ValueError(f"--per-image {args.per_image}: must end in .json or .csv")
    if args.html and not args.images_root:
        raise ValueError(f"--html {args.html}: needs --images-root, whose pictures it shows")
    for flag in ("--json", "--per-image", "--html"):
        out = getattr(args, flag[2:].replace("-", "_"))
        if out:
            check_writable(Path(out).parent, flag)


def _read(args: argparse.Namespace) -> tuple[Annotations, dict[str, dict[str, str]], int]:
    """Return annotations, and predictions by file, of the images to score; and how many images are annotated.

    Those to score are all of them; under --allow-partial they are the images that all files name.
    """
    annotations = load_annotations(args.annotation_file, args.split)
    if args.split and not annotations.splits:
        raise ValueError(f"--split {args.split}: {args.annotation_file} has no splits; leave the flag out")
    files = [name for name in (args.pred_file, args.compare) if name]
    predictions = {name: load_predictions(name, annotations, args.pred_keys) for name in files}
    if not args.split:
        annotations = predicted_split(args.annotation_file, annotations, predictions.values())
    annotated = len(annotations.references)
    if args.allow_partial:
        for captions in predictions.values():
            annotations, _ = shared_images(annotations, captions)
        shared = annotations.references
        predictions = {name: {stem: captions[stem] for stem in shared} for name, captions in predictions.items()}
    for captions in predictions.values():
        check_keys(annotations.references, captions)  # of both files, before one of them is scored
    return annotations, predictions, annotated


def _make_evaluator(args: argparse.Namespace, annotations: Annotations) -> Evaluator:
    profile, device = PROFILES[args.profile], None
    if args.device or any(METRICS[metric].by_clip for metric in _metrics(args)):
        device = pick_device(args.device, announce=False)  # the line on what made the numbers says it
    model = args.clip_model or profile.clip_model
    weights = args.clip_weights or (None if Path(model).is_dir() else profile.clip_weights)
    return Evaluator(
        annotations,
        args.images_root,
        lambda: ClipScorer(model, weights, device, args.precision, args.clip_long),
        args.batch_size,
        args.tokenizer,
        args.clip_prompt,
        Path(profile.cache) if args.cache else None,
        _make_chair(args, annotations),
    )


def _make_chair(args: argparse.Namespace, annotations: Annotations) -> Chair | None:
    if not args.boxes:
        return None
    words = args.chair_words or PROFILES[args.profile].chair_words
    return Chair.of_files(words, args.boxes, annotations.file_names, annotations.ids)


def _add_uncertainty(args: argparse.Namespace, result: Evaluation, other: Evaluation | None) -> None:
    """Fill in intervals and comparison, for the metrics that are means over images."""
    for metric in (metric for metric in result.means if metric in MEANS_OF_IMAGES):
        scores = result.per_image[metric]
        if args.bootstrap is not None:
            result.intervals[metric] = bootstrap_interval([*scores.values()], args.bootstrap, args.seed)
        if other is not None and metric in other.means:
            comparison = compare(scores, other.per_image[metric], seed=args.seed)
            result.comparison[metric] = comparison.turned() if metric in LOWER_IS_BETTER else comparison


def _add_statistics(
    evaluator: Evaluator,
    result: Evaluation,
    predictions: Mapping[str, str],
    training: Mapping[str, Sequence[str]] | None,
) -> None:
    """Fill in what the captions are like; where they cannot be tokenized, the scores are still reported."""
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
        rows = [
            [stem, *(", ".join(v) if isinstance(v, list) else v for v in row.values())] for stem, row in ranking.items()
        ]
        write_csv(args.per_image, ["image", *next(iter(ranking.values()))], rows)
    elif args.per_image:
        write_json(args.per_image, ranking)
    if args.html:
        from captioning.scoring import gallery

        references, lines = evaluator.annotations.references, result.lines(images=False)
        page, unreadable = gallery.page(ranking, references, evaluator.paths, lines, result.origin(), args.seed)
        write_text(args.html, page)
        if unreadable:
            result.errors["gallery"] = f"{len(unreadable)} pictures cannot be read{listed(unreadable)}"


@command
def main(argv: list[str] | None = None) -> int:
    """Score a prediction file; return 0, 3 (``PARTIAL``) where one metric failed, 2 where none could be computed."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    _check(args)
    annotations, files, annotated = _read(args)
    training = load_references(args.train_annotations, "train") if args.train_annotations else None
    evaluator = _make_evaluator(args, annotations)
    metrics, predictions = _metrics(args), files[args.pred_file]
    result = evaluator.evaluate(predictions, metrics)
    if not result.means:
        return BAD_INPUT
    result.annotated = annotated if len(predictions) < annotated else None
    other = evaluator.evaluate(files[args.compare], metrics) if args.compare else None
    _add_uncertainty(args, result, other)
    if args.json or training:
        _add_statistics(evaluator, result, predictions, training)
    log.info("%s", result.origin())
    print("\n".join(result.lines()))
    _write(args, evaluator, result, predictions)
    return PARTIAL if result.errors or (other and other.errors) else 0


if __name__ == "__main__":
    sys.exit(main())
