"""A billion images on 1, 8 and 512 GPUs, on paper: what saturates, what shards and failures cost, and the bill.

    python -m bench.simulate                        the tables
    python -m bench.simulate --store 10e9 --price 2 the same with other assumptions
    python -m bench.simulate --write                docs/scale.md and its pictures, from the defaults
    python -m bench.simulate --check                is docs/scale.md what the defaults give?

Costs of an image come from bench/costs.json (``python -m bench.costs``); what a GPU needs is computed from operations,
bytes and assumed shares of its peaks, until ``--rehearsal`` names the JSON that ``bash bench/full_size.sh --out``
wrote on one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import runtime
from bench import scale
from bench.cluster import Job, Outcome, simulate
from bench.common import markdown
from bench.scale import Cluster, Workload
from profiles import ROOT
from strictjson import read_json

DOCUMENT = ROOT / "docs" / "scale.md"
TEMPLATE = Path(__file__).parent / "scale_template.md"
COSTS = Path(__file__).parent / "costs.json"
REHEARSAL = Path(__file__).parent / "full_size.json"
GPUS = (1, 8, 512)
SHARDS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)
SEEDS = range(12)
FEW = 100_000  # shards; with more, one draw is as good as several
JITTER = 0.1  # of the time of a shard, relative
SPREAD, SLOW_NODES, SLOW_SPEED = 0.05, 0.02, 0.5  # of workers' speeds; share and speed of slow nodes
CAPTION_BYTES, FEATURE_BYTES = 90, 257 * 1024 * 2  # a line of results; an image in the feature cache
SOURCES = {  # field of Cluster: (what it is, unit, factor, where from)
    "products": ("bf16 matrix products", "TFLOP/s", 1e-12, "published: H100 SXM, dense [1]"),
    "bandwidth": ("GPU memory", "TB/s", 1e-12, "published: H100 SXM [1]"),
    "encode_share": ("share of the products that encoding and reading reach", "", 1, "assumed"),
    "step_share": ("share of the memory's rate that a step reaches", "", 1, "assumed"),
    "launch": ("a small kernel, launched from Python", "µs", 1e6, "assumed"),
    "kernels": ("kernels a block and step", "", 1, "assumed"),
    "gpus_a_node": ("GPUs a node", "", 1, "as usual"),
    "cores_a_gpu": ("CPU cores a GPU", "", 1, "assumed"),
    "core_share": ("share of a core's rate, with many at work", "", 1, "assumed; published: 4 to 8 workers of a loader "
                   "do 2.2 to 3.3 times what one thread does [4]"),
    "network": ("network into a node", "GB/s", 1e-9, "assumed: 100 Gb/s"),
    "store": ("store, all nodes together", "GB/s", 1e-9, "assumed: 400 Gb/s"),
    "mtbf_hours": ("a node between failures", "h", 1, "published: 419 failures of 16,384 GPUs in 54 days [2]"),
    "restart": ("until a failed node works again", "s", 1, "assumed"),
    "startup": ("from launch to first image", "s", 1, "assumed"),
    "shard_overhead": ("a shard beside its images", "s", 1, "assumed"),
    "price": ("an hour of GPU", "$", 1, "published: median of 37 providers, 2.95 [3]"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; defaults of the assumptions stand in ``Cluster``."""
    parser = runtime.FlagParser(prog="python -m bench.simulate", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write docs/scale.md and its pictures")
    what.add_argument("--check", action="store_true", help="compare docs/scale.md with what it would be")
    parser.add_argument("--images", type=float, default=1e9, help="how many")
    parser.add_argument("--costs", type=Path, default=COSTS, help="what bench.costs measured")
    parser.add_argument("--rehearsal", type=Path, metavar="JSON", help="what bench/full_size.sh --out wrote on a GPU "
                        "(default: bench/full_size.json where it exists)")  # fmt: skip
    group = parser.add_argument_group("assumptions")
    for f in fields(Cluster):
        text, unit = SOURCES[f.name][:2]
        kind = int if f.name in ("kernels", "gpus_a_node", "cores_a_gpu") else float
        unit = {"TFLOP/s": "operations a second", "TB/s": "bytes a second", "GB/s": "bytes a second", "µs": "s"}.get(
            unit, unit
        )
        group.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default, metavar="X",
                           help=text + (f", {unit}" if unit else ""))  # fmt: skip
    return parser


