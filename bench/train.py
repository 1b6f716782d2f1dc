"""Training with cached features and packed captions against what people use instead.

    python -m bench.train --out bench/train      ViT-L/14 and GPT-2 small with random weights, 5 captions an image
    python -m bench.train --batch-by captions    beside them a step of as many captions as there are images
    python -m bench.train --attention mask       ours by torch's own attention
    python -m bench.train --tiny                 tiny models: are loss and gradients equal? no times

All train the same weights (LoRA of rank 32 on every linear layer, and the projector) on the same captions with Adam,
the peers one caption a sequence with logits at all positions. The script encodes the image of every caption in its
loop. The loop of transformers, what its Trainer does a step, feeds GPT2LMHeadModel `inputs_embeds` and `labels`, and
is given the features that we cache, so that it has no encoder in it. Ours reads the same cache and packs, as
p2_train.py does. Building that cache costs the encoder once an image.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from bench.common import CLOCKS, Floor, draw_scenes, in_turn, make_parser, peak_memory, report, transformers_gpt2
from captioning.cli import FlagParser, command, positive_int
from captioning.data.batches import IGNORED, Batch, caption_batches, pack_captions
from captioning.device import autocast, pick_device, product_dtype
from captioning.inference.encode import cached_features, read_pixels
from captioning.models.captioner import ATTENTION, Captioner, CaptionerConfig
from captioning.profiles import PROFILES
from captioning.training.config import TrainConfig
from captioning.training.trainer import make_optimizer
from decoder import Decoder, DecoderConfig, LoraConfig, cast_frozen

CAPTIONS = 5  # an image
BY_CAPTIONS = "ours, a caption an image"
TOLERANCE = 1e-3  # the cache rounds features to float16
TINY = (
    DecoderConfig(vocab_size=101, n_positions=64, n_embd=64, n_layer=2, n_head=2),
    "vit_base_patch32_clip_224.openai",
    {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 48},
)
FULL: tuple[DecoderConfig, str, dict] = (DecoderConfig(), PROFILES["full"].encoder, {})


def build_parser() -> FlagParser:
    """Return the command line."""
    parser, types = make_parser("train", __doc__, clock=True), ["fp32", "bf16"]
    add = parser.add_argument
    add("--precision", nargs="+", choices=types, default=types, help="fp32, or bf16 under autocast")
    add("--images", type=positive_int, default=4, help="images a step of ours, all of their captions together")
    text = "captions: also time, or with --tiny check, a step of ours of one caption an image, as p2_train.py takes it"
    add("--batch-by", choices=["images", "captions"], default="images", help=text)
    add("--attention", choices=ATTENTION, default="auto", help="of ours, as p2_train.py's")
    add("--student-batch", type=positive_int, default=5, help="captions a step of both peers")
    add("--tiny", action="store_true", help="compare losses and gradients of tiny models; no times")
    return parser


class LoraConv1D(torch.nn.Module):
    """LoRA around a layer of transformers' GPT-2, with the matrices of one of our layers: both train the same ones."""

    def __init__(self, base: torch.nn.Module, lora: Any) -> None:
        super().__init__()
        self.base, self.lora = base, lora

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return self.base(x) + x @ self.lora.lora_A.T @ self.lora.lora_B.T * self.lora.scaling


