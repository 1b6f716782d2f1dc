"""Pre-train the micro world's small models from nothing but its own `pretrain` split.

``python -m microworld.pretrain MODEL``, or ``all``, writes into ``microworld/weights/<MODEL>/``:

* ``decoder``: a GPT-2 in the full-size decoder's file format, trained on caption text alone; it never sees an image.
  Captions are packed into streams that fill the whole context, so that every position embedding is trained.
* ``encoder``: an open_clip ViT. Contrastive loss (Radford et al. 2021) and, beside it, a linear read-out of what each
  patch shows (kind and colour, from the boxes), which makes the last layer's tokens say what is where after a few
  thousand drawings; the read-outs are thrown away afterwards. Its vision tower is P2's encoder, through timm.
* ``scorer``: an open_clip ResNet with other scenes, another architecture and the contrastive loss alone; for scores.
* ``llava``: a LLaVA with the encoder's vision tower, taught by instructions; see `microworld.pretrain_llava`.

Weights are stored as fp16 safetensors, each beside a JSON of seed, data, steps, time and metrics.
"""

from __future__ import annotations

import json
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from captioning.cli import FlagParser, command, setup_logging
from captioning.data import tokenizer as tokenizer_module
from captioning.data.tokenizer import Tokenizer
from captioning.device import pick_device, seed_everything
from captioning.files import atomic_path, write_json
from captioning.imports import import_guarded
from captioning.profiles import MICRO_WEIGHTS, PROFILES
from decoder import Decoder, DecoderConfig, gpt2_state_dict, init_weights
from microworld.scenes import SIZE, Scene, make_image, make_scene
from microworld.things import COLOURS, KINDS

log = logging.getLogger(__name__)

