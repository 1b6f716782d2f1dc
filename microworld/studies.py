"""Studies on the micro world: all settings, what parts of our recipe and of the report's are worth, what rewards add.

    python -m microworld.studies settings --out demo      every --setting by one scaling rule, scored on unseen scenes
    python -m microworld.studies ablation --out demo      variants of the demo's recipe, on scenes of another seed
    python -m microworld.studies rewards --out demo       self-critical training from the setting best, scored alike
    python -m microworld.studies letter --out demo        the report's setting 1 to the letter, point by point

A study that was stopped continues: finished runs are skipped, a started one is resumed. report.py shows them all.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from captioning.cli import FlagParser, command, positive_int
from captioning.device import PRECISIONS
from captioning.files import read_json, write_json
from captioning.scoring.significance import compare
from captioning.training.config import SCST_NUMBERS, SETTINGS
from captioning.training.run_folder import RunFolder, read_run
from microworld.steps import WIDTH_RATIO, Runner, caption, draw, scaled, score, train

MEASURES = ("CIDEr", "CLIPScore")
DEVELOPMENT_SEED = 1  # of scenes that no reported number is measured on; the demo's have seed 0


def rate(factor: float) -> str:
    """Return the recipe's learning rate on the micro world, times ``factor``."""
    return f"{SETTINGS['best'].lr * WIDTH_RATIO * factor:.3g}"


VARIANTS: dict[str, dict[str, object]] = {
    "start": {},  # the setting best as it is
    "rate x 0.5": {"lr": rate(0.5), "projector_lr": rate(0.5)},
    "rate x 2": {"lr": rate(2), "projector_lr": rate(2)},
    "projector rate x 3": {"projector_lr": rate(3)},
    "projector first": {"projector_epochs": 1},
    "constant rate": {"schedule": "constant"},
    "rank 16": {"lora_rank": 16, "lora_alpha": 16},
    "alpha 1": {"lora_alpha": 1},
    "no lm_head": {"lora_lm_head": False},
    "no dropout": {"lora_dropout": 0},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "layer before the last": {"encoder_layer": -2},
    "no CLS": {"cls": False},
}

# The brevity penalty multiplies CLIPScore too and so weighs more with it: a smaller exponent. As many further epochs of
# cross-entropy show how much of a gain is due to the reward.
REWARDS: dict[str, dict[str, object]] = {
    "cider": {"objective": "scst"},
    "cider+clip": {"objective": "scst", "clip_reward": 1, "brevity": 1.2},
    "more cross-entropy": {"objective": "xe", "epochs": SCST_NUMBERS["epochs"], "warmup": 0, "weight_decay": 0},
}


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
        """Draw training and validation scenes."""
        for split, count in (("train", self.args.train), ("val", self.args.val)):
            if not (data / f"{split}.json").exists():
                draw(self.run, data, split, count, seed)
        return data

    def train(self, folder: Path, data: Path, **options: object) -> None:
        """Train one run, or resume it."""
        if not finished(folder):
            precision = None if self.args.precision == "auto" else self.args.precision  # float32 where the report's is
            options |= {"precision": precision, "resume": RunFolder(folder).has_state or None}
            train(self.run, folder, data, self.args.out / "cache", **options)

    def score(self, folder: Path, data: Path, **search: Any) -> None:
        """Caption and score the validation scenes."""
        if not (folder / "val_scores.json").exists():
            caption(self.run, folder, data, "val", **search)
            score(self.run, folder, data, "val")

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Return the names that --only asks for, or all; ValueError where there is none of that name."""
        for name in self.args.only or ():
            if name not in names:
                raise ValueError(f"--only {name}: choose from {', '.join(names)}")
        return list(self.args.only or names)

    def settings(self) -> None:
        """Train and score every setting on the demo's scenes, the report's to the letter too, with one seed or more."""
        names = self.chosen([*SETTINGS, *(name + LETTER for name in SETTINGS if name != "best")])
        for seed in range(self.args.seeds or 1):
            for name in names:
                self.setting(name, seed)

    def setting(self, name: str, seed: int) -> Path:
        """Train and score one setting with one seed; return its run folder."""
        data = self.draw(self.args.out / "data")
        folder = self.args.out / "settings" / (name if seed == 0 else f"{name}-seed{seed}")
        self.train(folder, data, **recipe(name), seed=seed)
        self.score(folder, data)
        return folder

    def letter(self) -> None:
        """Turn each point of the report's code alone to sound practice, in its setting 1, with every seed."""
        names, found = self.chosen([*SOUND, ALL_SOUND]), defaultdict(list)
        for seed in range(self.args.seeds or 3):
            literal = self.setting("1" + LETTER, seed)
            for name in names:
                found[name].append((literal, self.sound(name, seed, literal)))
        for name, pairs in found.items():
            folder = self.args.out / "letter" / name.replace(" ", "_")
            write_json(folder / "comparison.json", {"what": name, "profile": "micro", **compared(pairs)})

    def sound(self, name: str, seed: int, literal: Path) -> Path:
        """Train, where that is needed, and score one row of the study ``letter``; return its folder."""
        if name == ALL_SOUND:
            return self.setting("1", seed)
        folder, data = self.args.out / "letter" / name.replace(" ", "_") / str(seed), self.args.out / "data"
        if "search_rule" in SOUND[name]:
            self.score(folder, data, adapter=literal / "best.safetensors", **SOUND[name])
        else:
            self.train(folder, data, **recipe("1" + LETTER) | SOUND[name], seed=seed)
            self.score(folder, data)
        return folder

    def rewards(self) -> None:
        """Tune the setting ``best`` of every seed by each reward, and score the result on the demo's scenes."""
        names, data = self.chosen(REWARDS), self.args.out / "data"
        rate: Any = SCST_NUMBERS["lr"]
        common = {"lr": f"{rate * WIDTH_RATIO:.3g}", "batch_size": scaled("best")["batch_size"], "val_images": 150}
        for seed in range(self.args.seeds or 3):
            base = self.setting("best", seed)
            for name in names:
                folder = self.args.out / "rewards" / name.replace(" ", "_") / str(seed)
                start = base / "best.safetensors"
                self.train(folder, data, init_adapter=start, **REWARDS[name], **common, seed=seed)
                self.score(folder, data)

    def ablation(self) -> None:
        """Train every variant of the setting best with every seed; its CIDEr is its best epoch's on other scenes."""
        names, folder = self.chosen(VARIANTS), self.args.out / "ablation"
        data = self.draw(folder / "data", DEVELOPMENT_SEED)
        common = scaled("best") | {"val_images": self.args.val}
        if self.args.epochs:
            common["epochs"] = self.args.epochs
        for seed in range(self.args.seeds or 3):
            for name in names:
                self.train(folder / name.replace(" ", "_") / str(seed), data, **common | VARIANTS[name], seed=seed)


