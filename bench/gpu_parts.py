"""One part of ``bench.first_gpu`` in a process of its own: what it measured, or why it could not, as JSON.

    python -m bench.gpu_parts decode OUT.json --device cpu --quick

A part that ends its process, or leaves the GPU unusable, so takes nothing else with it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import decode, features, llava, photographs, scst, train
from bench.arithmetic import CaptionerShape
from bench.common import draw_scenes, in_turn, machine, make_parser, measure_rates, timed
from bench.measured import Peaks
from bench.stand_ins import FULL, SAMPLES, TINY
from captioning.cli import PARTIAL, FlagParser, command, setup_logging
from captioning.data.batches import pack_captions
from captioning.device import autocast, has_bf16, pick_device
from captioning.files import write_json
from captioning.kernels.attention_route import Trial
from captioning.kernels.packed_attention import can_attend_packed
from captioning.kernels.packing import Packing
from captioning.messages import first_sentence
from captioning.models.llava import load_llava, pick_dtype
from captioning.models.step_functions import CompiledStepFunction, StepFunction
from captioning.profiles import PROFILES

LENGTHS = 30  # of the keys, as a search has them
LAYERS = 4  # of LLaVA's tower and language model
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Setup:
    """Where and how much: the numbers are those of a training and an inference at full size, or small ones."""

    device: torch.device
    quick: bool
    folder: Path

    @property
    def batch(self) -> int:
        """Images of a training step."""
        return 2 if self.quick else FULL.numbers["batch_size"]

    @property
    def precision(self) -> str:
        """What is measured beside float32: bf16, on a CPU too, to see that it runs."""
        return "bf16" if self.device.type == "cpu" or has_bf16(self.device) else "fp32"

    @property
    def repeats(self) -> int:
        """Timed runs of each, after a warm-up."""
        return 1 if self.quick else 5


# --- the parts --------------------------------------------------------------------------------------------------------


def build(setup: Setup) -> Rows:
    """What torch was built with, what the card is, and what may be used."""
    cuda, device = torch.backends.cuda, setup.device
    facts: dict[str, Any] = {
        "machine": machine(device),
        "CUDA of torch": torch.version.cuda or torch.version.hip or "none",
        "driver": driver(),
        "cuDNN": torch.backends.cudnn.version() or "none",
        "kernels for": " ".join(torch.cuda.get_arch_list()) or "no GPU",
        "flash attention": f"built: {cuda.is_flash_attention_available()}, allowed: {cuda.flash_sdp_enabled()}",
        "attention allowed": f"memory-efficient: {cuda.mem_efficient_sdp_enabled()}, cuDNN: {cuda.cudnn_sdp_enabled()}",
        "packed attention has a kernel": can_attend_packed(device, torch.bfloat16, 64),
        "compilers": " ".join(name for name in ("g++", "nvcc") if shutil.which(name)) or "none",
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "compute capability": f"{card.major}.{card.minor}, {card.multi_processor_count} multiprocessors",
            "memory": f"{card.total_memory / 1e9:.1f} GB",
        }
    facts["bf16"] = "native" if has_bf16(device) else "none of its own"
    rates, copying = measure_rates(device, size=256 if setup.quick else None)
    facts |= {f"matrix products in {kind}": f"{rate / 1e12:.3g} TFLOP/s" for kind, rate in rates.items()}
    facts["copying"] = f"{copying / 1e9:.3g} GB/s"
    return [{"fact": name, "is": str(value)} for name, value in facts.items()]


def driver() -> str:
    """Return the version of NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return found.partition("\n")[0] or "unknown"


