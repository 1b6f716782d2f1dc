"""Draw a small data set, tune LoRA on it, caption unseen scenes, score them, and show the result.

Every step is one of the suite's own command lines, printed before it runs. A full-size run
differs in ``--profile`` and sizes only.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

from captioning.cli import FlagParser, command
from captioning.data.annotations import load_split
from captioning.data.images import load_image
from captioning.files import atomic_path, read_json, write_json
from captioning.imports import import_guarded
from microworld.steps import QUICK_SCENES, Runner, caption, draw, quick, score, train

SPLITS = ("val", "val_novel")
SAMPLES = 9  # scenes on the contact sheet
EXPLAINED, GROUNDED = 5, 150  # scenes with maps, and scenes that the maps are measured on
# What `make blind` measured last, by the recipe of that day: captions of the wrong images teach the language, and next
# to nothing else.
BLIND_DATE = "2026-11-26"
BLIND = {
    "val": {"images": 300, "CIDEr": 0.177, "CLIPScore": 0.288},
    "val_novel": {"images": 150, "CIDEr": 0.190, "CLIPScore": 0.308},
}
MODELS = {"p1": "LLaVA", "p2": "the captioner"}


def compare_prompts(run: Runner, out: Path, data: Path) -> None:
    """Caption the validation scenes with LLaVA by both prompts of the report, and score them."""
    run(
        "compare LLaVA's prompts",
        "p1_llava_caption.py",
        data / "images" / "val",
        out / "llava" / "val.json",
        profile="micro",
        compare=True,
        annotation_file=data / "val.json",
    )


def draw_maps(run: Runner, out: Path, data: Path) -> None:
    """Draw where each word of five captions looked, for both models, and measure it against the boxes."""
    images, common = data / "images" / "val", {"profile": "micro", "adapter": out / "lora" / "best.safetensors"}
    some = [sample.path for sample in load_split(data, "val")[:EXPLAINED]]
    for model, name in MODELS.items():
        each = {"model": model, "out": out / "attention" / model, **common}
        run(f"maps ({model})", "p3_attention.py", images=some, html=True, **each)
        title = f"does {name} look at what it names?"
        run(title, "p3_attention.py", grounding=data / "val.json", images=images, count=GROUNDED, **each)
    run(
        "best and worst pair",
        "p3_attention.py",
        model="p2",
        best_worst=out / "lora" / "val_per_image.json",
        annotation_file=data / "val.json",
        images=images,
        out=out / "attention",
        **common,
    )


def read_scores(out: Path, captioners: list[str]) -> dict[str, dict[str, Any]]:
    """Return the scores of every captioner and of LLaVA's prompts, by split."""
    scores = {name: {split: read_json(out / name / f"{split}_scores.json") for split in SPLITS} for name in captioners}
    prompts = read_json(out / "llava" / "val.json")
    return scores | {f"llava {setting}": {"val": found} for setting, found in prompts.items()}


