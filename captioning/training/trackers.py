"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases or Trackio, each through accelerate's own adapter."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioning.imports import import_guarded
from captioning.messages import install

NAMES = ("tensorboard", "wandb", "trackio")  # pip's names too
CHOICES = (*NAMES, "all")
PROJECT = "captioning"  # the folder's name distinguishes the runs


class Trackers:
    """The trackers of one run; each line of metrics.jsonl goes to all of them.

    Args:
        name: of a tracker, or ``all`` for every one that is installed.
        out: the run folder; TensorBoard's files go to ``out/tensorboard``.

    Raises:
        ValueError: the tracker, or every one of them, is not installed.
    """

    def __init__(self, name: str, out: Path) -> None:
        tracking = import_guarded("accelerate.tracking")
        installed = [str(tracker) for tracker in tracking.get_available_trackers()]
        wanted = NAMES if name == "all" else (name,)
        found = [tracker for tracker in wanted if tracker in installed]
        if not found:
            packages = " or ".join(install(n) if n == "tensorboard" else f"`pip install {n}`" for n in wanted)
            raise ValueError(f"--log-with {name}: not installed; {packages}, or leave the flag out")
        arguments = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": str(out)},
            "wandb": {"run_name": PROJECT, "name": out.name, "dir": str(out)},
            "trackio": {"run_name": PROJECT, "name": out.name},
        }
        self._trackers = [tracking.LOGGER_TYPE_TO_CLASS[tracker](**arguments[tracker]) for tracker in found]

    @contextlib.contextmanager
    def started(self, config: dict[str, Any]) -> Iterator[None]:
        """Start all trackers with the run's ``config`` as their hyperparameters; end them at the end."""
        with contextlib.ExitStack() as ends:
            for tracker in self._trackers:
                tracker.start()
                ends.callback(tracker.finish)
                tracker.store_init_configuration(flat(config))
            yield

    def log(self, record: dict[str, Any]) -> None:
        """Pass on the numbers of one line of metrics.jsonl, named by its kind."""
        values = {
            f"{record['kind']}/{key}": float(value)
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float))
        }
        for tracker in self._trackers:
            tracker.log(values, step=record["step"])


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as one level of plain values, ``{"train.lr": 0.001}``, which all trackers take."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return values
