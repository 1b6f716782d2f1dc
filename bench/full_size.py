"""Rehearse the whole job at full size with nothing downloaded: cache features, train, reward, caption, explain, score.

    bash bench/full_size.sh                       random ViT-L/14 and GPT-2 small, generated photographs; a CUDA machine
    bash bench/full_size.sh --tiny                the same steps in small on a CPU: does every one run?
    bash bench/full_size.sh --steps 2 --scst-steps 1 --images 2 --maps 1 --batch-size 1      full size, few images
    bash bench/full_size.sh --setting best-h        a larger encoder; --pool 2 for averages of its patches

Every part is one of the suite's own command lines, printed before it runs. Weights are random: throughput and memory
are those of a real job, captions are nonsense. The tokenizer has GPT-2's 50257 entries and splits words as the micro
world's does.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bench import photographs
from bench.arithmetic import BEAMS, PRESETS, TOKENS
from bench.common import machine, make_parser, markdown, measure_rates
from bench.stand_ins import FULL, NUMBERS, SAMPLES, TINY, Size, write_decoder, write_tokenizer
from captioning.cli import FlagParser, command, positive_int, setup_logging
from captioning.data.annotations import load_split
from captioning.data.listing import list_images
from captioning.device import pick_device, settle_precision
from captioning.files import read_json, write_json, write_text
from captioning.profiles import ROOT
from microworld.scenes import generate
from microworld.steps import flags

T = TypeVar("T")
MINUTES = 8.0  # that a rehearsal may take on a GPU
PARTS = ("train", "scst", "inference", "maps", "score")  # the first is what the others work on


def build_parser() -> FlagParser:
    """Return the command line."""
    parser = make_parser("full_size", __doc__, repeats=0)
    add = parser.add_argument
    add("--tiny", action="store_true", help="small models, few images")
    add("--setting", choices=["best", *PRESETS], default="best", help="of p2_train.py: which encoder")
    add("--pool", type=positive_int, default=1, help="as p2_train.py's", metavar="N")
    for name, what in NUMBERS.items():
        text = f"{what} (default: {FULL.numbers[name]}; tiny {TINY.numbers[name]})"
        add("--" + name.replace("_", "-"), type=positive_int, help=text, metavar="N")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="which (train, which the others need, is always one)")
    add("--minutes", type=float, help=f"stop after so long (default: {MINUTES:g} on CUDA, never elsewhere)")
    add("--workers", type=positive_int, default=os.cpu_count() or 1, help="processes that draw images")
    add("--work", type=Path, help="new folder for images, cache and runs, kept (default: a temporary one)")
    return parser


def size_of(args: argparse.Namespace) -> Size:
    """Return the size that the flags ask for; ValueError where they do not go together."""
    size = TINY if args.tiny else FULL
    if args.tiny and args.setting in PRESETS:
        raise ValueError(f"--setting {args.setting}: is of the full size; leave out --tiny")
    models = replace(size.models, encoder=PRESETS.get(args.setting, size.models.encoder), pool=args.pool)
    return replace(size, models=models, setting=args.setting)


def choose(args: argparse.Namespace, size: Size) -> dict[str, int]:
    """Return the size's numbers with those of the flags that were given."""
    numbers = size.numbers | {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    if numbers["maps"] > numbers["images"]:
        raise ValueError(f"--maps {numbers['maps']}: more than --images {numbers['images']}")
    if "score" in args.parts and "inference" not in args.parts:
        raise ValueError("--parts score: there are captions to score only with inference beside it")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes}: must be more than 0")
    return numbers


# --- running ----------------------------------------------------------------------------------------------------------


