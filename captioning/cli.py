"""What every script needs around the model: device, seed, logging, atomic writes, and one import guard."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

BAD_INPUT = 2  # exit code for wrong files, flags or data
PARTIAL = 3  # exit code when a part of the work could not be done, and the rest was
STOPPED = 4  # exit code when SIGTERM or SIGINT ended a training run early and all of it was kept: --resume goes on
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def pick_device(name: str = "auto") -> torch.device:
    """Return the device for ``name``: ``auto`` prefers CUDA, then Apple's MPS, then CPU.

    Raises:
        ValueError: ``name`` asks for an accelerator that this machine or this torch build does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            rank = os.environ.get("LOCAL_RANK")  # which of several processes on this machine, where it was launched so
            return torch.device("cuda" if rank is None else f"cuda:{rank}")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: not a torch device; use auto, cpu, cuda, cuda:N or mps") from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name}: torch {torch.__version__} sees {count} of that kind here; use --device cpu")
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) with ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below draw from the legacy global generator
    torch.manual_seed(seed)


def setup_logging(verbose: bool = False) -> None:
    """Send log records to stderr: the suite's at INFO (DEBUG when ``verbose``), other libraries' warnings only."""
    logging.basicConfig(format="%(levelname).1s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    for name in ("__main__", "captioning", "bench", "microworld"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush it to disk and rename it, on failure remove it.

    A reader sees the old file or the whole new one, never a part, whatever interrupts the writer.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is for secrets; results are for everyone the user lets in
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Write ``value`` to ``path`` as UTF-8 JSON, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def import_guarded(name: str) -> ModuleType:
    """Import ``name`` (timm, open_clip, transformers, …) and survive a torchvision without its compiled operators.

    PyPI's torchvision beside a CPU-only torch finds no compiled operators, and ``import torchvision`` dies while it
    registers fake kernels for them (``operator torchvision::nms does not exist``, pytorch/vision #9077 and #9085).
    Nothing in this suite calls those operators, so while torchvision is imported for the first time a registration
    whose operator is missing is passed over; ``torch.library.register_fake`` is put back afterwards.
    """
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is not None:
        register_fake = torch.library.register_fake

        def tolerant(op: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(op, str) and op.startswith("torchvision::") and not _operator_exists(op):
                return lambda function: function
            return register_fake(op, *args, **kwargs)

        torch.library.register_fake = tolerant
        try:
            importlib.import_module("torchvision")
        finally:
            torch.library.register_fake = register_fake
    return importlib.import_module(name)


def _operator_exists(qualified_name: str) -> bool:
    namespace, operator = qualified_name.split("::")
    return hasattr(getattr(torch.ops, namespace), operator)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but neither "None" and "False" nor a default that the help text tells itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        untold = action.default in (None, False) or "(default" in (action.help or "")
        return action.help if untold else super()._get_help_string(action)


class FlagParser(argparse.ArgumentParser):
    """A parser that shows defaults in ``--help`` and takes ``--two_words`` for every ``--two-words``."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: D102 - argparse's own
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._dashed(a) for a in args], namespace)

    def _dashed(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        twin = flag.replace("_", "-")
        known = twin in self._option_string_actions and flag not in self._option_string_actions
        return twin + equals + value if known else argument


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Wrap a script's ``main(argv) -> exit code``: bad input becomes one line on stderr and a non-zero exit code."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    return wrapped
