"""Beam search over a shared image prefix against transformers' ``generate`` and a plain student script.

    python -m bench.decode --out bench/decode      GPT-2 small with random weights, 257 image tokens, beam 5, 30 tokens
    python -m bench.decode --tiny                  a tiny decoder: are the captions of all three equal? no times

All start from the same projected image tokens and have the same weights, LoRA merged. The student script feeds the
whole sequence again for every token, takes logits everywhere and captions one image after the other. At full size its
time is that of its first and its last step of one image, averaged, times steps and images (a step's cost grows
linearly). Random weights hardly ever say EOS, so every caption has its full length.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.common import CLOCKS, Floor, in_turn, make_parser, peak_memory, report, timed, transformers_gpt2
from captioning.cli import FlagParser, command, positive_int
from captioning.device import autocast, pick_device
from captioning.inference import search
from captioning.models.inference_weights import prepare_decoder
from captioning.models.step_functions import StepFunction
from decoder import Decoder, DecoderConfig

BEAMS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """A decoder, and what it captions."""

    config: DecoderConfig
    prefix: int  # image tokens
    tokens: int  # longest caption
    eos: int


FULL = Size(DecoderConfig(), prefix=257, tokens=30, eos=50256)
TINY = Size(DecoderConfig(vocab_size=41, n_positions=40, n_embd=32, n_layer=2, n_head=2), prefix=9, tokens=12, eos=40)


def build_parser() -> FlagParser:
    """Return the command line."""
    parser, types = make_parser("decode", __doc__, clock=True), list(DTYPES)
    parser.add_argument("--precision", nargs="+", choices=types, default=types, help="types of weights and sums")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images at once")
    parser.add_argument("--tiny", action="store_true", help="compare captions of a tiny decoder; no times")
    return parser


class Rivals:
    """The three ways to caption the same images with the same weights.

    Args:
        size: what is captioned.
        batch_size: images B.
        precision: ``fp32`` or ``bf16``.
        device: where.
    """

    def __init__(self, size: Size, batch_size: int, precision: str, device: torch.device) -> None:
        self.size, self.precision, self.device = size, precision, device
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.decoder = Decoder(size.config)
            with torch.no_grad():
                for name, parameter in self.decoder.named_parameters():
                    if parameter.ndim > 1 and size is TINY:
                        parameter.normal_(std=0.3)  # with GPT-2's 0.02 a decoder this small hardly looks at anything
                    elif name == "wpe.weight":
                        parameter.normal_(std=0.3)  # else every step says the same word
            self.prefix = torch.randn(batch_size, size.prefix, size.config.n_embd).to(device)  # (B, P, C)
        self.theirs = transformers_gpt2(self.decoder, size.eos).eval().to(device, DTYPES[precision])
        self.decoder = self.decoder.to(device).eval().requires_grad_(False)
        self.prepared = prepare_decoder(copy.deepcopy(self.decoder), DTYPES[precision])
        self.captions: dict[str, list[list[int]]] = {}
        self.cache_bytes: dict[str, int] = {}

    @torch.no_grad()
    def ours(self) -> None:
        """Search as p2_infer.py does."""
        with autocast(self.device, self.precision):
            step = StepFunction(self.prepared, self.prefix, BEAMS, self.size.tokens)
            self.captions["ours"] = self.find(step, len(self.prefix), step.keep)
        self.cache_bytes["ours"] = sum(t.nbytes for t in step.cache.keys + step.cache.values)

    @torch.no_grad()
    def transformers(self) -> None:
        """``generate`` with beams on embeddings of the same weights."""
        bos = torch.full((len(self.prefix), 1), self.size.eos, device=self.device)
        embeds = torch.cat([self.prefix.to(self.theirs.dtype), self.theirs.transformer.wte(bos)], 1)
        found = self.theirs.generate(
            inputs_embeds=embeds,
            attention_mask=embeds.new_ones(embeds.shape[:2], dtype=torch.long),
            num_beams=BEAMS,
            max_new_tokens=self.size.tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        eos = self.size.eos
        rows = found.sequences.tolist()
        self.captions["transformers"] = [row[: row.index(eos)] if eos in row else row for row in rows]
        cache = found.past_key_values
        self.cache_bytes["transformers"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    @torch.no_grad()
    def plain(self) -> None:
        """The student script, all steps of all images."""
        with autocast(self.device, self.precision):
            steps = (PlainStep(self.decoder, row[None]) for row in self.prefix)
            self.captions["plain"] = [self.find(step, 1)[0] for step in steps]

    @torch.no_grad()
    def plain_seconds(self, clock: Callable[[], float]) -> float:
        """The time of ``plain``, from the first and the last step of one image."""

        def at(length: int) -> float:
            step = PlainStep(self.decoder, self.prefix[:1])
            tokens = torch.zeros(1, BEAMS, dtype=torch.long, device=self.device)
            slots = torch.eye(BEAMS, dtype=torch.bool, device=self.device)[None]
            for _ in range(length - 1):
                step.slots.append(tokens)
            with autocast(self.device, self.precision):
                return timed(lambda: step(tokens, slots.repeat(1, 1, length)), self.device, clock)

        at(1)
        return (at(1) + at(self.size.tokens)) / 2 * self.size.tokens * len(self.prefix)

    def find(
        self, step: search.Step, images: int, keep: Callable[[torch.Tensor], None] | None = None
    ) -> list[list[int]]:
        """Search with a step function; return the captions."""
        eos = self.size.eos
        found = search.beam_search(step, images, eos, eos, BEAMS, self.size.tokens, device=self.device, keep=keep)
        return found.tokens


class PlainStep:
    """A step function without a cache: every beam's whole sequence again, and logits at all of its positions."""

    def __init__(self, decoder: Decoder, prefix: torch.Tensor) -> None:
        self.decoder, self.prefix = decoder, prefix
        self.slots: list[torch.Tensor] = []

    def __call__(self, tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, K, V) of the tokens to come."""
        self.slots.append(tokens)
        fed = torch.cat(self.slots, 1)[0]  # (n,)
        histories = torch.stack([fed[seen] for seen in ancestors[0]])  # (K, t)
        x = torch.cat([self.prefix.expand(len(histories), -1, -1), self.decoder.embed(histories)], 1)
        return self.decoder.logits(self.decoder(x, torch.arange(x.shape[1])))[None, :, -1]


def floor_seconds(floor: Floor, size: Size, images: int, dtype: torch.dtype) -> float:
    """Return the least time of a search: the prefix once, then weights and cache read and multiplied every step."""
    c = size.config
    matrices, output = 12 * c.n_layer * c.n_embd**2, c.vocab_size * c.n_embd
    width = torch.empty((), dtype=dtype).itemsize
    rows = images * size.prefix
    seconds = floor.seconds(width * matrices, 2 * rows * matrices + 2 * c.n_layer * rows * size.prefix * c.n_embd)
    for step in range(1, size.tokens + 1):
        slots = size.prefix + BEAMS * step
        cache = 2 * c.n_layer * images * slots * c.n_embd
        operations = images * BEAMS * (2 * (matrices + output) + 4 * c.n_layer * slots * c.n_embd)
        seconds += floor.seconds(width * (matrices + output + cache), operations)
    return seconds


def compare(size: Size, precision: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time all three; return a row each."""
    rivals, clock = Rivals(size, args.batch_size, precision, device), CLOCKS[args.clock]
    runs = {"ours": rivals.ours, "transformers": rivals.transformers}
    in_turn(runs, 1, device, clock)  # warm-up
    seconds = in_turn(runs, args.repeats, device, clock)
    seconds["plain"] = rivals.plain_seconds(clock)
    floor = Floor(device, DTYPES[precision], clock)
    least = floor_seconds(floor, size, args.batch_size, DTYPES[precision])
    same = sum(a == b for a, b in zip(rivals.captions["ours"], rivals.captions["transformers"], strict=True))
    return [
        {
            "precision": precision,
            "who": name,
            "captions/s": args.batch_size / taken,
            "we are faster by": taken / seconds["ours"],
            "cache, MB": rivals.cache_bytes[name] / 1e6 if name in rivals.cache_bytes else "-",
            "share of the floor": f"{least / taken:.1%} ({floor})" if name == "ours" else f"{least / taken:.2%}",
            "captions equal to ours": f"{same} of {args.batch_size}" if name == "transformers" else "-",
        }
        for name, taken in seconds.items()
    ]