def attention(setup: Setup) -> Rows:
    """Packed attention and a mask, in value, gradient and time: one layer of a training step."""
    images, prefix, heads, size = (2, 21, 2, 16) if setup.quick else (setup.batch, decode.FULL.prefix, 12, 64)
    device, lengths = setup.device, random.Random(0)
    captions = [[[1] * lengths.randint(9, 16) for _ in range(train.CAPTIONS)] for _ in range(images)]
    batch = pack_captions(captions, 0, pad_to_multiple=8).to(device)
    assert batch.slots is not None
    packing = Packing(prefix, batch.slots, batch.inputs.shape[1], lambda: batch.mask_with_prefix(prefix))
    padding = F.pad(batch.segments == 0, (prefix, 0)).cpu()
    trial = Trial(packing, heads, size, padding)
    errors, runs = trial.errors(torch.bfloat16), trial.runs(torch.bfloat16)
    in_turn(runs, 1, device)
    seconds = in_turn(runs, 4 * setup.repeats, device)
    return [
        {"route": route, "ms forward and backward": 1e3 * seconds[route]}
        | {f"{what} off by": error for what, error in zip(("output", "gradient"), errors[route], strict=True)}
        for route in runs
    ]


def cudnn(setup: Setup) -> Rows:
    """Attention over thirty lengths, as a search has them, with cuDNN's kernels allowed and not."""
    images, heads, size = (1, 2, 16) if setup.quick else (16, 12, 64)
    device, beams, prefix, before = (
        setup.device,
        decode.BEAMS,
        decode.FULL.prefix,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float16
    q = torch.randn(images, heads, beams, size, device=device).to(dtype)
    keys = torch.randn(images, heads, prefix + beams * LENGTHS, size, device=device).to(dtype)

    def search() -> None:
        for step in range(1, LENGTHS + 1):
            kv = keys[:, :, : prefix + beams * step]
            F.scaled_dot_product_attention(q, kv, kv, attn_mask=q.new_zeros(images, 1, beams, kv.shape[2]))

    rows = []
    try:
        for allowed in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(allowed)
            first, again = timed(search, device), min(timed(search, device) for _ in range(setup.repeats))
            rows.append({"cuDNN": "allowed" if allowed else "off", "first s": first, "again s": again})
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    return rows


@torch.no_grad()
def decoding(setup: Setup) -> Rows:
    """Beam search as it is, compiled, and on CUDA as graphs."""
    size, count = (decode.TINY, 2) if setup.quick else (decode.FULL, FULL.numbers["infer_batch"])
    rivals = decode.Rivals(size, count, setup.precision, setup.device)
    plain = decode.prepare_decoder(rivals.decoder, decode.DTYPES[setup.precision], reorder=False)
    modes = {"eager": None, "compiled": False} | ({"graphs": True} if setup.device.type == "cuda" else {})
    rows: Rows = []
    for name, graphs in modes.items():
        with autocast(setup.device, setup.precision):
            step = None
            if graphs is not None:
                backend = "eager" if setup.quick else "inductor"
                shape = (count, size.prefix, decode.BEAMS, size.tokens)
                step = CompiledStepFunction(plain, *shape, backend=backend, graphs=graphs)

            def run(name: str = name, step: CompiledStepFunction | None = step) -> None:
                """Search, its cache filled again."""
                begun: Any = step.begin(rivals.prefix) if step else None
                begun = begun or StepFunction(rivals.prepared, rivals.prefix, decode.BEAMS, size.tokens)
                rivals.captions[name] = rivals.find(begun, count, None if step else begun.keep)

            first = timed(run, setup.device)
            again = min(timed(run, setup.device) for _ in range(setup.repeats))
        same = sum(a == b for a, b in zip(rivals.captions["eager"], rivals.captions[name], strict=True))
        row = {"search": name, "images": count, "first s": first, "again s": again, "captions/s": count / again}
        rows.append(row | {"ms a step": 1e3 * again / size.tokens, "as eager": f"{same} of {count}"})
    return rows


def training(setup: Setup) -> Rows:
    """A step of training in float32 and bf16, and those of the two loops that it is compared with."""
    words = ["--images", str(setup.batch), "--repeats", str(setup.repeats)]
    args = train.build_parser().parse_args(words)
    rivals = train.Rivals(train.TINY if setup.quick else train.FULL, setup.batch, setup.folder, setup.device)
    kinds = dict.fromkeys(("fp32", setup.precision))
    return [row for kind in kinds for row in train.compare(rivals, kind, args, setup.device)]


def caching(setup: Setup) -> Rows:
    """Caching the features of photographs, beside one batch after another, and reading them alone."""
    count, size, stand_in = (4, train.TINY, TINY) if setup.quick else (128, train.FULL, FULL)
    paths = draw_scenes(setup.folder, count)
    photographs.convert(paths, 1 if setup.quick else os.cpu_count() or 1, stand_in.photograph)
    runs = features.rivals(size, paths, setup.folder, setup.device)
    in_turn(runs, 1, setup.device)  # warm-up
    seconds, work = in_turn(runs, setup.repeats, setup.device), CaptionerShape().encoder.operations
    rows: Rows = [{"how": how, "images/s": count / taken} for how, taken in seconds.items()]
    for row in [] if setup.quick else rows:
        row["TFLOP/s"] = row["images/s"] * work / 1e12 if row["how"] != features.READING else "-"
    return rows


def rewarding(setup: Setup) -> Rows:
    """The parts of a step of self-critical training."""
    decoder, encoder, kwargs = train.TINY
    captioner = scst.make_captioner(encoder, kwargs, decoder) if setup.quick else scst.make_captioner()
    captioner, known = captioner.to(setup.device).eval(), 10 if setup.quick else 10_000
    with autocast(setup.device, setup.precision):
        parts = scst.measure(captioner, setup.batch, SAMPLES, setup.repeats, known)
    row: dict[str, Any] = {"images": setup.batch, "captions an image": SAMPLES, "s a step": sum(parts.values())}
    return [row | {f"{name}, s": taken for name, taken in parts.items()}]


def answering(setup: Setup) -> Rows:
    """LLaVA with few layers: plain ``generate`` image by image, and as p1_llava_caption.py answers."""
    count, tokens = (2, 4) if setup.quick else (32, 64)
    words = ["--batch-size", str(count), "--max-new-tokens", str(tokens), "--repeats", "1"]
    args, dtype = llava.build_parser().parse_args(words), pick_dtype("auto", setup.device)
    if setup.quick:
        model = load_llava(PROFILES["micro"].llava, setup.device, dtype)
    else:
        model = llava.random_llava(LAYERS, dtype, setup.device)
    row, _ = llava.compare(model, draw_scenes(setup.folder, count), 1, args)
    return [row]


PARTS: dict[str, Callable[[Setup], Rows]] = {
    "build": build,
    "attention": attention,
    "cudnn": cudnn,
    "decode": decoding,
    "train": training,
    "cache": caching,
    "scst": rewarding,
    "llava": answering,
}


# --- one of them ------------------------------------------------------------------------------------------------------


def measure(part: str, setup: Setup) -> dict[str, Any]:
    """Run one part; return its rows, or the error, with seconds and peak memory."""
    peaks, started = Peaks(), time.perf_counter()
    peaks.look()
    try:
        found: dict[str, Any] = {"rows": PARTS[part](setup)}
    except Exception as error:  # on an untested machine it can be any: the other parts are still worth having
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {first_sentence(error)}"}
    return found | {"seconds": time.perf_counter() - started, **peaks.look()}


def build_parser() -> FlagParser:
    """Return the command line."""
    parser = make_parser("gpu_parts", __doc__, repeats=0)
    parser.add_argument("part", choices=list(PARTS), help="which")
    parser.add_argument("found", type=Path, metavar="OUT.json", help="file of the result")
    parser.add_argument("--quick", action="store_true", help="tiny models: does it run?")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Run a part; return 3 (``PARTIAL``) where it failed."""
    args: argparse.Namespace = build_parser().parse_args(argv)
    setup_logging()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.part, Setup(pick_device(args.device, announce=False), args.quick, Path(folder)))
    write_json(args.found, found)
    return PARTIAL if "error" in found else 0


if __name__ == "__main__":
    sys.exit(main())
