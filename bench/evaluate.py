"""Time the scoring against pycocoevalcap: CIDEr on 2,000 images, the two tokenizers on 10,000 captions, a second run.

    python -m bench.evaluate --out bench/evaluate       CIDEr, tokenizers, and 2,000 scenes with the micro scorer
    python -m bench.evaluate --random-full-size         the second run alone, ViT-B/32 with random weights
    python -m bench.evaluate --tiny                     a few scenes: are the scores equal? no times

Both sides run in turn within one run, after a warm-up, and medians are compared, so that a busy machine slows both;
their results are compared as well. Captions are the micro world's, or those of --annotation-file, whose words are
richer. Wall time, since Java's work is another process's. The pure tokenizer runs in its own interpreter, so that
its start counts as Java's does. At full size --images is few by default; both sides' times are of those images.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import CPU, draw_scenes, in_turn, make_parser, peak_memory, report
from captioning.cli import FlagParser, command, positive_int
from captioning.data.annotations import Annotations, find_images, load_annotations, load_references
from captioning.imports import import_guarded
from captioning.profiles import PROFILES, ROOT
from captioning.scoring.cider import cider_d
from captioning.scoring.clipscore import ClipScorer, clip_scores
from captioning.scoring.evaluator import Evaluator
from captioning.scoring.tokenizers import drop_punctuation, ptb_java, ptb_python
from microworld.composer import make_scene

IMAGES, REFERENCES = 2000, 5
TOLERANCE = 1e-5  # of scores: batches are summed in another order than single images
SECOND_RUN = {"micro": 2000, "full": 40, "tiny": 6}  # images of the second run unless --images says otherwise
PURE = "import json, sys, ptb; json.dump(ptb.tokenize(json.load(sys.stdin)), sys.stdout)"  # with nothing of the suite


def make_captions(annotation_file: str | None) -> tuple[list[list[str]], list[str]]:
    """Return the references of ``IMAGES`` images, and for each the next image's first one as its candidate."""
    if annotation_file:
        groups = [captions[:REFERENCES] for captions in load_references(annotation_file).values()]
        groups = [groups[place % len(groups)] for place in range(IMAGES)]
    else:
        groups = [[caption.text for caption in make_scene("val", 0, index)[1]][:REFERENCES] for index in range(IMAGES)]
    return groups, [groups[(place + 1) % IMAGES][0] for place in range(IMAGES)]


