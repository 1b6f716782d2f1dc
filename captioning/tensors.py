"""What a run must not lose: checksummed tensors, two states of a run, one writer a folder, stops at a whole step."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from captioning import cli as runtime

log = logging.getLogger(__name__)

NEWEST, BEFORE = "training_state.safetensors", "training_state.before.safetensors"
LOCK = "run.lock"
DIGEST = "digest"  # name of the checksum among a file's texts


# --- files of tensors -----------------------------------------------------------------------------------------------


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """Return a short hash of the names, shapes, types and values of a state dict."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():  # torch cannot view an empty tensor as bytes
            digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
    """Write tensors and texts to one safetensors file, atomically, with a checksum over both.

    Raises:
        OSError: the disk is full, or the folder must not be written.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        with runtime.atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={**texts, DIGEST: _digest(tensors, texts)})
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{path}: cannot be written ({error})") from error


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and texts of a safetensors file; a checksum in it must be right, and may be missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from error
    wanted = texts.pop(DIGEST, None)
    if wanted is not None and wanted != _digest(tensors, texts):
        raise ValueError(f"{path}: damaged (its checksum is wrong); copy or make it again")
    return tensors, texts


def _digest(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    words = json.dumps([sorted(texts.items()), fingerprint(tensors)])
    return hashlib.sha256(words.encode()).hexdigest()


# --- a run folder ---------------------------------------------------------------------------------------------------


def has_state(folder: Path) -> bool:
    """Whether ``folder`` holds a run that can be resumed."""
    return any((folder / name).exists() for name in (NEWEST, BEFORE))


def save_state(folder: Path, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Write the newest state; the one that was the newest stays as the one before."""
    beside = folder / f"{NEWEST}.new"
    write_tensors(beside, tensors, {"values": json.dumps(values)})
    if (folder / NEWEST).exists():
        (folder / NEWEST).replace(folder / BEFORE)
    beside.replace(folder / NEWEST)  # killed in front of this line: only the one before is there, and it is whole


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors and values of the newest state that is whole; a damaged newest one is passed over, with a warning.

    Raises:
        FileNotFoundError: ``folder`` holds no state.
        ValueError: no state in it is whole.
    """
    if not has_state(folder):
        raise FileNotFoundError(f"--resume: {folder} holds no {NEWEST}; start without --resume")
    errors = []
    for name in (NEWEST, BEFORE):
        try:
            tensors, texts = read_tensors(folder / name)
            values = json.loads(texts["values"])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError) as error:
            errors.append(str(error))
            log.warning("--resume: %s", error)
            continue
        if errors or name == BEFORE:
            log.warning("--resume: going on from the state before, %s", folder / name)
        return tensors, values
    raise ValueError(f"--resume: no state is whole: {'; '.join(errors)}; start anew in another folder")


def lock_folder(folder: Path) -> IO[bytes]:
    """Make ``folder`` and lock it for this process; the lock goes with the returned file, or when the process dies.

    Temporary files that a killed writer left are removed: with the lock held, no one else writes them.

    Raises:
        ValueError: another process holds the lock.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"{folder}: another process is writing this run; wait for it, or choose another") from error
    for left in folder.glob(".*.tmp"):
        left.unlink()
    return file


def check_room(folder: Path, needed: int) -> None:
    """Raise ValueError where the disk of ``folder`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: the run writes up to {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; free some space, "
            "or choose another folder with --out"
        )


# --- signals --------------------------------------------------------------------------------------------------------


class StopSignals:
    """While entered, the first SIGTERM or SIGINT sets ``requested`` and does nothing else; the second acts as ever.

    Outside of the main thread, where Python sets no handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        log.warning("%s: stopping behind this step; once more stops at once", signal.Signals(number).name)
