"""Studies on the micro world: all settings, what parts of our recipe and of the report's are worth, what rewards add.

    python -m microworld.studies settings --out demo      every --setting by one scaling rule, scored on unseen scenes
    python -m microworld.studies variants --out demo      variants of the setting best, on scenes of another seed
    python -m microworld.studies rewards --out demo       self-critical training against more cross-entropy
    python -m microworld.studies letter --out demo        the report's setting 1 to the letter, point by point

A study that was stopped continues: finished runs are skipped, a started one is resumed. report.py shows them all.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from captioning.cli import FlagParser, command, positive_int
from captioning.device import PRECISIONS
from captioning.files import read_json, write_json
from captioning.profiles import PRESETS
from captioning.scoring.significance import compare
from captioning.training.config import SCST_NUMBERS, SETTINGS
from captioning.training.run_folder import LAST, RunFolder, read_run
from microworld.steps import WIDTH_RATIO, Runner, caption, draw, scaled, score, train
from microworld.variants import BASE, FURTHER, LEVEL, REWARDS, VARIANTS

MEASURES = ("CIDEr", "CLIPScore")
STYLE = ("mean_length", "repeated_2")  # of captions: words, and the share that repeats a bigram
SPLITS = ("val", "val_novel")
LOSS_IMAGES = 150  # that tell whether cross-entropy has levelled off
DEVELOPMENT_SEED = 1  # of scenes that no reported number is measured on; the demo's have seed 0


LETTER = "-letter"  # after a setting's name: as the report's code ran it
# What sound practice does in place of a point of the report's code. Without a training: another search, same adapter.
SOUND: dict[str, dict[str, object]] = {
    "gradients cleared": {"clear_gradients": True},
    "LoRA scale 1": {"lora_alpha": SETTINGS["1"].lora_rank},
    "own preprocessing": {"preprocessing": "own"},
    "BOS not predicted": {"predict_bos": False},
    "beams replaced": {"search_rule": "beam"},
}
ALL_SOUND = "without --report-faithful"  # all of these but LoRA's scale, which is the setting's


class Study:
    """Trains and scores runs below one folder, each only as far as that is not done yet.

    Args:
        run: of the commands.
        args: the command line.
    """

    def __init__(self, run: Runner, args: argparse.Namespace) -> None:
        self.run, self.args = run, args

    def draw(self, data: Path, seed: int = 0) -> Path:
        """Draw training scenes, unseen ones, and half as many of novel pairs, where they are not there."""
        counts = {"train": self.args.train, "val": self.args.scenes, "val_novel": max(1, self.args.scenes // 2)}
        for split, count in counts.items():
            if not (data / f"{split}.json").exists():
                draw(self.run, data, split, count, seed)
        return data

    def train(self, folder: Path, data: Path, **options: object) -> None:
        """Train one run, or resume it."""
        if not finished(folder):
            precision = None if self.args.precision == "auto" else self.args.precision  # float32 where the report's is
            options |= {"precision": precision, "resume": RunFolder(folder).has_state or None}
            train(self.run, folder, data, self.args.out / "cache", **options)

    def score(self, folder: Path, data: Path, splits: Sequence[str] = ("val",), **search: Any) -> None:
        """Caption and score the scenes of each split."""
        for split in splits:
            if not (folder / f"{split}_scores.json").exists():
                caption(self.run, folder, data, split, **search)
                score(self.run, folder, data, split)

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Return the names that --only asks for, or all; ValueError where there is none of that name."""
        for name in self.args.only or ():
            if name not in names:
                raise ValueError(f"--only {name}: choose from {', '.join(names)}")
        return list(self.args.only or names)

    def pairs(
        self, names: Iterable[str], base: Callable[[int], Path], row: Callable[[str, int], Path]
    ) -> dict[str, list[tuple[Path, Path]]]:
        """Return by row the folders of ``base`` and of the row, a pair per seed; what is not there yet is trained."""
        found = defaultdict(list)
        for seed in self.args.seeds:
            first = base(seed)
            for name in names:
                found[name].append((first, row(name, seed)))
        return found

    def settings(self) -> None:
        """Train every setting, the report's to the letter too, with every seed; hold each against best."""
        recipes = [name for name in SETTINGS if name not in PRESETS]  # which here have the same encoder
        names = self.chosen([*recipes, *(name + LETTER for name in recipes if name != BASE)])
        self.compare("settings", BASE, self.pairs(names, partial(self.setting, BASE), self.setting))

    def setting(self, name: str, seed: int) -> Path:
        """Train and score one setting with one seed; return its run folder."""
        data = self.settings_data()
        folder = self.args.out / "settings" / (name if seed == 0 else f"{name}-seed{seed}")
        self.train(folder, data, **self.options(name), seed=seed)
        self.score(folder, data, SPLITS)
        return folder

    def options(self, name: str) -> dict[str, object]:
        """Return the micro world's options of a setting, with the epochs that --epochs asks for."""
        return recipe(name) | ({"epochs": self.args.epochs} if self.args.epochs else {})

    def settings_data(self) -> Path:
        """Draw the scenes of the studies ``settings`` and ``letter``; return their folder."""
        return self.draw(self.args.out / "settings" / "data")

    def letter(self) -> None:
        """Turn each point of the report's code alone to sound practice, in its setting 1, with every seed."""
        names = self.chosen([*SOUND, ALL_SOUND])
        for name, pairs in self.pairs(names, self.literal, self.sound).items():
            result = {"what": name, "profile": "micro", "seeds": self.args.seeds}
            result |= compared(pairs, ("literal", "sound"))
            write_json(self.args.out / "letter" / slug(name) / "comparison.json", result)

    def literal(self, seed: int) -> Path:
        """Train and score the report's setting 1 to the letter with one seed; return its folder."""
        return self.setting("1" + LETTER, seed)

    def sound(self, name: str, seed: int) -> Path:
        """Train, where that is needed, and score one row of the study ``letter``; return its folder."""
        if name == ALL_SOUND:
            return self.setting("1", seed)
        folder, data = self.args.out / "letter" / slug(name) / str(seed), self.settings_data()
        if "search_rule" in SOUND[name]:
            self.score(folder, data, adapter=self.literal(seed) / "best.safetensors", **SOUND[name])
        else:
            self.train(folder, data, **self.options("1" + LETTER) | SOUND[name], seed=seed)
            self.score(folder, data)
        return folder

    def variants(self) -> None:
        """Train every variant of the setting best with every seed; hold each against it, on scenes of another seed."""
        names = self.chosen(VARIANTS)
        self.compare("variants", BASE, self.pairs(names, partial(self.variant, BASE), self.variant))

    def variant(self, name: str, seed: int) -> Path:
        """Train, where that is needed, and score one variant with one seed; return its folder.

        The last epoch's adapter captions: the best one's would be chosen on scenes that are scored.
        """
        data = self.draw(self.args.out / "variants" / "data", DEVELOPMENT_SEED)
        variant, folder = VARIANTS[name], self.args.out / "variants" / slug(name) / str(seed)
        trained = self.variant(variant.adapter_of, seed) if variant.adapter_of else folder
        if trained == folder:
            self.train(folder, data, **self.options("best") | {"val_images": 32} | dict(variant.train), seed=seed)
        self.score(folder, data, SPLITS, adapter=trained / LAST, **variant.search)
        return folder

    def rewards(self) -> None:
        """Tune a captioner that cross-entropy teaches no more by each reward; hold each against more cross-entropy."""
        names, found = self.chosen(REWARDS), defaultdict(list)
        data = self.draw(self.args.out / "rewards" / "data")
        for seed in self.args.seeds:
            start = self.levelled(seed, data)
            self.score(start, data, SPLITS, adapter=start / LAST)
            further = self.tuned(FURTHER, seed, data, start)
            found["start"].append((further, start))
            for name in names:
                found[name].append((further, self.tuned(name, seed, data, start)))
        self.compare("rewards", FURTHER, found)

    def levelled(self, seed: int, data: Path) -> Path:
        """Train by cross-entropy until another run of it lowers the validation loss by less than ``LEVEL``.

        Those runs are like the row ``FURTHER``; the folder before the last of them is returned. From ``--start`` there
        is one chain of them for all seeds, and the first is taken as it is.
        """
        rewards, chain = self.args.out / "rewards", "start" if self.args.start else str(seed)
        folder, adapter, loss = rewards / "start" / chain, self.args.start, math.inf
        if adapter is None:
            self.train(folder, data, **recipe("best") | {"val_images": LOSS_IMAGES}, seed=seed)
            adapter, loss = folder / LAST, last_loss(folder)
        for number in itertools.count(1):
            further = rewards / f"level_{number}" / chain
            order = number * 1000 + (0 if self.args.start else seed)  # else each would show the scenes in one order
            self.train(further, data, init_adapter=adapter, **self.tuning() | REWARDS[FURTHER], seed=order)
            before, loss = loss, last_loss(further)
            if loss > before * (1 - LEVEL):
                break
            folder, adapter = further, further / LAST
        return folder

    def tuning(self) -> dict[str, object]:
        """Return what all rows of the study ``rewards`` have in common."""
        epochs = self.args.epochs or math.ceil(SCST_NUMBERS["epochs"] / 2)
        lr, size = f"{SCST_NUMBERS['lr'] * WIDTH_RATIO:.3g}", scaled("best")["batch_size"]
        return {"lr": lr, "batch_size": size, "val_images": LOSS_IMAGES, "epochs": epochs}

    def tuned(self, name: str, seed: int, data: Path, start: Path) -> Path:
        """Tune the captioner of ``start`` by one row of the study ``rewards``, and score it; return its folder."""
        folder = self.args.out / "rewards" / slug(name) / str(seed)
        self.train(folder, data, init_adapter=start / LAST, **self.tuning() | REWARDS[name], seed=seed)
        self.score(folder, data, SPLITS, adapter=folder / LAST)
        return folder

    def compare(self, study: str, base: str, found: Mapping[str, Sequence[tuple[Path, Path]]]) -> None:
        """Write how each row of a study differs from its row ``base``: of each row a pair per seed, ``base`` first."""
        for name, pairs in found.items():
            if name == base:
                continue
            result = {"what": name, "against": base, "profile": "micro", "seeds": self.args.seeds}
            result |= {split: compared(pairs, (base, name), split) for split in SPLITS}
            write_json(self.args.out / study / slug(name) / "comparison.json", result)


