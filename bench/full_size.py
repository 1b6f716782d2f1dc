"""Rehearse the whole job at full size with nothing downloaded: cache features, train, reward, caption, explain, score.

    bash bench/full_size.sh                       random ViT-L/14 and GPT-2 small, generated photographs; a CUDA machine
    bash bench/full_size.sh --tiny                the same steps in small on a CPU: does every one run?
    bash bench/full_size.sh --steps 2 --scst-steps 1 --images 2 --maps 1 --batch-size 1      full size, few images

Every part is one of the suite's own command lines, printed before it runs. Weights are random, so throughput and memory
are those of a real job and captions are nonsense. The tokenizer has GPT-2's 50257 entries, and splits words as the
micro world's does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import photographs
from bench.arithmetic import BEAMS, TOKENS
from bench.common import Floor, machine, markdown
from bench.stand_ins import FULL, SAMPLES, TINY, Size, write_decoder, write_tokenizer
from captioning import cli
from captioning.cli import FlagParser, setup_logging
from captioning.data.annotations import load_split
from captioning.data.images import list_images
from captioning.device import pick_device
from captioning.files import write_json, write_text
from captioning.profiles import ROOT

MINUTES = 8.0  # that a rehearsal may take on a GPU


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(prog="bench/full_size.sh", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--tiny", action="store_true", help="small models, few images")
    for name, text in (
        ("steps", "training steps"),
        ("scst_steps", "self-critical steps"),
        ("images", "images captioned"),
        ("maps", "images explained"),
        ("val_images", "validation images"),
        ("batch_size", "images a training step"),
        ("infer_batch", "images captioned at once"),
    ):
        default = f"(default: {getattr(FULL, name)}; tiny {getattr(TINY, name)})"
        add("--" + name.replace("_", "-"), type=int, help=f"{text} {default}", metavar="N")
    add("--minutes", type=float, help=f"stop after so long (default: {MINUTES:g} on CUDA, never elsewhere)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw images")
    add("--work", type=Path, help="new folder for images, cache and runs, kept (default: a temporary one)")
    add("--out", type=Path, help="write OUT.md and OUT.json")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    return parser


def choose(args: argparse.Namespace, size: Size) -> dict[str, int]:
    """Return the size's numbers with those of the flags that were given."""
    names = ("steps", "scst_steps", "images", "maps", "val_images", "batch_size", "infer_batch")
    given = {name: getattr(size, name) if getattr(args, name) is None else getattr(args, name) for name in names}
    for name, value in {**given, "workers": args.workers}.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if given["maps"] > given["images"]:
        raise ValueError(f"--maps {given['maps']}: more than --images {given['images']}")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes}: must be more than 0")
    return given


# --- what the scripts are given ---------------------------------------------------------------------------------------


def write_subset(source: Path, target: Path, images: int) -> None:
    """Write the first ``images`` training images of a data folder as another one of the same pictures."""
    content = json.loads((source / "train.json").read_text(encoding="utf-8"))
    chosen = content["images"][:images]
    ids = {image["id"] for image in chosen}
    captions = [a for a in content["annotations"] if a["image_id"] in ids]
    write_json(target / "train.json", {"images": chosen, "annotations": captions}, indent=None)
    (target / "val.json").symlink_to(source.resolve() / "val.json")
    (target / "images").symlink_to(source.resolve() / "images")


# --- running ----------------------------------------------------------------------------------------------------------


class Rehearsal:
    """Runs commands of the suite one after another below one folder, and keeps what each took.

    Args:
        folder: where everything goes.
        device: ``--device`` of the scripts.
        seconds: that are left to all of them.
    """

    def __init__(self, folder: Path, device: str, seconds: float) -> None:
        self.folder, self.device = folder, device
        self.end = time.monotonic() + seconds
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def __call__(self, title: str, *arguments: object) -> dict[str, Any]:
        """Run ``python arguments…``, a script of the suite or ``-m`` and a module, in the repository.

        Returns:
            The script's usage as ``bench.measured`` writes it; for a module nothing.

        Raises:
            ValueError: the command failed, or the time is over.
        """
        command = [str(a) for a in arguments]
        print(f"\n== {title}\n$ python {shlex.join(command)}", flush=True)
        usage = self.folder / "usage.json"
        wrapped = command if command[0] == "-m" else ["-m", "bench.measured", str(usage), *command]
        left = self.end - time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, *wrapped],
                cwd=ROOT,
                env=self.environment,
                check=False,
                timeout=None if math.isinf(left) else max(left, 0.01),
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"the time was over during '{title}'; give more --minutes, or fewer --steps and --images"
            ) from error
        if done.returncode:
            raise ValueError(f"the part '{title}' failed with exit code {done.returncode}; see its message above")
        return {} if command[0] == "-m" else json.loads(usage.read_text(encoding="utf-8"))


