"""Make a datastore of captions for p2_train.py --retrieve: python -m captioning.scoring.make_datastore DATA OUT."""

from __future__ import annotations

import sys
from pathlib import Path

from captioning.cli import FlagParser, add_common_flags, command, setup_logging
from captioning.data.annotations import load_split
from captioning.device import pick_device
from captioning.profiles import PROFILES
from captioning.scoring.clipscore import ClipScorer
from captioning.scoring.retrieval import build


def build_parser() -> FlagParser:
    """Return the command line."""
    parser = FlagParser(prog="python -m captioning.scoring.make_datastore", description=__doc__)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with SPLIT.json and images/SPLIT")
    parser.add_argument("out", type=Path, metavar="OUT", help="the datastore, a safetensors file")
    parser.add_argument("--split", default="train", help="whose captions")
    parser.add_argument("--clip-model", help="open_clip's name of the CLIP, or its folder (default: the profile's)")
    parser.add_argument("--clip-weights", help="an open_clip tag or a file (default: the profile's)")
    add_common_flags(parser)
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Make a datastore."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    profile = PROFILES[args.profile]
    default = (profile.clip_model, profile.clip_weights) if args.clip_model is None else (args.clip_model, None)
    clip = ClipScorer(default[0], args.clip_weights or default[1], pick_device(args.device))
    store = build(load_split(args.data, args.split), clip)
    store.save(args.out)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {len(store.captions):,} captions of {len(store.images):,} images, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