@dataclass
class Study:
    """What the tables are made of."""

    cluster: Cluster
    works: list[Workload]
    costs: dict[str, Any]
    images: float
    gpu: str  # what the GPU's figures are

    def shard(self, work: Workload) -> int:
        """Return the images a shard that suit the largest job, rounded to one digit."""
        rate = scale.bottleneck(work, self.cluster, max(GPUS))[1]
        return int(float(f"{scale.best_shard(self.images, rate, max(GPUS), self.cluster):.0e}"))

    def job(self, work: Workload, gpus: int, shard: float, cluster: Cluster | None = None, **more: Any) -> Job:
        """Return the job that captions all images."""
        cluster = cluster or self.cluster
        rate = scale.bottleneck(work, cluster, gpus)[1]
        return Job(
            max(1, round(self.images / shard)), shard / rate + cluster.shard_overhead, gpus, cluster.gpus_a_node,
            cluster.failures, cluster.restart, **more,
        )  # fmt: skip


def load_study(args: argparse.Namespace) -> Study:
    """Read the costs, and the rehearsal where there is one.

    Raises:
        FileNotFoundError, ValueError: a file is missing or is not what it should be.
    """
    if not args.images >= 1e6:
        raise ValueError(f"--images {args.images:g}: must be a million or more; a smaller job needs no such plan")
    cluster = Cluster(**{f.name: getattr(args, f.name) for f in fields(Cluster)})
    costs = read_json(args.costs)
    needed = ("image_bytes", "tar_read_s", "decode_s", "transform_s", "transform_336_s", "write_s", "encode_cpu_s",
              "search_cpu_s", "phone_bytes", "decode_phone_s", "decode_phone_draft_s", "machine")  # fmt: skip
    missing = [name for name in needed if name not in costs] if isinstance(costs, dict) else list(needed)
    if missing:
        raise ValueError(f"--costs {args.costs}: no {', '.join(missing)}; write it with python -m bench.costs --out")
    path = args.rehearsal or (REHEARSAL if REHEARSAL.is_file() else None)
    if path is None:
        works = [scale.captioner(costs, cluster), scale.llava(costs, cluster)]
        return Study(cluster, works, costs, args.images, "computed from operations and bytes; no GPU has run this yet")
    cluster, rate, gpu = rehearsed(path, cluster)
    tuned = replace(scale.captioner(costs, cluster), stages={"all": 1 / rate}, measured=True)
    return Study(cluster, [tuned, scale.llava(costs, cluster)], costs, args.images, f"captioner measured on {gpu}")


