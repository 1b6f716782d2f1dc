"""A billion images on 1, 8 and 512 GPUs, on paper: what saturates, what shards and failures cost, and the bill.

    python -m bench.scale_study                          the page, docs/billion_images.md
    python -m bench.scale_study --store 10e9 --price 2   its tables with other assumptions
    python -m bench.scale_study --write                  write the page and its pictures
    python -m bench.scale_study --check                  is the page what the script gives?

A CPU's costs are measured; a GPU's are computed from operations, bytes and assumed shares of its peaks.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

from bench.scale_study.model import Cluster, Job, workloads
from captioning.cli import FlagParser, command
from captioning.files import atomic_path, read_json, write_text
from captioning.imports import import_guarded
from captioning.profiles import ROOT

DOCUMENT, HERE = ROOT / "docs" / "billion_images.md", Path(__file__).parent
GPUS = (1, 8, 512)
MOST = max(GPUS)
SHARDS = (3_000, 10_000, 30_000, 100_000, 300_000)
SEEDS = range(8)
OFTEN = 2.0  # hours after which a node is lost, of a kind that is often taken away
CAPTION_BYTES, FEATURE_BYTES = 90, 257 * 1024 * 2  # a line of results; an image in the feature cache
Jobs = dict[int, Job]  # of one workload, by number of GPUs
ASSUMPTIONS = {  # fields of Cluster that are flags
    "store": "bytes a second out of the store, all nodes together",
    "network": "bytes a second into a node",
    "cores_a_gpu": "CPU cores a GPU",
    "mtbf_hours": "hours of a node between failures",
    "price": "dollars an hour of GPU",
}


class Quantity(float):
    """A number that is shown in a unit: ``{store:GB}`` is "50 GB", ``{spread:%}`` "5 %", ``{hours:time}`` "54 min"."""

    def __format__(self, unit: str) -> str:
        if unit == "%":  # two digits, and no more than two decimals
            digits = f"{100 * self:.2g}" if self >= 0.001 else f"{100 * self:.2f}"
            return "< 0.01 %" if self < 0.00005 else f"{float(digits):g} %"
        if unit == "time":
            hours = float(self)
            text = f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.1f} h"
            return text if hours < 48 else f"{hours / 24:.1f} days"
        scale = {"ms": 1e3, "µs": 1e6, "kB": 1e-3, "MB": 1e-6, "GB": 1e-9, "TB": 1e-12, "TFLOP": 1e-12}
        value = self * scale.get(unit, 1)
        return (f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}").rstrip()


def an_image(jobs: Jobs) -> Iterator[str]:
    """What an image costs."""
    work, core_share = jobs[MOST].work, jobs[MOST].cluster.core_share
    stages = ", ".join(f"{stage} {s * 1e3:.2g}" for stage, s in work.stages.items())
    rate, cores = Quantity(1 / work.gpu_s), work.cpu_s / work.gpu_s / core_share
    yield f"{work.batch} | {work.cpu_s * 1e3:.1f} ms | {work.gpu_s * 1e3:.2g} ms | {stages} | {rate} | {cores:.1f}"


def saturation(jobs: Jobs) -> Iterator[str]:
    """Images a second that each resource allows a GPU; the first to saturate is marked."""
    for gpus, job in jobs.items():
        first = min(job.capacities, key=job.capacities.__getitem__)
        cells = [f"**{Quantity(v)}**" if k == first else f"{Quantity(v)}" for k, v in job.capacities.items()]
        yield f"{gpus} | {' | '.join(cells)} | {first}"


def bill(jobs: Jobs) -> Iterator[str]:
    """Hours, losses and dollars."""
    for gpus, job in jobs.items():
        cluster, lost = job.cluster, job.losses(jobs[MOST].best_shard)
        hours = (job.seconds * (1 + lost.pop("all")) + cluster.startup) / 3600
        spent, dollars = Quantity(hours * gpus), Quantity(hours * gpus * cluster.price)
        failures = hours * cluster.nodes(gpus) / cluster.mtbf_hours
        shares = " | ".join(f"{Quantity(share):%}" for share in lost.values())
        yield (
            f"{gpus} | {Quantity(job.rate * gpus)} | {Quantity(hours):time} | {spent} | {failures:.2g} | {shares} | "
            f"{dollars} | {dollars / job.images * 1e6:.2f}"
        )


def shards(jobs: Jobs) -> Iterator[str]:
    """Losses at the largest job for each size of shard, by the formula and simulated."""
    job = jobs[MOST]
    for shard in SHARDS:
        shares = (*job.losses(shard).values(), job.simulate(shard)[0])
        tar = f"{shard * job.work.image_bytes / 1e9:.2g} GB"
        yield f"{shard:,} | {tar} | {Quantity(shard / job.rate)} | {' | '.join(f'{Quantity(s):%}' for s in shares)}"


def failures(jobs: Jobs) -> Iterator[str]:
    """Time thrown away for several rates of failure, by the formula and simulated."""
    usual, base = jobs[MOST], jobs[MOST].best_shard
    for hours, shard in ((usual.cluster.mtbf_hours, base), (24.0, base), (24.0, 10 * base), (OFTEN, base)):
        job = replace(usual, cluster=replace(usual.cluster, mtbf_hours=hours))
        lost, redone = (mean(column) for column in zip(*(job.simulate(shard, seed=n) for n in SEEDS), strict=True))
        end = Quantity(job.seconds * (1 + lost) / 3600)
        yield f"{Quantity(hours)} h | {shard:,} | {Quantity(job.redone(shard)):%} | {Quantity(redone):%} | {end:time}"


def render(costs: dict[str, Any], every: list[Jobs]) -> str:
    """Return the page: page.md with its tables and figures."""
    tables = {
        make.__name__: "\n".join(f"| {jobs[MOST].work.name} | {row} |" for jobs in every for row in make(jobs))
        for make in (an_image, saturation, bill, shards, failures)
    }
    job, other = (jobs[MOST] for jobs in every)
    work, cluster = job.work, job.cluster
    cores = cluster.gpus_a_node / work.gpu_s / cluster.core_share  # of a node, for a second of CPU an image
    figures = {
        **{name: value for name, value in costs.items() if name != "machine"},
        **vars(cluster),
        "images": job.images,
        "ratio": round(other.work.gpu_s / work.gpu_s),
        "node_cores": round(cores * work.cpu_s),
        "phone_cores": round(cores * (work.cpu_s - costs["decode_s"] + costs["decode_phone_s"])),
        "draft_cores": round(cores * (work.cpu_s - costs["decode_s"] + costs["decode_phone_draft_s"])),
        "needed": MOST / work.gpu_s * work.image_bytes,
        "busy": job.rate * work.gpu_s,
        "requests": MOST * job.rate,
        "prefixes": round(MOST * job.rate / 5500),
        "read": job.images * work.image_bytes,
        "written": job.images * CAPTION_BYTES,
        "features": job.images * FEATURE_BYTES,
        "shard": job.best_shard,
        "llava_shard": other.best_shard,
        "per_gpu": round(job.images / job.best_shard / MOST),
        "llava_per_gpu": round(other.images / other.best_shard / MOST),
        "cluster_hours": round(cluster.mtbf_hours / cluster.nodes(MOST)),
        "again": replace(other, cluster=replace(cluster, mtbf_hours=OFTEN)).redone(other.best_shard),
        "slowest": 1 - math.exp(0.05 * NormalDist().inv_cdf(1 / MOST)),
    }
    text = (HERE / "page.md").read_text(encoding="utf-8")
    return text.format_map({k: Quantity(v) for k, v in figures.items()} | tables | {"machine": costs["machine"]})


def draw(name: str, every: list[Jobs], panel: Callable[[Any, Job], None]) -> None:
    """Draw a picture with a panel for each workload."""
    figure = import_guarded("matplotlib.figure").Figure((10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, jobs in zip(axes, every, strict=True):
        panel(axis, jobs[MOST])
        axis.set(xscale="log", yscale="log", title=jobs[MOST].work.name)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=9)
    with atomic_path(DOCUMENT.with_name(name)) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def draw_rates(axis: Any, job: Job) -> None:
    """Draw what each resource allows all GPUs together, by their number."""
    counts = [2**n for n in range(11)]
    found = [{k: n * v for k, v in replace(job, gpus=n).capacities.items()} for n in counts]
    for name in found[0]:
        axis.plot(counts, [rates[name] for rates in found], label=name)
    axis.plot(counts, [min(rates.values()) for rates in found], color="black", lw=6, alpha=0.15, label="the job")
    axis.set(xlabel="GPUs", ylabel="images a second, all GPUs")


def draw_shards(axis: Any, job: Job) -> None:
    """Draw what shards of each size cost, by the formula and simulated."""
    lost = [job.losses(shard) for shard in SHARDS]
    for name in lost[0]:
        axis.plot(SHARDS, [100 * shares[name] for shares in lost], label=name)
    axis.plot(SHARDS, [100 * job.simulate(shard)[0] for shard in SHARDS], "o", color="black", label="simulated")
    axis.set(xlabel="images a shard", ylabel=f"lost on {MOST} GPUs, % of the useful time")


def positive(text: str) -> float:
    """Be the ``type`` of a flag that is a positive number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be a positive number")
    return value


