"""A run folder: what is in it, how it survives a kill, and which ones hold a finished training."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import torch

from captioning.files import atomic_path, check_writable, write_text
from captioning.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)

CONFIG, METRICS, BEST, LAST, LOCK = "config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "run.lock"
NEWEST, BEFORE = "training_state.safetensors", "training_state.before.safetensors"
# What the config.json of a run must hold for a report.
CONFIG_KEYS = {"setting", "profile", "train", "captioner", "trainable_parameters", "device", "versions"}
TRAIN_KEYS = {"epochs", "batch_size", "lr", "lora_rank", "lora_alpha", "seed"}


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        epoch: finished epochs.
        position: optimiser steps taken in the epoch that has begun.
        step: optimiser steps taken in all.
        losses: of the steps of this epoch.
        skipped, skipped_in_a_row: steps without a finite loss and gradient.
        best: the highest score of an epoch.
        criterion: what the score is made of: ``val_cider``, or ``val_loss`` with the sign changed; empty at first.
        stale: epochs since the best one.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float = -math.inf
    criterion: str = ""
    stale: int = 0

    def end_epoch(self) -> None:
        """Begin with the next epoch."""
        self.epoch, self.position, self.losses = self.epoch + 1, 0, []

    def is_better(self, record: Mapping[str, Any]) -> bool:
        """Whether the metrics of an epoch are better than those of all before; it then is the best."""
        if not self.criterion:  # chosen once, so that a CIDEr is never compared with a loss
            self.criterion = "val_cider" if "val_cider" in record else "val_loss"
        score = record.get("val_cider", -math.inf) if self.criterion == "val_cider" else -record["val_loss"]
        better = score > self.best
        self.best, self.stale = (score, 0) if better else (self.best, self.stale + 1)
        return better


@dataclass
class State:
    """All that a resumed training needs, in one file, so that weights, optimiser and counts always agree.

    Attributes:
        adapter: LoRA and projector by name.
        optimizer: the optimiser's ``state_dict()``.
        random: state of the generators that dropout draws from, by name.
        progress: how far the training has come.
        gradients: sums of all gradients so far by name, where they are never cleared.
    """

    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    random: dict[str, torch.Tensor]
    progress: Progress
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write one safetensors file, atomically and with a checksum."""
        moments = {f"{i}.{k}": v for i, state in self.optimizer["state"].items() for k, v in state.items()}
        parts = {"adapter": self.adapter, "optimizer": moments, "random": self.random, "gradients": self.gradients}
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        values = {**asdict(self.progress), "groups": self.optimizer["param_groups"]}
        write_tensors(path, tensors, {"values": json.dumps(values)})

    @classmethod
    def read(cls, path: Path) -> State:
        """Read what ``write`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds something else.
        """
        tensors, texts = read_tensors(path)
        parts: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "optimizer": {}, "random": {}, "gradients": {}}
        state: dict[int, dict[str, torch.Tensor]] = {}
        try:
            values = json.loads(texts["values"])
            progress = Progress(**{f.name: values[f.name] for f in fields(Progress)})
            optimizer = {"state": state, "param_groups": values["groups"]}
            for name, tensor in tensors.items():
                part, rest = name.split(".", 1)
                parts[part][rest] = tensor
            for name, tensor in parts["optimizer"].items():
                number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: no training state of this suite ({error!r})") from error
        return cls(parts["adapter"], optimizer, parts["random"], progress, parts["gradients"])