class Rehearsal:
    """Runs scripts of the suite one after another below one folder.

    Args:
        folder: where everything goes.
        device: ``--device`` of the scripts.
        seconds: that are left to all of them.
    """

    def __init__(self, folder: Path, device: str, seconds: float) -> None:
        self.folder, self.device = folder, device
        self.end = time.monotonic() + seconds

    def __call__(self, title: str, *arguments: object, **options: object) -> dict[str, Any]:
        """Run ``python arguments… --options…``, a script of the suite, in the repository.

        Returns:
            The script's usage as ``bench.measured`` writes it.

        Raises:
            ValueError: the command failed, or the time is over.
        """
        words, usage = [*map(str, arguments), *flags(**options)], self.folder / "usage.json"
        print(f"\n== {title}\n$ python {shlex.join(words)}", flush=True)
        left = self.end - time.monotonic()
        timeout = None if math.isinf(left) else max(left, 0.01)
        command = [sys.executable, "-m", "bench.measured", str(usage), *words]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=timeout).returncode
        except subprocess.TimeoutExpired as error:
            remedy = "give more --minutes, or fewer --steps and --images"
            raise ValueError(f"the time was over during '{title}'; {remedy}") from error
        if code:
            raise ValueError(f"the part '{title}' failed with exit code {code}; see its message above")
        return read_json(usage)


def prepare(folder: Path, size: Size, numbers: dict[str, int], workers: int) -> float:
    """Draw the photographs with their captions and write tokenizer and subset; return a caption set's mean tokens."""
    tokenizer, source = write_tokenizer(folder / "tokenizer"), folder / "data"
    generate(source, "train", numbers["batch_size"] * numbers["steps"], seed=0, workers=workers)
    generate(source, "val", numbers["val_images"], seed=0, workers=workers)
    generate(folder / "unseen", "val", numbers["images"], seed=1, workers=workers)
    paths = [path for images in sorted(folder.glob("*/images/*")) for path in list_images(images)]
    bytes_an_image = photographs.convert(paths, workers, size.photograph)
    print(f"{len(paths)} photographs of {bytes_an_image / 1e3:.0f} kB")
    write_subset(source, folder / "rewarded", numbers["batch_size"] * min(numbers["steps"], numbers["scst_steps"]))
    samples = load_split(source, "train")
    return sum(len(tokenizer.encode(c)) + 1 for s in samples for c in s.captions) / len(samples)


def write_subset(source: Path, target: Path, images: int) -> None:
    """Write the first ``images`` training images of a data folder as another one of the same pictures."""
    content = json.loads((source / "train.json").read_text(encoding="utf-8"))
    chosen = content["images"][:images]
    ids = {image["id"] for image in chosen}
    captions = [a for a in content["annotations"] if a["image_id"] in ids]
    write_json(target / "train.json", {"images": chosen, "annotations": captions}, indent=None)
    (target / "val.json").symlink_to(source.resolve() / "val.json")
    (target / "images").symlink_to(source.resolve() / "images")


def run_all(
    run: Rehearsal, size: Size, numbers: dict[str, int], wanted: Collection[str]
) -> tuple[dict[str, dict[str, Any]], str]:
    """Run the wanted scripts up to the first that fails; return what they took, and why not all are there."""
    usages: dict[str, dict[str, Any]] = {}
    try:
        for title, words, options in commands(run.folder, size, numbers):
            if title in wanted or title == PARTS[0]:
                usages[title] = run(title, *words, **options | ({"device": run.device} if title != "score" else {}))
        check_results(run.folder, numbers, usages)
    except ValueError as error:
        return usages, str(error)
    return usages, ""


def commands(
    folder: Path, size: Size, numbers: dict[str, int]
) -> Iterator[tuple[str, list[object], dict[str, object]]]:
    """Yield title, words and options of each script, in order."""
    decoder = None
    if size.tiny:  # smaller than --random-weights makes it
        decoder = folder / "decoder_model.safetensors"
        write_decoder(decoder, size.decoder)
    common = {"profile": size.profile, "tokenizer": folder / "tokenizer"}
    training = common | {
        "random_weights": True,
        "setting": size.setting,
        "pool": size.models.pool,
        "cache": folder / "cache",
        "epochs": 1,
        "batch_size": numbers["batch_size"],
        "val_images": numbers["val_images"],
    }
    trained, adapter = folder / "trained", folder / "trained" / "best.safetensors"
    yield "train", ["p2_train.py"], training | {"data": folder / "data", "out": trained, "decoder": decoder}
    decoder = decoder or trained / "decoder_model.safetensors"
    tuning = {"objective": "scst", "samples": SAMPLES, "init_adapter": adapter, "decoder": decoder}
    yield "scst", ["p2_train.py"], training | {"data": folder / "rewarded", "out": folder / "tuned"} | tuning
    unseen, captions = folder / "unseen" / "images" / "val", folder / "captions.json"
    batch = {"batch_size": numbers["infer_batch"]}
    yield "inference", ["p2_infer.py", unseen, captions, decoder], common | {"adapter": adapter} | batch
    shown = {"images": list_images(unseen)[: numbers["maps"]], "out": folder / "maps"}
    yield "maps", ["p3_attention.py"], common | {"model": "p2", "adapter": adapter, "decoder": decoder} | shown
    references = folder / "unseen" / "val.json"
    yield "score", ["evaluate.py"], {"pred_file": captions, "annotation_file": references, "metrics": "cider"}


