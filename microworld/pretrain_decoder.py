"""Pre-train the micro world's tokenizer and GPT-2 on captions alone.

Captions are packed into streams that fill the whole context, so that every position embedding is trained.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from captioning.data import tokenizer as tokenizer_module
from captioning.data.tokenizer import Tokenizer
from captioning.device import seed_everything
from captioning.files import atomic_path
from decoder import Decoder, gpt2_state_dict, init_weights
from microworld.composer import make_scene
from microworld.recipes import DECODER, SCENE_SEEDS, VOCAB_SIZE, Run, optimise, write_record

HELD_OUT = 1000  # captions


def make_captions(count: int) -> list[str]:
    """Return the captions of ``count`` of the decoder's scenes; nothing is drawn."""
    seed = SCENE_SEEDS["decoder"]
    return [c.text for k in range(count) for c in make_scene("pretrain", seed, k)[1]]


def train_tokenizer(run: Run) -> None:
    """Train the byte-level BPE on the decoder's captions and `words.txt`, and write GPT-2's two files.

    The captions know 300 words; the words of other people's captions keep real photographs' captions short too.
    """
    words = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
    tokenizer_module.train_tokenizer(make_captions(run.recipe.scenes) + words, VOCAB_SIZE, run.out)


def train_decoder(run: Run) -> None:
    """Pre-train the GPT-2 on streams of captions in random order, split by end-of-text, and write its weights."""
    recipe, tokenizer = run.recipe, Tokenizer(run.out)
    seed_everything(recipe.seed)
    encoded = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in make_captions(recipe.scenes)]
    held_out = [encoded.pop() for _ in range(HELD_OUT)]
    decoder = Decoder(DECODER).to(run.device)
    init_weights(decoder)
    size = recipe.batch_size
    per_epoch = len(stream(encoded)) // size

    def batches() -> Iterator[torch.Tensor]:
        rng = random.Random(recipe.seed)
        for _ in range(recipe.epochs):
            rng.shuffle(encoded)
            rows = stream(encoded)
            for k in range(per_epoch):
                yield rows[k * size : (k + 1) * size].to(run.device)

    training = optimise(run, decoder.parameters(), batches(), per_epoch, lambda rows: text_loss(decoder, rows))
    with atomic_path(run.out / "decoder_model.safetensors") as temporary:
        save_file({k: v.half().contiguous().cpu() for k, v in gpt2_state_dict(decoder).items()}, temporary)
    with torch.no_grad():
        loss = float(np.mean([text_loss(decoder, row[None].to(run.device)).item() for row in stream(held_out)]))
    write_record(run, training, {"held_out_loss": loss}, decoder)


def stream(captions: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the ids of all captions, one after another, in rows (N, T + 1) that fill the context; the rest is cut."""
    ids, width = torch.tensor([i for caption in captions for i in caption]), DECODER.n_positions + 1
    return ids[: len(ids) // width * width].view(-1, width)


def text_loss(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    """Return the next-token loss of ``rows`` (B, T + 1)."""
    hidden = decoder(decoder.embed(rows[:, :-1]), torch.arange(rows.shape[1] - 1, device=rows.device))
    return F.cross_entropy(decoder.logits(hidden).float().flatten(0, 1), rows[:, 1:].flatten())