def recipe(name: str) -> dict[str, object]:
    """Return the micro world's options of a setting, or of one to the letter: ``1-letter``."""
    setting = name.removesuffix(LETTER)
    return scaled(setting) | ({} if setting == name else {"report_faithful": True})


def compared(pairs: Sequence[tuple[Path, Path]]) -> dict[str, Any]:
    """Return the scores of literal and sound runs, a pair per seed, and how sound differs by image, over all seeds."""
    sides = dict(zip(("literal", "sound"), zip(*pairs, strict=True), strict=True))
    scores = {side: [read_json(folder / "val_scores.json") for folder in folders] for side, folders in sides.items()}
    images = {side: [read_json(folder / "val_per_image.json") for folder in folders] for side, folders in sides.items()}
    result: dict[str, Any] = {"seeds": list(range(len(pairs))), "device": scores["literal"][0]["device"], "paired": {}}
    for side in sides:
        result[side] = {metric: [score[metric] for score in scores[side]] for metric in MEASURES}
    for metric in MEASURES:
        means = {
            side: {image: mean(rows[image][metric] for rows in found) for image in found[0]}
            for side, found in images.items()
        }
        result["paired"][metric] = compare(means["sound"], means["literal"]).summary()
    return result


def finished(folder: Path) -> bool:
    """Whether a run's training has ended."""
    try:
        read_run(folder)
    except ValueError:
        return False
    return True


STUDIES = {"settings": Study.settings, "ablation": Study.ablation, "rewards": Study.rewards, "letter": Study.letter}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(prog="python -m microworld.studies", description=__doc__.split("\n\n")[0])
    parser.add_argument("study", choices=list(STUDIES), help="which one")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the demo; runs go below it")
    parser.add_argument("--train", type=positive_int, default=1700, help="training scenes, where they must be drawn")
    parser.add_argument("--val", type=positive_int, default=300, help="validation scenes, where they must be drawn")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings, variants or rewards (default: all)")
    parser.add_argument("--seeds", type=positive_int, help="seeds of each (default: 1 of settings, 3 of others)")
    parser.add_argument("--epochs", type=int, help="epochs instead of the recipe's (ablation)")
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
    run = Runner()
    STUDIES[args.study](Study(run, args))
    run("report", "report.py", runs=args.out, out=args.out / "report.html")
    print(f"{sum(run.seconds.values()):.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