def transformers_model(decoder: Decoder, eos: int) -> Any:
    """Return transformers' GPT-2 with the decoder's weights, frozen, and its LoRA, shared."""
    model = transformers_gpt2(decoder, eos, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.requires_grad_(False)
    for theirs, ours in zip(model.transformer.h, decoder.h, strict=True):
        for part in ("attn", "mlp"):
            for name, layer in list(getattr(theirs, part).named_children()):
                if name.startswith("c_"):
                    setattr(getattr(theirs, part), name, LoraConv1D(layer, getattr(getattr(ours, part), name)))
    return model.train()


class Rivals:
    """The three ways to train one captioner on the same images and captions.

    Args:
        size: the decoder's shape, the encoder's name and its arguments.
        images: how many.
        folder: where images and the feature cache go.
        device: where it runs.
    """

    def __init__(self, size: tuple[DecoderConfig, str, dict], images: int, folder: Path, device: torch.device) -> None:
        shape, encoder, kwargs = size
        lora = LoraConfig(rank=32, alpha=32.0)
        self.eos = shape.vocab_size - 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            decoder = Decoder(shape, lora)
            with torch.no_grad():
                for name, parameter in decoder.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.02)  # at zero, as LoRA begins, A would have no gradient
            lengths = torch.randint(8, 15, (images, CAPTIONS)).tolist()
            self.captions = [[torch.randint(0, self.eos, (n,)).tolist() for n in row] for row in lengths]
            self.captioner = Captioner(CaptionerConfig(encoder, kwargs, "random", lora=lora), decoder).to(device)
        self.captioner.train()
        self.theirs = transformers_model(decoder, self.eos).to(device)
        paths = draw_scenes(folder, images)
        self.pixels = read_pixels(self.captioner.transform, paths)
        self.features = cached_features(self.captioner, paths, folder / "cache")
        self.optimizer = make_optimizer(self.captioner, TrainConfig())

    def first(self, per_image: int) -> Batch:
        """All images, with the first captions of each."""
        return Batch(list(range(len(self.captions))), [group[:per_image] for group in self.captions])

    def packed_loss(self, batch: Batch) -> torch.Tensor:
        """Ours."""
        device = self.captioner.device
        features = self.features.gather(batch.images).float().to(device)
        return self.captioner.loss(features, pack_captions(batch.captions, self.eos, pad_to_multiple=8).to(device))

    def student_loss(self, batch: Batch, count: int | None = None) -> torch.Tensor:
        """The script's, of the first ``count`` captions."""
        decoder, (images, inputs, labels) = self.captioner.decoder, self.unpacked(batch, count)
        prefix = self.captioner.prefix(self.captioner.encode(self.pixels[images].to(labels.device)))  # (n, P, C)
        x = torch.cat([prefix, decoder.embed(inputs[:, :-1]).to(prefix.dtype)], 1)
        logits = decoder.logits(decoder(x, torch.arange(x.shape[1])).flatten(0, 1)).float()  # (n * (P + T), V)
        targets = F.pad(labels[:, 1:], (prefix.shape[1], 0), value=IGNORED)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)

    def transformers_loss(self, batch: Batch, count: int | None = None) -> torch.Tensor:
        """transformers' own, of the first ``count`` captions, after cached features."""
        images, inputs, labels = self.unpacked(batch, count)
        prefix = self.captioner.prefix(self.features.gather(images).float().to(labels.device))
        embeds = torch.cat([prefix, self.theirs.transformer.wte(inputs).to(prefix.dtype)], 1)
        labels = F.pad(labels, (prefix.shape[1], 0), value=IGNORED)
        seen = (labels != IGNORED).long()
        seen[:, : prefix.shape[1] + 1] = 1  # the prefix, and BOS
        return self.theirs(inputs_embeds=embeds, attention_mask=seen, labels=labels, use_cache=False).loss

    def unpacked(self, batch: Batch, count: int | None) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """One caption a row: its image, ``BOS tokens EOS`` padded (n, T + 1), and the same as labels, BOS ignored."""
        chosen = [(image, tokens) for image, row in zip(*batch, strict=True) for tokens in row][:count]
        rows = [torch.tensor([self.eos, *tokens, self.eos]) for _, tokens in chosen]
        inputs = pad_sequence(rows, batch_first=True, padding_value=self.eos)
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        labels[:, 0] = IGNORED
        device = self.captioner.device
        return [image for image, _ in chosen], inputs.to(device), labels.to(device)

    def step(self, loss: Callable[[], torch.Tensor], precision: str) -> None:
        """Take one optimiser step."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.captioner.device, precision):
            value = loss()
        value.backward()
        self.optimizer.step()

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient of every trained parameter."""
        parameters = self.captioner.trainable()
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def largest_difference(rivals: Rivals, batch: Batch) -> tuple[float, float]:
    """Compare us with either peer on a batch in float32: loss and gradient furthest off, relative to theirs."""
    ours = rivals.packed_loss(batch)
    mine, furthest = rivals.gradients(ours), [0.0, 0.0]
    for theirs in (rivals.student_loss(batch), rivals.transformers_loss(batch)):
        wanted = rivals.gradients(theirs)
        apart = max(((mine[k] - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted)
        furthest = [max(furthest[0], abs(ours.item() - theirs.item()) / theirs.item()), max(furthest[1], apart)]
    return furthest[0], furthest[1]


def count_operations(run: Callable[[], None]) -> int:
    """Return the operations of a run's matrix products; on a CPU torch counts none of attention's fused kernel."""

    def linear(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: linear}) as counter:
        run()
    return counter.get_total_flops()


def compare(rivals: Rivals, precision: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time one step of each; return a row each."""
    clock, count = CLOCKS[args.clock], min(args.student_batch, args.images * CAPTIONS)
    dtype, every, single = product_dtype(device, precision), rivals.first(CAPTIONS), rivals.first(1)
    runs = {
        "ours": lambda: rivals.step(lambda: rivals.packed_loss(every), precision),
        "transformers": lambda: rivals.step(lambda: rivals.transformers_loss(every, count), precision),
        "script": lambda: rivals.step(lambda: rivals.student_loss(every, count), precision),
    }
    captions = {"ours": args.images * CAPTIONS, "transformers": count, "script": count}
    if args.batch_by == "captions":
        runs[BY_CAPTIONS] = lambda: rivals.step(lambda: rivals.packed_loss(single), precision)
        captions[BY_CAPTIONS] = args.images
    cast_frozen(rivals.captioner.decoder, dtype)  # as training does, once
    peaks, operations = {}, {}
    for name, run in runs.items():  # warm-up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        operations[name], peaks[name] = count_operations(run), peak_memory(device)
    seconds = in_turn(runs, args.repeats, device, clock)
    floor = Floor(device, dtype, clock)
    rate = {name: captions[name] / taken for name, taken in seconds.items()}
    shares = {name: operations[name] / seconds[name] / floor.operations_a_second for name in runs}
    return [
        {
            "precision": precision,
            "who": name,
            "captions a step": captions[name],
            "s a step": seconds[name],
            "captions/s": rate[name],
            "we are faster by": rate["ours"] / rate[name],
            "GFLOP a caption": operations[name] / captions[name] / 1e9,
            "share of the matrix rate": f"{shares[name]:.0%} ({floor})" if name == "ours" else f"{shares[name]:.0%}",
            "peak GB so far" if device.type == "cpu" else "peak GB": peaks[name],
        }
        for name in runs
    ]


@command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 where losses or gradients in float32 differ by more than ``TOLERANCE``."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        rivals = Rivals(TINY if args.tiny else FULL, args.images, Path(folder), device)
        rivals.captioner.attention = args.attention
        if args.tiny:
            batch = rivals.first(CAPTIONS)
            if args.batch_by == "captions":  # some of them share an image
                batch = caption_batches(rivals.captions, CAPTIONS * args.images - 1, seed=0, epoch=0)[0]
            loss, gradient = largest_difference(rivals, batch)
            print(f"largest relative difference: {loss:.1e} in the loss, {gradient:.1e} in a gradient")
            return int(max(loss, gradient) > TOLERANCE)
        rows = [row for precision in args.precision for row in compare(rivals, precision, args, device)]
    report(
        f"Training: ViT-L/14 and GPT-2 small with random weights, {CAPTIONS} captions an image, {args.clock} time",
        rows,
        device,
        args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