def slug(name: str) -> str:
    """Return the folder of a row."""
    return name.replace(" ", "_")


def recipe(name: str) -> dict[str, object]:
    """Return the micro world's options of a setting, or of one to the letter: ``1-letter``."""
    setting = name.removesuffix(LETTER)
    return scaled(setting) | ({} if setting == name else {"report_faithful": True})


def compared(pairs: Sequence[tuple[Path, Path]], names: tuple[str, str], split: str = "val") -> dict[str, Any]:
    """Return the scores of two rows of a study, a pair per seed, and how the second differs by image.

    What is compared is an image's mean over seeds.
    """
    result: dict[str, Any] = {"paired": {}}
    images = []
    for name, folders in zip(names, zip(*pairs, strict=True), strict=True):
        scores = [read_json(folder / f"{split}_scores.json") for folder in folders]
        images.append([read_json(folder / f"{split}_per_image.json") for folder in folders])
        result[name] = {metric: [score[metric] for score in scores] for metric in MEASURES}
        if all("captions" in score for score in scores):
            result[name] |= {measure: [score["captions"][measure] for score in scores] for measure in STYLE}
            result["references"] = {measure: scores[0]["references"][measure] for measure in STYLE}
        if all(map(finished, folders)):
            result[name]["val_loss"] = [last_loss(folder) for folder in folders]
        result |= {"device": scores[0]["device"], "images": len(images[-1][0])}
    for metric in MEASURES:
        base, other = ({image: mean(rows[image][metric] for rows in found) for image in found[0]} for found in images)
        result["paired"][metric] = compare(other, base).summary()
    return result


