"""Memory of inference over many images, streamed from tar shards: ``python -m bench.stream``.

Runs the real ``p2_infer.py`` on tars that hold few drawings of the micro world under many keys, and reads its resident
memory from ``/proc`` (Linux) while it works. The captioner has random LoRA and projector weights, so captions mean
nothing; ``--captioner micro`` is the micro world's encoder and decoder, ``tiny`` the same layout cut down.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.common import CPU, draw_scenes, make_parser, report
from captioning.cli import FlagParser, command, positive_int
from captioning.files import write_text
from captioning.imports import import_guarded
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.profiles import PROFILES, ROOT
from decoder import Decoder, DecoderConfig, LoraConfig, build_decoder, gpt2_state_dict
from microworld.steps import flags

MICRO = PROFILES["micro"]
TINY_ENCODER = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 48, "crop_pct": 1.0}
TINY_DECODER = DecoderConfig(vocab_size=1024, n_positions=64, n_embd=64, n_layer=2, n_head=2)
LORA = LoraConfig(4, 4.0)
ROWS = 10  # of the curve in the table; --out has all of it


def build_parser() -> FlagParser:
    """Return the command line."""
    parser = make_parser("stream", __doc__, repeats=0, device=False)
    add = parser.add_argument
    add("--images", type=positive_int, default=200_000, help="in all; 8.5 kB of disk each")
    add("--per-tar", type=positive_int, default=2000, help="images a tar")
    add("--distinct", type=positive_int, default=64, help="different drawings among them")
    add("--captioner", choices=("micro", "tiny"), default="micro", help="size of the random captioner")
    add("--every", type=float, default=1.0, help="seconds between two looks at the memory")
    add("--limit-gb", type=float, default=1.5, help="more resident memory than this is a failure")
    return parser


def make_captioner(folder: Path, size: str) -> list[str]:
    """Write an adapter, and for ``tiny`` a decoder, into ``folder``; return ``p2_infer.py``'s flags for them."""
    torch.manual_seed(0)
    if size == "micro":
        decoder, file = build_decoder(MICRO.decoder, LORA), MICRO.decoder
        config = CaptionerConfig(MICRO.encoder, MICRO.encoder_kwargs, MICRO.encoder_weights, lora=LORA)
    else:
        file = str(folder / "decoder.safetensors")
        save_file(gpt2_state_dict(Decoder(TINY_DECODER)), file)
        decoder = build_decoder(file, LORA)
        config = CaptionerConfig(MICRO.encoder, TINY_ENCODER, "random", lora=LORA)
    Captioner(config, decoder).save_adapter(folder / "adapter.safetensors")
    return [file, "--adapter", str(folder / "adapter.safetensors"), "--profile", "micro", "--device", "cpu"]


def make_tars(folder: Path, images: int, per_tar: int, distinct: int) -> str:
    """Write the shards; return the brace range that names them."""
    drawings = [path.read_bytes() for path in draw_scenes(folder / "drawings", distinct)]
    count = -(-images // per_tar)
    for shard in range(count):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(shard * per_tar, min(images, (shard + 1) * per_tar)):
                entry = tarfile.TarInfo(f"{number:09d}.jpg")
                content = drawings[number % len(drawings)]
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return str(folder / f"{{00000..{count - 1:05d}}}.tar")


def watch(command: list[str], state: Path, every: float) -> tuple[int, list[dict[str, float]]]:
    """Run ``command``; return its exit code and the curve: seconds, images captioned, resident memory and its peak."""
    curve: list[dict[str, float]] = []
    counted: dict[str, int] = {}
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while process.poll() is None:
            time.sleep(every)
            for record in state.glob("*.json"):
                if record.name not in counted and record.name != "run.json":
                    counted[record.name] = json.loads(record.read_text(encoding="utf-8"))["captioned"]
            memory = resident(process.pid)
            if memory:
                done = sum(counted.values())
                curve.append({"seconds": round(time.monotonic() - began, 1), "images": done, **memory})
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    return process.returncode, curve


def resident(pid: int) -> dict[str, float]:
    """Return the resident memory of a process and its peak so far in MB; nothing where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in lines)
    names = {"resident MB": "VmRSS", "peak MB": "VmHWM"}
    return {ours: int(found[theirs].split()[0]) / 1e3 for ours, theirs in names.items() if theirs in found}


def summarise(curve: list[dict[str, float]], images: int) -> list[dict[str, Any]]:
    """Return the curve's first points after each tenth of the images."""
    marks = [images * tenth // ROWS for tenth in range(ROWS)]
    rows = [next((point for point in curve if point["images"] > mark), None) for mark in marks]
    return [row for row in [*rows, curve[-1]] if row]


def draw(curve: list[dict[str, float]], limit: float, path: Path) -> None:
    """Draw memory over images."""
    figure = import_guarded("matplotlib.figure").Figure((6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([point["images"] for point in curve], [point["resident MB"] for point in curve], marker=".", lw=1)
    axes.axhline(limit * 1e3, color="grey", ls="--", lw=1)
    axes.set(xlabel="images captioned", ylabel="resident memory, MB", ylim=(0, limit * 1.1e3))
    figure.savefig(path, dpi=120)


def measure(args: argparse.Namespace, folder: Path) -> int:
    """Make the input, run, and report; return the exit code."""
    models = make_captioner(folder, args.captioner)
    tars = make_tars(folder, args.images, args.per_tar, args.distinct)
    out = folder / "out.jsonl"
    words = ["p2_infer.py", tars, str(out), *models, *flags(batch_size=64, beam_size=1, max_new_tokens=4)]
    code, curve = watch([sys.executable, *words], out / "_state", args.every)
    if code:
        raise ValueError(f"p2_infer.py ended with exit code {code}")
    manifest = json.loads((out / "_manifest.json").read_text(encoding="utf-8"))
    if manifest["keys"] != args.images:
        raise ValueError(f"{manifest['keys']} results for {args.images} images")
    peak = max(point["peak MB"] for point in curve)
    title = f"{args.images} images from {len(manifest['shards'])} tars, {args.captioner} captioner: peak {peak:.0f} MB"
    report(title, summarise(curve, args.images), CPU, args.out)
    if args.out:
        write_text(args.out.with_suffix(".curve.jsonl"), "".join(json.dumps(point) + "\n" for point in curve))
        draw(curve, args.limit_gb, args.out.with_suffix(".png"))
    return int(peak > args.limit_gb * 1e3)


@command
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 where more memory was resident than allowed."""
    args = build_parser().parse_args(argv)
    if not Path("/proc/self/status").is_file():
        raise ValueError("bench.stream reads /proc, which only Linux has")
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
