"""Time the scoring against pycocoevalcap: CIDEr on 2,000 images, the two tokenizers on 10,000 captions, a second run.

Both sides run in turn within one run, after a warm-up, and medians are compared, so that a busy machine slows both;
their results are compared as well. Captions are the micro world's, or those of --annotation-file, whose words are
richer. The pure tokenizer runs in an interpreter of its own, so that its start counts as Java's does.

    python -m bench.evaluate --out bench/evaluate
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cocometrics
import ptb
from annotations import find_images, load_annotations, load_references
from cider import cider_d
from clipscore import ClipScorer, clip_scores
from evaluate import Evaluator
from microworld.scenes import generate, make_scene
from profiles import PROFILES, ROOT
from runtime import FlagParser, command, write_json, write_text

IMAGES, REFERENCES = 2000, 5
PURE = "import json, sys, ptb; json.dump(ptb.tokenize(json.load(sys.stdin)), sys.stdout)"


def make_captions(annotation_file: str | None) -> tuple[list[list[str]], list[str]]:
    """Return the references of ``IMAGES`` images, and for each the next image's first one as its candidate."""
    if annotation_file:
        groups = [captions[:REFERENCES] for captions in load_references(annotation_file).values()]
        groups = [groups[place % len(groups)] for place in range(IMAGES)]
    else:
        groups = [[caption.text for caption in make_scene("val", 0, index)[1]][:REFERENCES] for index in range(IMAGES)]
    return groups, [groups[(place + 1) % IMAGES][0] for place in range(IMAGES)]


def in_turn(sides: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Run all sides once unmeasured, then in turn ``repeats`` times; return seconds and last results by side."""
    results = {name: run() for name, run in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def bench_cider(groups: Sequence[Sequence[str]], candidates: Sequence[str], repeats: int) -> dict[str, Any]:
    """Score tokenized captions by both; splitting them into words counts for both."""
    from pycocoevalcap.cider.cider import Cider

    flat = iter(ptb.tokenize([caption for group in groups for caption in group]))
    references = [[next(flat) for _ in group] for group in groups]
    tokens = ptb.tokenize(candidates)

    def theirs() -> list[float]:
        pairs = dict(enumerate(references)), {place: [caption] for place, caption in enumerate(tokens)}
        return Cider().compute_score(*pairs)[1].tolist()

    def ours() -> list[float]:
        words = [[caption.split() for caption in group] for group in references]
        return cider_d(words, [caption.split() for caption in tokens]).tolist()

    seconds, results = in_turn({"pycocoevalcap": theirs, "cider.py": ours}, repeats)
    pairs = zip(*results.values(), strict=True)
    return {**report(seconds), "largest_difference": max(abs(a - b) for a, b in pairs)}


def bench_tokenizers(captions: Sequence[str], repeats: int) -> dict[str, Any]:
    """Tokenize the same captions by a Java and by a Python that start for it."""

    def pure() -> list[str]:
        start = [sys.executable, "-c", PURE]
        run = subprocess.run(start, input=json.dumps(captions), cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(run.stdout)

    seconds, results = in_turn({"ptb-java": lambda: cocometrics.ptb_java(captions), "ptb": pure}, repeats)
    pairs = zip(*results.values(), strict=True)
    return {**report(seconds), "captions": len(captions), "different": sum(a != b for a, b in pairs)}


def bench_second_run(count: int, repeats: int) -> dict[str, Any]:
    """Score drawn scenes by the micro scorer: a second run of ours, against one image after the other and no cache."""
    from pycocoevalcap.cider.cider import Cider

    profile = PROFILES["micro"]
    scorer = ClipScorer(profile.clip_model, profile.clip_weights)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, "val", count, seed=0, workers=1)
        annotations = load_annotations(folder / "val.json")
        references, images = annotations.references, folder / "images" / "val"
        stems = list(references)
        predictions = {stem: references[stems[place - 1]][0] for place, stem in enumerate(stems)}

        def theirs() -> dict[str, float]:
            tokens = cocometrics.ptb_java([caption for stem in stems for caption in references[stem]])
            flat = iter(tokens + cocometrics.ptb_java([predictions[stem] for stem in stems]))
            wanted = {stem: [next(flat) for _ in references[stem]] for stem in stems}
            scores = []
            for path in find_images(annotations, images).values():
                seen = scorer.encode_images(scorer.load_image(path)[None])
                said = scorer.encode_texts([predictions[path.stem]])
                scores.append(clip_scores(seen, said).item())
            found = Cider().compute_score(wanted, {stem: [next(flat)] for stem in stems})[0]
            return {"CIDEr": float(found), "CLIPScore": statistics.fmean(scores)}

        def ours() -> dict[str, float]:
            evaluator = Evaluator(annotations, images, lambda: scorer, cache=folder / "cache")
            return evaluator.evaluate(predictions).means

        seconds, results = in_turn({"one at a time": theirs, "evaluate.py": ours}, repeats)
    first, second = results.values()
    return {**report(seconds), "images": count, "largest_difference": max(abs(first[k] - second[k]) for k in first)}


def report(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians, and how many times faster the second side is."""
    theirs, ours = (statistics.median(values) for values in seconds.values())
    medians = dict(zip(seconds, (theirs, ours), strict=True))
    return {"seconds": seconds, "medians": medians, "times_faster": theirs / ours}


def machine() -> str:
    """One line on what the figures were measured on."""
    load = os.getloadavg()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "pycocoevalcap"))
    python = f"Python {platform.python_version()}"
    return f"{os.cpu_count()} CPUs, {platform.machine()}, {python}, {packages}, load {load:.1f}"


def markdown(results: dict[str, Any]) -> str:
    """Return the results as a table."""
    lines = [f"# Scoring against pycocoevalcap\n\n{results['machine']}; captions: {results['captions']}\n"]
    lines += ["| what | theirs, s | ours, s | times faster | same results |", "|---|---|---|---|---|"]
    rows = (("cider", "largest_difference"), ("tokenizer", "different"), ("second run", "largest_difference"))
    for name, same in rows:
        part = results[name]
        theirs, ours = part["medians"].values()
        lines.append(f"| {name} | {theirs:.3f} | {ours:.3f} | {part['times_faster']:.2f} | {same}: {part[same]:.3g} |")
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this benchmark."""
    parser = FlagParser(prog="python -m bench.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--repeats", type=int, default=7, help="measured runs of each side")
    parser.add_argument("--images", type=int, default=300, help="scenes of the second run, micro scorer")
    parser.add_argument("--annotation-file", help="take captions from here instead of the micro world")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and write it where asked to."""
    args = build_parser().parse_args(argv)
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: must be at least 1")
    groups, candidates = make_captions(args.annotation_file)
    captions = [caption for group in groups for caption in group]
    results = {
        "machine": machine(),
        "captions": "of --annotation-file" if args.annotation_file else "micro world",
        "cider": bench_cider(groups, candidates, args.repeats),
        "tokenizer": bench_tokenizers(captions, args.repeats),
        "second run": bench_second_run(args.images, args.repeats),
    }
    print(markdown(results))
    if args.out:
        write_json(args.out.with_suffix(".json"), results)
        write_text(args.out.with_suffix(".md"), markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
