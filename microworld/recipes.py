"""What the pre-training of all micro models shares: shapes, recipes, drawn scenes, the optimiser loop, the record."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from captioning.files import write_json
from captioning.profiles import PROFILES
from decoder import DecoderConfig
from microworld.scene import SIZE, Scene
from microworld.scenes import make_image, spread
from microworld.steps import QUICK_SCENES, quick
from microworld.things import COLOURS, KINDS

log = logging.getLogger(__name__)

# Seeds of the `pretrain` split: no two share a scene.
SCENE_SEEDS = {"encoder": 0, "scorer": 1, "decoder": 2, "test": 3, "llava": 4}
VOCAB_SIZE = 1024
CLIP_CONTEXT = 48  # tokens; no caption of the micro world is longer
ENCODER_IMAGE, ENCODER_PATCH = (PROFILES["micro"].encoder_kwargs[k] for k in ("img_size", "patch_size"))
DECODER = DecoderConfig(vocab_size=VOCAB_SIZE, n_positions=320, n_embd=256, n_layer=4, n_head=4)
TEXT_TOWER = {
    "context_length": CLIP_CONTEXT,
    "vocab_size": VOCAB_SIZE,
    "width": 192,
    "heads": 3,
    "layers": 3,
    "hf_tokenizer_name": "local",
}
VISION_TOWERS: dict[str, dict[str, Any]] = {
    "encoder": {
        "layers": 6,
        "width": 192,
        "head_width": 64,
        "patch_size": ENCODER_PATCH,
        "image_size": ENCODER_IMAGE,
    },
    "scorer": {"layers": [1, 2, 2, 1], "width": 32, "image_size": 96, "patch_size": None},
}
CLIP_CONFIGS: dict[str, dict[str, Any]] = {
    name: {"embed_dim": 192, "vision_cfg": tower, "text_cfg": TEXT_TOWER} for name, tower in VISION_TOWERS.items()
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, for all models


@dataclass(frozen=True)
class Recipe:
    """What one pre-training run takes."""

    scenes: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.1
    warmup: int = 60
    patch_loss: float = 0.0
    seed: int = 0


DEMO: dict[str, Any] = quick()
RECIPES = {
    "encoder": Recipe(scenes=20000, epochs=7, batch_size=128, lr=1e-3, patch_loss=1.0),
    "scorer": Recipe(scenes=12000, epochs=5, batch_size=128, lr=1e-3),
    "decoder": Recipe(scenes=24000, epochs=2, batch_size=16, lr=1.5e-3, weight_decay=0.05),
    "decoder_images": Recipe(scenes=24000, epochs=1, batch_size=8, lr=1e-3, weight_decay=0.05),
    "llava": Recipe(scenes=14000, epochs=4, batch_size=24, lr=1.5e-3, weight_decay=0.05, warmup=100),
    "adapter": Recipe(scenes=QUICK_SCENES, epochs=DEMO["epochs"], batch_size=DEMO["batch_size"], lr=DEMO["lr"]),
}


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass
class Scenes:
    """Scenes in memory: pixels (N, S, S, 3) uint8, five captions each, patch labels (N, 2, G, G)."""

    pixels: np.ndarray
    captions: list[list[str]]
    labels: np.ndarray


def draw_scenes(seed: int, count: int, pixels: int, workers: int) -> Scenes:
    """Draw ``count`` scenes of the `pretrain` split with ``seed`` at ``pixels`` a side."""
    jobs = [(seed, index, pixels) for index in range(count)]
    images, captions, labels = zip(*spread(_draw_small, jobs, workers, "draw"), strict=True)
    return Scenes(np.stack(images), list(captions), np.stack(labels))


def _draw_small(job: tuple[int, int, int]) -> tuple[np.ndarray, list[str], np.ndarray]:
    seed, index, pixels = job
    image, scene, captions = make_image("pretrain", seed, index)
    image = image.resize((pixels, pixels), Image.Resampling.BICUBIC)
    return np.asarray(image), [c.text for c in captions], patch_labels(scene, pixels // ENCODER_PATCH)


def patch_labels(scene: Scene, grid: int) -> np.ndarray:
    """Return (2, grid, grid) int8 labels: kind and colour of the thing at each patch's centre, 0 for none."""
    labels = np.zeros((2, grid, grid), np.int8)
    centres = (np.arange(grid) + 0.5) * SIZE / grid
    kinds, colours = list(KINDS), list(COLOURS)
    for thing in scene.things():
        x, y, w, h = thing.box
        inside = np.ix_((centres > y) & (centres < y + h), (centres > x) & (centres < x + w))
        labels[0][inside] = kinds.index(thing.kind) + 1
        labels[1][inside] = colours.index(thing.colour) + 1 if thing.colour else 0
    return labels


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Turn (B, S, S, 3) uint8 into (B, 3, S, S) float with CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One pre-training: the model's name, its recipe, the folder of the result, and what it runs on."""

    name: str
    recipe: Recipe
    out: Path
    device: torch.device
    workers: int

    @property
    def steps_per_epoch(self) -> int:
        """How many full batches of scenes an epoch has."""
        return self.recipe.scenes // self.recipe.batch_size

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (epoch, indices of a batch of scenes), shuffled in every epoch."""
        rng, size = np.random.default_rng(self.recipe.seed), self.recipe.batch_size
        for epoch in range(self.recipe.epochs):
            order = rng.permutation(self.recipe.scenes)
            for k in range(self.steps_per_epoch):
                yield epoch, order[k * size : (k + 1) * size]


@dataclass(frozen=True)
class Training:
    """What came of a training: its steps, seconds, and the mean loss of the last 50 steps."""

    steps: int
    seconds: float
    last_loss: float


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Return the rate at ``step``: linear warm-up, then a cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimise(
    run: Run,
    parameters: Iterable[torch.nn.Parameter],
    batches: Iterable[Any],
    steps_per_epoch: int,
    loss_of: Callable[[Any], torch.Tensor],
) -> Training:
    """Run AdamW over ``batches`` under bf16 autocast, clipping gradients at 1; matrices decay, vectors do not.

    Raises:
        ValueError: a loss is not finite.
    """
    recipe, steps = run.recipe, run.recipe.epochs * steps_per_epoch
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    start, losses = time.time(), []
    for step, batch in zip(tqdm(range(steps), disable=None), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, recipe)
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise ValueError(f"pre-training: the loss is {loss.item()} at step {step}; lower the learning rate")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.item())
        if step % 50 == 0:
            mean = np.mean(losses[-50:])
            log.info("%s step %d/%d loss %.3f %.0f s", run.name, step, steps, mean, time.time() - start)
    return Training(steps, time.time() - start, float(np.mean(losses[-50:])))


def write_record(
    run: Run, training: Training, metrics: dict[str, float], model: torch.nn.Module, **more: object
) -> None:
    """Write the JSON that says how the weights were made; ``more`` goes into its recipe."""
    recipe = run.recipe
    data = {"world": "micro", "split": "pretrain", "seed": SCENE_SEEDS[run.name], "scenes": recipe.scenes}
    save_record(run, training, metrics, sum(p.numel() for p in model.parameters()), data, vars(recipe) | more)


def save_record(
    run: Run,
    training: Training,
    metrics: dict[str, float],
    parameters: int,
    data: dict[str, Any],
    recipe: dict[str, Any],
) -> None:
    """Write ``training.json`` beside the weights."""
    record = {
        "model": run.name,
        "parameters": parameters,
        "command": f"python -m microworld.pretrain {run.name}",
        "data": data,
        "recipe": recipe,
        "steps": training.steps,
        "seconds": round(training.seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "metrics": {k: round(v, 4) for k, v in metrics.items()},
    }
    write_json(run.out / "training.json", record)
    print(json.dumps(record["metrics"]))
