"""What every command line shares: exit codes, flags, one line for an error, and the log."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from captioning.profiles import PROFILES

BAD_INPUT = 2  # exit code for wrong files, flags or data
PARTIAL = 3  # exit code when a part of the work could not be done, and the rest was
STOPPED = 4  # exit code when SIGTERM or SIGINT ended a training run early and all of it was kept: --resume continues
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
UNHEARD = 141  # exit code when the reader of our output has gone before the end, as shells have it for SIGPIPE


def setup_logging(verbose: bool = False) -> None:
    """Send log records to stderr: the suite's at INFO (DEBUG when ``verbose``), other libraries' warnings only.

    What Pillow warns of, damaged metadata above all, says nothing about captions and does not name the picture.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.basicConfig(format="%(levelname).1s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    for name in ("__main__", "captioning", "bench", "microworld"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines; shows defaults other than None and False that the help text does not give."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or action.default is False or "(default" in (action.help or "")
        return action.help if plain else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """A parser that shows defaults in ``--help`` and takes ``--two_words`` for every ``--two-words``."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: D102 - argparse's own
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._dashed(a) for a in args], namespace)

    def error(self, message: str) -> Any:
        """End with one line: the whole usage of a script with fifty flags hides what is wrong."""
        self.exit(BAD_INPUT, f"error: {message} ({self.prog} --help shows all flags)\n")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Let a flag's type refuse a value in one line: by ``ArgumentTypeError``, as :func:`positive_int` does."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, argparse.ArgumentTypeError):
                name = "/".join(action.option_strings) or action.metavar
                raise ValueError(f"{name} {arg_string}: {error.message}") from error
            raise

    def _dashed(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        twin = flag.replace("_", "-")
        known = twin in self._option_string_actions and flag not in self._option_string_actions
        return twin + equals + value if known else argument


def positive_int(text: str) -> int:
    """Be the ``type`` of a flag that counts something: 0 is refused as ``--flag 0: must be at least 1``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def add_common_flags(parser: argparse.ArgumentParser, profile: bool = True, device: bool = True) -> None:
    """Add ``--verbose``, and where the script has a use for them ``--profile`` and ``--device``."""
    if profile:
        parser.add_argument("--profile", choices=sorted(PROFILES), default="full", help="sets names and paths only")
    if device:
        parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--verbose", action="store_true", help="more log lines")


def add_annotation_file(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--annotation-file``; ``data.annotations.references_beside`` has its default, ``what`` begins its help."""
    parser.add_argument(
        "--annotation-file",
        type=Path,
        help=f"{what}; layouts: docs/scoring.md (default: DATA/val.json of images in DATA/images/val)",
    )


def add_allow_other_decoder(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-other-decoder``, for scripts that put an adapter on a decoder."""
    parser.add_argument(
        "--allow-other-decoder",
        action="store_true",
        help="only warn where the adapter was trained on another decoder, such as the same GPT-2 in another precision",
    )


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Wrap a script's ``main(argv) -> exit code``: bad input becomes one line on stderr and a non-zero exit code."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            code = main(argv)
            flush_output()
            return code
        except BrokenPipeError as error:
            return _end("", UNHEARD) if _reader_is_gone() else _end(f"error: {error}", BAD_INPUT)
        except ModuleNotFoundError as error:
            if not missing_package(error):
                raise
            return _end(f"error: {missing_package(error)}", BAD_INPUT)
        except (ValueError, OSError) as error:
            return _end(f"error: {error}", BAD_INPUT)
        except KeyboardInterrupt:
            return _end("interrupted", INTERRUPTED)
        except SystemExit:  # of --help, say
            flush_output()
            raise

    return wrapped


def _end(message: str, code: int) -> int:
    if message:
        print(message, file=sys.stderr)
    flush_output()
    return code


def _reader_is_gone() -> bool:
    try:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
    except (OSError, AttributeError):  # no file, or a system without poll
        return False
    return bool(poller.poll(0))


def flush_output() -> None:
    """Write out what was printed, before Python does at its end and has a message and an exit code of its own.

    What is not read, as after ``… | head -1``, is dropped in silence.

    Raises:
        OSError: it cannot be written for another reason, such as a full disk.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def missing_package(error: ModuleNotFoundError) -> str:
    """Say which package this Python lacks and what to do; empty where the package is there and only a part is not."""
    package = (error.name or "").partition(".")[0]
    if not package or importlib.util.find_spec(package):
        return ""
    return (
        f"{sys.executable} has no package {package}: `source .venv/bin/activate` first (`make demo` makes .venv), or "
        "`pip install -r requirements.txt`"
    )


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Be ``sys.excepthook`` for what happens while a script still imports, where ``command`` does not reach yet."""
    if isinstance(error, ModuleNotFoundError) and missing_package(error):
        sys.exit(_end(f"error: {missing_package(error)}", BAD_INPUT))
    if isinstance(error, KeyboardInterrupt):
        sys.exit(_end("interrupted", INTERRUPTED))
    sys.__excepthook__(kind, error, trace)
