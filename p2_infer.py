"""Caption every image of a folder with a trained adapter: ``python p2_infer.py IMG_DIR OUT.json DECODER.bin``."""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

from captioning.checkpoints import read_state_dict
from captioning.cli import (
    PARTIAL,
    FlagParser,
    add_allow_other_decoder,
    add_common_flags,
    command,
    positive_int,
    setup_logging,
)
from captioning.data.images import DRAFT_FACTOR
from captioning.data.tokenizer import Tokenizer
from captioning.device import PRECISIONS, pick_device, product_dtype
from captioning.distributed import Processes, join
from captioning.inference.batches import Job
from captioning.inference.captions import check_length_penalty, check_vocabulary
from captioning.inference.encode import draft_side
from captioning.inference.folder import PredictionLog, caption_images
from captioning.inference.jobs import Search, captioner_job
from captioning.inference.options import (
    add_options,
    check_options,
    describe_options,
    ranked_count,
    text_files,
    wording_of,
)
from captioning.models.adapter import load_captioner, read_adapter
from captioning.models.captioner import ATTENTION, SEARCH_RULES
from captioning.models.inference_weights import prepare
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
from captioning.tensors import fingerprint

ADAPTER = Path("runs/best/best.safetensors")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add_images_and_results(parser)
    add("decoder", type=Path, metavar="DECODER", help="GPT-2: a state dict (.bin, .pt or .safetensors) or a folder")
    add(
        "--adapter", type=Path, help=f"what p2_train.py wrote (default: best.safetensors beside OUT.json, or {ADAPTER})"
    )
    add("--encoder-weights", help="the encoder's weights, a file or folder (default: the one trained with)")
    add("--tokenizer", help="folder of GPT-2's tokenizer files (default: the profile's)")
    add("--beam-size", type=positive_int, default=5, help="live beams; 1 is greedy search")
    add("--max-new-tokens", type=positive_int, default=30, help="longest caption in tokens")
    add("--length-penalty", type=float, default=1.0, help="above 1 favours longer captions; of --search-rule beam")
    add(
        "--search-rule",
        choices=SEARCH_RULES,
        help="beam: as transformers' generate; report: as the report's code, which replaces no beam that has ended "
        "(default: the adapter's)",
    )
    add("--batch-size", type=positive_int, default=16, help="images at once")
    add(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: bf16 on a GPU, or at full size a CPU, that has it",
    )
    add(
        "--attention",
        choices=ATTENTION,
        default="auto",
        help="of captions that are read again for --scores and --n-best, as p2_train.py's",
    )
    add(
        "--jpeg-draft",
        action=argparse.BooleanOptionalAction,
        default=False,
        help=f"decode big JPEGs smaller, to no less than {DRAFT_FACTOR} times the model's size: "
        "faster, and now and then another caption",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the decoding steps: same captions, a minute or more at the start",
    )
    add_allow_other_decoder(parser)
    add_common_flags(parser)
    add_options(parser)
    add_flags(parser)
    return parser


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """Return whatever decides the captions, so that no other run's are taken for this one's."""
    flags = ("encoder_weights", "tokenizer", "beam_size", "max_new_tokens", "length_penalty", "precision", "jpeg_draft")
    return {
        "script": "p2_infer.py",
        **describe_images(args),
        "decoder": str(args.decoder.resolve()),
        "adapter": hashlib.sha256(args.adapter.read_bytes()).hexdigest(),
        **{name: getattr(args, name) for name in flags},
        # The adapter's own fingerprint of the decoder, which loading holds against the file, does not hold then.
        **({"other_decoder": fingerprint(read_state_dict(args.decoder))} if args.allow_other_decoder else {}),
        **describe_options(args),
        **({"search_rule": "report"} if args.search_rule == "report" else {}),  # others' side files have no such key
    }


def describe_models(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fingerprints of all weights, which loading compares with the files."""
    config = read_adapter(args.adapter)[0]
    return {"encoder": config.encoder, "encoder_hash": config.encoder_hash, "decoder_hash": config.decoder_hash}


def load_job(args: argparse.Namespace) -> Job:
    """Load the captioner; return what it does to images. Called in other machines' processes too."""
    setup_logging(args.verbose)
    device = pick_device(args.device)
    tokenizer = Tokenizer(args.tokenizer or PROFILES[args.profile].tokenizer)
    fallback = PROFILES[args.profile].encoder_weights
    frozen = (args.decoder, args.encoder_weights)
    captioner = load_captioner(args.adapter, *frozen, device, fallback, args.allow_other_decoder)
    check_vocabulary(tokenizer, captioner.decoder)
    precision = prepare(captioner, args.precision, reorder=not args.compile)
    if ranked_count(args):
        captioner.attention = captioner.attention_route(args.attention, product_dtype(device, precision))
    draft = draft_side(captioner.transform) if args.jpeg_draft else None
    sizes = (args.beam_size, args.max_new_tokens)
    search = Search(*sizes, wording_of(args), ranked_count(args), args.length_penalty, args.search_rule)
    compiled_batch = args.batch_size if args.compile else None
    return captioner_job(captioner, tokenizer, search, precision, draft, compiled_batch)


def settle_search(args: argparse.Namespace) -> None:
    """Take the search rule from the adapter where the command line has none.

    Raises:
        FileNotFoundError, ValueError: there is no such adapter, or the rule has no length penalty.
    """
    args.search_rule = args.search_rule or read_adapter(args.adapter)[0].search_rule
    check_length_penalty(args.search_rule, args.length_penalty)


def adapter_of(out: Path) -> Path:
    """Return the adapter to caption with where none is named: captions in a run folder are that run's."""
    beside = out.parent / ADAPTER.name
    return beside if beside.is_file() else ADAPTER


def caption(args: argparse.Namespace, processes: Processes) -> int:
    """Caption what the command line names; return the exit code."""
    if not is_plain_folder(args):
        settle_search(args)
        run = ShardRun.from_flags(args, describe_run(args) | describe_models(args))
        return caption_source(run, functools.partial(load_job, args), processes)
    images = processes.from_first(source_of(args).images)
    settle_search(args)
    with PredictionLog(args.out, describe_run(args), True, processes, text_files(args), args.keep) as predictions:
        predictions.check_texts(images)
        job = load_job(args)
        caption_images(predictions, images, job, args.batch_size)
        captions = predictions.finish(images)
    return PARTIAL if len(captions) < len(images) else 0


@command
def main(argv: list[str] | None = None) -> int:
    """Caption images; return 0, or 3 (``PARTIAL``) where an image could not be read."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    args.adapter = args.adapter or adapter_of(args.out)
    check_options(args, "--beam-size", args.beam_size, is_plain_folder(args))
    with join(pick_device("auto" if args.engine == "ray" else args.device)) as processes:
        return caption(args, processes)


if __name__ == "__main__":
    sys.exit(main())
