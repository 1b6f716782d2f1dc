"""Caption every image of a folder with LLaVA, zero-shot: ``python p1_llava_caption.py IMG_DIR OUT.json``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

from captioning.cli import (
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
    load_annotations,
    match_captions,
    predicted_split,
    references_beside,
)
from captioning.device import pick_device
from captioning.distributed import Processes, join
from captioning.files import sha256_of, write_json
from captioning.inference.batches import Entry, Job
from captioning.inference.folder import PredictionLog, caption_images
from captioning.inference.jobs import Search, llava_job
from captioning.inference.options import (
    add_options,
    check_options,
    describe_options,
    ranked_count,
    text_files,
    wording_of,
)
from captioning.models.llava import (
    DTYPES,
    LAUNCHED_DTYPES,
    MAX_NEW_TOKENS,
    PROMPTS,
    Llava,
    check_prompt,
    load_llava,
)
from captioning.profiles import PROFILES
from captioning.scale.pipeline import (
    ShardRun,
    add_flags,
    add_images_and_results,
    caption_source,
    describe_images,
    is_plain_folder,
    source_of,
)
from captioning.scoring import evaluator
from captioning.scoring.clipscore import ClipScorer


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add_images_and_results(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--setting", type=int, choices=sorted(PROMPTS), default=1, help="prompt of the report")
    which.add_argument("--prompt", help="any other text, put into USER: <image>\\nTEXT ASSISTANT:")
    which.add_argument(
        "--compare",
        action="store_true",
        help="run both settings, score them and print a table",
    )
    add("--model", help="hub id or folder of a LLaVA 1.5 (default: the profile's)")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--num-beams", type=positive_int, default=1, help="live beams; 1 is greedy search")
    add("--max-new-tokens", type=positive_int, default=MAX_NEW_TOKENS, help="longest answer in tokens")
    add("--batch-size", type=positive_int, default=16, help="images at once; halved if memory runs out")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the weights; auto: float16, on a CPU float32",
    )
    add("--load-in-4bit", action="store_true", help="quantise the weights (needs bitsandbytes)")
    add_annotation_file(parser, "references, for --compare")
    add_common_flags(parser)
    add_options(parser)
    add_flags(parser)
    return parser


def prompts(args: argparse.Namespace) -> dict[str, tuple[str, Path]]:
    """Return ``{name: (prompt, file of its captions)}``: both settings for --compare, else one."""
    if args.compare:
        return {str(n): (text, args.out.with_name(f"{args.out.stem}_setting{n}.json")) for n, text in PROMPTS.items()}
    return {str(args.setting): (args.prompt or PROMPTS[args.setting], args.out)}


def describe_run(prompt: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return whatever decides the captions, so that no other run is resumed."""
    return {
        "script": "p1_llava_caption.py",
        **describe_images(args),
        "model": args.model or PROFILES[args.profile].llava,
        "prompt": prompt,
        **{name: getattr(args, name) for name in ("revision", "num_beams", "max_new_tokens", "dtype", "load_in_4bit")},
        **describe_options(args),
    }


def job_of(model: Llava, prompt: str, args: argparse.Namespace) -> Job:
    """Return what the model does to images with a prompt. Raises ValueError where an answer would not fit after it."""
    return llava_job(model, prompt, Search(args.num_beams, args.max_new_tokens, wording_of(args), ranked_count(args)))


def load_model(args: argparse.Namespace) -> Llava:
    """Load the model that the command line names."""
    device = pick_device(args.device)
    return load_llava(args.model or PROFILES[args.profile].llava, device, args.dtype, args.revision, args.load_in_4bit)


def load_job(args: argparse.Namespace) -> Job:
    """Load the model; return what it does to images. Called in other machines' processes too."""
    setup_logging(args.verbose)
    ((prompt, _),) = prompts(args).values()
    return job_of(load_model(args), prompt, args)


def weights_hash(model: str) -> str | None:
    """Return one SHA-256 of all weights in a model's folder; None for a hub id, whose revision says which they are."""
    files = sorted(path for path in Path(model).glob("*") if path.suffix in (".safetensors", ".bin"))
    sums = "".join(sha256_of(file) for file in files)
    return hashlib.sha256(sums.encode()).hexdigest() if files else None