def prepare(run: Rehearsal, size: Size, numbers: dict[str, int], workers: int) -> float:
    """Draw the photographs with their captions and write tokenizer and subset; return a caption set's mean tokens."""
    tokenizer = write_tokenizer(run.folder / "tokenizer")
    source = run.folder / "data"
    counts = {"train": numbers["batch_size"] * numbers["steps"], "val": numbers["val_images"]}
    for split, count in counts.items():
        run(
            f"draw {split}",
            "-m",
            "microworld.scenes",
            "--out",
            source,
            "--split",
            split,
            "--count",
            count,
            "--workers",
            workers,
        )
    run(
        "draw images to caption",
        "-m",
        "microworld.scenes",
        "--out",
        run.folder / "unseen",
        "--split",
        "val",
        "--count",
        numbers["images"],
        "--seed",
        "1",
        "--workers",
        workers,
    )
    folders = [source / "images" / split for split in counts] + [run.folder / "unseen" / "images" / "val"]
    paths = [path for folder in folders for path in list_images(folder)]
    bytes_an_image = photographs.convert(paths, workers, size.photograph)
    print(f"{len(paths)} photographs of {bytes_an_image / 1e3:.0f} kB")
    images = min(counts["train"], numbers["batch_size"] * numbers["scst_steps"])
    write_subset(source, run.folder / "rewarded", images)
    samples = load_split(source, "train")
    return sum(len(tokenizer.encode(c)) + 1 for s in samples for c in s.captions) / len(samples)


def commands(run: Rehearsal, size: Size, numbers: dict[str, int]) -> dict[str, list[object]]:
    """Return the command of each part, in order."""
    folder, device = run.folder, ["--device", run.device]
    tokenizer = ["--tokenizer", folder / "tokenizer"]
    common = [
        "--profile",
        size.profile,
        "--random-weights",
        "--cache",
        folder / "cache",
        *tokenizer,
        "--epochs",
        1,
        "--batch-size",
        numbers["batch_size"],
        "--val-images",
        numbers["val_images"],
        *device,
    ]
    trained, decoder = folder / "trained", folder / "trained" / "decoder_model.safetensors"
    smaller = []
    if size is TINY:
        decoder = folder / "decoder_model.safetensors"
        write_decoder(decoder, size.decoder)
        smaller = ["--decoder", decoder]
    adapter = ["--adapter", trained / "best.safetensors"]
    unseen, captions = folder / "unseen" / "images" / "val", folder / "captions.json"
    shown = list_images(unseen)[: numbers["maps"]]
    return {
        "train": ["p2_train.py", "--data", folder / "data", "--out", trained, *common, *smaller],
        "scst": [
            "p2_train.py",
            "--data",
            folder / "rewarded",
            "--out",
            folder / "tuned",
            *common,
            "--decoder",
            decoder,
            "--objective",
            "scst",
            "--samples",
            SAMPLES,
            "--init-adapter",
            trained / "best.safetensors",
        ],
        "inference": [
            "p2_infer.py",
            unseen,
            captions,
            decoder,
            *adapter,
            *tokenizer,
            "--profile",
            size.profile,
            "--batch-size",
            numbers["infer_batch"],
            *device,
        ],
        "maps": [
            "p3_attention.py",
            "--model",
            "p2",
            "--images",
            *shown,
            "--out",
            folder / "maps",
            *adapter,
            "--decoder",
            decoder,
            *tokenizer,
            "--profile",
            size.profile,
            *device,
        ],
        "score": [
            "evaluate.py",
            "--pred-file",
            captions,
            "--annotation-file",
            folder / "unseen" / "val.json",
            "--metrics",
            "cider",
        ],
    }


