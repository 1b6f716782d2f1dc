"""Draw a small data set, tune LoRA on it, caption unseen scenes, score them, and show the result.

Every step is one of the suite's own command lines, printed before it runs; only ``--profile micro`` and the sizes tell
it from a full-size run.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from captioning import cli
from captioning.cli import FlagParser
from captioning.data.annotations import load_split
from captioning.data.images import load_image
from captioning.files import atomic_path, write_json
from captioning.profiles import PROFILES, ROOT
from captioning.training.config import SETTINGS

SPLITS = ("val", "val_novel")
SAMPLES = 9  # scenes on the contact sheet
EXPLAINED, GROUNDED = 5, 150  # scenes with maps, and scenes that the maps are measured on
# How much wider the full-size decoder is. Adam's rate for matrices goes with 1 / width (Yang et al., arXiv 2203.03466).
WIDTH_RATIO = 768 / 256
BATCH = 8  # images, on the micro world


class Runner:
    """Runs the suite's commands one after another, shows them, and keeps the time of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}

    def __call__(self, title: str, *arguments: object) -> str:
        """Run ``python arguments…`` in the repository; return its standard output.

        Raises:
            ValueError: the command failed; its own message is on stderr.
        """
        command = [str(a) for a in arguments]
        print(f"\n== {title}\n$ python {shlex.join(command)}", flush=True)
        start = time.time()
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, text=True, check=False
        )
        self.seconds[title] = time.time() - start
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise ValueError(f"the step '{title}' failed with exit code {done.returncode}; see its message above")
        return done.stdout


def scaled(setting: str) -> list[str]:
    """Return the flags that bring a full-size setting to the micro world; one rule for all of them.

    Half the epochs, rounded up, in batches of 8, at learning rates times ``WIDTH_RATIO``. All else stays literal.
    """
    config = SETTINGS[setting]
    return [
        "--setting",
        setting,
        "--epochs",
        str(math.ceil(config.epochs / 2)),
        "--batch-size",
        str(BATCH),
        "--val-images",
        "60",
        "--lr",
        f"{config.lr * WIDTH_RATIO:.3g}",
        "--projector-lr",
        f"{config.projector_lr * WIDTH_RATIO:.3g}",
    ]


