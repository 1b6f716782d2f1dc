"""Flags of the scripts that caption: what captions may not say, how sure of them the model is, and text files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from captioning.cli import positive_int
from captioning.inference.text_files import TextFiles
from captioning.inference.wording import Wording

BESIDE = ""  # the value of --txt without a folder


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("captions")
    add = group.add_argument
    add("--min-new-tokens", type=int, default=Wording.min_new_tokens, help="shortest caption in tokens")
    add(
        "--no-repeat-ngram",
        type=int,
        metavar="N",
        default=Wording.no_repeat_ngram,
        help="no N tokens in a row come twice in a caption; 0: they may",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=Wording.repetition_penalty,
        help="above 1, tokens that were said become less likely; these three are those of transformers' generate",
    )
    add(
        "--scores",
        action="store_true",
        help="also write OUT.scores.json (parts: a field or column `ranked`): each caption with its confidence, the "
        "mean log-probability of its tokens",
    )
    add(
        "--n-best", type=positive_int, metavar="N", default=1, help="as --scores, with the N best captions of the beams"
    )
    add(
        "--txt",
        nargs="?",
        const=BESIDE,
        metavar="FOLDER",
        help="also write each caption to a .txt beside its picture, or into FOLDER; after the other arguments, or as "
        "--txt=FOLDER",
    )


def wording_of(args: argparse.Namespace) -> Wording:
    """Return the rules of wording that a command line asks for. Raises ValueError naming the flag at fault."""
    if args.min_new_tokens > args.max_new_tokens:
        raise ValueError(f"--min-new-tokens {args.min_new_tokens}: is above --max-new-tokens {args.max_new_tokens}")
    return Wording(args.min_new_tokens, args.no_repeat_ngram, args.repetition_penalty)


def ranked_count(args: argparse.Namespace) -> int:
    """Return how many captions of an image are written with their scores; 0: none is."""
    return args.n_best if args.scores or args.n_best > 1 else 0


def describe_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what these flags change in the captions; nothing without them, as runs of earlier versions have it."""
    count = ranked_count(args)
    return wording_of(args).changed() | ({"n_best": count} if count else {})


def check_options(args: argparse.Namespace, beams_flag: str, beams: int, one_by_one: bool) -> None:
    """Refuse flags that do not go together, before anything is loaded.

    Args:
        args: with the flags of :func:`add_options`.
        beams_flag: the script's flag for the number of beams.
        beams: its value.
        one_by_one: whether images are files, and OUT one JSON.

    Raises:
        ValueError: naming the flags.
    """
    wording_of(args)
    if args.n_best > beams:
        raise ValueError(f"--n-best {args.n_best}: {beams_flag} {beams} finds no more than {beams}; raise that")
    if args.txt is not None and not one_by_one:
        raise ValueError(
            "--txt: goes with a folder or pictures and one OUT.json; for lists, tars and parts leave it out, and take "
            "the captions from OUT"
        )


def text_files(args: argparse.Namespace) -> TextFiles | None:
    """Return the text files that ``--txt`` asks for."""
    return None if args.txt is None else TextFiles(Path(args.txt) if args.txt != BESIDE else None, args.overwrite)
