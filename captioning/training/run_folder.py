"""A run folder: what lies in it, how it survives a kill, and when not to trust one."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from types import FrameType, TracebackType
from typing import IO, Any

import torch

from captioning.files import atomic_path
from captioning.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)

NEWEST, BEFORE = "training_state.safetensors", "training_state.before.safetensors"


LOCK = "run.lock"


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


CONFIG_KEYS = {"setting", "profile", "train", "captioner", "trainable_parameters", "device", "versions"}


TRAIN_KEYS = {"epochs", "batch_size", "lr", "lora_rank", "lora_alpha", "seed"}


@dataclass(frozen=True)
class Run:
    """One finished training.

    Attributes:
        name: its folder, relative to where the search began.
        config: config.json.
        steps, epochs: lines of metrics.jsonl, in order.
        scores: by split, what ``evaluate.py --json`` wrote into ``<split>_scores.json``.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """``xe`` (cross-entropy) or ``scst``."""
        return self.config["train"].get("objective", "xe")

    @property
    def blind(self) -> bool:
        """Whether it was trained on captions dealt to wrong images."""
        return bool(self.config.get("shuffled_captions"))

    @property
    def seconds(self) -> float | None:
        """Time of the training, where it was measured."""
        return self.epochs[-1].get("seconds")

    @property
    def best_cider(self) -> float | None:
        """The best validation CIDEr of an epoch, on the run's own validation subset."""
        return max((e["val_cider"] for e in self.epochs if "val_cider" in e), default=None)


@dataclass(frozen=True)
class Omitted:
    """A folder that looks like a run and is left out, and why."""

    name: str
    reason: str


def read_run(folder: str | os.PathLike, name: str | None = None) -> Run:
    """Read one run folder.

    Raises:
        ValueError: it is half-written, damaged, of another version of the suite, or its training has not ended.
    """
    folder = Path(folder)
    config = _object(folder / "config.json")
    missing = sorted(CONFIG_KEYS - config.keys())
    if not missing and isinstance(config["train"], dict):
        missing = sorted(f"train.{key}" for key in TRAIN_KEYS - config["train"].keys())
    if missing:
        raise ValueError(f"config.json is of another version of the suite (it lacks {', '.join(missing)})")
    records = _records(folder / "metrics.jsonl")
    epochs = [r for r in records if r["kind"] == "epoch"]
    done, wanted = max((e.get("epoch", 0) for e in epochs), default=0), config["train"]["epochs"]
    stopped = any(r["kind"] == "stopped" for r in records)
    if done < wanted and not stopped:
        raise ValueError(f"its training has not ended ({done} of {wanted} epochs; going on, or broken off)")
    if not (folder / "best.safetensors").is_file():
        raise ValueError("best.safetensors is missing")
    scores = {p.name.removesuffix("_scores.json"): _object(p) for p in sorted(folder.glob("*_scores.json"))}
    steps = [r for r in records if r["kind"] == "step"]
    return Run(name or folder.name, folder, config, steps, epochs, scores)


def find_runs(root: str | os.PathLike, depth: int = 3) -> tuple[list[Run], list[Omitted]]:
    """Return the finished runs up to ``depth`` folders below ``root``, by name, and those that are left out.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"--runs {root}: no such folder; `make demo` makes one called demo")
    folders = {
        path.parent
        for level in range(depth + 1)
        for file in ("config.json", "metrics.jsonl")
        for path in root.glob("*/" * level + file)
    }
    runs, omitted = [], []
    for folder in sorted(folders):
        name = folder.relative_to(root).as_posix()
        if not (folder / "metrics.jsonl").exists() and not (folder / "best.safetensors").exists():
            continue  # a config.json of something else, such as a model's
        try:
            runs.append(read_run(folder, name))
        except ValueError as error:
            omitted.append(Omitted(name, str(error)))
    return runs, omitted


def spread(values: list[float], digits: int = 3) -> str:
    """Return ``mean ± standard deviation`` of several values, or the one value."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged or half-written ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged or half-written ({error})") from error
    if not all(isinstance(r, dict) and "kind" in r for r in records):
        raise ValueError(f"{path.name} is of another version of the suite (lines without a kind)")
    return records


def plot_losses(out: Path) -> None:
    """Draw loss.png from metrics.jsonl: training and validation loss, and CIDEr where it was measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, epochs = ([r for r in lines if r["kind"] == kind] for kind in ("step", "epoch"))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#9db8d9", lw=1, label="training loss")
    at = [r["step"] for r in epochs]
    axis.plot(at, [r["val_loss"] for r in epochs], "o-", color="#1f4e8c", label="validation loss")
    axis.set(xlabel="optimiser step", ylabel="loss a token (nats)", ylim=(0, None))
    handles, labels = axis.get_legend_handles_labels()
    if any("val_cider" in r for r in epochs):
        right = axis.twinx()
        right.plot(at, [r.get("val_cider", math.nan) for r in epochs], "s--", color="#c2571a", label="validation CIDEr")
        right.set(ylabel="CIDEr", ylim=(0, None))
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axis.legend(handles, labels, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.13), frameon=False)
    with atomic_path(out / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
