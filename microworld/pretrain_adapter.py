"""The adapter that ships: the demo's captioner, trained by the suite's scripts and stored in half precision."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from captioning.files import read_json
from captioning.models.adapter import read_adapter
from captioning.profiles import PROFILES, ROOT
from captioning.tensors import write_tensors
from captioning.training.run_folder import read_run
from microworld.recipes import Run, Training, save_record
from microworld.steps import Runner, caption, draw, quick, score, train

SPLITS = {"val": 300, "val_novel": 150}  # scenes that the shipped adapter is scored on: the demo's
SEED = 0  # of the drawings, as in the demo


def train_adapter(run: Run) -> None:
    """Draw the demo's scenes, train on them, and ship what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        work, runner = Path(folder), Runner()
        draw(runner, work / "data", "train", run.recipe.scenes, SEED)
        for split, count in SPLITS.items():
            draw(runner, work / "data", split, min(count, run.recipe.scenes), SEED)
        recipe = quick() | {"epochs": run.recipe.epochs, "batch_size": run.recipe.batch_size}
        train(runner, work / "lora", work / "data", work / "cache", device=str(run.device), **recipe)
        ship(run, runner, work)


def ship(run: Run, runner: Runner, work: Path) -> None:
    """Store the adapter of the run ``work/lora`` in half precision, score it on ``work/data``, and write its record."""
    folder, shipped = work / "lora", run.out / "adapter.safetensors"
    config, state = read_adapter(folder / "best.safetensors")
    encoder = PROFILES["micro"].encoder_weights
    config = replace(config, encoder_weights=str(Path(encoder or "").relative_to(ROOT)))  # wherever the repository is
    halves = {name: tensor.half() for name, tensor in state.items()}
    write_tensors(shipped, halves, {"captioner": json.dumps(asdict(config))})
    metrics: dict[str, float] = {}
    for split in SPLITS:
        caption(runner, folder, work / "data", split, adapter=shipped)
        score(runner, folder, work / "data", split)
        scores = read_json(folder / f"{split}_scores.json")
        metrics |= {f"{split} {metric}": scores[metric] for metric in ("CIDEr", "CLIPScore")}
    trained = read_run(folder)
    training = Training(int(trained.epochs[-1]["step"]), trained.seconds or 0.0, float(trained.steps[-1]["loss"]))
    settings: dict[str, Any] = {key: trained.config["train"][key] for key in quick() if key != "setting"}
    data = {"world": "micro", "split": "train", "seed": SEED, "scenes": run.recipe.scenes}
    count = sum(tensor.numel() for tensor in state.values())
    save_record(run, training, metrics, count, data, {"setting": trained.config["setting"], **settings})