# Seeds of the `pretrain` split: no two share a scene.
SCENE_SEEDS = {"encoder": 0, "scorer": 1, "decoder": 2, "test": 3, "llava": 4}
VOCAB_SIZE = 1024
CLIP_CONTEXT = 48  # tokens; no caption of the micro world is longer
ENCODER_IMAGE, ENCODER_PATCH = (PROFILES["micro"].encoder_kwargs[k] for k in ("img_size", "patch_size"))
DECODER = DecoderConfig(vocab_size=VOCAB_SIZE, n_positions=320, n_embd=256, n_layer=4, n_head=4)
CLIP_CONFIGS: dict[str, dict[str, Any]] = {
    "encoder": {
        "embed_dim": 192,
        "vision_cfg": {
            "layers": 6,
            "width": 192,
            "head_width": 64,
            "patch_size": ENCODER_PATCH,
            "image_size": ENCODER_IMAGE,
        },
        "text_cfg": {
            "context_length": CLIP_CONTEXT,
            "vocab_size": VOCAB_SIZE,
            "width": 192,
            "heads": 3,
            "layers": 3,
            "hf_tokenizer_name": "local",
        },
    },
    "scorer": {
        "embed_dim": 192,
        "vision_cfg": {"layers": [1, 2, 2, 1], "width": 32, "image_size": 96, "patch_size": None},
        "text_cfg": {
            "context_length": CLIP_CONTEXT,
            "vocab_size": VOCAB_SIZE,
            "width": 192,
            "heads": 3,
            "layers": 3,
            "hf_tokenizer_name": "local",
        },
    },
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, for both models

MODELS = ("tokenizer", "decoder", "encoder", "scorer", "llava")  # in the order in which they need each other


@dataclass
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


RECIPES = {
    "encoder": Recipe(scenes=20000, epochs=7, batch_size=128, lr=1e-3, patch_loss=1.0),
    "scorer": Recipe(scenes=12000, epochs=5, batch_size=128, lr=1e-3),
    "decoder": Recipe(scenes=24000, epochs=3, batch_size=16, lr=1.5e-3, weight_decay=0.05),
    "llava": Recipe(scenes=14000, epochs=4, batch_size=24, lr=1.5e-3, weight_decay=0.05, warmup=100),
}


# --- data -----------------------------------------------------------------------------------------------------------


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


@dataclass
class Scenes:
    """Scenes in memory: pixels (N, S, S, 3) uint8, five captions each, patch labels (N, 2, G, G)."""

    pixels: np.ndarray
    captions: list[list[str]]
    labels: np.ndarray


def draw_scenes(seed: int, count: int, pixels: int, workers: int) -> Scenes:
    """Draw ``count`` scenes of the `pretrain` split with ``seed`` at ``pixels`` a side."""
    jobs = [(seed, index, pixels) for index in range(count)]
    with ProcessPoolExecutor(workers) as pool:
        rows = list(tqdm(pool.map(_draw_small, jobs, chunksize=32), total=count, desc="draw", disable=None))
    images, captions, labels = zip(*rows, strict=True)
    return Scenes(np.stack(images), list(captions), np.stack(labels))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Turn (B, S, S, 3) uint8 into (B, 3, S, S) float with CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


# --- training -------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Return the rate at ``step``: linear warm-up, then a cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimise(
    parameters: list[torch.nn.Parameter],
    batches: Iterator,
    steps: int,
    recipe: Recipe,
    loss_of: Callable[[Any], torch.Tensor],
    device: torch.device,
    note: Callable[[int, float], None],
) -> None:
    """Run AdamW over ``batches`` under bf16 autocast, clipping gradients at 1; matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    for step, batch in zip(tqdm(range(steps), disable=None), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, recipe)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise ValueError(f"pre-training: the loss is {loss.item()} at step {step}; lower the learning rate")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        note(step, loss.item())


class PatchReadout(torch.nn.Module):
    """Linear read-outs of kind and colour from every patch token; pre-training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = torch.nn.Linear(width, len(KINDS) + 1)
        self.colour = torch.nn.Linear(width, len(COLOURS) + 1)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss for ``tokens`` (B, G*G, D) against ``labels`` (B, 2, G, G); empty patches weigh less."""
        kind, colour = labels.long().flatten(2).unbind(1)  # (B, G*G) each
        weight = torch.where(kind > 0, 1.0, 0.25)
        return sum(
            (F.cross_entropy(head(tokens).float().transpose(1, 2), target, reduction="none") * weight).mean()
            for head, target in ((self.kind, kind), (self.colour, colour))
        )


def train_clip(name: str, recipe: Recipe, out: Path, device: torch.device, workers: int) -> None:
    """Pre-train the ``encoder`` or the ``scorer`` and write an open_clip folder with its tokenizer."""
    open_clip = import_guarded("open_clip")
    seed_everything(recipe.seed)
    copy_clip_tokenizer(out)
    config = CLIP_CONFIGS[name]
    model = open_clip.CLIP(**config, output_dict=False).to(device)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(out), context_length=CLIP_CONTEXT)
    scenes = draw_scenes(SCENE_SEEDS[name], recipe.scenes, config["vision_cfg"]["image_size"], workers)
    tokens = torch.stack([tokenizer(c) for c in scenes.captions])  # (N, 5, T)
    tokens = tokens[..., : int((tokens != 0).sum(-1).max())]
    readout = PatchReadout(config["vision_cfg"]["width"]).to(device) if recipe.patch_loss else None
    if readout:
        model.visual.output_tokens = True
    parameters = [*model.parameters(), *(readout.parameters() if readout else [])]
    steps = recipe.epochs * (recipe.scenes // recipe.batch_size)
    start, losses = time.time(), []

    def loss_of(batch: np.ndarray) -> torch.Tensor:
        return clip_loss(model, readout, recipe, scenes, tokens, batch, device)

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 50 == 0:
            log.info("%s step %d/%d loss %.3f %.0f s", name, step, steps, np.mean(losses[-50:]), time.time() - start)

    model.train()
    optimise(parameters, index_batches(recipe, recipe.scenes), steps, recipe, loss_of, device, note)
    seconds = time.time() - start
    model.visual.output_tokens = False
    save_clip(model, config, out)
    metrics = retrieval(model.eval(), tokenizer, config["vision_cfg"]["image_size"], device, workers)
    write_record(out, name, recipe, steps, seconds, {"last_loss": float(np.mean(losses[-50:])), **metrics}, model)


def index_batches(recipe: Recipe, count: int) -> Iterator[np.ndarray]:
    """Yield shuffled index batches for all epochs."""
    rng = np.random.default_rng(recipe.seed)
    for _ in range(recipe.epochs):
        order = rng.permutation(count)
        for k in range(count // recipe.batch_size):
            yield order[k * recipe.batch_size : (k + 1) * recipe.batch_size]


def clip_loss(
    model: Any,
    readout: PatchReadout | None,
    recipe: Recipe,
    scenes: Scenes,
    tokens: torch.Tensor,
    batch: np.ndarray,
    device: torch.device,
) -> torch.Tensor:
    """Symmetric contrastive loss of images and one caption each, plus the patch read-out where there is one."""
    images = normalise(torch.from_numpy(scenes.pixels[batch]).to(device))
    which = torch.from_numpy(np.random.default_rng(int(batch[0])).integers(0, tokens.shape[1], len(batch)))
    texts = tokens[torch.from_numpy(batch), which].to(device)
    texts = F.pad(texts, (0, CLIP_CONTEXT - texts.shape[1])) if texts.shape[1] < CLIP_CONTEXT else texts
    visual = model.visual(images)
    pooled, patch_tokens = visual if readout else (visual, None)
    image_features = F.normalize(pooled.float(), dim=-1)
    text_features = F.normalize(model.encode_text(texts).float(), dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * image_features @ text_features.T
    target = torch.arange(len(batch), device=device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    if readout:
        loss = loss + recipe.patch_loss * readout(patch_tokens, torch.from_numpy(scenes.labels[batch]).to(device))
    return loss


@torch.no_grad()
def retrieval(
    model: Any, tokenizer: Any, pixels: int, device: torch.device, workers: int, count: int = 500
) -> dict[str, float]:
    """Return the recall of an image's own caption among unseen scenes, and CLIPScore of right and wrong pairs."""
    scenes = draw_scenes(SCENE_SEEDS["test"], count, pixels, workers)
    image, text = [], []
    for k in range(0, count, 50):
        images = normalise(torch.from_numpy(scenes.pixels[k : k + 50]).to(device))
        image.append(F.normalize(model.encode_image(images).float(), dim=-1))
        captions = [c[0] for c in scenes.captions[k : k + 50]]
        text.append(F.normalize(model.encode_text(tokenizer(captions).to(device)).float(), dim=-1))
    similarity = torch.cat(image) @ torch.cat(text).T
    rank = (similarity > similarity.diag()[:, None]).sum(1)
    wrong = similarity.roll(1, 0).diag()
    return {
        "retrieval_images": count,
        "recall_at_1": (rank == 0).float().mean().item(),
        "recall_at_5": (rank < 5).float().mean().item(),
        "clipscore_right": (2.5 * similarity.diag().clamp(min=0)).mean().item(),
        "clipscore_wrong": (2.5 * wrong.clamp(min=0)).mean().item(),
    }


