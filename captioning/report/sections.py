"""The report's sections, in the order of the original: LLaVA, the captioner, attention maps, speed and environment.

Each is built from what lies in the folder of runs, and nothing else: a number that is not there is named as missing
together with the command that makes it. Beside our numbers stand the original report's, which belong to the full size.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from captioning.models.llava import PROMPTS
from captioning.report.document import Cell, Figure, Missing, Section, Table, Text
from captioning.training.run_folder import Omitted, Run

# CIDEr and CLIPScore of the report that this suite reproduces (full size).
REPORTED_P1 = {"1": (1.1529808500176097, 0.77809814453125), "2": (0.7197498966877777, 0.7927020263671875)}
REPORTED_P2 = {
    "1": (0.8844035428513431, 0.6921499633789062),
    "2": (0.8513301122849635, 0.6806594848632812),
    "3": (0.8654818424667257, 0.6828769683837891),
    "4": (0.7765376105405314, 0.678280029296875),
    "5": (0.792413225587337, 0.6929396057128906),
}
REPORTED_PAIRS = {"best": 1.002197265625, "worst": 0.32196044921875}
STUDIES = ("settings", "ablation", "rewards")  # folders of runs with tables of their own
WORLDS = {"micro": "micro", "full": "full size"}
GROUNDING_ROWS = 5  # best looks of a model that the table shows, beside default, report's and baselines
UNKNOWN_ORIGIN = "not recorded"


def world(profile: str | None) -> str:
    """Return a profile in words."""
    return WORLDS.get(profile or "", UNKNOWN_ORIGIN)


def llava_section(root: Path, size: str) -> Section:
    """P1: what LLaVA is, both prompts' scores, and what the numbers say about them."""
    section = Section(
        "P1: LLaVA, zero-shot",
        [
            Text(
                "LLaVA-1.5 (Liu et al. 2023) joins three parts: a CLIP ViT-L/14 tower at 336 pixels, which gives 576 "
                "patch tokens of its second to last layer; a projector, an MLP of two layers, which maps them into the "
                "word space; and a language model, Vicuna 7B, which reads them in front of the question."
            ),
            Text(
                "Its instruction data was made by GPT-4 from captions and boxes alone, as conversations, descriptions "
                "and reasoning about pictures that the writer never saw. Training has two stages: first only the "
                "projector, on image-caption pairs; then projector and language model, on the instructions. The tower "
                "stays frozen in both."
            ),
        ],
    )
    if size == "micro":
        section.blocks.append(
            Text(
                "The micro LLaVA keeps the layout (tower, projector, Llama) at a thousandth of the size, and has been "
                "taught both prompts, so here 'zero-shot' means unseen scenes and not unseen questions."
            )
        )
    scores = _json(root / "llava" / "val.json")
    if scores is None:
        section.blocks.append(
            Missing(
                "captions and scores of both prompts (llava/val.json)",
                "python p1_llava_caption.py IMG_DIR RUNS/llava/val.json --compare --annotation-file VAL.json",
            )
        )
        return section
    columns = (
        "setting",
        "images",
        "words",
        "CIDEr",
        "CLIPScore",
        "report's CIDEr",
        "report's CLIPScore",
        "world",
        "device",
    )
    rows = [
        (
            name,
            s.get("images"),
            s.get("words"),
            s.get("CIDEr"),
            s.get("CLIPScore"),
            *REPORTED_P1.get(name, (None, None)),
            world(s.get("profile")),
            s.get("device", UNKNOWN_ORIGIN),
        )
        for name, s in sorted(scores.items())
    ]
    section.blocks += [Text(f"Prompt {number}: {prompt}") for number, prompt in PROMPTS.items()]
    section.blocks += [
        Table("p1_prompts", "LLaVA with the two prompts of the report", columns, rows),
        Text(explain_prompts(scores)),
    ]
    return section


