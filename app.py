"""A local web page to play with: captions of both models, their maps by a click on a word, two adapters side by side.

python app.py            full size where its weights are there, otherwise the micro world; then open the printed address

The page is for this machine only, unless --host says otherwise, and sends nothing anywhere.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import threading
from pathlib import Path

from captioning.cli import FlagParser, add_common_flags, command, setup_logging
from captioning.models.llava import DTYPES
from captioning.profiles import PROFILES

log = logging.getLogger("captioning")
MEGABYTE = 10**6


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add(
        "--profile",
        choices=sorted(PROFILES),
        help="sets names and paths only (default: full where its decoder is, otherwise micro)",
    )
    add(
        "--adapter",
        type=Path,
        nargs="+",
        metavar="FILE_OR_RUN",
        help="adapters to caption with, the first by default (default: the profile's and those in runs/ and demo/)",
    )
    add("--llava", help="hub id or folder of a LLaVA 1.5 (default: the profile's)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of LLaVA's weights")
    add("--load-in-4bit", action="store_true", help="quantise LLaVA's weights (needs bitsandbytes)")
    add("--host", default="127.0.0.1", help="address to listen on; any other than this lets others use the page")
    add("--port", type=int, default=7860, help="port to listen on; 0 takes any that is free")
    add("--max-upload", type=int, default=20, metavar="MB", help="largest picture that is taken, in megabytes")
    add_common_flags(parser, profile=False)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuse numbers that make no sense before anything is loaded."""
    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port {args.port}: must be from 0 to 65535")
    if not 1 <= args.max_upload <= 512:
        raise ValueError(f"--max-upload {args.max_upload}: must be from 1 to 512 megabytes")


@command
def main(argv: list[str] | None = None) -> int:
    """Serve the page until Ctrl-C; return 0."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    check_args(args)
    from captioning.api import adapter_file
    from captioning.app.server import LOOPBACK, Server
    from captioning.app.studio import Studio, adapters_beside
    from captioning.models.adapter import read_adapter

    profile = args.profile or ("full" if Path(PROFILES["full"].decoder).is_file() else "micro")
    adapters = [adapter_file(path) for path in args.adapter] if args.adapter else adapters_beside(profile)
    for path in adapters:
        read_adapter(path)  # what is no adapter is said before the page is there
    with tempfile.TemporaryDirectory(prefix="captioning-") as folder:
        options = {"dtype": args.dtype, "load_in_4bit": args.load_in_4bit}
        studio = Studio(profile, adapters, Path(folder), args.llava, args.device, **options)
        try:
            server = Server(studio, args.host, args.port, args.max_upload * MEGABYTE)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"--host {args.host} --port {args.port}: {reason}; name another, or --port 0") from error
        if args.host not in LOOPBACK:
            log.warning("--host %s: whoever reaches this machine can use the page", args.host)
        threading.Thread(target=studio.warm_up, daemon=True).start()
        print(f"{server.url} ({profile}; Ctrl-C ends it)", flush=True)
        try:
            with server:
                server.serve_forever()
        finally:
            studio.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