def train_tokenizer(out: Path, recipe: Recipe) -> None:
    """Train the byte-level BPE on the decoder's captions and `words.txt`, and write GPT-2's two files.

    The captions know 300 words; the words of other people's captions keep real photographs' captions short too.
    """
    texts = [t for captions in decoder_captions(recipe) for t in captions]
    texts += (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
    tokenizer_module.train_tokenizer(texts, VOCAB_SIZE, out)


def copy_clip_tokenizer(out: Path) -> None:
    """Write the decoder's BPE into ``out`` as the fast tokenizer that open_clip loads: caption, end, padding with 0."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GPT2TokenizerFast

    source = MICRO_WEIGHTS / "decoder"
    tokenizer = GPT2TokenizerFast(vocab=str(source / "encoder.json"), merges=str(source / "vocab.bpe"), pad_token="!")
    end = tokenizer.eos_token
    # open_clip pools the text tower at the highest id, the first one of it: so there is an end, and no beginning.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(out)


def decoder_captions(recipe: Recipe) -> list[list[str]]:
    """Return the captions of the decoder's scenes; nothing is drawn."""
    seed = SCENE_SEEDS["decoder"]
    return [[c.text for c in make_scene("pretrain", seed, k)[1]] for k in range(recipe.scenes)]


def train_decoder(recipe: Recipe, out: Path, device: torch.device) -> None:
    """Pre-train the GPT-2 on streams of captions in random order, split by end-of-text, and write its weights."""
    seed_everything(recipe.seed)
    tokenizer = Tokenizer(out)
    eos = tokenizer.eos_id
    texts = [t for captions in decoder_captions(recipe) for t in captions]
    encoded = [[eos, *tokenizer.encode(t)] for t in texts]
    held_out = [encoded.pop() for _ in range(1000)]
    decoder = Decoder(DECODER).to(device)
    init_weights(decoder)
    length = DECODER.n_positions
    per_epoch = sum(map(len, encoded)) // (length + 1) // recipe.batch_size
    steps = per_epoch * recipe.epochs
    start, losses = time.time(), []

    def batches() -> Iterator[torch.Tensor]:
        rng = random.Random(recipe.seed)
        for _ in range(recipe.epochs):
            rng.shuffle(encoded)
            stream = torch.tensor([t for c in encoded for t in c])
            rows = stream[: len(stream) // (length + 1) * (length + 1)].view(-1, length + 1)
            for k in range(per_epoch):
                yield rows[k * recipe.batch_size : (k + 1) * recipe.batch_size].to(device)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return text_loss(decoder, rows)

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 50 == 0:
            log.info("decoder step %d/%d loss %.3f %.0f s", step, steps, np.mean(losses[-50:]), time.time() - start)

    optimise(list(decoder.parameters()), batches(), steps, recipe, loss_of, device, note)
    seconds = time.time() - start
    with atomic_path(out / "decoder_model.safetensors") as temporary:
        save_file({k: v.half().contiguous().cpu() for k, v in gpt2_state_dict(decoder).items()}, temporary)
    stream = torch.tensor([t for c in held_out for t in c])
    rows = stream[: len(stream) // (length + 1) * (length + 1)].view(-1, length + 1).to(device)
    with torch.no_grad():
        loss = float(np.mean([text_loss(decoder, r[None]).item() for r in rows]))
    write_record(out, "decoder", recipe, steps, seconds, {"held_out_loss": loss}, decoder)


def text_loss(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    """Return the next-token loss of ``rows`` (B, T+1)."""
    hidden = decoder(decoder.embed(rows[:, :-1]), torch.arange(rows.shape[1] - 1, device=rows.device))
    return F.cross_entropy(decoder.logits(hidden).float().flatten(0, 1), rows[:, 1:].flatten())


# --- files ----------------------------------------------------------------------------------------------------------


def save_clip(model: Any, config: dict[str, Any], out: Path) -> None:
    """Write an open_clip ``local-dir:`` folder: config with preprocessing, fp16 weights."""
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(out / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}
    with atomic_path(out / "open_clip_model.safetensors") as temporary:
        save_file(state, temporary)


def write_record(
    out: Path, name: str, recipe: Recipe, steps: int, seconds: float, metrics: dict[str, float], model: torch.nn.Module
) -> None:
    """Write the JSON that says how the weights were made."""
    record = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": f"python -m microworld.pretrain {name}",
        "data": {"world": "micro", "split": "pretrain", "seed": SCENE_SEEDS[name], "scenes": recipe.scenes},
        "recipe": vars(recipe),
        "steps": steps,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "metrics": {k: round(v, 4) for k, v in metrics.items()},
    }
    write_json(out / "training.json", record)
    print(json.dumps(record["metrics"]))


@command
def main(argv: list[str] | None = None) -> int:
    """Command line of the pre-training."""
    parser = FlagParser(prog="python -m microworld.pretrain", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=(*MODELS, "all"), help="what to pre-train")
    parser.add_argument("--weights", type=Path, default=MICRO_WEIGHTS, help="folder of the results")
    parser.add_argument("--scenes", type=int, help="number of scenes instead of the recipe's")
    parser.add_argument("--epochs", type=int, help="epochs instead of the recipe's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument("--verbose", action="store_true", help="more log lines")
    args = parser.parse_args(argv)
    setup_logging(args.verbose)
    device = pick_device(args.device)
    names = MODELS if args.model == "all" else (args.model,)
    for name in names:
        recipe = RECIPES["decoder" if name == "tokenizer" else name]
        recipe.scenes, recipe.epochs = args.scenes or recipe.scenes, args.epochs or recipe.epochs
        out = args.weights / ("decoder" if name == "tokenizer" else name)
        out.mkdir(parents=True, exist_ok=True)
        if name == "tokenizer":
            train_tokenizer(out, recipe)
        elif name == "decoder":
            train_decoder(recipe, out, device)
        elif name == "llava":
            from microworld.pretrain_llava import train_llava  # it builds on this module

            train_llava(recipe, out, device, args.workers)
        else:
            train_clip(name, recipe, out, device, args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
