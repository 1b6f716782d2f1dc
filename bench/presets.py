"""What a setting's encoder takes, computed from the models' shapes: nothing is run, so nothing here was measured.

    python -m bench.presets        a row for best and each setting with a larger encoder, some with pooled patches

Training is 8 epochs of 10,000 images with 5 captions; 2,000 validation images are cached too. Memory is that of the
parameters, of what a step of 16 images keeps for its backward pass, and of CUDA. Minutes are those of matrix products
alone, at a quarter to a half of the card's nominal rate: reading, validation and the launches of kernels come on top.
"""

from __future__ import annotations

import argparse
import sys

from bench.arithmetic import BEAMS, PRESETS, TOKENS, VIT_L14, CaptionerShape
from bench.common import make_parser, markdown
from captioning.cli import command
from captioning.files import write_json, write_text
from captioning.training.config import SETTINGS

IMAGES, VALIDATION, CAPTIONS = 10_000, 2_000, 5
CAPTION_TOKENS = 70  # of an image's captions together
POOLED = (("best", 1), ("best", 2), ("best-336", 1), ("best-336", 2), ("best-336", 3), ("best-h", 1), ("best-g", 1))
GPT2_SMALL = 124_439_808  # parameters, embeddings and norms among them
# What a training step keeps for its backward pass an image, MB: with 257 image tokens, and for each token more or
# less. Counted on a CPU by torch's hooks on saved tensors.
KEPT = {"bf16": (183, 0.456), "fp32": (306, 0.840)}
LOGITS, CUDA = 30, 500  # MB an image, for the gradient of its logits; MB in all
CARDS = {"A100": (156e12, 312e12), "RTX 3090": (35.6e12, 71e12)}  # nominal TF32, for the cache, and bf16


def shape_of(setting: str, pool: int) -> CaptionerShape:
    """Return the shapes of a setting's models, its patches averaged ``pool`` x ``pool``."""
    return CaptionerShape(PRESETS.get(setting, VIT_L14), pool=pool)


def memory(shape: CaptionerShape, precision: str, batch: int) -> float:
    """Return the gigabytes of a training step, with the encoder, which goes once all images are cached."""
    kept, a_token = KEPT[precision]
    step = batch * (kept + a_token * (shape.prefix - VIT_L14.tokens) + LOGITS) + CUDA
    copies = 2 * GPT2_SMALL if precision == "bf16" else 0
    moments = 4 * shape.trained  # weight, gradient and both of Adam's
    return (4 * (shape.encoder.weights + GPT2_SMALL + moments) + copies) / 1e9 + step / 1e3


def minutes(shape: CaptionerShape, epochs: int, card: str) -> str:
    """Return how long the products of caching and training take, at half and at a quarter of the nominal rates."""
    tf32, bf16 = CARDS[card]
    fast = (cached(shape) / (tf32 / 2) + trained(shape, epochs) / (bf16 / 2)) / 60
    return f"{fast:.2g} to {2 * fast:.2g}"


def cached(shape: CaptionerShape) -> float:
    """Return the operations of encoding all images once."""
    return (IMAGES + VALIDATION) * shape.encoder.operations


def trained(shape: CaptionerShape, epochs: int) -> float:
    """Return the operations of all training steps."""
    return epochs * IMAGES * shape.train(CAPTION_TOKENS, CAPTIONS)


def row(setting: str, pool: int) -> dict[str, str]:
    """Return one row of the table."""
    shape, config = shape_of(setting, pool), SETTINGS[setting]
    assert (config.lora_rank, config.lora_lm_head) == (shape.rank, shape.head)
    batch, epochs = config.batch_size, config.epochs
    return {
        "`--setting`": f"`{setting}" + (f" --pool {pool}`" if pool > 1 else "`"),
        "image tokens": str(shape.prefix),
        "trained": f"{shape.trained:,}",
        "encoder, GB": f"{4 * shape.encoder.weights / 1e9:.2f}",
        "cache an image, kB": f"{shape.feature_bytes / 1e3:.0f}",
        f"of {IMAGES:,}, GB": f"{IMAGES * shape.feature_bytes / 1e9:.1f}",
        "GFLOP to encode": f"{shape.encoder.operations / 1e9:.0f}",
        "to train a caption": f"{shape.train(CAPTION_TOKENS, CAPTIONS) / CAPTIONS / 1e9:.1f}",
        "to search": f"{shape.search(BEAMS, TOKENS) / 1e9:.0f}",
        "memory, bf16; fp32, GB": f"{memory(shape, 'bf16', batch):.1f}; {memory(shape, 'fp32', batch):.1f}",
        **{f"{card}, min": minutes(shape, epochs, card) for card in CARDS},
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    return make_parser("presets", __doc__, repeats=0, device=False)


@command
def main(argv: list[str] | None = None) -> int:
    """Print the table; return 0."""
    args = build_parser().parse_args(argv)
    rows = [row(*pair) for pair in POOLED]
    print(markdown(rows))
    if args.out:
        write_text(args.out.with_suffix(".md"), markdown(rows) + "\n")
        write_json(args.out.with_suffix(".json"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
