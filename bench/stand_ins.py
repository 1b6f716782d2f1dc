"""What replaces downloads where speed is measured: shapes at full size and in small, a tokenizer, a decoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench import photographs
from bench.arithmetic import CaptionerShape, Vit, gpt2
from captioning.data.tokenizer import END_OF_TEXT, Tokenizer
from captioning.files import atomic_path, write_json, write_text
from captioning.profiles import PROFILES
from decoder import Decoder, DecoderConfig, gpt2_state_dict

SAMPLES = 5  # captions an image in self-critical training
VOCABULARY = 50257


@dataclass(frozen=True)
class Size:
    """A size of the rehearsal.

    Attributes:
        models: shapes for the arithmetic.
        profile: of the scripts, which build models of these shapes.
        decoder: shape of the decoder, for a file of random weights.
        photograph: width and height in pixels.
        floor: rows of the matrices whose product is timed.
        numbers: how much of what, by the name of the flag that changes it.
        setting: of p2_train.py, which decides the encoder.
    """

    models: CaptionerShape
    profile: str
    decoder: DecoderConfig
    photograph: tuple[int, int]
    floor: int
    numbers: dict[str, int]
    setting: str = "best"

    @property
    def tiny(self) -> bool:
        """Whether it is the small one."""
        return self.profile == "micro"


NUMBERS = {
    "steps": "training steps",
    "scst_steps": "self-critical steps",
    "images": "images captioned",
    "maps": "images explained",
    "val_images": "validation images",
    "batch_size": "images a training step",
    "infer_batch": "images captioned at once",
}
FULL = Size(
    CaptionerShape(),
    "full",
    DecoderConfig(),
    photographs.SIZE,
    2048,
    dict(zip(NUMBERS, (200, 50, 2000, 10, 16, 16, 64), strict=True)),
)
TINY = Size(
    CaptionerShape(Vit(145, 192, 6, 192), gpt2(2, 128, VOCABULARY)),
    "micro",
    DecoderConfig(n_embd=128, n_layer=2, n_head=2),
    (160, 120),
    1024,
    dict(zip(NUMBERS, (3, 2, 6, 1, 4, 2, 4), strict=True)),
)


def write_tokenizer(folder: Path) -> Tokenizer:
    """Write tokenizer files in place of GPT-2's: 50257 entries, every one of which can be decoded.

    The micro world's merges come first. The others join two entries of which the second begins with a space. Texts are
    cut before spaces, so these never apply, and texts are split exactly as by the micro world's files.
    """
    source = Path(PROFILES["micro"].tokenizer)
    vocabulary = json.loads((source / "encoder.json").read_text(encoding="utf-8"))
    del vocabulary[END_OF_TEXT]
    merges = (source / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    entries = list(vocabulary)
    for second in (entry for entry in entries if entry.startswith("Ġ")):
        for first in entries:
            if len(vocabulary) == VOCABULARY - 1:
                break
            if first + second not in vocabulary:
                vocabulary[first + second] = len(vocabulary)
                merges.append(f"{first} {second}")
    vocabulary[END_OF_TEXT] = len(vocabulary)
    write_json(folder / "encoder.json", vocabulary, indent=None)
    write_text(folder / "vocab.bpe", "\n".join(merges) + "\n")
    return Tokenizer(folder)


def write_decoder(path: Path, config: DecoderConfig) -> None:
    """Write a random GPT-2 of the given shape, for a rehearsal that is smaller than ``--random-weights`` makes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = gpt2_state_dict(Decoder(config))
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