def check_results(folder: Path, numbers: dict[str, int]) -> None:
    """Make sure that every part did all of its work, whatever it says itself.

    Raises:
        ValueError: something is missing.
    """
    counts = {
        "captions": (len(json.loads((folder / "captions.json").read_text(encoding="utf-8"))), numbers["images"]),
        "maps": (len(list((folder / "maps").glob("*.npz"))), numbers["maps"]),
    }
    for run_folder, steps in (("trained", "steps"), ("tuned", "scst_steps")):
        lines = (folder / run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        counts[steps] = (max(json.loads(line)["step"] for line in lines), numbers[steps])
    wrong = {name: pair for name, pair in counts.items() if pair[0] != pair[1]}
    if wrong:
        raise ValueError("; ".join(f"{found} {name} instead of {wanted}" for name, (found, wanted) in wrong.items()))


# --- the table --------------------------------------------------------------------------------------------------------


def work_of(usage: dict[str, Any], what: str) -> dict[str, Any]:
    """Add up what a script reported of one kind of work; ValueError where it reported none."""
    parts = [part for part in usage["work"] if part["what"] == what]
    if not parts:
        raise ValueError(f"no word of '{what}' from a script: nothing to show in the table")
    cuda = [part["cuda_gb"] for part in parts if part["cuda_gb"] is not None]
    return {
        "count": sum(part["count"] for part in parts),
        "seconds": sum(part["seconds"] for part in parts),
        "host_gb": max(part["host_gb"] for part in parts),
        "cuda_gb": max(cuda) if cuda else None,
    }


@dataclass(frozen=True)
class Part:
    """A part of the work: which command does it and how it names it; operations of one unit, and their type."""

    name: str
    command: str
    what: str
    unit: str
    count: int
    operations: float
    kind: str


def parts_of(size: Size, numbers: dict[str, int], caption_tokens: float, product: str) -> list[Part]:
    """Return the parts that the arithmetic knows.

    Args:
        size, numbers: models, and how many of what.
        caption_tokens: of all captions of an image.
        product: type of matrix products where the scripts choose it.
    """
    models, batch, tokens = size.models, numbers["batch_size"], round(caption_tokens)
    train, reward = batch * models.train(tokens), batch * models.scst(SAMPLES, TOKENS, tokens)
    encode = models.encoder.operations
    cached = batch * numbers["steps"] + numbers["val_images"]
    return [
        Part("feature cache", "train", "cache", "images", cached, encode, "fp32"),
        Part("training", "train", "train", "steps", numbers["steps"], train, product),
        Part("self-critical training", "scst", "train", "steps", numbers["scst_steps"], reward, product),
        Part(
            "inference",
            "inference",
            "caption",
            "images",
            numbers["images"],
            encode + models.search(BEAMS, TOKENS),
            product,
        ),
        Part("attention maps", "maps", "explain", "images", numbers["maps"], models.explain(BEAMS, TOKENS), "fp32"),
    ]


def table(parts: list[Part], usages: dict[str, dict[str, Any]], rates: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row for each part, and one for the scoring.

    Args:
        parts: what was to be done.
        usages: what each command took; commands that are not there have no row.
        rates: measured operations a second of matrix products by type.
    """
    rows = []
    for part in parts:
        if part.command in usages:
            work = work_of(usages[part.command], part.what)
            reached = work["count"] / work["seconds"] * part.operations
            rows.append(row(part.name, work, part.unit, reached, part.kind, rates[part.kind]))
    if "score" not in usages:
        return rows
    score = usages["score"]
    whole = {**score, "count": next(part.count for part in parts if part.command == "inference")}
    return [*rows, row("CIDEr, start included", whole, "captions", None, "-", None)]


def estimate(parts: list[Part], rates: dict[str, float]) -> str:
    """Say what the matrix products of each part take at the measured rates: less than any run can."""
    least = {part.name: part.count * part.operations / rates[part.kind] for part in parts}
    return "products alone, at the measured rates: " + ", ".join(f"{name} {s:.3g} s" for name, s in least.items())


def row(
    name: str, work: dict[str, Any], unit: str, operations: float | None, kind: str, rate: float | None
) -> dict[str, Any]:
    """Return one row; ``operations`` a second are those of the arithmetic, at the rate reached."""
    return {
        "part": name,
        "count": work["count"],
        "unit": unit,
        "seconds": work["seconds"],
        "a second": work["count"] / work["seconds"],
        "TFLOP/s": "-" if operations is None else operations / 1e12,
        "share of the matrix rate": "-" if operations is None else f"{operations / rate:.1%} ({kind})",
        "GPU memory, GB": "-" if work["cuda_gb"] is None else work["cuda_gb"],
        "host memory, GB": work["host_gb"],
    }


def measure_rates(device: torch.device, size: Size) -> tuple[dict[str, float], float]:
    """Return the operations a second of matrix products by type, and the bytes a second of copying."""
    kinds = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if device.type == "cuda" else {})
    rows = 6144 if device.type == "cuda" else size.floor
    floors = {kind: Floor(device, dtype, size=rows) for kind, dtype in kinds.items()}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {kind: floor.operations_a_second for kind, floor in floors.items()}, floors["fp32"].bytes_a_second


def rehearse(args: argparse.Namespace, size: Size, device: torch.device, folder: Path) -> dict[str, Any]:
    """Run all parts below ``folder`` and return the results."""
    numbers, started = choose(args, size), time.monotonic()
    default = MINUTES if device.type == "cuda" else math.inf
    run = Rehearsal(folder, args.device, 60 * (default if args.minutes is None else args.minutes))
    rates, copying = measure_rates(device, size)
    tokens = prepare(run, size, numbers, args.workers)
    prepared = time.monotonic() - started
    parts = parts_of(size, numbers, tokens, "bf16" if device.type == "cuda" else "fp32")
    print(estimate(parts, rates))
    usages, failure = run_all(run, commands(run, size, numbers))
    if not failure:
        check_results(folder, numbers)
    again, copying_again = measure_rates(device, size)  # other work on the machine may have been in the way
    rates = {kind: max(rate, again[kind]) for kind, rate in rates.items()}
    return {
        "machine": machine(device),
        "failure": failure,
        "tiny": size is TINY,
        "numbers": numbers,
        "caption_tokens": tokens,
        "matrix_rates": rates,
        "copy_rate": max(copying, copying_again),
        "rows": table(parts, usages, rates),
        "seconds": {"prepare": prepared} | {k: u["seconds"] for k, u in usages.items()},
        "reserved_gb": {k: u["cuda_gb"] for k, u in usages.items() if u["cuda_gb"] is not None},
        "minutes": (time.monotonic() - started) / 60,
    }


def run_all(run: Rehearsal, commands: dict[str, list[object]]) -> tuple[dict[str, dict[str, Any]], str]:
    """Run the commands up to the first that fails; return what they took, and why not all are there."""
    usages: dict[str, dict[str, Any]] = {}
    for title, command in commands.items():
        try:
            usages[title] = run(title, *command)
        except ValueError as error:
            return usages, str(error)
    return usages, ""


def as_text(found: dict[str, Any]) -> str:
    """Return the results as one Markdown table with a title and what it was measured against."""
    rates = ", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in found["matrix_rates"].items())
    whole = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["seconds"].items())
    title = "Rehearsal in small" if found["tiny"] else "Rehearsal at full size: random ViT-L/14 and GPT-2 small"
    reserved = ", ".join(f"{name} {gb:.1f} GB" for name, gb in found["reserved_gb"].items())
    reserved = f" Taken from the GPU by its allocator: {reserved}." if reserved else ""
    rows = markdown(found["rows"]) if found["rows"] else "No part was finished."
    return (
        f"## {title}\n\n{found['machine']}; matrix products {rates}; copying {found['copy_rate'] / 1e9:.3g} GB/s\n\n"
        f"{rows}\n\nWhole processes, start included: {whole}. All: {found['minutes']:.1f} min.{reserved}\n"
    )


def in_folder(work: Path | None, function: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Call ``function`` with a new folder: ``work``, which is kept, or a temporary one."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="full_size_") as folder:
            return function(Path(folder))
    if work.exists() and (not work.is_dir() or any(work.iterdir())):
        raise ValueError(f"--work {work}: exists already; name a new folder")
    work.mkdir(parents=True, exist_ok=True)
    return function(work.resolve())


@cli.command
def main(argv: list[str] | None = None) -> int:
    """Rehearse; return 0, or 2 where a part failed or the time was over."""
    args = build_parser().parse_args(argv)
    setup_logging()
    size = TINY if args.tiny else FULL
    choose(args, size)
    device = pick_device(args.device)
    found = in_folder(args.work, lambda folder: rehearse(args, size, device, folder))
    text = as_text(found)
    print(f"\n{text}")
    if args.out:
        write_text(args.out.with_suffix(".md"), text)
        write_json(args.out.with_suffix(".json"), found)
    if found["failure"]:  # what was measured before is shown all the same
        raise ValueError(found["failure"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
