"""Pre-train the micro world's tokenizer and GPT-2: on captions, then on captions after images.

GPT-2 has read so much text that it makes use of whatever stands before a caption; 24,000 scenes of a few sentences do
not teach that. So the micro GPT-2 reads the captions of a scene in a row, in streams that fill the whole context, which
trains every position embedding; and then captions after the frozen encoder's tokens, through a projector that is
thrown away. What a captioner trains, LoRA and a projector, is new to it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from captioning.data import tokenizer as tokenizer_module
from captioning.data.batches import pack_captions
from captioning.data.tokenizer import Tokenizer
from captioning.device import seed_everything
from captioning.files import atomic_path
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.profiles import PROFILES
from decoder import Decoder, gpt2_state_dict, init_weights
from microworld.composer import make_scene
from microworld.recipes import (
    DECODER,
    ENCODER_IMAGE,
    RECIPES,
    SCENE_SEEDS,
    VOCAB_SIZE,
    Run,
    Training,
    draw_scenes,
    normalise,
    optimise,
    write_record,
)

HELD_OUT = 200  # scenes whose text is not trained on
ENCODED = 64  # scenes that the encoder reads at once
TEXT_WEIGHT = 0.25  # of a stream's loss beside that of captions after images
Captions = list[list[int]]  # the ids of a scene's captions


def make_captions(count: int) -> list[list[str]]:
    """Return the captions of each of ``count`` of the decoder's scenes; nothing is drawn."""
    seed = SCENE_SEEDS["decoder"]
    return [[c.text for c in make_scene("pretrain", seed, k)[1]] for k in range(count)]


def train_tokenizer(run: Run) -> None:
    """Train the byte-level BPE on the decoder's captions and `words.txt`, and write GPT-2's two files.

    The captions know 300 words; the words of other people's captions keep real photographs' captions short too.
    """
    words = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
    captions = [text for scene in make_captions(run.recipe.scenes) for text in scene]
    tokenizer_module.train_tokenizer(captions + words, VOCAB_SIZE, run.out)


def train_decoder(run: Run) -> None:
    """Pre-train the GPT-2 on text and then after images, and write its weights."""
    tokenizer = Tokenizer(run.out)
    seed_everything(run.recipe.seed)
    scenes = [[tokenizer.encode(text) for text in captions] for captions in make_captions(run.recipe.scenes)]
    decoder = Decoder(DECODER).to(run.device)
    init_weights(decoder)
    text = read_text(run, decoder, scenes[HELD_OUT:], tokenizer.eos_id)
    images = replace(RECIPES["decoder_images"], scenes=len(scenes) - HELD_OUT)
    training, after = read_images(replace(run, recipe=images), decoder, scenes, tokenizer.eos_id)
    with atomic_path(run.out / "decoder_model.safetensors") as temporary:
        save_file({k: v.half().contiguous().cpu() for k, v in gpt2_state_dict(decoder).items()}, temporary)
    with torch.no_grad():
        rows = stream(scenes[:HELD_OUT], tokenizer.eos_id)
        alone = float(np.mean([text_loss(decoder, row[None].to(run.device)).item() for row in rows]))
    metrics = {"held_out_loss": alone, "held_out_loss_after_images": after}
    whole = Training(text.steps + training.steps, text.seconds + training.seconds, training.last_loss)
    write_record(run, whole, metrics, decoder, images=vars(images))


def read_text(run: Run, decoder: Decoder, scenes: Sequence[Captions], eos_id: int) -> Training:
    """Train on the captions of scenes, those of a scene in a row, split by end-of-text."""
    size, scenes = run.recipe.batch_size, list(scenes)
    per_epoch = len(stream(scenes, eos_id)) // size

    def batches() -> Iterator[torch.Tensor]:
        rng = random.Random(run.recipe.seed)
        for _ in range(run.recipe.epochs):
            rng.shuffle(scenes)
            rows = stream(scenes, eos_id)
            for k in range(per_epoch):
                yield rows[k * size : (k + 1) * size].to(run.device)

    return optimise(run, decoder.parameters(), batches(), per_epoch, lambda rows: text_loss(decoder, rows))


def read_images(run: Run, decoder: Decoder, scenes: Sequence[Captions], eos_id: int) -> tuple[Training, float]:
    """Train on the captions of scenes after their drawings, with some text beside so that it stays fluent without.

    The captioner's own loss, but that all of the decoder learns. The first HELD_OUT scenes are kept to measure on.

    Returns:
        the training, and the loss per token on what was held out.
    """
    profile = PROFILES["micro"]
    config = CaptionerConfig(profile.encoder, profile.encoder_kwargs, profile.encoder_weights)
    captioner = Captioner(config, decoder).to(run.device)
    learned = [*decoder.parameters(), *captioner.projector.parameters()]
    for parameter in learned:
        parameter.requires_grad_(True)
    drawn = draw_scenes(SCENE_SEEDS["decoder"], len(scenes), ENCODER_IMAGE, run.workers).pixels
    parts = [drawn[k : k + ENCODED] for k in range(0, len(drawn), ENCODED)]
    features = torch.cat([captioner.encode(normalise(torch.from_numpy(p).to(run.device))).half() for p in parts])
    rows = stream(scenes[HELD_OUT:], eos_id)

    def image_loss(chosen: Sequence[int]) -> torch.Tensor:
        packed = pack_captions([scenes[i] for i in chosen], eos_id).to(run.device)
        return captioner.loss(features[chosen].float(), packed)

    def loss_of(batch: tuple[int, np.ndarray]) -> torch.Tensor:
        chosen = batch[1] + HELD_OUT
        text = rows[chosen[:1] % len(rows)].to(run.device)
        return image_loss(chosen) + TEXT_WEIGHT * text_loss(decoder, text)

    captioner.train()
    training = optimise(run, learned, run.batches(), run.steps_per_epoch, loss_of)
    captioner.eval()
    with torch.no_grad():
        held_out = np.array_split(np.arange(HELD_OUT), max(1, HELD_OUT // run.recipe.batch_size))
        return training, float(np.mean([image_loss(chosen).item() for chosen in held_out]))


def stream(scenes: Sequence[Captions], eos_id: int) -> torch.Tensor:
    """Return the ids of all captions, one after another, in rows (N, T + 1) that fill the context; the rest is cut."""
    ids = torch.tensor([i for scene in scenes for caption in scene for i in (eos_id, *caption)])
    width = DECODER.n_positions + 1
    return ids[: len(ids) // width * width].view(-1, width)


def text_loss(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    """Return the next-token loss of ``rows`` (B, T + 1)."""
    hidden = decoder(decoder.embed(rows[:, :-1]), torch.arange(rows.shape[1] - 1, device=rows.device))
    return F.cross_entropy(decoder.logits(hidden).float().flatten(0, 1), rows[:, 1:].flatten())
