"""Pre-train the micro world's two open_clip models: the ``encoder``, a ViT, and the ``scorer``, a ResNet.

Both learn by the contrastive loss (Radford et al. 2021). The encoder has, beside it, a linear read-out of what each
patch shows (kind and colour, from the boxes), which makes the last layer's tokens say what is where after a few
thousand drawings; the read-outs are thrown away afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from captioning.device import seed_everything
from captioning.files import atomic_path, write_json
from captioning.imports import import_guarded
from captioning.profiles import MICRO_WEIGHTS
from microworld.recipes import (
    CLIP_CONFIGS,
    CLIP_CONTEXT,
    MEAN,
    SCENE_SEEDS,
    STD,
    Run,
    draw_scenes,
    normalise,
    optimise,
    write_record,
)
from microworld.things import COLOURS, KINDS

BPE_FILES = {"vocab": "encoder.json", "merges": "vocab.bpe"}
UNSEEN = 500  # scenes that retrieval is measured on


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

        def loss(head: torch.nn.Linear, target: torch.Tensor) -> torch.Tensor:
            return (F.cross_entropy(head(tokens).float().transpose(1, 2), target, reduction="none") * weight).mean()

        return loss(self.kind, kind) + loss(self.colour, colour)


def train_clip(run: Run) -> None:
    """Pre-train the ``encoder`` or the ``scorer`` and write an open_clip folder with its tokenizer."""
    open_clip = import_guarded("open_clip")
    recipe, device, config = run.recipe, run.device, CLIP_CONFIGS[run.name]
    vision = config["vision_cfg"]
    seed_everything(recipe.seed)
    copy_clip_tokenizer(run.out)
    model = open_clip.CLIP(**config, output_dict=False).to(device)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(run.out), context_length=CLIP_CONTEXT)
    scenes = draw_scenes(SCENE_SEEDS[run.name], recipe.scenes, vision["image_size"], run.workers)
    tokens = torch.stack([tokenizer(captions) for captions in scenes.captions])  # (N, 5, T)
    readout = PatchReadout(vision["width"]).to(device) if recipe.patch_loss else None
    model.visual.output_tokens = readout is not None

    def loss_of(batch: tuple[int, np.ndarray]) -> torch.Tensor:
        """Symmetric contrastive loss of images and one caption each, plus the patch read-out where there is one."""
        _, chosen = batch
        images = normalise(torch.from_numpy(scenes.pixels[chosen]).to(device))
        which = np.random.default_rng(int(chosen[0])).integers(0, tokens.shape[1], len(chosen))
        visual = model.visual(images)
        pooled, patch_tokens = visual if readout else (visual, None)
        loss = contrastive_loss(model, pooled, tokens[torch.from_numpy(chosen), torch.from_numpy(which)].to(device))
        if readout:
            loss = loss + recipe.patch_loss * readout(patch_tokens, torch.from_numpy(scenes.labels[chosen]).to(device))
        return loss

    model.train()
    trained = [*model.parameters(), *(readout.parameters() if readout else [])]
    training = optimise(run, trained, run.batches(), run.steps_per_epoch, loss_of)
    model.visual.output_tokens = False
    save_clip(model, config, run.out)
    metrics = retrieval(model.eval(), tokenizer, vision["image_size"], run)
    write_record(run, training, {"last_loss": training.last_loss, **metrics}, model)


def contrastive_loss(model: Any, pooled: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return CLIP's symmetric loss of image features (B, D) and the ids ``texts`` (B, T) of their captions."""
    image_features = F.normalize(pooled.float(), dim=-1)
    text_features = F.normalize(model.encode_text(texts).float(), dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * image_features @ text_features.T
    target = torch.arange(len(texts), device=texts.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def retrieval(model: Any, tokenizer: Any, pixels: int, run: Run) -> dict[str, float]:
    """Return the recall of an image's own caption among unseen scenes, and CLIPScore of right and wrong pairs."""
    scenes = draw_scenes(SCENE_SEEDS["test"], UNSEEN, pixels, run.workers)
    image, text = [], []
    for k in range(0, UNSEEN, 50):
        images = normalise(torch.from_numpy(scenes.pixels[k : k + 50]).to(run.device))
        image.append(F.normalize(model.encode_image(images).float(), dim=-1))
        captions = [c[0] for c in scenes.captions[k : k + 50]]
        text.append(F.normalize(model.encode_text(tokenizer(captions).to(run.device)).float(), dim=-1))
    similarity = torch.cat(image) @ torch.cat(text).T
    rank = (similarity > similarity.diag()[:, None]).sum(1)
    wrong = similarity.roll(1, 0).diag()
    return {
        "retrieval_images": UNSEEN,
        "recall_at_1": (rank == 0).float().mean().item(),
        "recall_at_5": (rank < 5).float().mean().item(),
        "clipscore_right": (2.5 * similarity.diag().clamp(min=0)).mean().item(),
        "clipscore_wrong": (2.5 * wrong.clamp(min=0)).mean().item(),
    }


def copy_clip_tokenizer(out: Path) -> None:
    """Write the decoder's BPE into ``out`` as the fast tokenizer that open_clip loads: caption, end, padding with 0."""
    from tokenizers.processors import TemplateProcessing

    transformers = import_guarded("transformers")

    files = {name: str(MICRO_WEIGHTS / "decoder" / file) for name, file in BPE_FILES.items()}
    tokenizer = transformers.GPT2TokenizerFast(**files, pad_token="!")
    end = tokenizer.eos_token
    # open_clip pools the text tower at the highest id, the first one of it: so there is an end, and no beginning.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(out)


def save_clip(model: Any, config: dict[str, Any], out: Path) -> None:
    """Write an open_clip ``local-dir:`` folder: config with preprocessing, fp16 weights."""
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    write_json(out / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}
    with atomic_path(out / "open_clip_model.safetensors") as temporary:
        save_file(state, temporary)
