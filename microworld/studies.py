"""Studies on the micro world: all six settings, what each part of the recipe is worth, what rewards add.

    python -m microworld.studies settings --out demo      every --setting by one scaling rule, scored on unseen scenes
    python -m microworld.studies ablation --out demo      variants of the demo's recipe, on scenes of another seed
    python -m microworld.studies rewards --out demo       self-critical training from the setting best, scored alike

A study that was broken off goes on where it stopped: finished runs are passed over, a begun one is resumed. report.py
shows them all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from captioning.cli import FlagParser, command
from captioning.device import PRECISIONS
from captioning.profiles import PROFILES
from captioning.training.config import SCST_NUMBERS, SETTINGS
from captioning.training.run_folder import RunFolder, read_run
from microworld.demo import BATCH, WIDTH_RATIO, Runner, scaled

DEVELOPMENT_SEED = 1  # of scenes that no reported number is measured on; the demo's have seed 0


def rate(factor: float) -> str:
    """Return the recipe's learning rate on the micro world, times ``factor``."""
    return f"{SETTINGS['best'].lr * WIDTH_RATIO * factor:.3g}"


VARIANTS: dict[str, tuple[str, ...]] = {
    "start": (),  # the setting best as it is
    "rate x 0.5": ("--lr", rate(0.5), "--projector-lr", rate(0.5)),
    "rate x 2": ("--lr", rate(2), "--projector-lr", rate(2)),
    "projector rate x 3": ("--projector-lr", rate(3)),
    "projector first": ("--projector-epochs", "1"),
    "constant rate": ("--schedule", "constant"),
    "rank 16": ("--lora-rank", "16", "--lora-alpha", "16"),
    "alpha 1": ("--lora-alpha", "1"),
    "no lm_head": ("--no-lora-lm-head",),
    "no dropout": ("--lora-dropout", "0"),
    "label smoothing 0.1": ("--label-smoothing", "0.1"),
    "layer before the last": ("--encoder-layer", "-2"),
    "no CLS": ("--no-cls",),
}

# The brevity penalty damps CLIPScore too, and with it weighs more: a smaller exponent. As many further epochs of
# cross-entropy tell what of a gain is the reward's.
REWARDS: dict[str, tuple[str, ...]] = {
    "cider": ("--objective", "scst"),
    "cider+clip": ("--objective", "scst", "--clip-reward", "1", "--brevity", "1.2"),
    "more cross-entropy": (
        "--objective",
        "xe",
        "--epochs",
        str(SCST_NUMBERS["epochs"]),
        "--warmup",
        "0",
        "--weight-decay",
        "0",
    ),
}


def finished(folder: Path) -> bool:
    """Whether a run's training has ended."""
    try:
        read_run(folder)
    except ValueError:
        return False
    return True


def train(run: Runner, folder: Path, data: Path, cache: Path, flags: list[str]) -> None:
    """Train one run, or go on with it, or pass it over."""
    if finished(folder):
        return
    resume = ["--resume"] if RunFolder(folder).has_state else []
    run(
        f"train {folder.name}",
        "p2_train.py",
        "--profile",
        "micro",
        "--data",
        data,
        "--cache",
        cache,
        "--out",
        folder,
        *flags,
        *resume,
    )


def score(run: Runner, folder: Path, data: Path) -> None:
    """Caption and score the validation scenes, where that is not done yet."""
    result, images, predictions = folder / "val_scores.json", data / "images" / "val", folder / "val.json"
    if result.exists():
        return
    run(
        f"caption ({folder.name})",
        "p2_infer.py",
        images,
        predictions,
        PROFILES["micro"].decoder,
        "--profile",
        "micro",
        "--adapter",
        folder / "best.safetensors",
    )
    run(
        f"score ({folder.name})",
        "evaluate.py",
        "--pred_file",
        predictions,
        "--images_root",
        images,
        "--annotation_file",
        data / "val.json",
        "--profile",
        "micro",
        "--json",
        result,
    )


