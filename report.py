"""Write the whole report as one HTML file: ``python report.py --runs demo --out demo/report.html``.

Beside it, ``<name>_files`` holds every figure as PNG and every table as CSV and Markdown. Only what lies in the folder
of runs is told; parts that are not there are named, with the command that makes them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from captioning.cli import FlagParser, command, setup_logging
from captioning.profiles import ROOT
from captioning.report import document as reporting
from captioning.report import sections as chapters
from captioning.report import study_sections as studychapters
from captioning.report.document import Text
from captioning.training.run_folder import Run, find_runs

log = logging.getLogger(__name__)

TITLE = "Image captioning with CLIP, GPT-2 and LoRA: the report"
WORLD = {
    "micro": "Micro world: every number of ours here comes from generated drawings and small models. It says that the "
    "code works, and must never be compared with full-size numbers, such as the report's, which stand beside ours "
    "for orientation only. CLIPScore here is that of a small CLIP with a scale of its own.",
    "full": "Full size: photographs and the full-size models.",
    "mixed": "Micro and full-size runs stand side by side here; each row says which it is, and the two must never be "
    "compared.",
    "none": "No finished run lies here: which world this is, is not known.",
}

PARTS = ("demo", "settings", "ablation", "rewards")  # that --run can make


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders, such as the demo's")
    parser.add_argument("--out", type=Path, required=True, help="HTML file")
    parser.add_argument(
        "--run",
        nargs="*",
        choices=PARTS,
        metavar="PART",
        help=f"first make what is missing of a micro world that `make demo` began: {', '.join(PARTS)} "
        f"(demo, where no part is named)",
    )
    parser.add_argument("--bench", type=Path, default=ROOT / "bench", help="folder of the benchmarks' JSON files")
    parser.add_argument("--verbose", action="store_true", help="more log lines")
    return parser


def size_of(runs: list[Run]) -> str:
    """Return ``micro``, ``full``, ``mixed`` or ``none``."""
    sizes = {run.config["profile"] for run in runs}
    return "none" if not sizes else sizes.pop() if len(sizes) == 1 else "mixed"


def make_missing(root: Path, parts: list[str]) -> None:
    """Run the steps of the demo or of the studies whose results are not in ``root``.

    Raises:
        ValueError: the folder has no data of the micro world, or a step failed.
    """
    from microworld import demo, studies

    if not (root / "data" / "val.json").is_file():
        raise ValueError(f"--run: no {root}/data/val.json; start with `python -m microworld.demo --out {root}`")
    run, out = demo.Runner(), root.absolute()
    steps = (
        ("lora/val_scores.json", lambda: demo.train_and_score(run, out, "lora", None, blind=False)),
        ("llava/val.json", lambda: demo.zero_shot(run, out)),
        ("attention/best_worst.png", lambda: demo.look(run, out)),
    )
    for result, step in steps:
        if "demo" in parts and not (out / result).is_file():
            log.info("missing: %s", result)
            step()
    for part in parts:
        if part in studies.STUDIES:
            studies.STUDIES[part](run, studies.build_parser().parse_args([part, "--out", str(out)]))


@command
def main(argv: list[str] | None = None) -> int:
    """Write the report; return 0."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    if args.run is not None:
        make_missing(args.runs, args.run or ["demo"])
    runs, omitted = find_runs(args.runs)
    size = size_of(runs)
    sections = [
        chapters.llava_section(args.runs, size),
        chapters.captioner_section(runs, omitted),
        studychapters.settings_section(runs),
        studychapters.ablation_section(runs),
        studychapters.reward_section(runs),
        chapters.attention_section(args.runs, size),
        chapters.environment_section(args.runs, runs, args.bench),
    ]
    parts = reporting.write(TITLE, [Text(WORLD[size], world=True)], sections, args.out)
    for run in omitted:
        log.warning("left out: %s (%s)", run.name, run.reason)
    missing = [b.what for s in sections for b in s.blocks if isinstance(b, reporting.Missing)]
    for what in missing:
        log.info("missing: %s", what)
    print(f"{args.out}  ({len(runs)} runs, {len(missing)} parts missing; tables and figures in {parts})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