def rehearsed(path: Path, cluster: Cluster) -> tuple[Cluster, float, str]:
    """Read a rehearsal: the GPU's own matrix and copy rates in the cluster, images a second, and the machine."""
    found = read_json(path)
    try:
        rows = {row["part"]: row for row in found["rows"]}
        if found["tiny"] or "bf16" not in found["matrix_rates"]:
            raise ValueError("it was not made at full size on a GPU")
        rate = float(rows["inference"]["a second"])
        cluster = replace(cluster, products=found["matrix_rates"]["bf16"], bandwidth=found["copy_rate"])
        return cluster, rate, found["machine"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--rehearsal {path}: {error}; write it with bash bench/full_size.sh --out") from error


# --- tables -----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share in per cent, two digits, and no more than two decimals."""
    text = f"{100 * share:.2g}" if share >= 0.001 else f"{100 * share:.2f}" if share >= 0.00005 else "< 0.01"
    return f"{float(text):g} %" if text[0] != "<" else f"{text} %"


def inputs(study: Study) -> list[dict[str, str]]:
    """What goes in, and where it comes from."""
    costs, how = study.costs, f"measured, {study.costs['clock']} time of one thread"
    rows = [
        ("photograph of 640 x 480", f"{costs['image_bytes'] / 1e3:.0f} kB", "generated, as COCO's in size"),
        ("reading it from a tar", f"{costs['tar_read_s'] * 1e3:.2g} ms", how + ", file in memory"),
        ("decoding it", f"{costs['decode_s'] * 1e3:.2g} ms", how),
        ("preprocessing to 224; 336 pixels", f"{costs['transform_s'] * 1e3:.2g}; "
         f"{costs['transform_336_s'] * 1e3:.2g} ms", how),
        ("writing its line", f"{costs['write_s'] * 1e3:.2g} ms", how),
        ("photograph of 12 megapixels", f"{costs['phone_bytes'] / 1e6:.2g} MB", "generated"),
        ("decoding it; in draft mode", f"{costs['decode_phone_s'] * 1e3:.0f}; "
         f"{costs['decode_phone_draft_s'] * 1e3:.0f} ms", how),
        ("ViT-L/14; search, on that thread", f"{costs['encode_cpu_s']:.2f}; {costs['search_cpu_s']:.2f} s",
         how + ", float32"),
    ]  # fmt: skip
    found = [{"what": what, "value": value, "from": source} for what, value, source in rows]
    for name, (what, unit, factor, source) in SOURCES.items():
        value = getattr(study.cluster, name) * factor
        found.append({"what": what, "value": f"{number(value)} {unit}".strip(), "from": source})
    return found


def an_image(study: Study) -> list[dict[str, str]]:
    """What an image costs of each workload."""
    return [
        {
            "workload": work.name,
            "batch": str(work.batch),
            "CPU core": f"{work.cpu_s * 1e3:.1f} ms",
            "GPU": f"{work.gpu_s * 1e3:.2g} ms",
            "of it": ", ".join(f"{stage} {s * 1e3:.2g}" for stage, s in work.stages.items()),
            "images a second and GPU": number(1 / work.gpu_s),
            "cores that keep a GPU busy": f"{work.cpu_s / work.gpu_s / study.cluster.core_share:.1f}",
        }
        for work in study.works
    ]


def saturation(study: Study) -> list[dict[str, str]]:
    """Images a second that each resource allows a GPU; the first to saturate is marked."""
    rows = []
    for work in study.works:
        for gpus in GPUS:
            first = scale.bottleneck(work, study.cluster, gpus)[0]
            allowed = scale.capacities(work, study.cluster, gpus)
            cells = {k: f"**{number(v)}**" if k == first else number(v) for k, v in allowed.items()}
            rows.append({"workload": work.name, "GPUs": str(gpus), **cells, "saturates first": first})
    return rows


def bill(study: Study) -> list[dict[str, str]]:
    """Hours, losses and dollars."""
    rows, cluster = [], study.cluster
    for work in study.works:
        shard = study.shard(work)
        for gpus in GPUS:
            rate = scale.bottleneck(work, cluster, gpus)[1]
            lost = scale.losses(shard, study.images, rate, gpus, cluster)
            hours = (study.images / rate / gpus * (1 + lost.total) + cluster.startup) / 3600
            dollars = hours * gpus * cluster.price
            rows.append({
                "workload": work.name, "GPUs": str(gpus), "images/s": number(rate * gpus),
                "time": duration(hours), "GPU-hours": number(hours * gpus),
                "failures expected": f"{hours * cluster.nodes(gpus) / cluster.mtbf_hours:.2g}",
                "overhead": percent(lost.overhead), "failures": percent(lost.redone), "tail": percent(lost.tail),
                "$": number(dollars), "$ a million": f"{dollars / study.images * 1e6:.2f}",
            })  # fmt: skip
    return rows


def duration(hours: float) -> str:
    """In minutes, hours or days."""
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def spread_of(found: Sequence[float], scale_by: float = 1.0) -> str:
    """Mean and standard error."""
    value, error = mean(found) * scale_by, stdev(found) / math.sqrt(len(found)) * scale_by
    return f"{number(value) if value >= 100 else format(value, '.2g')} ± {error:.1g}"


def lost(job: Job, useful: float, seed: int) -> float:
    """Simulate ``job``; return the time of its GPUs beyond ``useful`` as a share of that."""
    return job.workers * simulate(job, seed).makespan / useful - 1


def shard_rows(study: Study, work: Workload) -> list[dict[str, Any]]:
    """Losses at the largest job for each size of shard, by the formula and simulated, as numbers."""
    rows, gpus = [], max(GPUS)
    rate = scale.bottleneck(work, study.cluster, gpus)[1]
    for shard in SHARDS:
        losses = scale.losses(shard, study.images, rate, gpus, study.cluster)
        job = study.job(work, gpus, shard, jitter=JITTER)
        useful = job.shards * shard / rate  # of a whole number of shards
        simulated = mean(lost(job, useful, seed) for seed in SEEDS[: 3 if job.shards <= FEW else 1])
        rows.append({"workload": work, "shard": shard, "seconds": shard / rate, "losses": losses,
                     "simulated": simulated})  # fmt: skip
    return rows


def shards(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The table of ``shard_rows``."""
    return [
        {
            "workload": row["workload"].name,
            "images a shard": f"{row['shard']:,}",
            "tar": f"{row['shard'] * row['workload'].image_bytes / 1e9:.2g} GB",
            "seconds": number(row["seconds"]),
            "overhead": percent(row["losses"].overhead),
            "failures": percent(row["losses"].redone),
            "tail": percent(row["losses"].tail),
            "all": percent(row["losses"].total),
            "simulated": percent(row["simulated"]),
        }
        for row in rows
    ]


def failures(study: Study) -> list[dict[str, str]]:
    """Shards lost and time thrown away for several rates of failure, by the formula and simulated."""
    rows, gpus = [], max(GPUS)
    for work in study.works:
        base = study.shard(work)
        for hours, shard in ((study.cluster.mtbf_hours, base), (24.0, base), (24.0, 10 * base), (2.0, base)):
            cluster = replace(study.cluster, mtbf_hours=hours)
            job = study.job(work, gpus, shard, cluster, jitter=JITTER)
            thrown = scale.redone_seconds(job.shard, cluster.failures) * job.shards
            outcomes = [simulate(job, seed) for seed in SEEDS]
            useful = job.shards * job.shard
            rows.append({
                "workload": work.name, "a node fails every": f"{number(hours)} h", "images a shard": f"{shard:,}",
                "shards lost": number(job.shards * math.expm1(cluster.failures * job.shard)),
                "simulated": spread_of([o.lost_shards for o in outcomes]),
                "done again": percent(thrown / useful),
                "simulated ": spread_of([o.redone for o in outcomes], 100 / useful) + " %",
                "time of the job, simulated": duration(mean(o.makespan for o in outcomes) / 3600),
            })  # fmt: skip
    return rows


def stragglers(study: Study) -> list[dict[str, str]]:
    """What workers of unequal speed cost: shards claimed one by one against shards dealt out."""
    rows, gpus = [], max(GPUS)
    for work in study.works:
        shard = study.shard(work)
        slow = {"slow_nodes": SLOW_NODES, "slow_speed": SLOW_SPEED}
        for name, more in (("unequal", {}), ("unequal, some nodes slow", slow)):
            times = {}
            for claiming in (True, False):
                job = replace(study.job(work, gpus, shard, spread=SPREAD, **more), failures=0.0, claiming=claiming)
                times[claiming] = mean(waiting(simulate(job, seed)) for seed in SEEDS)
            rows.append({"workload": work.name, "workers": name, "claimed one by one": percent(times[True]),
                         "dealt out at the start": percent(times[False])})  # fmt: skip
    return rows


def waiting(outcome: Outcome) -> float:
    """Return the share of all workers' time that they wait for the last one."""
    return outcome.idle / (outcome.workers * outcome.makespan)


def what_if(study: Study) -> list[dict[str, str]]:
    """The largest job under other assumptions."""
    costs, base, gpus = study.costs, study.cluster, max(GPUS)
    work = study.works[0]
    phone = replace(work, image_bytes=costs["phone_bytes"], cpu_s=work.cpu_s - costs["decode_s"]
                    + costs["decode_phone_s"])  # fmt: skip
    draft = replace(phone, cpu_s=phone.cpu_s - costs["decode_phone_s"] + costs["decode_phone_draft_s"])
    graphs = []
    if not work.measured:
        fast = scale.captioner(costs, replace(base, launch=1e-9), work.batch)
        graphs = [("steps without launches (CUDA graphs), a store without limit", fast, replace(base, store=1e18))]
    cases: list[tuple[str, Workload, Cluster]] = [
        ("as above", work, base),
        ("a store of 10 GB/s", work, replace(base, store=10e9)),
        ("a store without limit", work, replace(base, store=1e18)),
        ("2 cores a GPU", work, replace(base, cores_a_gpu=2)),
        *graphs,
        ("photographs of 12 megapixels", phone, base),
        ("the same, a store without limit", phone, replace(base, store=1e18)),
        ("and decoded in draft mode", draft, replace(base, store=1e18)),
    ]
    rows = []
    for name, case, cluster in cases:
        first, rate = scale.bottleneck(case, cluster, gpus)
        rows.append({"captioner on 512 GPUs": name, "saturates first": first, "images a second and GPU": number(rate),
                     "time": duration(study.images / rate / gpus / 3600),
                     "GPU busy": percent(rate * case.gpu_s)})  # fmt: skip
    return rows


# --- the document -----------------------------------------------------------------------------------------------------


def values(study: Study, shard_study: list[dict[str, Any]]) -> dict[str, str]:
    """Return what the template's braces stand for."""
    work, model = study.works
    gpus, cluster = max(GPUS), study.cluster
    first, rate = scale.bottleneck(work, cluster, gpus)
    needed = gpus / work.gpu_s * work.image_bytes
    tables = {
        "inputs": inputs(study), "an_image": an_image(study), "saturation": saturation(study), "bill": bill(study),
        "shards": shards(shard_study), "failures": failures(study), "stragglers": stragglers(study),
        "what_if": what_if(study),
    }  # fmt: skip
    return {name: markdown(rows) for name, rows in tables.items()} | {
        "machine": study.costs["machine"],
        "gpu": study.gpu,
        "first": first,
        "busy": percent(rate * work.gpu_s),
        "needed": number(needed / 1e9),
        "store": number(cluster.store / 1e9),
        "cores": f"{work.cpu_s / work.gpu_s / cluster.core_share:.1f}",
        "node_cores": f"{cluster.gpus_a_node * work.cpu_s / work.gpu_s / cluster.core_share:.0f}",
        "requests": number(gpus * rate),
        "prefixes": number(gpus * rate / 5500),
        "input_tb": number(study.images * work.image_bytes / 1e12),
        "output_gb": number(study.images * CAPTION_BYTES / 1e9),
        "features_tb": number(study.images * FEATURE_BYTES / 1e12),
        "cluster_hours": f"{cluster.mtbf_hours / cluster.nodes(gpus):.0f}",
        "mtbf": number(cluster.mtbf_hours),
        "shard": f"{study.shard(work):,}",
        "llava_shard": f"{study.shard(model):,}",
        "overhead": number(cluster.shard_overhead),
        "price": number(cluster.price),
        "spread": percent(SPREAD),
        "slow_nodes": percent(SLOW_NODES),
        "ratio": f"{model.gpu_s / work.gpu_s:.0f}",
        "seeds": str(len(SEEDS)),
        "pillow": number(1 / study.costs["decode_s"]),
        "jitter": percent(JITTER),
    }


def draw_rates(study: Study, path: Path) -> None:
    """Draw what each resource allows all GPUs together, by their number."""
    from matplotlib import pyplot as plt

    counts = [2**n for n in range(11)]
    colours = dict(zip(scale.RESOURCES, ("#c2571a", "#6b8e23", "#8c4a8c", "#1f4e8c"), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, work in zip(axes, study.works, strict=True):
        found = [scale.capacities(work, study.cluster, n) for n in counts]
        for name in scale.RESOURCES:
            axis.plot(counts, [n * c[name] for n, c in zip(counts, found, strict=True)], color=colours[name], lw=1.5,
                      label=name)  # fmt: skip
        reached = [n * min(c.values()) for n, c in zip(counts, found, strict=True)]
        axis.plot(counts, reached, color="black", lw=6, alpha=0.15, solid_capstyle="round", label="the job")
        axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images a second, all GPUs", title=work.name)
        axis.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=9)
    save(figure, path)


def draw_shards(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what shards of each size cost, by the formula and simulated."""
    from matplotlib import pyplot as plt

    works = list({row["workload"].name: row["workload"] for row in rows}.values())
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, work in zip(axes, works, strict=True):
        mine = [row for row in rows if row["workload"] is work]
        x = [row["shard"] for row in mine]
        for name, colour in (("overhead", "#1f4e8c"), ("redone", "#8c4a8c"), ("tail", "#c2571a"), ("total", "black")):
            label = {"redone": "failures", "total": "all"}.get(name, name)
            axis.plot(x, [100 * getattr(row["losses"], name) for row in mine], color=colour, lw=1.5, label=label)
        axis.plot(x, [100 * row["simulated"] for row in mine], "o", color="black", ms=5, mfc="white", label="simulated")
        axis.set(xscale="log", yscale="log", xlabel="images a shard", title=f"{work.name}, {max(GPUS)} GPUs")
        axis.grid(alpha=0.25)
    axes[0].set(ylabel="lost, % of the useful time")
    axes[1].legend(frameon=False, fontsize=9)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture, atomically."""
    from matplotlib import pyplot as plt

    with runtime.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    plt.close(figure)


@runtime.command
def main(argv: list[str] | None = None) -> int:
    """Print the tables, or write or check the document; return 1 where it is not what the script gives."""
    parser = build_parser()
    args = parser.parse_args(argv)
    changed = [f.name for f in fields(Cluster) if getattr(args, f.name) != f.default]
    if (args.write or args.check) and (changed or args.images != parser.get_default("images")):
        raise ValueError("--write and --check are for the defaults: docs/scale.md says which they are")
    study = load_study(args)
    shard_study = [row for work in study.works for row in shard_rows(study, work)]
    found = values(study, shard_study)
    text = TEMPLATE.read_text(encoding="utf-8").format_map(found)
    if args.check:
        same = DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == text
        print(f"{DOCUMENT}: {'as the script gives it' if same else 'differs; python -m bench.simulate --write'}")
        return int(not same)
    if not args.write:
        print(text)
        return 0
    import matplotlib as mpl

    mpl.use("Agg")
    runtime.write_text(DOCUMENT, text)
    draw_rates(study, DOCUMENT.with_name("scale_rates.png"))
    draw_shards(shard_study, DOCUMENT.with_name("scale_shards.png"))
    print(DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
