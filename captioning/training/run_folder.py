"""Run folders as readers see them: what a training left, whether it is whole, and why it is left out if not."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

CONFIG_KEYS = {"setting", "profile", "train", "captioner", "trainable_parameters", "device", "versions"}
TRAIN_KEYS = {"epochs", "batch_size", "lr", "lora_rank", "lora_alpha", "seed"}


@dataclass(frozen=True)
class Run:
    """One finished training.

    Attributes:
        name: its folder, relative to where the search began.
        config: config.json.
        steps, epochs, averages: lines of metrics.jsonl, in order.
        scores: by split, what ``evaluate.py --json`` wrote into ``<split>_scores.json``.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    averages: list[dict[str, Any]] = field(default_factory=list)
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
        """The best validation CIDEr of an epoch or of averaged weights, on the run's own validation subset."""
        return max((r["val_cider"] for r in (*self.epochs, *self.averages) if "val_cider" in r), default=None)


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
    steps, averages = ([r for r in records if r["kind"] == kind] for kind in ("step", "average"))
    return Run(name or folder.name, folder, config, steps, epochs, averages, scores)


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