def check_results(folder: Path, numbers: dict[str, int], parts: Collection[str] = PARTS) -> None:
    """Make sure that every one of the parts did all of its work, whatever it says itself.

    Raises:
        ValueError: something is missing.
    """
    counts = {}
    if "inference" in parts:
        captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        counts["captions"] = len(captions), numbers["images"]
    if "maps" in parts:
        counts["maps"] = len(list((folder / "maps").glob("*.npz"))), numbers["maps"]
    for part, run_folder, steps in (("train", "trained", "steps"), ("scst", "tuned", "scst_steps")):
        if part in parts:
            lines = (folder / run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            counts[steps] = max(json.loads(line)["step"] for line in lines), numbers[steps]
    wrong = {name: pair for name, pair in counts.items() if pair[0] != pair[1]}
    if wrong:
        raise ValueError("; ".join(f"{found} {name} instead of {wanted}" for name, (found, wanted) in wrong.items()))


# --- the table --------------------------------------------------------------------------------------------------------


def work_of(usage: dict[str, Any], what: str) -> dict[str, Any]:
    """Add up what a script reported of one kind of work; ValueError where it reported none."""
    parts = [part for part in usage["work"] if part["what"] == what]
    if not parts:
        raise ValueError(f"a script did not report '{what}': nothing to show in the table")
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


def parts_of(
    size: Size, numbers: dict[str, int], caption_tokens: float, product: str, searched: str | None = None
) -> list[Part]:
    """Return the parts that the arithmetic knows.

    Args:
        size, numbers: models, and how many of what.
        caption_tokens: of all captions of an image.
        product: type of matrix products where the scripts choose it, in training.
        searched: the same in inference, where that is another one.
    """
    models, batch, tokens = size.models, numbers["batch_size"], round(caption_tokens)
    train, reward = batch * models.train(tokens), batch * models.scst(SAMPLES, TOKENS, tokens)
    encode, search = models.encoder.operations, models.encoder.operations + models.search(BEAMS, TOKENS)
    cached = batch * numbers["steps"] + numbers["val_images"]
    return [
        Part("feature cache", "train", "cache", "images", cached, encode, "fp32"),
        Part("training", "train", "train", "steps", numbers["steps"], train, product),
        Part("self-critical training", "scst", "train", "steps", numbers["scst_steps"], reward, product),
        Part("inference", "inference", "caption", "images", numbers["images"], search, searched or product),
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
            reached = work["count"] / work["seconds"] * part.operations  # those of the arithmetic, a second
            share = f"{reached / rates[part.kind]:.1%} ({part.kind})"
            rows.append(row(part.name, work, part.unit, reached / 1e12, share))
    if "score" in usages:
        captions = next(part.count for part in parts if part.command == "inference")
        rows.append(row("CIDEr, start included", usages["score"] | {"count": captions}, "captions", "-", "-"))
    return rows


def row(name: str, work: dict[str, Any], unit: str, teraflops: float | str, share: str) -> dict[str, Any]:
    """Return one row of the table."""
    return {
        "part": name,
        "count": work["count"],
        "unit": unit,
        "seconds": work["seconds"],
        "a second": work["count"] / work["seconds"],
        "TFLOP/s": teraflops,
        "share of the matrix rate": share,
        "GPU memory, GB": "-" if work["cuda_gb"] is None else work["cuda_gb"],
        "host memory, GB": work["host_gb"],
    }


@dataclass(frozen=True)
class Surveyed:
    """What is known of the device that everything runs on: rates of ``measure_rates``, and what captions' auto is."""

    kind: str
    machine: str
    precision: str
    rates: dict[str, float]
    copying: float


def survey(name: str, rows: int, width: int) -> Surveyed:
    """Look at the device of ``--device name`` and measure it, by matrices of so many rows where it is no GPU.

    A decoder's ``width`` decides which precision the scripts choose.

    Raises:
        ValueError: there is no such device.
    """
    device = pick_device(name)
    rates = measure_rates(device, None if device.type == "cuda" else rows)
    return Surveyed(device.type, machine(device), settle_precision(device, "auto", width), *rates)


def in_child(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process: a CUDA context takes memory from the card for as long as its process lives."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rehearse(args: argparse.Namespace, size: Size, before: Surveyed, folder: Path) -> dict[str, Any]:
    """Run all parts below ``folder`` on a device that was surveyed; return the results."""
    numbers, started = choose(args, size), time.monotonic()
    default = MINUTES if before.kind == "cuda" else math.inf
    run = Rehearsal(folder, args.device, 60 * (default if args.minutes is None else args.minutes))
    tokens = prepare(folder, size, numbers, args.workers)
    prepared = time.monotonic() - started
    trained = "fp32" if before.kind == "cpu" else before.precision
    parts = parts_of(size, numbers, tokens, trained, before.precision)
    usages, failure = run_all(run, size, numbers, args.parts)
    after = in_child(
        survey, args.device, size.floor, size.models.decoder.width
    )  # other work on the machine may have been in the way
    rates = {kind: max(rate, after.rates[kind]) for kind, rate in before.rates.items()}
    return {
        "machine": before.machine,
        "failure": failure,
        "tiny": size.tiny,
        "setting": size.setting,
        "pool": size.models.pool,
        "numbers": numbers,
        "caption_tokens": tokens,
        "matrix_rates": rates,
        "copy_rate": max(before.copying, after.copying),
        "rows": table(parts, usages, rates),
        "seconds": {"prepare": prepared} | {k: u["seconds"] for k, u in usages.items()},
        "reserved_gb": {k: u["cuda_gb"] for k, u in usages.items() if u["cuda_gb"] is not None},
        "minutes": (time.monotonic() - started) / 60,
    }


def as_text(found: dict[str, Any]) -> str:
    """Return the results as one Markdown table with a title and what it was measured against."""
    rates = ", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in found["matrix_rates"].items())
    processes = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["seconds"].items())
    models = "random ViT-L/14 and GPT-2 small" if found["setting"] == "best" else f"random weights, {found['setting']}"
    title = "Rehearsal in small" if found["tiny"] else f"Rehearsal at full size: {models}"
    title += f", patches averaged {found['pool']} x {found['pool']}" if found["pool"] > 1 else ""
    reserved = ", ".join(f"{name} {gb:.1f} GB" for name, gb in found["reserved_gb"].items())
    reserved = f" Taken from the GPU by its allocator: {reserved}." if reserved else ""
    rows = markdown(found["rows"]) if found["rows"] else "No part was finished."
    return (
        f"## {title}\n\n{found['machine']}; matrix products {rates}; copying {found['copy_rate'] / 1e9:.3g} GB/s\n\n"
        f"{rows}\n\nProcesses, start included: {processes}. All: {found['minutes']:.1f} min.{reserved}\n"
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


@command
def main(argv: list[str] | None = None) -> int:
    """Rehearse; return 0, or 2 where a part failed or the time was over."""
    args = build_parser().parse_args(argv)
    setup_logging()
    size = size_of(args)
    choose(args, size)
    before = in_child(survey, args.device, size.floor, size.models.decoder.width)
    found = in_folder(args.work, lambda folder: rehearse(args, size, before, folder))
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
