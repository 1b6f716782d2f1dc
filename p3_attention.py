"""Show which pixels each word looked at: captions with one heat map a word, for LLaVA (p1) and the tuned model (p2).

python p3_attention.py --model p2 --images DIR_OR_FILES --out DIR [--html]       maps, a PNG and an npz an image
python p3_attention.py --model p2 --best-worst PER_IMAGE.json --images DIR --annotation-file val.json --out DIR
python p3_attention.py --model p2 --grounding val.json --images DIR --out DIR     do the maps point at the things?
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captioning.cli import PARTIAL, FlagParser, command, setup_logging
from captioning.data.annotations import load_samples
from captioning.data.images import list_images, load_image
from captioning.data.tokenizer import Tokenizer
from captioning.device import pick_device
from captioning.files import atomic_path, read_json, write_csv
from captioning.maps import figures, grounding, viewer
from captioning.maps.attention import METHODS, ROWS, Explained, Heads, Look, parse_layers
from captioning.maps.explainers import (
    DEFAULTS,
    REPORT,
    Explainer,
    P1Explainer,
    P2Explainer,
    Reading,
    explain,
    many_looks,
    read,
    shown_looks,
)
from captioning.models.adapter import load_captioner
from captioning.models.llava import DTYPES, PROMPTS, check_prompt, load_llava, pick_dtype
from captioning.profiles import PROFILES
from captioning.timing import Timer

log = logging.getLogger("captioning")


def _defaults(name: str) -> str:
    values = {model: getattr(look, name) for model, look in DEFAULTS.items()}
    same = len(set(values.values())) == 1
    return f"(default: {values['p1']})" if same else f"(default: p1 {values['p1']}, p2 {values['p2']})"


def chosen_look(args: argparse.Namespace) -> Look:
    """Return the model's default look with what the flags change."""
    flags = {name: getattr(args, name) for name in ("method", "layers", "heads", "row")}
    return replace(DEFAULTS[args.model], **{name: value for name, value in flags.items() if value is not None})


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", choices=("p1", "p2"), required=True, help="p1: LLaVA; p2: the tuned captioner")
    add("--images", type=Path, nargs="+", required=True, metavar="DIR_OR_FILE", help="images to explain")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    add("--method", choices=METHODS, help=f"from weights to maps {_defaults('method')}")
    add("--layers", help=f"all, last, a number, or a range such as 2-5 {_defaults('layers')}")
    add("--heads", help=f"max, mean, a head's number, or topK {_defaults('heads')}")
    add("--row", choices=ROWS, help=f"position that predicts a token (as grad always), or its own {_defaults('row')}")
    add(
        "--relative-to",
        choices=("words", "generic"),
        default="words",
        help="what the method relative divides by: the mean over words, or a generic caption",
    )
    add("--caption", help="explain this caption of one image instead of the model's own")
    add("--html", action="store_true", help="write viewer.html too, with every method and many layers and heads")
    add("--best-worst", type=Path, metavar="PER_IMAGE.json", help="evaluate.py's --per-image: explain top-1 and last-1")
    add("--annotation-file", type=Path, help="COCO-style references, shown with --best-worst")
    add("--grounding", type=Path, metavar="CAPTIONS.json", help="measure all methods against boxes")
    add("--boxes", type=Path, metavar="INSTANCES.json", help="COCO instances, for captions without mentions")
    add("--count", type=int, default=500, help="images for --grounding")
    add("--adapter", type=Path, default=Path("runs/best/best.safetensors"), help="p2: what p2_train.py wrote")
    add("--decoder", type=Path, help="p2: GPT-2 state dict (default: the profile's)")
    add("--encoder-weights", help="p2: local file of the encoder's weights (default: the one trained with)")
    add("--tokenizer", help="p2: folder of encoder.json and vocab.bpe (default: the profile's)")
    add("--llava", help="p1: hub id or folder of a LLaVA 1.5 (default: the profile's)")
    add("--setting", type=int, choices=sorted(PROMPTS), default=1, help="p1: prompt of the report")
    add("--prompt", help="p1: any other prompt")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="p1: of the weights")
    add("--beam-size", type=int, help="live beams (default: 5 for p2, 1 for p1)")
    add("--max-new-tokens", type=int, help="longest caption in tokens (default: 30 for p2, 64 for p1)")
    add("--profile", choices=sorted(PROFILES), default="full", help="sets names and paths only")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--verbose", action="store_true", help="more log lines")
    return parser


# --- what to look at ------------------------------------------------------------------------------------------------


def list_files(places: Sequence[Path]) -> list[Path]:
    """Return the images that ``places`` (files and folders) name.

    Raises:
        FileNotFoundError, ValueError: a place does not exist, or two images share a stem.
    """
    paths: list[Path] = []
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"--images {place}: no such file or folder")
        paths += list_images(place) if place.is_dir() else [place]
    stems = [path.stem for path in paths]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice:
        raise ValueError(f"--images: two files have the stem {twice!r}, which names the results; explain them apart")
    return paths