def last_loss(folder: Path) -> float:
    """Return the validation loss after a run's last epoch."""
    return read_run(folder).epochs[-1]["val_loss"]


def finished(folder: Path) -> bool:
    """Whether a run's training has ended."""
    try:
        read_run(folder)
    except ValueError:
        return False
    return True


STUDIES = {"settings": Study.settings, "variants": Study.variants, "rewards": Study.rewards, "letter": Study.letter}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(prog="python -m microworld.studies", description=__doc__.split("\n\n")[0])
    parser.add_argument("study", choices=list(STUDIES), help="which one")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the demo; runs go below it")
    parser.add_argument("--train", type=positive_int, default=1700, help="training scenes, where they must be drawn")
    parser.add_argument(
        "--scenes",
        type=positive_int,
        default=500,
        help="unseen scenes, where they must be drawn, and half as many with novel pairs",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings, variants or rewards (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", default=[0, 1, 2], help="of each training")
    parser.add_argument("--epochs", type=positive_int, help="epochs instead of the recipe's (rewards: after the start)")
    parser.add_argument("--start", type=Path, help="adapter to begin with instead of training one a seed (rewards)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of every training; bf16 is fast where the CPU has it",
    )
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Run a study."""
    args = build_parser().parse_args(argv)
    args.out = args.out.absolute()
    args.start = args.start and args.start.absolute()
    run = Runner()
    STUDIES[args.study](Study(run, args))
    run("report", "report.py", runs=args.out, out=args.out / "report.html")
    print(f"{sum(run.seconds.values()):.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
