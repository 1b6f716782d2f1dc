"""A billion images on 1, 8 and 512 GPUs, on paper: what saturates, what shards and failures cost, and the bill.

    python -m bench.simulate                          the page, docs/scale.md
    python -m bench.simulate --store 10e9 --price 2   its tables with other assumptions
    python -m bench.simulate --write                  write the page and its pictures
    python -m bench.simulate --check                  is the page what the script gives?

Costs of an image come from bench/costs.json (``python -m bench.costs``); what a GPU needs is computed from operations,
bytes and assumed shares of its peaks, until ``--rehearsal`` names the JSON that ``bash bench/full_size.sh --out``
wrote on one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bench import costmodel
from bench.costmodel import Cluster
from bench.study import GPUS, SOURCES, TABLES, Study, shard_rows, values
from captioning.cli import FlagParser, command
from captioning.files import atomic_path, read_json, write_text
from captioning.profiles import ROOT

DOCUMENT = ROOT / "docs" / "scale.md"
TEMPLATE = Path(__file__).parent / "scale_template.md"
COSTS = Path(__file__).parent / "costs.json"
REHEARSAL = Path(__file__).parent / "full_size.json"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; defaults of the assumptions stand in ``Cluster``."""
    parser = FlagParser(prog="python -m bench.simulate", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="write docs/scale.md and its pictures")
    what.add_argument("--check", action="store_true", help="compare docs/scale.md with what it would be")
    parser.add_argument("--images", type=float, default=1e9, help="how many")
    parser.add_argument("--costs", type=Path, default=COSTS, help="what bench.costs measured")
    parser.add_argument(
        "--rehearsal",
        type=Path,
        metavar="JSON",
        help="what bench/full_size.sh --out wrote on a GPU (default: bench/full_size.json where it exists)",
    )
    group = parser.add_argument_group("assumptions")
    for f in fields(Cluster):
        text, unit = SOURCES[f.name][:2]
        kind = int if f.name in ("kernels", "gpus_a_node", "cores_a_gpu") else float
        unit = {"TFLOP/s": "operations a second", "TB/s": "bytes a second", "GB/s": "bytes a second", "µs": "s"}.get(
            unit, unit
        )
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            type=kind,
            default=f.default,
            metavar="X",
            help=text + (f", {unit}" if unit else ""),
        )
    return parser


def load_study(args: argparse.Namespace) -> Study:
    """Read the costs, and the rehearsal where there is one.

    Raises:
        FileNotFoundError, ValueError: a file is missing or is not what it should be.
    """
    if not 1e6 <= args.images <= 1e10:
        raise ValueError(f"--images {args.images:g}: must be from 1e6 to 1e10; a smaller job needs no such plan")
    cluster = Cluster(**{f.name: getattr(args, f.name) for f in fields(Cluster)})
    costs = read_json(args.costs)
    needed = (
        "image_bytes",
        "tar_read_s",
        "decode_s",
        "transform_s",
        "transform_336_s",
        "write_s",
        "encode_cpu_s",
        "search_cpu_s",
        "phone_bytes",
        "decode_phone_s",
        "decode_phone_draft_s",
        "machine",
    )
    missing = [name for name in needed if name not in costs] if isinstance(costs, dict) else list(needed)
    if missing:
        raise ValueError(f"--costs {args.costs}: no {', '.join(missing)}; write it with python -m bench.costs --out")
    path = args.rehearsal or (REHEARSAL if REHEARSAL.is_file() else None)
    if path is None:
        works = [costmodel.captioner(costs, cluster), costmodel.llava(costs, cluster)]
        return Study(cluster, works, costs, args.images, "computed from operations and bytes; no GPU has run this yet")
    cluster, rate, gpu = rehearsed(path, cluster)
    tuned = replace(costmodel.captioner(costs, cluster), stages={"all": 1 / rate}, measured=True)
    return Study(cluster, [tuned, costmodel.llava(costs, cluster)], costs, args.images, f"captioner measured on {gpu}")


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


def draw_rates(study: Study, path: Path) -> None:
    """Draw what each resource allows all GPUs together, by their number."""
    from matplotlib import pyplot as plt

    counts = [2**n for n in range(11)]
    colours = dict(zip(costmodel.RESOURCES, ("#c2571a", "#6b8e23", "#8c4a8c", "#1f4e8c"), strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, work in zip(axes, study.works, strict=True):
        found = [costmodel.capacities(work, study.cluster, n) for n in counts]
        for name in costmodel.RESOURCES:
            axis.plot(
                counts,
                [n * c[name] for n, c in zip(counts, found, strict=True)],
                color=colours[name],
                lw=1.5,
                label=name,
            )
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
        axis.set(xscale="log", yscale="log", xlabel="images a shard", ylim=(2e-3, 200))
        axis.set(title=f"{work.name}, {max(GPUS)} GPUs")
        axis.grid(alpha=0.25)
    axes[0].set(ylabel="lost, % of the useful time")
    axes[0].set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    axes[1].legend(frameon=False, fontsize=9)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture, atomically."""
    from matplotlib import pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    plt.close(figure)


@command
def main(argv: list[str] | None = None) -> int:
    """Print the tables, or write or check the document; return 1 where it is not what the script gives."""
    parser = build_parser()
    args = parser.parse_args(argv)
    names = ("images", "costs", "rehearsal", *(f.name for f in fields(Cluster)))
    changed = any(getattr(args, name) != parser.get_default(name) for name in names)
    if (args.write or args.check) and changed:
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
        print("\n\n".join(map(found.get, TABLES)) if changed else text)  # words are for what they were written of
        return 0
    import matplotlib as mpl

    mpl.use("Agg")
    write_text(DOCUMENT, text)
    draw_rates(study, DOCUMENT.with_name("scale_rates.png"))
    draw_shards(shard_study, DOCUMENT.with_name("scale_shards.png"))
    print(DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