def load_explainer(args: argparse.Namespace, device: torch.device) -> Explainer:
    """Build the model that ``--model`` names."""
    profile = PROFILES[args.profile]
    if args.model == "p1":
        prompt = check_prompt(args.prompt) if args.prompt is not None else PROMPTS[args.setting]
        llava = load_llava(args.llava or profile.llava, device, pick_dtype(args.dtype, device))
        return P1Explainer(llava, prompt, args.beam_size or 1, args.max_new_tokens or 64)
    captioner = load_captioner(
        args.adapter, args.decoder or Path(profile.decoder), args.encoder_weights, device, profile.encoder_weights
    )
    tokenizer = Tokenizer(args.tokenizer or profile.tokenizer)
    return P2Explainer(captioner, tokenizer, args.beam_size or 5, args.max_new_tokens or 30)


# --- explaining -----------------------------------------------------------------------------------------------------


def explain_images(
    explainer: Explainer, paths: Sequence[Path], args: argparse.Namespace
) -> Iterator[tuple[Explained, Reading]]:
    """Caption and explain image after image; one without a picture or without a caption is named and left out."""
    look = chosen_look(args)
    for path in tqdm(paths, "explain", disable=None):
        try:
            image = load_image(path)
        except (ValueError, OSError) as error:
            log.error("not explained: %s", error)
            continue
        inputs = explainer.prepare(image)
        tokens = explainer.caption([inputs])[0] if args.caption is None else explainer.tokens(args.caption)
        if not explainer.text(tokens).strip():
            log.error("not explained: %s: the model's caption is empty", path)
            continue
        looks = shown_looks(look, explainer.n_layer) if args.html else [look]
        reading = read(explainer, inputs, tokens, looks, args.relative_to)
        yield explain(explainer, path, image, reading, looks), reading


def save_maps(out: Path, explained: Explained, reading: Reading, look: Look) -> None:
    """Write the raw maps and what was made of them as a compressed npz.

    ``attention`` (L, nh, T, gh, gw) float16 is the attention of every layer, head and token on the patches, ``maps``
    (W, gh, gw) float32 what the look makes of it; the rest says which is which.
    """
    capture = reading.capture
    part = capture.image_part(look.row).cpu().numpy().astype(np.float16)
    word_of_token = np.full(len(capture.tokens), -1)
    for number, (_, indices) in enumerate(reading.words):
        word_of_token[indices] = number
    content = io.BytesIO()
    np.savez_compressed(
        content,
        attention=part.reshape(*part.shape[:3], *capture.grid),
        maps=explained.views[0].maps,
        tokens=np.array(capture.tokens),
        words=np.array(explained.words),
        word_of_token=word_of_token,
        layers=np.array(parse_layers(look.layers, capture.n_layer)),
        heads=str(Heads.parse(look.heads, capture.n_head)),
        method=look.method,
        row=look.row,
        grid=np.array(capture.grid),
        window=np.array(explained.window),
        caption=explained.caption,
        image=str(explained.path.name),
        model=explained.model,
        image_mass=explained.image_mass,
    )
    with atomic_path(out) as temporary:
        temporary.write_bytes(content.getvalue())


def run_images(explainer: Explainer, paths: list[Path], args: argparse.Namespace) -> int:
    """Write a PNG and an npz an image, and the viewer; return the exit code."""
    look = chosen_look(args)
    items, timer = [], Timer("explain")
    for explained, reading in explain_images(explainer, paths, args):
        figures.word_grid(explained, explained.views[0], args.out / f"{explained.path.stem}.png")
        save_maps(args.out / f"{explained.path.stem}.npz", explained, reading, look)
        print(f"{explained.path.name}  {figures.line(explained.caption)}")
        items.append(explained)
    if not items:
        raise ValueError(f"none of the {len(paths)} images could be explained")
    if args.html:
        viewer.write(items, args.out / "viewer.html", f"Which pixels each word looked at ({explainer.name.upper()})")
    timer.report(log, len(items), "%s: %d images explained", args.out)
    return PARTIAL if len(items) < len(paths) else 0


def run_best_worst(explainer: Explainer, paths: list[Path], args: argparse.Namespace) -> int:
    """Draw the best and the worst pair by CLIPScore, and their maps."""
    scores = read_per_image(args.best_worst)
    by_stem = {path.stem: path for path in paths}
    absent = [stem for stem in scores if stem not in by_stem]
    if absent:
        raise ValueError(f"--images: {len(absent)} images of {args.best_worst} are not there, first {absent[0]}")
    references = {s.path.stem: s.captions for s in load_samples(args.annotation_file, args.images[0])}
    ranked = sorted(scores, key=lambda stem: scores[stem]["CLIPScore"])
    pairs = []
    for title, stem in (("Top-1", ranked[-1]), ("Last-1", ranked[0])):
        row = scores[stem]
        pairs.append((title, by_stem[stem], row["caption"], references.get(stem, []), row["CLIPScore"]))
        print(f"{title}: {by_stem[stem].name}  CLIPScore {row['CLIPScore']}  {row['caption']}")
        if not row["caption"].strip():
            continue  # nothing to explain; the pair is drawn all the same
        image = load_image(by_stem[stem])
        look = chosen_look(args)
        inputs = explainer.prepare(image)
        reading = read(explainer, inputs, explainer.tokens(row["caption"]), [look], args.relative_to)
        notes = {"CLIPScore": f"{row['CLIPScore']:.4f}"}
        explained = explain(explainer, by_stem[stem], image, reading, [look], notes)
        figures.word_grid(explained, explained.views[0], args.out / f"{title.lower()}.png")
    figures.best_worst(pairs, args.out / "best_worst.png")
    return 0


