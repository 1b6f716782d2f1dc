"""Train LoRA and a projector so that GPT-2 captions what a frozen CLIP encoder sees.

Writes into the run folder: best.safetensors and last.safetensors (LoRA + projector), config.json (everything that the
run was made with), metrics.jsonl (a line every few steps, a line an epoch) and loss.png.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from captioning import distributed
from captioning.cli import PARTIAL, STOPPED, FlagParser, add_common_flags, command, setup_logging
from captioning.device import pick_device
from captioning.training.config import SETTINGS, add_flags
from captioning.training.setup import plan, prepare
from captioning.training.trackers import CHOICES as TRACKERS
from captioning.training.trainer import StoppedEarly, stopped_early


def _gigabytes(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise ArgumentTypeError("must be at least 0")
    return value


def build_parser() -> FlagParser:
    """Return the command line; numbers default to the setting's, so their flags default to None here."""
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--setting",
        choices=list(SETTINGS),
        default="best",
        help="whose numbers the flags change; best-336, best-h and best-g are best with a larger encoder",
    )
    parser.add_argument(
        "--data", type=Path, help="folder with train.json, val.json, images/train, images/val; see docs/training.md"
    )
    parser.add_argument("--out", type=Path, help="run folder (default: runs/SETTING)")
    parser.add_argument("--resume", action="store_true", help="continue from the last state in the run folder")
    parser.add_argument("--dry-run", action="store_true", help="check the flags and files, count the steps, and end")
    parser.add_argument("--encoder", help="timm ViT (default: the setting's, or the profile's)")
    parser.add_argument("--encoder-weights", help="its weights, a file or folder (default: what was downloaded for it)")
    parser.add_argument("--decoder", help="GPT-2, a file or folder (default: the profile's)")
    parser.add_argument("--tokenizer", help="folder of GPT-2's tokenizer files (default: the profile's)")
    parser.add_argument("--cache", type=Path, help="folder of cached encoder tokens (default: the profile's)")
    parser.add_argument(
        "--cache-gb",
        type=_gigabytes,
        default=math.inf,
        metavar="N",
        help="cache at most N GB; images beyond are encoded every epoch (default: all)",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="for checks of shape and speed only: random encoder, and a random GPT-2 small unless --decoder is given",
    )
    parser.add_argument(
        "--shuffle-captions", action="store_true", help="the blind baseline: train on captions dealt to wrong images"
    )
    parser.add_argument(
        "--init-adapter", type=Path, help="adapter to start from; its LoRA, layer and CLS are taken over"
    )
    parser.add_argument(
        "--report-faithful",
        action="store_true",
        help="all that the report's code did (docs/training.md); the flag of a single point turns it off again",
    )
    parser.add_argument(
        "--log-with",
        choices=TRACKERS,
        help="send the numbers of metrics.jsonl to a tracker too; all: every one that is installed (default: none)",
    )
    add_common_flags(parser)
    add_flags(parser.add_argument_group("numbers (defaults are those of --setting best)"))
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Train; return 0, 3 (``PARTIAL``) where images could not be read, or 4 (``STOPPED``) after SIGTERM or SIGINT."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    with distributed.join(pick_device(args.device)) as processes:
        if not processes.first:
            logging.disable(logging.INFO)  # the first one says it for all
        return train(args, processes)


def train(args: Any, processes: distributed.Processes) -> int:
    """Train and print what came of it; return the exit code."""
    if args.dry_run:
        planned = processes.together(lambda: plan(args, processes))
        if processes.first:
            print(planned)
        return 0
    with contextlib.ExitStack() as held:
        try:
            with stopped_early():
                trainer = processes.together(lambda: prepare(args, processes, held))
        except StoppedEarly:
            print("stopped before the first step; start again by the same command")
            return STOPPED
        record = trainer.run()
    if record and processes.first:
        shown = {k: round(v, 4) for k, v in record.items() if isinstance(v, float)}
        print(f"{trainer.folder.best}: {shown}")
    if trainer.finished:
        return PARTIAL if trainer.train_split.unreadable or trainer.val_split.unreadable else 0
    if processes.first:
        step = trainer.progress.step
        print(f"stopped after step {step} of {trainer.steps}; continue by the same command with --resume")
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