class Duel:
    """Two ways to the same result: theirs, then ours.

    Args:
        what: names the row.
        images: how many are scored.
        sides: their name and their way, our name and our way.
        difference: says how far their result is from ours, as ``(name, number)``.
        warm_up: their way on a part of the work, where all of it takes minutes; None: all of it.
    """

    def __init__(
        self,
        what: str,
        images: int,
        sides: dict[str, Callable[[], Any]],
        difference: Callable[[Any, Any], tuple[str, float]],
        warm_up: Callable[[], Any] | None = None,
    ) -> None:
        self.what, self.images, self.sides, self.difference, self.warm_up = what, images, sides, difference, warm_up

    def row(self, repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
        """Time both sides, warmed up and in turn; return medians, their ratio and the difference of the results."""
        results: dict[str, Any] = {}

        def kept(name: str) -> None:
            results[name] = self.sides[name]()

        theirs, ours = self.sides
        (self.warm_up or self.sides[theirs])()
        kept(ours)
        seconds = in_turn({name: partial(kept, name) for name in self.sides}, repeats, CPU, clock)
        name, difference = self.difference(results[theirs], results[ours])
        return {
            "what": self.what,
            "images": self.images,
            "theirs, s": seconds[theirs],
            "ours, s": seconds[ours],
            "times faster": seconds[theirs] / seconds[ours],
            "theirs, ms an image": 1000 * seconds[theirs] / self.images,
            "ours, ms an image": 1000 * seconds[ours] / self.images,
            "same results": f"{name}: {difference:.3g}",
            "peak memory so far, GB": peak_memory(CPU),
        }

    def differs(self) -> float:
        """Run both sides once; return how far their results are apart."""
        return self.difference(*(run() for run in self.sides.values()))[1]


def largest(theirs: Sequence[float], ours: Sequence[float]) -> tuple[str, float]:
    """Return the largest difference of two lists of numbers."""
    return "largest difference", max(abs(a - b) for a, b in zip(theirs, ours, strict=True))


def unequal(theirs: Sequence[str], ours: Sequence[str]) -> tuple[str, float]:
    """Return how many captions are not the same."""
    return "different", sum(a != b for a, b in zip(theirs, ours, strict=True))


def cider_duel(groups: Sequence[Sequence[str]], candidates: Sequence[str]) -> Duel:
    """Score tokenized captions by both; splitting them into words counts for both."""
    from pycocoevalcap.cider.cider import Cider

    flat = iter(ptb_python([caption for group in groups for caption in group]))
    references = [[next(flat) for _ in group] for group in groups]
    tokens = ptb_python(candidates)

    def theirs() -> list[float]:
        pairs = dict(enumerate(references)), {place: [caption] for place, caption in enumerate(tokens)}
        return Cider().compute_score(*pairs)[1].tolist()

    def ours() -> list[float]:
        words = [[caption.split() for caption in group] for group in references]
        return cider_d(words, [caption.split() for caption in tokens]).tolist()

    return Duel("CIDEr of tokens", len(groups), {"pycocoevalcap": theirs, "cider.py": ours}, largest)


def tokenizer_duel(captions: Sequence[str], images: int) -> Duel:
    """Tokenize the same captions by a Java and by a Python that start for it."""

    def pure() -> list[str]:
        start, folder = [sys.executable, "-c", PURE], ROOT / "captioning" / "scoring"
        run = subprocess.run(start, input=json.dumps(captions), cwd=folder, capture_output=True, text=True, check=True)
        return [drop_punctuation(tokens) for tokens in json.loads(run.stdout)]

    sides = {"ptb-java": lambda: ptb_java(captions), "ptb": pure}
    return Duel(f"tokenizer, {len(captions)} captions", images, sides, unequal)


def second_run_duel(scorer: ClipScorer, name: str, annotations: Annotations, images: Path, cache: Path) -> Duel:
    """Score scenes: a second run of ours, against pycocoevalcap and CLIPScore one image at a time without a cache."""
    from pycocoevalcap.cider.cider import Cider

    references, paths = annotations.references, find_images(annotations, images)
    stems = list(references)
    predictions = {stem: references[stems[place - 1]][0] for place, stem in enumerate(stems)}

    def one_at_a_time(stems: Sequence[str]) -> list[float]:
        tokens = ptb_java([caption for stem in stems for caption in references[stem]])
        flat = iter(tokens + ptb_java([predictions[stem] for stem in stems]))
        wanted = {stem: [next(flat) for _ in references[stem]] for stem in stems}
        scores = []
        for stem in stems:
            seen = scorer.encode_images(scorer.load_image(paths[stem])[None])
            scores.append(clip_scores(seen, scorer.encode_texts([predictions[stem]])).item())
        found = Cider().compute_score(wanted, {stem: [next(flat)] for stem in stems})[0]
        return [float(found), statistics.fmean(scores)]

    def ours() -> list[float]:
        means = Evaluator(annotations, images, lambda: scorer, cache=cache).evaluate(predictions).means
        return [means["CIDEr"], means["CLIPScore"]]

    sides = {"one at a time": lambda: one_at_a_time(stems), "evaluate.py": ours}
    return Duel(f"second run, {name}", len(stems), sides, largest, lambda: one_at_a_time(stems[:5]))


@contextmanager
def second_run(size: str, count: int) -> Iterator[Duel]:
    """Draw ``count`` scenes and yield the duel over them, with the micro scorer or ViT-B/32 with random weights."""
    profile = PROFILES["full" if size == "full" else "micro"]
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name), profile.clip_weights
        if size == "full":
            torch.manual_seed(0)
            weights = str(folder / "random.pt")
            model = import_guarded("open_clip").create_model(profile.clip_model, pretrained=None)
            torch.save(model.state_dict(), weights)
            del model
        scorer = ClipScorer(profile.clip_model, weights, CPU)
        draw_scenes(folder, count)
        what = f"{profile.clip_model} with random weights" if size == "full" else "micro scorer"
        annotations = load_annotations(folder / "val.json")
        yield second_run_duel(scorer, what, annotations, folder / "images" / "val", folder / "cache")


def build_parser() -> FlagParser:
    """Return the command line of this benchmark."""
    parser = make_parser("evaluate", __doc__, device=False)
    text = f"scenes of the second run (default: {SECOND_RUN['micro']}, at full size {SECOND_RUN['full']})"
    parser.add_argument("--images", type=positive_int, help=text)
    parser.add_argument("--annotation-file", help="take captions from here instead of the micro world")
    text = "only the second run, with the full size's scorer and random weights, whose scores mean nothing"
    parser.add_argument("--random-full-size", action="store_true", help=text)
    parser.add_argument("--tiny", action="store_true", help="compare the scores of a few scenes; no times")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and write it where asked to; with --tiny return 1 where results differ."""
    args = build_parser().parse_args(argv)
    size = "tiny" if args.tiny else "full" if args.random_full_size else "micro"
    duels = []
    if size != "full":
        groups, candidates = make_captions(args.annotation_file)
        captions = [caption for group in groups for caption in group]
        duels = [cider_duel(groups, candidates), tokenizer_duel(captions, len(groups))]
    with second_run(size, args.images or SECOND_RUN[size]) as second:
        duels.append(second)
        if args.tiny:
            different = [duel.what for duel in duels if duel.differs() > TOLERANCE]
            print(f"{len(duels)} comparisons; different: {', '.join(different) or 'none'}")
            return int(bool(different))
        rows = [duel.row(args.repeats) for duel in duels]
    whose = "those of --annotation-file" if args.annotation_file else "the micro world's"
    report(f"Scoring against pycocoevalcap; captions: {whose}; wall time", rows, CPU, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