def caption_many(args: argparse.Namespace, processes: Processes) -> int:
    """Caption lists, tars, or a folder into parts; return the exit code."""
    if args.compare:
        raise ValueError("--compare: scores one JSON of a folder's images; leave it out for lists, tars and parts")
    settings = describe_run(args.prompt or PROMPTS[args.setting], args)
    settings["weights_sha256"] = weights_hash(settings["model"])
    return caption_source(ShardRun.from_flags(args, settings), functools.partial(load_job, args), processes)


def caption_folder(images: list[Entry], args: argparse.Namespace, processes: Processes) -> dict[str, dict[str, str]]:
    """Caption a folder's images with each prompt; return the captions, ``{setting: {key: caption}}``."""
    texts = text_files(args)
    with contextlib.ExitStack() as stack:
        logs = {
            name: stack.enter_context(
                PredictionLog(out, describe_run(prompt, args), args.overwrite, processes, texts, args.keep)
            )
            for name, (prompt, out) in prompts(args).items()
        }
        for predictions in logs.values():
            predictions.check_texts(images)
        model = load_model(args)
        jobs = {name: job_of(model, prompt, args) for name, (prompt, _) in prompts(args).items()}
        for name, job in jobs.items():
            caption_images(logs[name], images, job, args.batch_size)
        return {name: predictions.finish(images) for name, predictions in logs.items()}


def compare(
    captions: dict[str, dict[str, str]], annotations: Annotations, args: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """Score the captions of every setting; return the scores and the report's table as text."""
    profile = PROFILES[args.profile]
    scorer = ClipScorer(profile.clip_model, profile.clip_weights, pick_device(args.device))
    scores: dict[str, Any] = {}
    lines = [f"{'setting':<9}{'images':>7}{'CIDEr':>9}{'CLIPScore':>11}{'words':>8}"]
    captions = {setting: match_captions(args.img_dir[0], texts, annotations) for setting, texts in captions.items()}
    annotations = predicted_split(args.annotation_file, annotations, captions.values())
    for setting, predictions in captions.items():
        result = evaluator.evaluate_predictions(
            predictions, annotations, ("cider", "clipscore"), args.img_dir[0], lambda: scorer
        )
        if result.errors:
            raise ValueError(f"setting {setting}: " + "; ".join(result.errors.values()))
        words = sum(len(caption.split()) for caption in predictions.values()) / len(predictions)
        scores[setting] = {
            **result.means,
            "words": words,
            "images": len(predictions),
            "profile": args.profile,
            "device": str(scorer.device),
        }
        lines.append(
            f"{setting:<9}{len(predictions):>7}{result.means['CIDEr']:>9.3f}"
            f"{result.means['CLIPScore']:>11.3f}{words:>8.1f}"
        )
    return scores, "\n".join(lines)


def check_args(args: argparse.Namespace) -> None:
    """Refuse flags that make no sense before anything is loaded."""
    if args.prompt is not None:
        check_prompt(args.prompt)
    if args.annotation_file and not args.compare:
        raise ValueError("--annotation-file: only --compare scores captions; leave it out, or add --compare")
    if args.compare and args.keep and args.out.exists():
        raise ValueError(f"{args.out}: exists already; leave out --keep to replace it, or name another")
    if args.compare and (args.recursive or source_of(args).kind != "folder"):
        raise ValueError("--compare: scores the images directly in one folder; give that, without --recursive")
    if args.compare and args.txt is not None:
        raise ValueError("--compare and --txt: a picture has two captions then; leave one flag out")
    if args.compare:
        args.annotation_file = args.annotation_file or references_beside(args.img_dir[0])
    check_options(args, "--num-beams", args.num_beams, is_plain_folder(args))


@command
def main(argv: list[str] | None = None) -> int:
    """Caption images; return 0, or 3 (``PARTIAL``) where an image could not be read."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    check_args(args)
    annotations = load_annotations(args.annotation_file) if args.compare else None
    with join(pick_device(args.device), tuple(LAUNCHED_DTYPES)) as processes:
        if not is_plain_folder(args):
            return caption_many(args, processes)
        images = processes.from_first(source_of(args).images)
        captions = caption_folder(images, args, processes)
        if annotations is not None and processes.first:
            scores, table = compare(captions, annotations, args)
            write_json(args.out, scores)
            print(table)
    return PARTIAL if any(len(c) < len(images) for c in captions.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