@command
def main(argv: list[str] | None = None) -> int:
    """Print the page or its tables, write it, or check it; return 1 where it is not what the script gives."""
    parser = FlagParser(prog="python -m bench.scale_study", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write docs/billion_images.md and its pictures")
    what.add_argument("--check", action="store_true", help="compare docs/billion_images.md with what it would be")
    parser.add_argument("--images", type=positive, default=1e9, metavar="X", help="how many, from 1e6 to 1e10")
    for name, text in ASSUMPTIONS.items():
        default = getattr(Cluster, name)
        parser.add_argument("--" + name.replace("_", "-"), type=positive, default=default, metavar="X", help=text)
    parser.add_argument("--rate", type=positive, metavar="X", help="images a second that a GPU was measured to caption")
    args = parser.parse_args(argv)
    changed = vars(args) != vars(parser.parse_args([])) | {"write": args.write, "check": args.check}
    if (args.write or args.check) and changed:
        raise ValueError("--write and --check are for the defaults: docs/billion_images.md says which they are")
    if not 1e6 <= args.images <= 1e10:
        raise ValueError(f"--images {args.images:g}: must be from 1e6 to 1e10; a smaller job needs no such plan")
    cluster, costs = Cluster(**{name: getattr(args, name) for name in ASSUMPTIONS}), read_json(HERE / "costs.json")
    tuned, llava = workloads(costs, cluster)
    tuned = replace(tuned, stages={"measured": 1 / args.rate}) if args.rate else tuned
    every = [{gpus: Job(work, cluster, gpus, args.images) for gpus in GPUS} for work in (tuned, llava)]
    text = render(costs, every)
    if args.check:
        same = DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == text
        print(f"{DOCUMENT}: {'as the script gives it' if same else 'differs; python -m bench.scale_study --write'}")
        return int(not same)
    if args.write:
        write_text(DOCUMENT, text)
        draw("scale_rates.png", every, draw_rates)
        draw("scale_shards.png", every, draw_shards)
    else:  # the words hold for the defaults
        print("\n".join(line for line in text.splitlines() if line.startswith(("|", "## "))) if changed else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
