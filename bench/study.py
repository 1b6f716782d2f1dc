"""The study of a billion images: its assumptions with their sources, its tables, and what its page says in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from bench import costmodel
from bench.cluster import Job, Outcome, simulate
from bench.common import markdown
from bench.costmodel import ANSWER, PROMPT, Cluster, Workload
from bench.stand_ins import BEAMS, TOKENS

GPUS = (1, 8, 512)
TABLES = ("inputs", "an_image", "saturation", "what_if", "bill", "shards", "failures", "stragglers")  # of the page
SHARDS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)
SEEDS = range(12)
FEW = 100_000  # shards; with more, one draw is as good as several
JITTER = 0.1  # of the time of a shard, relative
SPREAD, SLOW_NODES, SLOW_SPEED = 0.05, 0.02, 0.5  # of workers' speeds; share and speed of slow nodes
MTBF_HOURS = (24.0, 2.0)  # of a node that is often taken away
S3_REQUESTS = 5500  # a second and partitioned prefix
SEARCH_NOTE = "Of a captioner's search the assumed launches take more than memory or products would. "
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
    "core_share": (
        "share of a core's rate, with many at work",
        "",
        1,
        "assumed; published: simplejpeg in a loader, 2.2 times one thread's rate with 4 workers and 3.2 with 8 [4]",
    ),
    "network": ("network into a node", "GB/s", 1e-9, "assumed: 100 Gb/s"),
    "store": ("store, all nodes together", "GB/s", 1e-9, "assumed: 400 Gb/s"),
    "mtbf_hours": ("a node between failures", "h", 1, "published: 419 failures of 16,384 GPUs in 54 days [2]"),
    "restart": ("until a failed node works again", "s", 1, "assumed"),
    "startup": ("from launch to first image", "s", 1, "assumed"),
    "shard_overhead": ("a shard beside its images", "s", 1, "assumed"),
    "price": ("an hour of GPU", "$", 1, "published: median of 37 providers, 2.95 [3]"),
}


@dataclass
class Study:
    """What the tables are made of."""

    cluster: Cluster
    works: list[Workload]  # captioner, LLaVA
    costs: dict[str, Any]
    images: float
    gpu: str  # what the GPU's figures are

    def shard(self, work: Workload) -> int:
        """Return the images a shard that suit the largest job, rounded to one digit."""
        rate = costmodel.bottleneck(work, self.cluster, max(GPUS))[1]
        return int(float(f"{costmodel.best_shard(self.images, rate, max(GPUS), self.cluster):.0e}"))

    def job(self, work: Workload, gpus: int, shard: float, cluster: Cluster | None = None, **more: Any) -> Job:
        """Return the job that captions all images."""
        cluster = cluster or self.cluster
        rate = costmodel.bottleneck(work, cluster, gpus)[1]
        return Job(
            max(1, round(self.images / shard)),
            shard / rate + cluster.shard_overhead,
            gpus,
            cluster.gpus_a_node,
            cluster.failures,
            cluster.restart,
            **more,
        )


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
        (
            "preprocessing to 224; 336 pixels",
            f"{costs['transform_s'] * 1e3:.2g}; {costs['transform_336_s'] * 1e3:.2g} ms",
            how,
        ),
        ("writing its line", f"{costs['write_s'] * 1e3:.2g} ms", how),
        ("photograph of 12 megapixels", f"{costs['phone_bytes'] / 1e6:.2g} MB", "generated"),
        (
            "decoding it; in draft mode",
            f"{costs['decode_phone_s'] * 1e3:.0f}; {costs['decode_phone_draft_s'] * 1e3:.0f} ms",
            how,
        ),
        (
            "ViT-L/14; search, on that thread",
            f"{costs['encode_cpu_s']:.2f}; {costs['search_cpu_s']:.2f} s",
            how + ", float32",
        ),
    ]
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
            first = costmodel.bottleneck(work, study.cluster, gpus)[0]
            allowed = costmodel.capacities(work, study.cluster, gpus)
            cells = {k: f"**{number(v)}**" if k == first else number(v) for k, v in allowed.items()}
            rows.append({"workload": work.name, "GPUs": str(gpus), **cells, "saturates first": first})
    return rows


def bill(study: Study) -> list[dict[str, str]]:
    """Hours, losses and dollars."""
    rows, cluster = [], study.cluster
    for work in study.works:
        shard = study.shard(work)
        for gpus in GPUS:
            rate = costmodel.bottleneck(work, cluster, gpus)[1]
            lost = costmodel.losses(shard, study.images, rate, gpus, cluster)
            hours = (study.images / rate / gpus * (1 + lost.total) + cluster.startup) / 3600
            dollars = hours * gpus * cluster.price
            rows.append(
                {
                    "workload": work.name,
                    "GPUs": str(gpus),
                    "images/s": number(rate * gpus),
                    "time": duration(hours),
                    "GPU-hours": number(hours * gpus),
                    "failures expected": f"{hours * cluster.nodes(gpus) / cluster.mtbf_hours:.2g}",
                    "overhead": percent(lost.overhead),
                    "failures": percent(lost.redone),
                    "tail": percent(lost.tail),
                    "$": number(dollars),
                    "$ a million": f"{dollars / study.images * 1e6:.2f}",
                }
            )
    return rows


def duration(hours: float) -> str:
    """In minutes, hours or days."""
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def spread_of(found: Sequence[float], scale_by: float = 1.0) -> str:
    """Mean and standard error."""
    value, error = mean(found) * scale_by, stdev(found) / math.sqrt(len(found)) * scale_by
    shown = number(value) if value >= 100 else f"{value:.2g}"
    return f"{shown} ± {error:.0f}" if error >= 10 else f"{shown} ± {error:.1g}"


def lost(job: Job, useful: float, seed: int) -> float:
    """Simulate ``job``; return the time of its GPUs beyond ``useful`` as a share of that."""
    return job.workers * simulate(job, seed).makespan / useful - 1


def shard_rows(study: Study, work: Workload) -> list[dict[str, Any]]:
    """Losses at the largest job for each size of shard, by the formula and simulated, as numbers."""
    rows, gpus = [], max(GPUS)
    rate = costmodel.bottleneck(work, study.cluster, gpus)[1]
    for shard in SHARDS:
        losses = costmodel.losses(shard, study.images, rate, gpus, study.cluster)
        job = study.job(work, gpus, shard, jitter=JITTER)
        useful = job.shards * shard / rate  # of a whole number of shards
        simulated = mean(lost(job, useful, seed) for seed in SEEDS[: 3 if job.shards <= FEW else 1])
        rows.append(
            {"workload": work, "shard": shard, "seconds": shard / rate, "losses": losses, "simulated": simulated}
        )
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
        for hours, shard in (
            (study.cluster.mtbf_hours, base),
            (MTBF_HOURS[0], base),
            (MTBF_HOURS[0], 10 * base),
            (MTBF_HOURS[1], base),
        ):
            cluster = replace(study.cluster, mtbf_hours=hours)
            job = study.job(work, gpus, shard, cluster, jitter=JITTER)
            thrown = costmodel.redone_seconds(job.shard, cluster.failures) * job.shards
            outcomes = [simulate(job, seed) for seed in SEEDS]
            useful = job.shards * job.shard
            rows.append(
                {
                    "workload": work.name,
                    "a node fails every": f"{number(hours)} h",
                    "images a shard": f"{shard:,}",
                    "shards lost": number(job.shards * math.expm1(cluster.failures * job.shard)),
                    "lost, simulated": spread_of([o.lost_shards for o in outcomes]),
                    "done again": percent(thrown / useful),
                    "done again, simulated": spread_of([o.redone for o in outcomes], 100 / useful) + " %",
                    "time of the job, simulated": duration(mean(o.makespan for o in outcomes) / 3600),
                }
            )
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
            rows.append(
                {
                    "workload": work.name,
                    "workers": name,
                    "claimed one by one": percent(times[True]),
                    "dealt out at the start": percent(times[False]),
                }
            )
    return rows


def waiting(outcome: Outcome) -> float:
    """Return the share of all workers' time that they wait for the last one."""
    return outcome.idle / (outcome.workers * outcome.makespan)


