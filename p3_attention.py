"""Show which pixels each word looked at: captions with one heat map per word, for LLaVA (p1) and the tuned model (p2).

python p3_attention.py --model p2 --images DIR_OR_FILES --out DIR [--html]       maps, as one PNG and one npz per image
python p3_attention.py --model p2 --images FILE --out DIR --contact-sheet         one picture by all methods
python p3_attention.py --model p2 --best-worst PER_IMAGE.json --images DIR --annotation-file val.json --out DIR
python p3_attention.py --model p2 --grounding val.json --images DIR --out DIR     do the maps point at the things?
python p3_attention.py --model p2 --find-heads --images DIR --out DIR             choose the heads of --heads local
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.cli import (
    PARTIAL,
    FlagParser,
    add_allow_other_decoder,
    add_annotation_file,
    add_common_flags,
    command,
    positive_int,
    setup_logging,
)
from captioning.data.annotations import load_references, references_beside
from captioning.data.images import load_image
from captioning.data.tokenizer import Tokenizer
from captioning.device import pick_device
from captioning.files import check_writable
from captioning.maps import comparison, figures, grounding, localisation, viewer
from captioning.maps.attention import METHODS, ROWS, Heads, MapSpec, parse_layers
from captioning.maps.explainers import (
    DEFAULTS,
    REPORTED,
    CaptionerExplainer,
    Explainer,
    LlavaExplainer,
    choose_spec,
    explain,
    explain_each,
    find_local_heads,
    specs_of_methods,
    specs_to_compare,
    specs_to_show,
)
from captioning.maps.measures import Box
from captioning.maps.pairs import Pair, best_and_worst, read_per_image
from captioning.maps.saved import save_maps
from captioning.messages import naming
from captioning.models.adapter import load_captioner
from captioning.models.llava import DTYPES, MAX_NEW_TOKENS, PROMPTS, check_prompt, load_llava
from captioning.profiles import PROFILES
from captioning.scale.sources import images_at
from captioning.scoring.chair import ObjectWords, objects_in_boxes
from captioning.timing import Timer

if TYPE_CHECKING:
    import torch
    from PIL import Image

log = logging.getLogger("captioning")
LETTERS = 4  # of the shortest word on a contact sheet without nouns that are known
Nouns = Callable[[str, Sequence[str]], dict[int, list[Box]]]
BESIDE = Path()  # the value of --best-worst without a file


def _defaults(name: str) -> str:
    """Return a setting's default for the help text, of each model where they differ."""
    values = {model: getattr(spec, name) for model, spec in DEFAULTS.items()}
    same = len(set(values.values())) == 1
    return f"(default: {values['p1']})" if same else f"(default: p1 {values['p1']}, p2 {values['p2']})"