def contact_sheet(out: Path, path: Path) -> None:
    """Draw the first validation scenes with their captions and scores."""
    per_image = read_json(out / "lora" / "val_per_image.json")
    figure = import_guarded("matplotlib.figure").Figure((11, 12.6), layout="constrained")
    axes = figure.subplots(3, SAMPLES // 3)
    for axis, sample in zip(axes.flat, load_split(out / "data", "val")[:SAMPLES], strict=True):
        row = per_image[sample.path.stem]
        axis.imshow(load_image(sample.path))
        axis.set_title(textwrap.fill(row["caption"], 42), fontsize=10)
        axis.set_xlabel(f"CIDEr {row['CIDEr']:.2f}   CLIPScore {row['CLIPScore']:.2f}", fontsize=9, color="#555555")
        axis.set(xticks=[], yticks=[])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Return the scores of every run as text, and those kept of the blind baseline where it was not trained now."""
    kept = {} if "blind" in scores else {"blind *": BLIND}
    lines = [f"{'run':<9}{'split':<11}{'images':>7}{'CIDEr':>9}{'CLIPScore':>11}"]
    for name, splits in (scores | kept).items():
        for split, s in splits.items():
            lines.append(f"{name:<9}{split:<11}{s['images']:>7}{s['CIDEr']:>9.3f}{s['CLIPScore']:>11.3f}")
    if kept:
        lines.append(f"* trained on captions of wrong images: what language alone scores; `make blind` of {BLIND_DATE}")
    else:
        ratio = scores["lora"]["val"]["CIDEr"] / scores["blind"]["val"]["CIDEr"]
        lines.append(f"CIDEr on val is {ratio:.1f} times that of the blind baseline")
    return "\n".join(lines)


def summary(out: Path, run: Runner, scores: dict[str, Any]) -> None:
    """Print scores, sample captions, times and where everything is."""
    print("\n" + "=" * 78 + "\nMicro world (generated drawings; never to be compared with full-size numbers)\n")
    print(table(scores) + "\n")
    captions = read_json(out / "lora" / "val.json")
    for sample in load_split(out / "data", "val")[:4]:
        print(f"{sample.path.name}  {captions[sample.path.stem]}\n{'':18}e.g. {sample.captions[0]}")
    total, training = sum(run.seconds.values()), run.seconds["train lora"]
    step = max(run.memory, key=lambda title: run.memory[title])
    print(f"\n{total:.0f} s in all, training {training:.0f} s; peak memory {run.memory[step]:.1f} GB ({step})")
    places = {
        "data": "data",
        "run folder": "lora",
        "loss curve": "lora/loss.png",
        "captions": "lora/val.json",
        "samples": "samples.png",
        "maps": "attention",
        "viewer": "attention/p2/viewer.html",
        "report": "report.html",
    }
    for name, place in places.items():
        print(f"{name:<11} {out / place}")


def remove_run(folder: Path) -> None:
    """Remove the files of an earlier demo run, and nothing that the demo did not write."""
    for pattern in ("*.safetensors", "*.json", "metrics.jsonl", "loss.png", "training_state*.safetensors"):
        for file in folder.glob(pattern):
            file.unlink()


@command
def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    parser = FlagParser(prog="python -m microworld.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for data, run and results")
    parser.add_argument("--train", type=int, default=QUICK_SCENES, help="training scenes")
    parser.add_argument("--val", type=int, default=300, help="validation scenes; half as many with novel pairs")
    parser.add_argument("--epochs", type=int, help="epochs instead of the demo's")
    parser.add_argument("--blind", action="store_true", help="train the blind baseline (shuffled captions) too")
    args = parser.parse_args(argv)
    if args.val < SAMPLES * 2:
        raise ValueError(f"--val {args.val}: at least {SAMPLES * 2} scenes are needed")
    out, run = args.out.absolute(), Runner()
    data, recipe = out / "data", quick() | ({"epochs": args.epochs} if args.epochs else {})
    captioners = {"lora": {}, "blind": {"shuffle_captions": True}} if args.blind else {"lora": {}}
    for name in ("lora", "blind"):
        remove_run(out / name)
    draw(run, data, "train", args.train)
    draw(run, data, "val", args.val)
    draw(run, data, "val_novel", args.val // 2)
    for name, more in captioners.items():
        train(run, out / name, data, out / "cache", **recipe, **more)
        for split in SPLITS:
            caption(run, out / name, data, split)
            score(run, out / name, data, split)
    compare_prompts(run, out, data)
    draw_maps(run, out, data)
    scores = read_scores(out, list(captioners))
    write_json(out / "scores.json", {"scores": scores, "seconds": run.seconds, "memory": run.memory})
    run("report", "report.py", runs=out, out=out / "report.html")
    contact_sheet(out, out / "samples.png")
    summary(out, run, scores)
    return 0


if __name__ == "__main__":
    sys.exit(main())
