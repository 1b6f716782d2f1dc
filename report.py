"""Write the whole report as one HTML file: ``python report.py --runs demo --out demo/report.html``.

Beside it, ``<name>_files`` holds every figure as PNG and every table as CSV and Markdown. The report holds only what is
in the folder of runs; each missing part is named together with the command that makes it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from captioning.cli import FlagParser, command, setup_logging
from captioning.profiles import ROOT
from captioning.report import document, sections, study_sections
from captioning.report.document import Block, Text
from captioning.report.first_picture import first_picture
from captioning.training.run_folder import Run, find_runs

log = logging.getLogger("captioning")

TITLE = "Image captioning with CLIP, GPT-2 and LoRA: the report"
WORLD = {
    "micro": "Micro world: all of our numbers here come from generated drawings and small models. They show that the "
    "code works and must never be compared with full-size numbers, such as the original report's, which are printed "
    "beside ours for orientation only. CLIPScore here comes from a small CLIP model and has its own scale.",
    "full": "Full size: photographs and the full-size models.",
    "mixed": "This folder holds both micro and full-size runs; each row says which it is, and the two must never be "
    "compared.",
    "none": "No finished run is here, so it is unknown whether this is the micro world or the full size.",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders, such as the demo's")
    parser.add_argument("--out", type=Path, required=True, help="HTML file")
    parser.add_argument("--bench", type=Path, default=ROOT / "bench", help="folder of the benchmarks' JSON files")
    parser.add_argument("--verbose", action="store_true", help="more log lines")
    return parser


def size_of(runs: list[Run], root: Path) -> str:
    """Return ``micro``, ``full``, ``mixed`` or ``none``, by the captioner's runs and LLaVA's scores."""
    prompts = (sections.read_object(root / sections.LLAVA) or {}).values()
    sizes = {run.config["profile"] for run in runs} | {prompt["profile"] for prompt in prompts if "profile" in prompt}
    return "none" if not sizes else sizes.pop() if len(sizes) == 1 else "mixed"


@command
def main(argv: list[str] | None = None) -> int:
    """Write the report; return 0."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    runs, omitted = find_runs(args.runs)
    size, best = size_of(runs, args.runs), sections.best_of(runs)
    parts = [
        sections.llava_section(args.runs, size),
        sections.captioner_section(runs, omitted, best),
        study_sections.settings_section(args.runs, runs, size),
        study_sections.letter_section(args.runs, size),
        study_sections.variants_section(args.runs, size),
        study_sections.reward_section(args.runs, runs, size, best),
        sections.attention_section(args.runs, size, best),
        sections.environment_section(args.runs, runs, args.bench, size),
    ]
    head: list[Block] = [Text(WORLD[size], world=True), *first_picture(args.runs, size)]
    folder = document.write(TITLE, head, parts, args.out)
    for run in omitted:
        log.warning("left out: %s (%s)", run.name, run.reason)
    missing = [part.what for section in parts for part in section.missing if part.wanted]
    for what in missing:
        log.info("missing: %s", what)
    print(f"{args.out}  ({len(runs)} runs, {len(missing)} parts missing; tables and figures in {folder})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
