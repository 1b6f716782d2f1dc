"""All there is to learn in the first ten minutes on a GPU, in one command.

    python -m bench.first_gpu --out gpu --readme      full size, random weights; writes gpu.md and gpu.json
    python -m bench.first_gpu --device cpu --quick    the same in small: does every part run?

What torch is built with; packed attention against a mask in value, gradient and time; cuDNN's attention on and off;
search eager, compiled and as graphs; a training step and its share of the measured matrix rate; feature caching; a
self-critical step; LLaVA with four layers; peak memory of each. A part that fails is recorded with its error, and the
others go on. `bench.gpu_parts` has the parts, each of which runs in a process of its own.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import machine, make_parser, markdown
from bench.full_size import in_child
from bench.gpu_parts import PARTS
from captioning.cli import PARTIAL, FlagParser, command, setup_logging
from captioning.device import pick_device
from captioning.files import markdown_table, read_json, write_json, write_text
from captioning.profiles import ROOT

log = logging.getLogger("bench.first_gpu")

BEGIN, END = "<!-- first_gpu: begin -->", "<!-- first_gpu: end -->"  # of the README's table
NOT_MEASURED = "not measured"
MINUTES = 4.0  # that a part may take: compiling, and cuDNN's first look at every shape, are the longest


def build_parser() -> FlagParser:
    """Return the command line."""
    parser = make_parser("first_gpu", __doc__, repeats=0)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="which", metavar="PART")
    add("--quick", action="store_true", help="tiny models, for a CPU: times mean nothing")
    add("--minutes", type=float, default=MINUTES, help="that each part may take")
    add(
        "--readme",
        nargs="?",
        type=Path,
        const=ROOT / "README.md",
        metavar="FILE",
        help="write the table of the README, or of another file with its two marks: of a GPU, and not --quick",
    )
    return parser


# --- running ----------------------------------------------------------------------------------------------------------


def run_part(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a process of its own; return what it found, or its error."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = [sys.executable, "-m", "bench.gpu_parts", part, str(file), "--device", args.device]
        started = time.monotonic()
        try:
            code = subprocess.run(
                words + ["--quick"] * args.quick, cwd=ROOT, check=False, timeout=60 * args.minutes
            ).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"longer than --minutes {args.minutes:g}", "seconds": time.monotonic() - started}
        if file.is_file():
            return read_json(file)
        return {"error": f"its process ended with exit code {code}", "seconds": time.monotonic() - started}


def survey(name: str) -> tuple[str, str]:
    """Return the kind of the device that ``--device name`` is, and the machine in words."""
    setup_logging()
    device = pick_device(name)
    return device.type, machine(device)


def run_all(args: argparse.Namespace, where: str) -> dict[str, Any]:
    """Run the parts one after another; what is there is written after each, and returned."""
    found: dict[str, Any] = {"machine": where, "quick": args.quick, "parts": {}}
    for part in args.parts:
        log.info("%s …", part)
        found["parts"][part] = result = run_part(part, args)
        if "error" in result:
            log.error("%s failed: %s", part, result["error"])
        print(as_text({part: result}), flush=True)
        write_results(found, args.out)
    return found


# --- results ----------------------------------------------------------------------------------------------------------


def write_results(found: dict[str, Any], out: Path | None) -> None:
    """Write OUT.json and OUT.md."""
    if out:
        size = "in small, times mean nothing" if found["quick"] else "full size, random weights"
        title = f"## First minutes on a device: {size}\n\n{found['machine']}\n"
        write_json(out.with_suffix(".json"), found)
        write_text(out.with_suffix(".md"), f"{title}\n{as_text(found['parts'])}")


def as_text(parts: dict[str, Any]) -> str:
    """Return the results of parts as Markdown."""
    sections = []
    for part, result in parts.items():
        doc = (PARTS[part].__doc__ or "").strip()
        body = f"**failed**: {result['error']}" if "error" in result else markdown(result["rows"])
        used = [f"{result['seconds']:.0f} s"]
        used += [f"{gb:.2f} GB of {where}" for where, gb in peaks(result).items()]
        sections.append(f"### {part}\n\n{doc}\n\n{body}\n\n{', at most '.join(used)}\n")
    return "\n".join(sections)


def peaks(result: dict[str, Any]) -> dict[str, float]:
    """Return a part's peak memory in GB, of the host and of the GPU where there was one."""
    found = {"host memory": result.get("host_gb"), "GPU memory": result.get("cuda_gb")}
    return {where: gb for where, gb in found.items() if gb is not None}


def _training(rows: list[dict[str, Any]]) -> str:
    ours = [row for row in rows if row["who"] == "ours"][-1]  # in bf16, where the card has it
    share = str(ours["share of the matrix rate"]).split()[0]
    return f"{ours['precision']} {ours['s a step']:.3g} s, {share} of the matrix rate"


def _llava(rows: list[dict[str, Any]]) -> str:
    return f"{next(rate for name, rate in rows[0].items() if name.startswith('ours')):.3g} images/s"


FIGURES: dict[str, tuple[str, Callable[[list[dict[str, Any]]], str]]] = {  # of the README, by part
    "train": ("training step, 16 images", _training),
    "decode": ("captions/s", lambda rows: ", ".join(f"{row['search']} {row['captions/s']:.3g}" for row in rows)),
    "cache": ("feature cache", lambda rows: f"{rows[0]['images/s']:.3g} images/s"),
    "scst": ("self-critical step", lambda rows: f"{rows[0]['s a step']:.3g} s"),
    "llava": ("LLaVA, 4 layers", _llava),
}


def table(found: dict[str, Any] | None) -> str:
    """Return the README's table, one row; without results every figure is not measured."""
    where = found["machine"].replace("|", "/") if found else "no GPU yet"
    cells = [cell((found or {"parts": {}})["parts"].get(part), figure) for part, (_, figure) in FIGURES.items()]
    header = ["`python -m bench.first_gpu --readme`", *(what for what, _ in FIGURES.values())]
    return markdown_table(header, [[where, *cells]])


def cell(result: dict[str, Any] | None, figure: Callable[[list[dict[str, Any]]], str]) -> str:
    """Return a part's figure and peak memory."""
    if result is None:
        return NOT_MEASURED
    if "error" in result:
        return "failed"
    memory = peaks(result).get("GPU memory")
    return figure(result["rows"]) + ("" if memory is None else f", {memory:.1f} GB")


def fill(text: str, found: dict[str, Any] | None, name: object) -> str:
    """Return ``text`` with the table between its two marks replaced; ValueError, naming the file, without the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"--readme {name}: has no lines {BEGIN} and {END} to write the table between")
    return f"{before}{BEGIN}\n{table(found).rstrip()}\n{END}{after}"


def check(args: argparse.Namespace, kind: str) -> None:
    """Refuse wrong flags before anything slow starts, on a device of that kind."""
    if not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes}: must be more than 0")
    if args.readme:
        if args.quick or kind != "cuda":
            raise ValueError(f"--readme: its figures are a GPU's at full size; leave it out on {kind} or with --quick")
        fill(args.readme.read_text(encoding="utf-8"), None, args.readme)


@command
def main(argv: list[str] | None = None) -> int:
    """Run the parts; return 3 (``PARTIAL``) where one failed."""
    args = build_parser().parse_args(argv)
    setup_logging()
    kind, where = in_child(survey, args.device)  # this process takes no memory of the GPU
    check(args, kind)
    found = run_all(args, where)
    if args.readme:
        write_text(args.readme, fill(args.readme.read_text(encoding="utf-8"), found, args.readme))
    return PARTIAL if any("error" in result for result in found["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