class RunFolder:
    """The folder of one training; one process writes it.

    config.json                          all that the training was started with
    metrics.jsonl, loss.png              a line every few steps and every epoch, and their curves
    best.safetensors, last.safetensors   adapters of the best epoch and of the last one
    training_state.safetensors           what ``--resume`` needs
    training_state.before.safetensors    the same of an earlier step, should that one be damaged
    run.lock                             locked by the process that writes
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.best, self.last = (path / name for name in (CONFIG, METRICS, BEST, LAST))
        self.newest, self.before = path / NEWEST, path / BEFORE

    @property
    def has_state(self) -> bool:
        """Whether there is a training to resume."""
        return self.newest.exists() or self.before.exists()

    def claim(self, resume: bool) -> IO[bytes]:
        """Make the folder and lock it, to begin a training or to resume the one that is there.

        Raises:
            FileNotFoundError: there is nothing to resume.
            ValueError: there is a training and it is not to be resumed, another process holds the lock, or the folder
                cannot be written.
        """
        if resume and not self.has_state:
            raise FileNotFoundError(f"--resume: {self.path} holds no state of a run; start without --resume")
        if not resume and self.has_state:
            raise ValueError(f"--out {self.path}: holds a run already; add --resume, name another folder, or remove it")
        file = self.lock()
        if not resume:
            self.metrics.unlink(missing_ok=True)  # of a run that was stopped before its first state
        return file

    def lock(self) -> IO[bytes]:
        """Make the folder and lock it until the returned file is closed or the process ends.

        Temporary files that a killed writer left are removed: with the lock held, no one else writes them.

        Raises:
            ValueError: another process holds the lock, or the folder cannot be written.
        """
        check_writable(self.path, "--out")
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / LOCK).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(
                f"{self.path}: another process is writing this run; wait for it, or choose another"
            ) from error
        for left in self.path.glob(".*.tmp"):
            left.unlink()
        return file

    def check_room(self, needed: int) -> None:
        """Raise ValueError where the disk has fewer than ``needed`` bytes free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise ValueError(
                f"{self.path}: the run writes up to {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; free some "
                "space, or choose another folder with --out"
            )

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, through to the disk."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_metrics(self, progress: Progress) -> None:
        """Drop the lines of steps and epochs that will be taken again, and a last line that a kill cut short."""
        kept = []
        text = self.metrics.read_text(encoding="utf-8", errors="replace") if self.metrics.exists() else ""
        for line in text.splitlines(keepends=True):
            try:
                record = json.loads(line)
                known = record["step"] <= progress.step and record.get("epoch", 0) <= progress.epoch
                if known and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                log.warning("%s: a damaged line is dropped", self.metrics)
        write_text(self.metrics, "".join(kept))

    def save_state(self, state: State) -> None:
        """Write the newest state; the one that was the newest is kept as the one before."""
        beside = self.path / f"{NEWEST}.new"
        state.write(beside)
        if self.newest.exists():
            self.newest.replace(self.before)
        beside.replace(self.newest)  # killed before this line, there is only the one before, and it is intact

    def load_state(self) -> State:
        """Return the newest state that is intact, with a warning where that is not the newest one.

        Raises:
            FileNotFoundError: there is no state.
            ValueError: no state is intact.
        """
        errors = []
        for path in (self.newest, self.before):
            try:
                state = State.read(path)
            except FileNotFoundError:
                continue
            except ValueError as error:
                errors.append(str(error))
                log.warning("--resume: %s", error)
                continue
            if path == self.before:
                log.warning("--resume: continuing from the state before, %s", path)
            return state
        if not errors:
            raise FileNotFoundError(f"--resume: {self.path} holds no {NEWEST}; start without --resume")
        raise ValueError(f"--resume: no state is intact: {'; '.join(errors)}; start again in another folder")

    def describe(self) -> dict[str, str]:
        """Return a sentence on the ``training`` and one on the ``validation`` of the best adapter, for a model card."""
        described = dict.fromkeys(("training", "validation"), "not recorded beside the adapter")
        if self.config.is_file():
            config = _object(self.config)
            keys = ("epochs", "batch_size", "optimizer", "lr", "seed")
            numbers = ", ".join(f"{key} {config['train'][key]}" for key in keys)
            described["training"] = (
                f"setting {config['setting']}: {numbers}; {config['trainable_parameters']:,} parameters; "
                f"profile {config.get('profile', 'not recorded')}; "
                f"revision {config['git']}, torch {config['versions']['torch']}"
                + ("; random encoder, a check of shapes only" if config["random_weights"] else "")
            )
        records = _records(self.metrics) if self.metrics.is_file() else []
        best = [record for record in records if record["kind"] == "epoch" and record["best"]]
        if best:
            scores = {key: best[-1].get(f"val_{key}") for key in ("cider", "loss")}
            shown = ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if value is not None)
            images = best[-1]["val_images"]
            described["validation"] = f"epoch {best[-1]['epoch']}: {shown}, on {images} validation images"
        scored = self.path / "val_scores.json"
        if scored.is_file():
            scores = _object(scored)
            named = ", ".join(f"{name} {scores[name]:.4f}" for name in scores.get("metrics", ()))
            described["validation"] += f"; afterwards {named} on {scores.get('images')} images"
        return described

    def plot_losses(self) -> None:
        """Draw loss.png from metrics.jsonl: training and validation loss, and CIDEr where it was measured."""
        from matplotlib.figure import Figure  # no pyplot: nothing global is touched

        records = _records(self.metrics)
        steps, epochs = ([r for r in records if r["kind"] == kind] for kind in ("step", "epoch"))
        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        axis.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#9db8d9", lw=1, label="training loss")
        at = [r["step"] for r in epochs]
        axis.plot(at, [r["val_loss"] for r in epochs], "o-", color="#1f4e8c", label="validation loss")
        axis.set(xlabel="optimiser step", ylabel="loss a token (nats)", ylim=(0, None))
        handles, labels = axis.get_legend_handles_labels()
        if any("val_cider" in r for r in epochs):
            right = axis.twinx()
            ciders = [r.get("val_cider", math.nan) for r in epochs]
            right.plot(at, ciders, "s--", color="#c2571a", label="validation CIDEr")
            right.set(ylabel="CIDEr", ylim=(0, None))
            more = right.get_legend_handles_labels()
            handles, labels = handles + more[0], labels + more[1]
        axis.legend(handles, labels, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.13), frameon=False)
        with atomic_path(self.path / "loss.png") as temporary:
            figure.savefig(temporary, format="png", dpi=130)


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
    config = _object(folder / CONFIG)
    missing = sorted(CONFIG_KEYS - config.keys())
    if not missing and isinstance(config["train"], dict):
        missing = sorted(f"train.{key}" for key in TRAIN_KEYS - config["train"].keys())
    if missing:
        raise ValueError(f"config.json is of another version of the suite (it lacks {', '.join(missing)})")
    records = _records(folder / METRICS)
    steps, epochs, stopped = ([r for r in records if r["kind"] == kind] for kind in ("step", "epoch", "stopped"))
    done, wanted = max((e.get("epoch", 0) for e in epochs), default=0), config["train"]["epochs"]
    if done < wanted and not stopped:
        raise ValueError(f"its training has not ended ({done} of {wanted} epochs; still running, or interrupted)")
    if not (folder / BEST).is_file():
        raise ValueError("best.safetensors is missing")
    scores = {p.name.removesuffix("_scores.json"): _object(p) for p in sorted(folder.glob("*_scores.json"))}
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
        for file in (CONFIG, METRICS)
        for path in root.glob("*/" * level + file)
    }
    runs, omitted = [], []
    for folder in sorted(folders):
        name = folder.relative_to(root).as_posix()
        if not (folder / METRICS).exists() and not (folder / BEST).exists():
            continue  # a config.json of something else, such as a model's
        try:
            runs.append(read_run(folder, name))
        except ValueError as error:
            omitted.append(Omitted(name, str(error)))
    return runs, omitted


def _object(path: Path) -> dict[str, Any]:
    value = _read(path, json.loads)
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def _records(path: Path) -> list[dict[str, Any]]:
    records = _read(path, lambda text: [json.loads(line) for line in text.splitlines()])
    if not all(isinstance(r, dict) and "kind" in r for r in records):
        raise ValueError(f"{path.name} is of another version of the suite (lines without a kind)")
    return records


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged or half-written ({error})") from error
