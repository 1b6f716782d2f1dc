"""Scenes to choose from: pictures whose references are known, some two dozen at a time."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from captioning.data.annotations import Annotations, find_images, load_annotations
from captioning.messages import first_line
from captioning.profiles import PROFILES, ROOT
from captioning.scoring.chair import Chair
from captioning.scoring.cider import cider_d
from captioning.scoring.evaluator import Evaluator

COUNT = 24  # scenes of a set
SPLITS = ("val", "val_novel")
LAST_SEED = 2**31 - 1
MORE = "the micro world draws scenes; at full size they are the validation images: `bash hw3_download.sh data`"


@dataclass(frozen=True)
class SceneSet:
    """Some scenes, their files and their references, which are also those that document frequencies are of."""

    name: str
    annotations: Annotations
    paths: dict[str, Path]
    chair: Chair | None = None  # where boxes are known

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """Scores captions of these scenes as evaluate.py does."""
        return Evaluator(self.annotations, chair=self.chair)

    @property
    def metrics(self) -> list[str]:
        """What captions of these scenes are compared by."""
        return ["cider"] if self.chair is None else ["cider", "chair"]

    def cider(self, key: str, caption: str) -> float:
        """Return one caption's CIDEr, as ``evaluate.py --per-image`` has it for all captions of these scenes."""
        side, tokens = self.evaluator.reference_side, self.evaluator.tokenize({key: caption})
        references = [text.split() for text in side.tokens[key]]
        return float(cider_d([references], [tokens[key].split()], side.frequencies)[0])

    def not_there(self, key: str, caption: str) -> list[str] | None:
        """Return the objects that a caption names and its scene lacks, as CHAIR counts them; None without boxes."""
        if self.chair is None:
            return None
        _, details = self.chair.score({key: caption}, self.evaluator.objects)
        return details[key]["objects not there"]


def check_scenes(split: object, seed: object) -> None:
    """Raise ValueError for a split or a seed that there is not."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: use one of {', '.join(SPLITS)}")
    if type(seed) is not int or not 0 <= seed <= LAST_SEED:
        raise ValueError(f"seed {seed!r}: a whole number from 0 to {LAST_SEED} draws scenes")


def make_scenes(profile: str, folder: Path, split: str, seed: int, count: int = COUNT) -> SceneSet:
    """Return the scenes that ``seed`` stands for: drawn below ``folder``, or chosen from the full-size data.

    Raises:
        FileNotFoundError, ValueError: there is neither generator nor data, or drawing failed.
    """
    check_scenes(split, seed)
    if profile == "micro":
        return draw_scenes(folder / f"{split}-{seed}", split, seed, count)
    data = Path(PROFILES[profile].data)
    if not (data / "val.json").is_file():
        raise FileNotFoundError(f"{data}/val.json: no such file; {MORE}")
    everything = load_annotations(data / "val.json")
    keys = sorted(everything.references)
    some = everything.of(random.Random(seed).sample(keys, min(count, len(keys))))
    return SceneSet(f"val-{seed}", some, find_images(some, data / "images" / "val"))


def draw_scenes(folder: Path, split: str, seed: int, count: int = COUNT) -> SceneSet:
    """Let the micro world's generator draw scenes, in a process of its own: the package imports nothing of it."""
    if not (folder / f"{split}.json").is_file():
        if not (ROOT / "microworld").is_dir():
            raise FileNotFoundError(f"{ROOT / 'microworld'}: no such folder; {MORE}")
        options = ("--out", folder, "--split", split, "--count", count, "--seed", seed, "--workers", 1)
        command = [sys.executable, "-m", "microworld.scenes", *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        drawn = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if drawn.returncode:
            raise ValueError(f"no scenes could be drawn: {first_line(ValueError(drawn.stderr.strip()))}")
    file = folder / f"{split}.json"
    annotations, words = load_annotations(file), PROFILES["micro"].chair_words
    chair = Chair.of_files(words, str(file), annotations.file_names, annotations.ids)  # drawn with their boxes
    return SceneSet(f"{split}-{seed}", annotations, find_images(annotations, folder / "images" / split), chair)