def draw(run: Runner, folder: Path, train: int, val: int, seed: int) -> None:
    """Draw training and validation scenes, where they are not there yet."""
    for split, count in (("train", train), ("val", val)):
        if not (folder / f"{split}.json").exists():
            run(
                f"draw {split}",
                "-m",
                "microworld.scenes",
                "--out",
                folder,
                "--split",
                split,
                "--count",
                count,
                "--seed",
                seed,
            )


def chosen(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Return the names that --only asks for, or all; ValueError where one is not there."""
    for name in args.only or ():
        if name not in names:
            raise ValueError(f"--only {name}: choose from {', '.join(names)}")
    return list(args.only or names)


def study_settings(run: Runner, args: argparse.Namespace) -> None:
    """Train and score every setting on the demo's scenes, with one seed or as many as asked for."""
    names = chosen(args, SETTINGS)
    for seed in range(args.seeds or 1):
        for setting in names:
            study_setting(run, args, setting, seed)


def study_setting(run: Runner, args: argparse.Namespace, setting: str, seed: int) -> Path:
    """Train and score one setting with one seed, where that is not done yet; return its run folder."""
    data = args.out / "data"
    draw(run, data, args.train, args.val, seed=0)
    folder = args.out / "settings" / (setting if seed == 0 else f"{setting}-seed{seed}")
    flags = [*scaled(setting), "--seed", str(seed), "--precision", args.precision]
    train(run, folder, data, args.out / "cache", flags)
    score(run, folder, data)
    return folder


def study_rewards(run: Runner, args: argparse.Namespace) -> None:
    """Tune the setting ``best`` of every seed by each reward, and score what comes of it on the demo's scenes."""
    names = chosen(args, REWARDS)
    for seed in range(args.seeds or 3):
        base = study_setting(run, args, "best", seed)
        for name in names:
            folder = args.out / "rewards" / name.replace(" ", "_") / str(seed)
            flags = [
                "--init-adapter",
                str(base / "best.safetensors"),
                *REWARDS[name],
                "--lr",
                f"{SCST_NUMBERS['lr'] * WIDTH_RATIO:.3g}",
                "--batch-size",
                str(BATCH),
                "--val-images",
                "150",
                "--seed",
                str(seed),
                "--precision",
                args.precision,
            ]
            train(run, folder, args.out / "data", args.out / "cache", flags)
            score(run, folder, args.out / "data")


def study_ablation(run: Runner, args: argparse.Namespace) -> None:
    """Train every variant of the setting best with every seed; its CIDEr is the best epoch's on development scenes."""
    data = args.out / "ablation" / "data"
    names = chosen(args, VARIANTS)
    draw(run, data, args.train, args.val, DEVELOPMENT_SEED)
    for seed in range(args.seeds or 3):
        for variant in names:
            folder = args.out / "ablation" / variant.replace(" ", "_") / str(seed)
            flags = [
                *scaled("best"),
                *VARIANTS[variant],
                "--seed",
                str(seed),
                "--val-images",
                str(args.val),
                "--precision",
                args.precision,
            ]
            flags += ["--epochs", str(args.epochs)] if args.epochs else []
            train(run, folder, data, args.out / "cache", flags)


STUDIES = {"settings": study_settings, "ablation": study_ablation, "rewards": study_rewards}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(prog="python -m microworld.studies", description=__doc__.split("\n\n")[0])
    parser.add_argument("study", choices=list(STUDIES), help="which one")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the demo; runs go below it")
    parser.add_argument("--train", type=int, default=1700, help="training scenes, where they must be drawn")
    parser.add_argument("--val", type=int, default=300, help="validation scenes, where they must be drawn")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings, variants or rewards (default: all)")
    parser.add_argument("--seeds", type=int, help="seeds of each (default: 1 of settings, 3 of others)")
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
    for name in ("train", "val", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    args.out = args.out.absolute()
    run = Runner()
    STUDIES[args.study](run, args)
    run("report", "report.py", "--runs", args.out, "--out", args.out / "report.html")
    print(f"{sum(run.seconds.values()):.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