def draw(run: Runner, folder: Path, train: int, val: int) -> None:
    """Draw the splits that the demo needs."""
    for split, count in (("train", train), ("val", val), ("val_novel", val // 2)):
        run(f"draw {split}", "-m", "microworld.scenes", "--out", folder, "--split", split, "--count", count)


def train_and_score(run: Runner, out: Path, name: str, epochs: int | None, blind: bool) -> dict[str, Any]:
    """Train one captioner, caption and score both validation splits; return the scores by split."""
    folder, adapter = out / "data", out / name / "best.safetensors"
    extra = [*(["--epochs", epochs] if epochs else []), *(["--shuffle-captions"] if blind else [])]
    run(
        f"train {name}",
        "p2_train.py",
        "--profile",
        "micro",
        "--data",
        folder,
        "--cache",
        out / "cache",
        "--out",
        out / name,
        *scaled("best"),
        *extra,
    )
    scores = {}
    for split in SPLITS:
        images, predictions = folder / "images" / split, out / name / f"{split}.json"
        run(
            f"caption {split} ({name})",
            "p2_infer.py",
            images,
            predictions,
            PROFILES["micro"].decoder,
            "--profile",
            "micro",
            "--adapter",
            adapter,
        )
        result = out / name / f"{split}_scores.json"
        run(
            f"score {split} ({name})",
            "evaluate.py",
            "--pred_file",
            predictions,
            "--images_root",
            images,
            "--annotation_file",
            folder / f"{split}.json",
            "--profile",
            "micro",
            "--json",
            result,
            "--per_image",
            out / name / f"{split}_per_image.json",
        )
        scores[split] = json.loads(result.read_text(encoding="utf-8"))
    return scores


def zero_shot(run: Runner, out: Path) -> dict[str, Any]:
    """Caption the validation scenes with LLaVA by both prompts of the report; return the scores by run and split."""
    table = out / "llava" / "val.json"
    run(
        "compare LLaVA's prompts",
        "p1_llava_caption.py",
        out / "data" / "images" / "val",
        table,
        "--compare",
        "--annotation-file",
        out / "data" / "val.json",
        "--profile",
        "micro",
        "--overwrite",
    )
    scores = json.loads(table.read_text(encoding="utf-8"))
    return {f"llava {setting}": {"val": s} for setting, s in scores.items()}


def look(run: Runner, out: Path) -> None:
    """Draw where each word of five captions looked, for both models, and measure it against the boxes."""
    images = out / "data" / "images" / "val"
    some = [sample.path for sample in load_split(out / "data", "val")[:EXPLAINED]]
    flags = ("--profile", "micro", "--adapter", out / "lora" / "best.safetensors")
    for model, name in (("p1", "LLaVA"), ("p2", "the captioner")):
        folder = out / "attention" / model
        run(
            f"maps ({model})", "p3_attention.py", "--model", model, "--images", *some, "--out", folder, "--html", *flags
        )
        run(
            f"does {name} look at what it names?",
            "p3_attention.py",
            "--model",
            model,
            "--grounding",
            out / "data" / "val.json",
            "--images",
            images,
            "--count",
            GROUNDED,
            "--out",
            folder,
            *flags,
        )
    run(
        "best and worst pair",
        "p3_attention.py",
        "--model",
        "p2",
        "--best-worst",
        out / "lora" / "val_per_image.json",
        "--annotation-file",
        out / "data" / "val.json",
        "--images",
        images,
        "--out",
        out / "attention",
        *flags,
    )


def contact_sheet(out: Path, run_folder: Path) -> Path:
    """Draw the first validation scenes with their captions and CIDEr; return the picture's path."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    per_image = json.loads((run_folder / "val_per_image.json").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(3, SAMPLES // 3, figsize=(11, 12.6), layout="constrained")
    for axis, sample in zip(axes.flat, load_split(out / "data", "val")[:SAMPLES], strict=True):
        row = per_image[sample.path.stem]
        axis.imshow(load_image(sample.path))
        axis.set_title(textwrap.fill(row["caption"], 42), fontsize=10)
        axis.set_xlabel(f"CIDEr {row['CIDEr']:.2f}   CLIPScore {row['CLIPScore']:.2f}", fontsize=9, color="#555555")
        axis.set(xticks=[], yticks=[])
    path = out / "samples.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    plt.close(figure)
    return path


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Return the scores of every run as text."""
    lines = [f"{'run':<9}{'split':<11}{'images':>7}{'CIDEr':>9}{'CLIPScore':>11}"]
    for name, splits in scores.items():
        for split, s in splits.items():
            lines.append(f"{name:<9}{split:<11}{s['images']:>7}{s['CIDEr']:>9.3f}{s['CLIPScore']:>11.3f}")
    if "blind" in scores:
        ratio = scores["lora"]["val"]["CIDEr"] / scores["blind"]["val"]["CIDEr"]
        lines.append(f"CIDEr on val is {ratio:.1f} times that of the blind baseline")
    return "\n".join(lines)


def summary(out: Path, run: Runner, scores: dict[str, Any], sheet: Path) -> None:
    """Print scores, sample captions, times and where everything lies."""
    print("\n" + "=" * 78 + "\nMicro world (generated drawings; never to be compared with full-size numbers)\n")
    print(table(scores) + "\n")
    captions = json.loads((out / "lora" / "val.json").read_text(encoding="utf-8"))
    for sample in load_split(out / "data", "val")[:4]:
        print(f"{sample.path.name}  {captions[sample.path.stem]}\n{'':18}e.g. {sample.captions[0]}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    train = run.seconds["train lora"]
    print(f"\n{sum(run.seconds.values()):.0f} s in all, training {train:.0f} s; peak memory of a step {peak:.1f} GB")
    places = (
        ("data", out / "data"),
        ("run folder", out / "lora"),
        ("loss curve", out / "lora" / "loss.png"),
        ("captions", out / "lora" / "val.json"),
        ("samples", sheet),
        ("maps", out / "attention"),
        ("viewer", out / "attention" / "p2" / "viewer.html"),
        ("report", out / "report.html"),
    )
    for name, path in places:
        print(f"{name:<11} {path}")


@cli.command
def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    parser = FlagParser(prog="python -m microworld.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for data, run and results")
    parser.add_argument("--train", type=int, default=1700, help="training scenes")
    parser.add_argument("--val", type=int, default=300, help="validation scenes; half as many with novel pairs")
    parser.add_argument("--epochs", type=int, help="epochs instead of the demo's")
    parser.add_argument("--blind", action="store_true", help="train the blind baseline (shuffled captions) too")
    args = parser.parse_args(argv)
    if args.val < SAMPLES * 2:
        raise ValueError(f"--val {args.val}: at least {SAMPLES * 2} scenes are needed")
    out = args.out.absolute()
    for name in ("lora", "blind"):
        _remove_run(out / name)
    run = Runner()
    draw(run, out / "data", args.train, args.val)
    scores = {"lora": train_and_score(run, out, "lora", args.epochs, blind=False)}
    if args.blind:
        scores["blind"] = train_and_score(run, out, "blind", args.epochs, blind=True)
    scores |= zero_shot(run, out)
    look(run, out)
    write_json(out / "scores.json", {"scores": scores, "seconds": run.seconds})
    run("report", "report.py", "--runs", out, "--out", out / "report.html")
    summary(out, run, scores, contact_sheet(out, out / "lora"))
    return 0


def _remove_run(folder: Path) -> None:
    """Remove the files of an earlier demo run, and nothing that the demo did not write."""
    for pattern in ("*.safetensors", "*.json", "metrics.jsonl", "loss.png", "training_state*.safetensors"):
        for file in folder.glob(pattern):
            file.unlink()


if __name__ == "__main__":
    sys.exit(main())