def chosen_spec(args: argparse.Namespace) -> MapSpec:
    """Return the model's default spec with what the flags change."""
    return choose_spec(args.model, method=args.method, layers=args.layers, heads=args.heads, row=args.row)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    methods = "\n".join(f"  {name:<12}{method.about}" for name, method in METHODS.items())
    parser = FlagParser(description=__doc__.split("\n\n")[0], epilog=f"methods, with what a word's map is:\n{methods}")
    add = parser.add_argument
    add("--model", choices=("p1", "p2"), required=True, help="p1: LLaVA; p2: the tuned captioner")
    add("--images", type=Path, nargs="+", required=True, metavar="DIR_OR_FILE", help="images to explain")
    add("--recursive", action="store_true", help="take the subfolders of folders too, with results in such folders")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    add("--method", choices=METHODS, help=f"how maps are made; see below {_defaults('method')}")
    add("--layers", help=f"all, last, a number, or a range such as 2-5 {_defaults('layers')}")
    add("--heads", help=f"max, mean, a head's number, topK, or local, of --find-heads {_defaults('heads')}")
    add("--row", choices=ROWS, help=f"position that predicts a token, or its own: of attention {_defaults('row')}")
    add("--caption", help="explain this caption of one image instead of the model's own")
    add("--find-heads", action="store_true", help="choose the localisation heads (--heads local) by --images, once")
    add("--html", action="store_true", help="write viewer.html too, with every method and many layers and heads")
    add("--contact-sheet", action="store_true", help="draw NAME.methods.png too: the caption's nouns by every method")
    add(
        "--best-worst",
        type=Path,
        nargs="?",
        const=BESIDE,
        metavar="PER_IMAGE.json",
        help="explain top-1 and last-1 of evaluate.py's --per-image (no file: val_per_image.json beside the adapter)",
    )
    add_annotation_file(parser, "references, shown with --best-worst")
    add("--grounding", type=Path, metavar="CAPTIONS.json", help="measure all methods against boxes")
    add(
        "--boxes",
        type=Path,
        metavar="INSTANCES.json",
        help="COCO instances: for --grounding captions without mentions, or to draw on --contact-sheet",
    )
    add("--count", type=positive_int, default=500, help="images for --grounding")
    add("--ask", type=positive_int, nargs="?", const=50, metavar="N", help="are the maps of N images faithful? slow")
    add("--specs", nargs="+", metavar="SPEC", help="what --grounding compares: methods, or method,layers,heads,row")
    add("--adapter", type=Path, default=Path("runs/best/best.safetensors"), help="p2: what p2_train.py wrote")
    add("--decoder", type=Path, help="p2: GPT-2, a file or folder (default: the profile's)")
    add("--encoder-weights", help="p2: the encoder's weights, a file or folder (default: the one trained with)")
    add("--tokenizer", help="p2: folder of GPT-2's tokenizer files (default: the profile's)")
    add("--llava", help="p1: hub id or folder of a LLaVA 1.5 (default: the profile's)")
    add("--setting", type=int, choices=sorted(PROMPTS), default=1, help="p1: prompt of the report")
    add("--prompt", help="p1: any other prompt")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="p1: of the weights, as for p1_llava_caption.py")
    add("--beam-size", type=positive_int, help="live beams (default: 5 for p2, 1 for p1)")
    add(
        "--max-new-tokens",
        type=positive_int,
        help=f"longest caption in tokens (default: 30 for p2, {MAX_NEW_TOKENS} for p1)",
    )
    add_allow_other_decoder(parser)
    add_common_flags(parser)
    return parser


# --- images and model -----------------------------------------------------------------------------------------------


def load_explainer(args: argparse.Namespace, device: torch.device) -> Explainer:
    """Build the model that ``--model`` names."""
    profile = PROFILES[args.profile]
    if args.model == "p1":
        prompt = check_prompt(args.prompt) if args.prompt is not None else PROMPTS[args.setting]
        llava = load_llava(args.llava or profile.llava, device, args.dtype)
        return LlavaExplainer(llava, prompt, args.beam_size or 1, args.max_new_tokens or MAX_NEW_TOKENS)
    frozen = (args.decoder or Path(profile.decoder), args.encoder_weights)
    captioner = load_captioner(args.adapter, *frozen, device, profile.encoder_weights, args.allow_other_decoder)
    tokenizer = Tokenizer(args.tokenizer or profile.tokenizer)
    return CaptionerExplainer(captioner, tokenizer, args.beam_size or 5, args.max_new_tokens or 30)


def read_nouns(args: argparse.Namespace, paths: dict[str, Path]) -> Nouns:
    """Return which words of an image's caption the contact sheet shows, each with its boxes where ``--boxes`` has them.

    They are the words for objects, as CHAIR has them; where a caption has none, or there is no list, the longer words.
    """
    file = Path(PROFILES[args.profile].chair_words)
    if args.boxes and not file.is_file():
        raise FileNotFoundError(f"--boxes needs {file}, the words for its categories; run: bash hw3_download.sh data")
    objects = ObjectWords.read(file) if file.is_file() else ObjectWords({})
    names = {key: key + path.suffix for key, path in paths.items()}
    boxes = objects_in_boxes(args.boxes, objects, names, {}) if args.boxes else {}

    def find(key: str, words: Sequence[str]) -> dict[int, list[Box]]:
        named = objects.places(words) or {n: "" for n, word in enumerate(words) if len(word) >= LETTERS}
        return {n: boxes.get(key, {}).get(name, []) for n, name in (named or {len(words) - 1: ""}).items()}

    return find