def read_per_image(path: Path) -> dict[str, dict[str, Any]]:
    """Read evaluate.py's per-image scores; ValueError when they hold no CLIPScore."""
    if not path.is_file():
        raise FileNotFoundError(f"--best-worst {path}: no such file; write it with evaluate.py --per-image")
    try:
        scores = read_json(path)
    except ValueError as error:
        raise ValueError(f"--best-worst {path}: {error}") from error
    rows = scores.values() if isinstance(scores, dict) else []
    if not rows or not all(map(_is_scored, rows)):
        raise ValueError(
            f"--best-worst {path}: needs CLIPScore and caption of every image, as evaluate.py --per-image "
            "OUT.json writes them"
        )
    return scores


def _is_scored(row: Any) -> bool:
    """Whether a row has what is drawn; an empty caption is a caption."""
    return (
        isinstance(row, dict) and isinstance(row.get("caption"), str) and isinstance(row.get("CLIPScore"), int | float)
    )


# --- grounding ------------------------------------------------------------------------------------------------------


def run_grounding(explainer: Explainer, args: argparse.Namespace) -> int:
    """Write grounding.csv and its chart, and print the rows that matter."""
    samples = grounding.load_samples(args.grounding, args.images[0], args.boxes)[: args.count]
    default = chosen_look(args)
    looks = many_looks(explainer.n_layer, explainer.n_head, ROWS)
    looks = list(dict.fromkeys([default, REPORT[explainer.name], *looks]))
    scores, floor = grounding.measure(explainer, samples, looks, args.relative_to)
    ranked = sorted(looks, key=lambda look: -scores[look].pointing)
    rows = []
    for look in ranked:
        score = scores[look]
        mark = "default" if look == default else "report" if look == REPORT[explainer.name] else ""
        measures = {name: getattr(score, name) for name in ("pointing", "mass_ratio", "iou")}
        rows.append({**vars(look), **measures, "note": mark})
    bare = {"layers": "", "heads": "", "row": "", "mass_ratio": "", "iou": "", "note": "baseline"}
    table = [*rows, *({"method": n, **bare, "pointing": v} for n, v in floor.items())]
    write_csv(args.out / "grounding.csv", list(rows[0]), [[row[name] for name in rows[0]] for row in table])
    baseline_rows = [{"name": name, "pointing": value} for name, value in floor.items()]
    figures.grounding_chart([*rows, *baseline_rows], args.out / "grounding.png")
    words = scores[default].count
    print(f"{explainer.name}: {len(samples)} images, {words} words; pointing, attention in box / area, IoU")
    marked = [row for row in rows if row["note"]]
    for row in [*rows[:5], *(row for row in marked if row not in rows[:5])]:
        name = f"{row['method']} layers {row['layers']} heads {row['heads']} {row['row']}"
        print(f"{name:<44}{row['pointing']:>7.3f}{row['mass_ratio']:>7.2f}{row['iou']:>7.3f}  {row['note']}")
    for name, value in floor.items():
        print(f"{name:<44}{value:>7.3f}{'':>14}  baseline")
    return 0


def check_args(args: argparse.Namespace) -> None:
    """Refuse flags that make no sense together before anything is loaded."""
    for name in ("beam_size", "max_new_tokens", "count"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if args.best_worst and args.grounding:
        raise ValueError("--best-worst and --grounding are two runs; give one of them")
    if args.best_worst and not args.annotation_file:
        raise ValueError("--best-worst needs --annotation-file, whose references it shows")
    if (args.best_worst or args.grounding) and (len(args.images) != 1 or not args.images[0].is_dir()):
        raise ValueError("--images must be the one folder of the images for --best-worst and --grounding")
    if args.boxes and not args.grounding:
        raise ValueError("--boxes belongs to --grounding")
    if args.caption is not None and not args.caption.strip():
        raise ValueError("--caption is empty; give the words to explain")


@command
def main(argv: list[str] | None = None) -> int:
    """Explain captions; return 0, or 3 (``PARTIAL``) where an image could not be read."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    check_args(args)
    device = pick_device(args.device)
    paths = list_files(args.images)
    if args.caption is not None and len(paths) != 1:
        raise ValueError(f"--caption explains one image, and --images names {len(paths)}")
    explainer = load_explainer(args, device)
    parse_layers(chosen_look(args).layers, explainer.n_layer)
    Heads.parse(chosen_look(args).heads, explainer.n_head)
    if args.grounding:
        return run_grounding(explainer, args)
    if args.best_worst:
        return run_best_worst(explainer, paths, args)
    return run_images(explainer, paths, args)


if __name__ == "__main__":
    sys.exit(main())