def what_if(study: Study) -> list[dict[str, str]]:
    """The largest job under other assumptions."""
    costs, base, gpus = study.costs, study.cluster, max(GPUS)
    work = study.works[0]
    phone = replace(
        work, image_bytes=costs["phone_bytes"], cpu_s=work.cpu_s - costs["decode_s"] + costs["decode_phone_s"]
    )
    draft = replace(phone, cpu_s=phone.cpu_s - costs["decode_phone_s"] + costs["decode_phone_draft_s"])
    graphs = []
    if not work.measured:
        fast = costmodel.captioner(costs, replace(base, launch=1e-9), work.batch)
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
        first, rate = costmodel.bottleneck(case, cluster, gpus)
        rows.append(
            {
                f"captioner on {gpus} GPUs": name,
                "saturates first": first,
                "images a second and GPU": number(rate),
                "time": duration(study.images / rate / gpus / 3600),
                "GPU busy": percent(rate * case.gpu_s),
            }
        )
    return rows


def values(study: Study, shard_study: list[dict[str, Any]]) -> dict[str, str]:
    """Return what the template's braces stand for."""
    work, model = study.works
    gpus, cluster = max(GPUS), study.cluster
    rate = costmodel.bottleneck(work, cluster, gpus)[1]
    often = study.job(model, gpus, study.shard(model), replace(cluster, mtbf_hours=min(MTBF_HOURS)))
    needed = gpus / work.gpu_s * work.image_bytes
    tables = (
        inputs(study),
        an_image(study),
        saturation(study),
        what_if(study),
        bill(study),
        shards(shard_study),
        failures(study),
        stragglers(study),
    )
    return {name: markdown(rows) for name, rows in zip(TABLES, tables, strict=True)} | {
        "machine": study.costs["machine"],
        "gpu": study.gpu,
        "search": "" if work.measured else SEARCH_NOTE,
        "images": number(study.images),
        "gpus": str(gpus),
        "nodes": str(cluster.nodes(gpus)),
        "beams": str(BEAMS),
        "tokens": str(TOKENS),
        "prompt": str(PROMPT),
        "answer": str(ANSWER),
        "often": number(min(MTBF_HOURS)),
        "less_often": number(max(MTBF_HOURS)),
        "again": percent(costmodel.redone_seconds(often.shard, often.failures) / often.shard),
        "busy": percent(rate * work.gpu_s),
        "needed": number(needed / 1e9),
        "store": number(cluster.store / 1e9),
        "cores": f"{work.cpu_s / work.gpu_s / cluster.core_share:.1f}",
        "node_cores": f"{cluster.gpus_a_node * work.cpu_s / work.gpu_s / cluster.core_share:.0f}",
        "requests": number(gpus * rate),
        "s3": number(S3_REQUESTS),
        "prefixes": f"{gpus * rate / S3_REQUESTS:.0f}",
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
        "per_gpu": f"{study.images / study.shard(work) / gpus:.0f}",
        "llava_per_gpu": f"{study.images / study.shard(model) / gpus:.0f}",
        "restart": number(cluster.restart),
        "waiting": percent(cluster.restart / (cluster.restart + 3600 * min(MTBF_HOURS))),
        "seeds": str(len(SEEDS)),
        "pillow": number(1 / study.costs["decode_s"]),
        "jitter": percent(JITTER),
    }