def unequal(rivals: Rivals) -> list[str]:
    """Run all three to the end; return the names of those whose captions differ from ours."""
    rivals.ours()
    rivals.transformers()
    rivals.plain()
    return [name for name, captions in rivals.captions.items() if captions != rivals.captions["ours"]]


@command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 where captions in float32 differ."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    if args.tiny:
        rivals = Rivals(TINY, args.batch_size, "fp32", device)
        different = unequal(rivals)
        lengths = sorted({len(caption) for caption in rivals.captions["ours"]})
        print(f"{args.batch_size} captions of {lengths} tokens; different: {', '.join(different) or 'none'}")
        return int(bool(different))
    rows = [row for precision in args.precision for row in compare(FULL, precision, args, device)]
    what = f"batch {args.batch_size}, {FULL.prefix} image tokens, beam {BEAMS}, {FULL.tokens} tokens"
    report(
        f"Captions: GPT-2 small with random weights, {what}, {args.clock} time, peak memory "
        f"{peak_memory(device):.1f} GB",
        rows,
        device,
        args.out,
    )
    full = f"{args.batch_size} of {args.batch_size}"
    theirs = [row for row in rows if row["precision"] == "fp32" and row["who"] == "transformers"]
    return int(any(row["captions equal to ours"] != full for row in theirs))


if __name__ == "__main__":
    sys.exit(main())
