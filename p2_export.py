"""Write a trained adapter and its merged decoder as folders that others can use without this suite.

OUT/adapter holds the adapter file with a model card; OUT/gpt2 holds the decoder with LoRA merged in, which
transformers' GPT2LMHeadModel.from_pretrained loads, its tokenizer, the projector, and a card with the code to caption.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from captioning.cli import FlagParser, add_allow_other_decoder, add_common_flags, command, setup_logging
from captioning.data.tokenizer import END_OF_TEXT, Tokenizer, tokenizer_files
from captioning.files import atomic_path, check_writable, write_text
from captioning.models.adapter import read_adapter
from captioning.models.export import load_decoder, make_cards, write_gpt2
from captioning.profiles import PROFILES
from captioning.training.run_folder import RunFolder


def build_parser() -> Any:
    """Return the command line."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; OUT/adapter and OUT/gpt2 must not exist")
    parser.add_argument(
        "--adapter", type=Path, default=Path("runs/best/best.safetensors"), help="what p2_train.py wrote"
    )
    parser.add_argument("--decoder", help="GPT-2 that it was trained on, a file or folder (default: the profile's)")
    parser.add_argument("--tokenizer", help="folder of GPT-2's tokenizer files (default: the profile's)")
    add_allow_other_decoder(parser)
    add_common_flags(parser, device=False)
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Export; return 0."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    profile = PROFILES[args.profile]
    folders = {name: args.out / name for name in ("adapter", "gpt2")}
    for folder in folders.values():
        if folder.exists():
            raise ValueError(f"{folder}: exists already; name another OUT, or remove it")
    check_writable(args.out, "OUT")
    tokenizer = args.tokenizer or profile.tokenizer
    files, end_id = tokenizer_files(tokenizer), Tokenizer(tokenizer).eos_id
    config, decoder, projector = load_decoder(args.adapter, args.decoder or profile.decoder, args.allow_other_decoder)
    write_gpt2(folders["gpt2"], decoder, projector, files, end_id, END_OF_TEXT)
    with atomic_path(folders["adapter"] / "adapter.safetensors") as temporary:
        shutil.copyfile(args.adapter, temporary)
    trained_on = read_adapter(args.adapter)[0]  # which --allow-other-decoder may have exchanged
    for name, described in (("adapter", trained_on), ("gpt2", config)):
        card = make_cards(described, decoder, projector, RunFolder(args.adapter.parent).describe())[name]
        write_text(folders[name] / "README.md", card)
        print(folders[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