def explain_prompts(scores: dict[str, dict[str, Any]]) -> str:
    """Say what the two prompts' scores show, and only that."""
    if not {"1", "2"} <= scores.keys():
        return "Only one prompt was scored, so there is nothing to compare."
    one, two = scores["1"], scores["2"]
    longer = two["words"] / max(one["words"], 1e-9)
    text = (
        f"Prompt 2 makes captions of {two['words']:.1f} words, {longer:.1f} times as long as prompt 1's "
        f"{one['words']:.1f}. "
    )
    if one["CIDEr"] > two["CIDEr"]:
        text += (
            f"CIDEr prefers prompt 1 ({one['CIDEr']:.3f} against {two['CIDEr']:.3f}), as in the report: it counts "
            "n-grams that people wrote and damps captions of another length, and people wrote one short sentence. "
        )
    else:
        text += f"Unlike in the report, CIDEr does not prefer prompt 1 ({one['CIDEr']:.3f}, {two['CIDEr']:.3f}). "
    if two["CLIPScore"] > one["CLIPScore"]:
        return text + (
            f"CLIPScore prefers prompt 2 ({two['CLIPScore']:.3f} against {one['CLIPScore']:.3f}), as in the report: "
            "it compares with the picture and not with people's words, so naming more of what is there helps."
        )
    return text + (
        f"Unlike in the report, CLIPScore does not prefer prompt 2 ({one['CLIPScore']:.3f}, {two['CLIPScore']:.3f})."
    )


# ------------------------------------------------------------------------------------------------------ the captioner

RUN_COLUMNS = (
    "run",
    "setting",
    "what",
    "rank",
    "alpha",
    "epochs",
    "lr",
    "trainable",
    "train, s",
    "CIDEr",
    "CLIPScore",
    "report's CIDEr",
    "report's CLIPScore",
    "images",
    "world",
    "device",
)


def captioner_section(runs: Sequence[Run], omitted: Sequence[Omitted]) -> Section:
    """P2: the best setting, the table of all, and the curves."""
    section = Section("P2: CLIP, projector, GPT-2 with LoRA")
    plain = [r for r in runs if r.name.split("/")[0] not in STUDIES]
    best = max((r for r in plain if not r.blind), key=lambda r: r.scores.get("val", {}).get("CIDEr", -1), default=None)
    if best is None:
        section.blocks.append(Missing("a finished training run", "python p2_train.py --out RUNS/lora"))
    else:
        section.blocks += [Text(describe(best)), run_table("p2_runs", "Runs, scored on unseen images", plain)]
        section.blocks += _novel_table(plain)
    if any(run.blind for run in plain):
        section.blocks.append(Text("A blind run was trained on captions of other images: what language alone scores."))
    section.blocks += [Text(f"Left out: {o.name}, since {o.reason}.") for o in omitted]
    section.blocks += curves("p2_curves", "the runs", plain)
    return section


def describe(run: Run) -> str:
    """Say in a sentence or two what a run was."""
    train, captioner = run.config["train"], run.config["captioner"]
    where = "with" if train.get("lora_lm_head") else "without"
    return (
        f"Best run here: {run.name} (setting {run.config['setting']}): encoder {captioner['encoder']}, frozen; a "
        f"linear projector; LoRA of rank {train['lora_rank']} and alpha {train['lora_alpha']:g} on c_attn, attention "
        f"c_proj and both MLP layers, {where} lm_head; {train.get('optimizer', 'adam')} at {train['lr']:g}; "
        f"{train['epochs']} epochs; {run.config['trainable_parameters']:,} trained parameters; captions by beam "
        f"search with {train.get('beam_size', UNKNOWN_ORIGIN)} beams in validation."
    )


def run_table(name: str, caption: str, runs: Iterable[Run]) -> Table:
    """A row a run: what it was, its scores, and the report's."""
    rows: list[tuple[Cell, ...]] = []
    for run in runs:
        train, scores = run.config["train"], run.scores.get("val", {})
        kind = "blind" if run.blind else run.objective
        rows.append(
            (
                run.name,
                run.config["setting"],
                kind,
                train["lora_rank"],
                f"{train['lora_alpha']:g}",
                train["epochs"],
                f"{train['lr']:g}",
                run.config["trainable_parameters"],
                run.seconds,
                scores.get("CIDEr"),
                scores.get("CLIPScore"),
                *REPORTED_P2.get(run.config["setting"], (None, None)),
                scores.get("images"),
                world(run.config["profile"]),
                scores.get("device", run.config["device"]),
            )
        )
    return Table(name, caption, RUN_COLUMNS, rows)


