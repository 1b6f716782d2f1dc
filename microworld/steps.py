"""The steps that the demo and the studies are made of: the suite's own command lines with the micro world's flags."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from captioning.device import has_bf16
from captioning.profiles import PROFILES, ROOT
from captioning.training.config import SETTINGS

# How much wider the full-size decoder is. Adam's rate for matrices goes with 1 / width (Yang et al., arXiv 2203.03466).
WIDTH_RATIO = 768 / 256


def flags(**options: object) -> list[str]:
    """Return options as words: ``flags(batch_size=8, html=True)`` is ``["--batch-size", "8", "--html"]``.

    False is ``--no-…``, None leaves the option out, and a list gives it several values.
    """
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag)
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


class Runner:
    """Runs the suite's commands one after another, shows them, and keeps the time and peak memory (GB) of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}

    def __call__(self, title: str, *arguments: object, **options: object) -> None:
        """Run ``python arguments… --options…`` in the repository.

        Raises:
            ValueError: the command failed; its own message is on stderr.
        """
        command = [*map(str, arguments), *flags(**options)]
        print(f"\n== {title}\n$ python {shlex.join(command)}", flush=True)
        start = time.time()
        with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=self.environment) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        self.seconds[title], self.memory[title] = time.time() - start, usage.ru_maxrss / 1e6
        if process.returncode:
            code = process.returncode
            raise ValueError(f"the step '{title}' failed with exit code {code}; see its message above")


def scaled(setting: str) -> dict[str, object]:
    """Return the options that bring a full-size setting to the micro world; one rule for all of them.

    Half the epochs, rounded up, in batches of half the size, so that a scene gets as many optimiser steps as a
    photograph does, in images or in captions; learning rates times ``WIDTH_RATIO``; all else as in full size.
    """
    config = SETTINGS[setting]
    return {
        "setting": setting,
        "epochs": math.ceil(config.epochs / 2),
        "batch_size": config.batch_size // 2,
        "val_images": 60,
        "lr": f"{config.lr * WIDTH_RATIO:.3g}",
        "projector_lr": f"{config.projector_lr * WIDTH_RATIO:.3g}",
    }


QUICK_SCENES = 2800  # that the demo trains on


def quick() -> dict[str, object]:
    """Return the demo's training: what captions best in the time that a newcomer waits (docs/micro_world.md).

    Few epochs of many scenes: none is seen often, so dropout costs more than it brings. bf16 where the processor
    multiplies in it.
    """
    return scaled("best") | {
        "epochs": 3,
        "lora_dropout": 0,
        "lr": 1e-3,
        "lora_plus": 8,
        "projector_lr": 1e-3,
        "precision": "bf16" if has_bf16(torch.device("cpu")) else "fp32",
    }


def draw(run: Runner, data: Path, split: str, count: int, seed: int | None = None) -> None:
    """Draw the scenes of a split."""
    run(f"draw {split}", "-m", "microworld.scenes", out=data, split=split, count=count, seed=seed)


def train(run: Runner, folder: Path, data: Path, cache: Path, **options: object) -> None:
    """Train a captioner into ``folder``."""
    run(f"train {folder.name}", "p2_train.py", profile="micro", data=data, cache=cache, out=folder, **options)


def caption(run: Runner, folder: Path, data: Path, split: str, **options: object) -> None:
    """Caption the scenes of a split with the captioner of a run folder, or by other options of p2_infer.py."""
    out, images = folder / f"{split}.json", data / "images" / split
    options = {"adapter": folder / "best.safetensors"} | options
    run(
        f"caption {split} ({folder.name})",
        "p2_infer.py",
        images,
        out,
        PROFILES["micro"].decoder,
        profile="micro",
        **options,
    )


def score(run: Runner, folder: Path, data: Path, split: str) -> None:
    """Score the captions of a split."""
    run(
        f"score {split} ({folder.name})",
        "evaluate.py",
        profile="micro",
        pred_file=folder / f"{split}.json",
        images_root=data / "images" / split,
        annotation_file=data / f"{split}.json",
        metrics="cider,clipscore,chair",
        boxes=data / f"{split}.json",  # the micro world's captions have theirs
        json=folder / f"{split}_scores.json",
        per_image=folder / f"{split}_per_image.json",
    )