# --- the three runs -------------------------------------------------------------------------------------------------


def not_explained(path: Path, error: Exception) -> None:
    """Name an image that is left out."""
    log.error("not explained: %s", naming(path, error))
    log.debug("%s", path, exc_info=error)


def run_images(explainer: Explainer, paths: dict[str, Path], nouns: Nouns | None, args: argparse.Namespace) -> int:
    """Write pictures and an npz per image, and the viewer; an image or caption that fails is named and left out."""
    from tqdm import tqdm

    spec = chosen_spec(args)
    by_method = specs_of_methods(explainer.name, spec) if nouns else []
    specs = list(dict.fromkeys([spec, *(specs_to_show(spec, explainer.n_layer) if args.html else []), *by_method]))
    items, timer = [], Timer("explain")
    for key, path in tqdm(paths.items(), "explain", disable=None):
        try:
            explanation, attention, absent = explain_each(explainer, path, specs, args.caption)
        except Exception as error:  # of any type: one image must not end the run
            not_explained(path, error)
            continue
        for left_out, why in absent.items():
            log.warning("%s: no maps by %s: %s", path, left_out, why)
        if nouns:
            rows = nouns(key, explanation.words)
            figures.contact_sheet(explanation, by_method, rows, args.out / f"{key}{figures.SHEET}", absent)
        figures.word_grid(explanation, args.out / f"{key}.png")
        save_maps(args.out / f"{key}.npz", explanation, attention)
        print(f"{path.name}  {figures.line(explanation.caption)}")
        items.append(explanation)
    if not items:
        raise ValueError(f"none of the {len(paths)} images could be explained")
    if args.html:
        viewer.write(
            items, args.out / "viewer.html", f"Which pixels each word looked at: {figures.MODELS[explainer.name]}"
        )
    timer.report(log, len(items), "%s: %d images explained", args.out)
    return PARTIAL if len(items) < len(paths) else 0


def run_find_heads(explainer: Explainer, paths: dict[str, Path]) -> int:
    """Choose the model's localisation heads by its captions of the images, and keep them beside it."""
    from tqdm import tqdm

    if explainer.heads_file is None:
        raise ValueError("--find-heads: the model has no file that its heads could be kept beside")
    check_writable(explainer.heads_file.parent, "--find-heads")
    read = 0

    def pictures() -> Iterator[Image.Image]:
        nonlocal read
        for path in tqdm(paths.values(), "find heads", disable=None):
            try:
                picture = load_image(path)
            except (ValueError, OSError) as error:
                not_explained(path, error)
                continue
            read += 1
            yield picture

    found = find_local_heads(explainer, pictures())
    localisation.write_heads(explainer.heads_file, found)
    for (layer, head), share in zip(found.heads, found.shares, strict=True):
        print(f"layer {layer} head {head}: chosen for {share:.0%} of {found.words} words")
    print(f"{explainer.heads_file}: localisation heads by {found.images} images")
    return PARTIAL if read < len(paths) else 0


def read_pairs(paths: dict[str, Path], args: argparse.Namespace) -> list[Pair]:
    """Return the best and the worst pair by CLIPScore; ValueError where an image is not there."""
    scores = read_per_image(args.best_worst)
    absent = [key for key in scores if key not in paths]
    if absent:
        raise ValueError(f"--images: {len(absent)} images of {args.best_worst} are not there, first {absent[0]}")
    return best_and_worst(scores, paths, load_references(args.annotation_file))


def run_best_worst(explainer: Explainer, pairs: list[Pair], args: argparse.Namespace) -> int:
    """Draw the best and the worst pair by CLIPScore, and their maps; one whose image fails is named and left out."""
    drawn = []
    for pair in pairs:
        notes, spec = {"CLIPScore": f"{pair.clipscore:.4f}"}, chosen_spec(args)
        try:
            load_image(pair.path)
            if pair.caption.strip():  # an empty caption has no maps; the pair is drawn all the same
                explanation, _ = explain(explainer, pair.path, [spec], pair.caption, notes)
                figures.word_grid(explanation, args.out / f"{pair.title.lower()}.png")
        except Exception as error:  # as above
            not_explained(pair.path, error)
            continue
        print(f"{pair.title}: {pair.path.name}  CLIPScore {pair.clipscore}  {pair.caption}")
        drawn.append(pair)
    if not drawn:
        raise ValueError("neither the best nor the worst pair could be explained")
    figures.best_worst(drawn, args.out / "best_worst.png")
    return PARTIAL if len(drawn) < len(pairs) else 0