def _novel_table(runs: Sequence[Run]) -> list[Table]:
    rows = [
        (
            r.name,
            split,
            s.get("images"),
            s.get("CIDEr"),
            s.get("CLIPScore"),
            world(r.config["profile"]),
            s.get("device", UNKNOWN_ORIGIN),
        )
        for r in runs
        for split, s in r.scores.items()
        if split != "val"
    ]
    columns = ("run", "split", "images", "CIDEr", "CLIPScore", "world", "device")
    return [Table("p2_other_splits", "Other splits", columns, rows)] if rows else []


def curves(name: str, what: str, runs: Sequence[Run]) -> list[Figure]:
    """Losses (dashed: training) and validation CIDEr by epoch, a colour a run; seeds of one run share theirs."""
    runs = [r for r in runs if r.objective == "xe"]  # a loss of rewards has another scale
    if not runs:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9), layout="constrained")
    labels = [run.name.partition("-seed")[0] for run in runs]
    colours = {label: f"C{number % 10}" for number, label in enumerate(dict.fromkeys(labels))}
    for label, run in zip(labels, runs, strict=True):
        epochs, colour = [e["epoch"] for e in run.epochs], colours[label]
        left.plot(epochs, [e["train_loss"] for e in run.epochs], "--", lw=1, color=colour)
        left.plot(epochs, [e["val_loss"] for e in run.epochs], "o-", ms=3, color=colour)
        cider = [e.get("val_cider", math.nan) for e in run.epochs]
        right.plot(epochs, cider, "o-", ms=3, color=colour)
    left.set(xlabel="epoch", ylabel="loss a token (nats)", title="validation loss (dashed: training)")
    right.set(xlabel="epoch", ylabel="CIDEr", title="CIDEr of validation captions", ylim=(0, None))
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    lines = [plt.Line2D([], [], marker="o", ms=3, color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(len(lines), 6), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    plt.close(figure)
    origins = ", ".join(sorted({f"{world(r.config['profile'])}, {r.config['device']}" for r in runs}))
    said = f"Loss and validation CIDEr of {what} by epoch; each on its validation subset ({origins})."
    return [Figure(name, content.getvalue(), f"Loss and CIDEr curves of {what}", said)]


# ---------------------------------------------------------------------------------------------------------- attention


def attention_section(root: Path, size: str) -> Section:
    """P3: maps of both models, the best and the worst pair, and whether words look at what they name."""
    section, folder = Section("P3: which pixels each word looked at"), root / "attention"
    if folder.is_dir():
        section.blocks.append(Text("The files of the maps and of the grounding do not record the device."))
    origin = f"({world(size)} world)" if size == "micro" else f"({world(size)})"
    for model, name in (("p1", "LLaVA"), ("p2", "The captioner")):
        files = sorted(p for p in (folder / model).glob("*.png") if p.name != "grounding.png")
        if not files:
            section.blocks.append(
                Missing(
                    f"maps of {name}",
                    f"python p3_attention.py --model {model} --images IMAGES --out RUNS/attention/{model}",
                )
            )
        section.blocks += [
            Figure(
                f"p3_{model}_{p.stem}",
                p.read_bytes(),
                f"Attention maps of every word, {name}, image {p.stem}",
                f"{name}, image {p.stem} {origin}: a tile a word.",
            )
            for p in files
        ]
    section.blocks += pair_blocks(root, origin)
    for model, name in (("p1", "LLaVA"), ("p2", "The captioner")):
        section.blocks += grounding_blocks(folder / model, model, name, size)
    return section


def pair_blocks(root: Path, origin: str) -> list[Any]:
    """The best and the worst pair by CLIPScore, with the report's."""
    folder = root / "attention"
    if not (folder / "best_worst.png").is_file():
        remedy = (
            "python p3_attention.py --model p2 --best-worst RUNS/lora/val_per_image.json --annotation-file VAL.json "
            "--images DIR --out RUNS/attention"
        )
        return [Missing("the best and the worst pair", remedy)]
    blocks: list[Any] = [
        Figure(
            "p3_best_worst",
            (folder / "best_worst.png").read_bytes(),
            "The pair of image and caption with the highest CLIPScore, and that with the lowest",
            f"Best and worst pair by CLIPScore {origin}.",
        )
    ]
    per_image = _json(root / "lora" / "val_per_image.json")
    if per_image:
        scores = sorted(row["CLIPScore"] for row in per_image.values() if "CLIPScore" in row)
        rows = [("best", scores[-1], REPORTED_PAIRS["best"]), ("worst", scores[0], REPORTED_PAIRS["worst"])]
        blocks.append(
            Table(
                "p3_pairs",
                f"CLIPScore of the best and the worst pair {origin}; the report's is full size",
                ("pair", "CLIPScore", "report's CLIPScore"),
                rows,
            )
        )
    files = [folder / f"{name}.png" for name in ("top-1", "last-1")]
    blocks += [
        Figure(f"p3_{p.stem}", p.read_bytes(), f"Maps of the {p.stem} pair", f"Maps of the {p.stem} pair {origin}.")
        for p in files
        if p.is_file()
    ]
    return blocks


def grounding_blocks(folder: Path, model: str, name: str, size: str) -> list[Any]:
    """Whether words look at the boxes of what they name: the best looks, the default, the report's, and chance."""
    file = folder / "grounding.csv"
    if not file.is_file():
        return [
            Missing(
                f"grounding of {name}",
                f"python p3_attention.py --model {model} --grounding VAL.json --images DIR --out {folder}",
            )
        ]
    with file.open(encoding="utf-8", newline="") as handle:
        found = list(csv.DictReader(handle))
    columns = ("method", "layers", "heads", "row", "pointing", "mass_ratio", "iou", "note")
    lacking = [c for c in columns if found and c not in found[0]]
    if lacking or not found:
        return [Text(f"Left out: {file.name} of {name}, since it is of another version or empty.")]
    kept = [row for n, row in enumerate(found) if n < GROUNDING_ROWS or row["note"]]
    rows = [
        tuple(_number(row[c]) if c in ("pointing", "mass_ratio", "iou") else row[c] or None for c in columns)
        for row in kept
    ]
    heads = ("method", "layers", "heads", "row", "pointing game", "mass in box / area", "IoU", "note")
    blocks: list[Any] = [
        Table(f"p3_grounding_{model}", f"{name}: do words look at what they name? ({world(size)})", heads, rows)
    ]
    chart = folder / "grounding.png"
    if chart.is_file():
        blocks.append(
            Figure(
                f"p3_grounding_{model}",
                chart.read_bytes(),
                f"Pointing game by method, {name}",
                f"{name}: pointing game by method ({world(size)}).",
            )
        )
    return blocks


# ------------------------------------------------------------------------------------------------- speed, environment


def environment_section(root: Path, runs: Sequence[Run], bench: Path) -> Section:
    """What took how long, and on what."""
    section = Section("Speed and environment")
    seconds = (_json(root / "scores.json") or {}).get("seconds", {})
    if seconds:
        section.blocks.append(
            Table(
                "steps",
                "Time of each step of the run",
                ("step", "seconds"),
                [(name, float(value)) for name, value in seconds.items()],
            )
        )
    else:
        section.blocks.append(Missing("times of the steps (scores.json)", "make demo"))
    timed = [
        (
            r.name,
            r.seconds,
            r.epochs[-1].get("step"),
            r.seconds / max(r.epochs[-1].get("step", 1), 1),
            r.config["train"]["batch_size"],
            world(r.config["profile"]),
            r.config["device"],
        )
        for r in runs
        if r.seconds
    ]
    if timed:
        section.blocks.append(
            Table(
                "training_speed",
                "Training",
                ("run", "seconds", "steps", "seconds a step", "images a step", "world", "device"),
                timed,
            )
        )
    for file in sorted(bench.glob("*.json")):
        found = _json(file) or {}
        if {"title", "machine", "rows"} <= found.keys() and found["rows"]:
            columns = list(found["rows"][0])
            section.blocks.append(
                Table(
                    f"bench_{file.stem}",
                    f"{found['title']} ({found['machine']})",
                    columns,
                    [[row.get(c) for c in columns] for row in found["rows"]],
                )
            )
    versions = {(name, version) for r in runs for name, version in r.config["versions"].items()}
    if versions:
        section.blocks.append(
            Table("versions", "Versions that the runs were made with", ("package", "version"), sorted(versions))
        )
    return section


def _json(path: Path) -> dict[str, Any] | None:
    """The JSON object at ``path``, None where there is none; ValueError where it is damaged."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged or half-written ({error}); remove it, or make it anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: no JSON object; remove it, or make it anew")
    return value


def _number(text: str) -> float | None:
    return float(text) if text else None
