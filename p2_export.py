"""Write a trained adapter and its merged decoder as folders that others can use without this suite.

OUT/adapter holds the adapter file with a model card; OUT/gpt2 holds the decoder with LoRA merged in, which
transformers' GPT2LMHeadModel.from_pretrained loads, its tokenizer, the projector, and a card with the code to caption;
OUT/llava holds the whole captioner as a model that transformers' LlavaForConditionalGeneration.from_pretrained loads.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

from captioning.cli import FlagParser, add_allow_other_decoder, add_common_flags, command, positive_int, setup_logging
from captioning.data.tokenizer import END_OF_TEXT, Tokenizer, for_transformers, tokenizer_files
from captioning.device import pick_device
from captioning.files import atomic_path, check_writable, write_text
from captioning.models.adapter import load_captioner, read_adapter
from captioning.models.captioner import Captioner
from captioning.models.export import load_decoder, make_cards, parts_of, push, write_gpt2
from captioning.models.export_llava import IMAGE_TOKEN, write_llava
from captioning.profiles import PROFILES
from captioning.training.run_folder import RunFolder

log = logging.getLogger("captioning")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; what it writes there must not exist")
    parser.add_argument(
        "--adapter", type=Path, default=Path("runs/best/best.safetensors"), help="what p2_train.py wrote"
    )
    parser.add_argument("--decoder", help="GPT-2 that it was trained on, a file or folder (default: the profile's)")
    parser.add_argument("--tokenizer", help="folder of GPT-2's tokenizer files (default: the profile's)")
    parser.add_argument("--encoder-weights", help="the encoder's (default: the file that the adapter names)")
    parser.add_argument("--beam-size", type=positive_int, default=5, help="beams that OUT/llava searches with")
    parser.add_argument("--max-new-tokens", type=positive_int, default=30, help="its longest caption in tokens")
    parser.add_argument(
        "--llava",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write OUT/llava, for which the encoder's weights must be there",
    )
    parser.add_argument("--license", default="mit", help="for the model cards: a name that the hub knows")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload OUT/llava as a new model of the hub")
    add_allow_other_decoder(parser)
    add_common_flags(parser, device=False)
    return parser


def load_whole(args: argparse.Namespace, decoder: str) -> Captioner:
    """Return the captioner that OUT/llava holds."""
    fallback = PROFILES[args.profile].encoder_weights
    sources = (args.adapter, Path(decoder), args.encoder_weights, pick_device("cpu", announce=False), fallback)
    return load_captioner(*sources, args.allow_other_decoder)


def write_whole(args: argparse.Namespace, captioner: Captioner, tokenizer: Tokenizer, card: str) -> None:
    """Write OUT/llava."""
    if captioner.config.search_rule != "beam":
        log.warning("OUT/llava searches by beams: transformers has no rule %r", captioner.config.search_rule)
    search = {"num_beams": args.beam_size, "max_new_tokens": args.max_new_tokens}
    write_llava(args.out / "llava", captioner, for_transformers(tokenizer, IMAGE_TOKEN), card, search)


@command
def main(argv: list[str] | None = None) -> int:
    """Export; return 0."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    if args.push and not args.llava:
        raise ValueError(f"--push {args.push}: uploads OUT/llava; leave out --no-llava")
    profile = PROFILES[args.profile]
    folders = {name: args.out / name for name in ("adapter", "gpt2", *(["llava"] if args.llava else []))}
    for folder in folders.values():
        if folder.exists():
            raise ValueError(f"{folder}: exists already; name another OUT, or remove it")
    check_writable(args.out, "OUT")
    folder, source = args.tokenizer or profile.tokenizer, args.decoder or profile.decoder
    tokenizer = Tokenizer(folder)
    whole = load_whole(args, source) if args.llava else None
    parts = parts_of(args.adapter, whole) if whole else load_decoder(args.adapter, source, args.allow_other_decoder)
    config, decoder, projector = parts
    recorded = RunFolder(args.adapter.parent).describe()
    if whole:
        card = make_cards(config, decoder, projector, recorded, args.license)["llava"]
        write_whole(args, whole, tokenizer, card)
    write_gpt2(folders["gpt2"], decoder, projector, tokenizer_files(folder), tokenizer.eos_id, END_OF_TEXT)
    with atomic_path(folders["adapter"] / "adapter.safetensors") as temporary:
        shutil.copyfile(args.adapter, temporary)
    trained_on = read_adapter(args.adapter)[0]  # which --allow-other-decoder may have exchanged
    for name, described in (("adapter", trained_on), ("gpt2", config)):
        card = make_cards(described, decoder, projector, recorded, args.license)[name]
        write_text(folders[name] / "README.md", card)
    print(*folders.values(), sep="\n")
    if args.push:
        print(push(folders["llava"], args.push))
    return 0


if __name__ == "__main__":
    sys.exit(main())