def read_grounded(args: argparse.Namespace) -> list[grounding.GroundedCaption]:
    """Return captions with boxes, for --grounding."""
    return grounding.load_grounded_captions(args.grounding, args.images[0], args.boxes)[: args.count]


def run_grounding(explainer: Explainer, samples: list[grounding.GroundedCaption], args: argparse.Namespace) -> int:
    """Write --grounding's tables and chart; print each method's best row, the default, the report's and baselines."""
    default, report = chosen_spec(args), REPORTED[explainer.name]
    sizes = explainer.n_layer, explainer.n_head
    chosen = comparison.parse_specs(args.specs, default, *sizes) if args.specs else specs_to_compare(*sizes)
    specs, notes = list(dict.fromkeys([default, report, *chosen])), {report: "report"} | {default: "default"}
    found, rows = comparison.compare(explainer, samples, specs, notes, args.ask or 0, args.out)
    figures.grounding_chart(rows, args.out / "grounding.png")
    print(f"{explainer.name}: {found.images} images, {rows[0].words} words; {comparison.MEASURES}")
    for row in comparison.best_of_each_method(rows):
        print(row)
    return PARTIAL if found.images < len(samples) else 0


def check_args(args: argparse.Namespace) -> None:
    """Refuse flags that make no sense together before anything is loaded."""
    runs = [name for name in ("best_worst", "grounding", "contact_sheet", "find_heads") if getattr(args, name)]
    if len(runs) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in runs)
        raise ValueError(f"{names} are {len(runs)} runs; give one of them")
    if (args.best_worst or args.grounding) and (len(args.images) != 1 or not args.images[0].is_dir()):
        raise ValueError("--images must be the one folder of the images for --best-worst and --grounding")
    if args.best_worst:
        args.best_worst = args.adapter.with_name("val_per_image.json") if args.best_worst == BESIDE else args.best_worst
        args.annotation_file = args.annotation_file or references_beside(args.images[0])
    for flag in ("specs", "ask"):
        if getattr(args, flag) and not args.grounding:
            raise ValueError(f"--{flag} belongs to --grounding")
    if args.boxes and not (args.grounding or args.contact_sheet):
        raise ValueError("--boxes belongs to --grounding and --contact-sheet")
    if args.caption is not None and not args.caption.strip():
        raise ValueError("--caption is empty; give the words to explain")


@command
def main(argv: list[str] | None = None) -> int:
    """Explain captions; return 0, or 3 (``PARTIAL``) where an image could not be explained."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    check_args(args)
    device = pick_device(args.device)
    paths = images_at(args.images, args.recursive)
    if args.caption is not None and len(paths) != 1:
        raise ValueError(f"--caption explains one image, and --images names {len(paths)}")
    check_writable(args.out, "--out")
    samples = read_grounded(args) if args.grounding else []
    pairs = read_pairs(paths, args) if args.best_worst else []
    nouns = read_nouns(args, paths) if args.contact_sheet else None
    explainer = load_explainer(args, device)
    parse_layers(chosen_spec(args).layers, explainer.n_layer)  # refuse what the model lacks before any work
    if Heads.parse(chosen_spec(args).heads, explainer.n_head).rule == "local":
        localisation.read_heads(explainer.heads_file, explainer.n_layer, explainer.n_head)
    if args.find_heads:
        return run_find_heads(explainer, paths)
    if args.grounding:
        return run_grounding(explainer, samples, args)
    if args.best_worst:
        return run_best_worst(explainer, pairs, args)
    return run_images(explainer, paths, nouns, args)


if __name__ == "__main__":
    sys.exit(main())
