"""The report's sections, in the order of the original: LLaVA, the captioner, attention maps, speed and environment.

Each is built only from what is in the folder of runs: what is not there is named as missing, together with the command
that makes it. The original report's numbers, which belong to the full size, are printed beside ours.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from captioning.files import read_json
from captioning.maps.figures import SHEET
from captioning.models.llava import PROMPTS
from captioning.report.curves import draw_cider, draw_loss
from captioning.report.document import Block, Cell, Figure, Missing, Row, Section, Table, Text
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
CHAIR = ("CHAIRs", "CHAIRi", "CHAIR recall")  # as evaluate.py names them
REPORTED_PAIRS = {"best": 1.002197265625, "worst": 0.32196044921875}
# Folders of runs with tables of their own; "ablation" is of an earlier version.
STUDIES = ("settings", "variants", "rewards", "letter", "ablation")
WORLDS = {"micro": "micro", "full": "full size"}
MODELS = {"p1": "LLaVA", "p2": "The captioner"}
LLAVA = "llava/val.json"  # where p1_llava_caption.py --compare writes, below the folder of runs
MEASURES = {  # of grounding.csv, in the table of each model; those of earlier versions lack some
    "pointing": "pointing game",
    "mass_ratio": "mass in box / area",
    "iou": "IoU",
    "precision": "average precision",
    "deletion": "deletion",
    "insertion": "insertion",
}
UNKNOWN_ORIGIN = "not recorded"

ABOUT_LLAVA = (
    "LLaVA-1.5 (Liu et al. 2023) joins three parts: a CLIP ViT-L/14 tower at 336 pixels, which gives 576 patch tokens "
    "of its second to last layer; a projector, an MLP of two layers, which maps them into the word space; and a "
    "language model, Vicuna 7B, which reads them before the question.",
    "Its instruction data was made by GPT-4 from captions and boxes alone: conversations, descriptions and reasoning "
    "about pictures that GPT-4 never saw. Training has two stages: first the projector alone, on image-caption pairs; "
    "then projector and language model, on the instructions. The tower stays frozen in both.",
)
MICRO_LLAVA = (
    "The micro LLaVA keeps the layout (tower, projector, Llama) at a thousandth of the size and was trained on both "
    "prompts, so 'zero-shot' here means unseen scenes, not unseen questions."
)


def world(profile: str | None) -> str:
    """Return a profile in words."""
    return WORLDS.get(profile or "", UNKNOWN_ORIGIN)


def origin(run: Run) -> dict[str, Cell]:
    """Return the columns that say which size of models and which device a run's numbers come from."""
    return {"world": world(run.config["profile"]), "device": run.config["device"]}


def compared(cider: Cell, clipscore: Cell, reported: tuple[float, float] | None) -> dict[str, Cell]:
    """Return the columns of two scores, and of the original report's beside them."""
    their_cider, their_clipscore = reported or (None, None)
    return {
        "CIDEr": cider,
        "CLIPScore": clipscore,
        "report's CIDEr": their_cider,
        "report's CLIPScore": their_clipscore,
    }


# --- LLaVA ----------------------------------------------------------------------------------------------------------


def llava_section(root: Path, size: str) -> Section:
    """P1: what LLaVA is, both prompts' scores, and what the numbers say about them."""
    section = Section("P1: LLaVA, zero-shot")
    scores = read_object(root / LLAVA)
    if scores is None:
        remedy = f"python p1_llava_caption.py IMG_DIR RUNS/{LLAVA} --compare --annotation-file VAL.json"
        section.blocks.append(Missing(f"captions and scores of both prompts ({LLAVA})", remedy))
        return section
    section.blocks += [Text(text) for text in (*ABOUT_LLAVA, *([MICRO_LLAVA] if size == "micro" else []))]
    rows = [
        {
            "setting": name,
            "images": s.get("images"),
            "words": s.get("words"),
            **compared(s.get("CIDEr"), s.get("CLIPScore"), REPORTED_P1.get(name)),
            "world": world(s.get("profile")),
            "device": s.get("device", UNKNOWN_ORIGIN),
        }
        for name, s in sorted(scores.items())
    ]
    section.blocks += [Text(f"Prompt {number}: {prompt}") for number, prompt in PROMPTS.items()]
    section.blocks.append(Table("p1_prompts", "LLaVA with the two prompts of the report", rows))
    section.blocks.append(Text(explain_prompts(scores)))
    return section


def explain_prompts(scores: Mapping[str, Mapping[str, Any]]) -> str:
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
            "n-grams that people wrote and lowers the score of captions of another length, and people wrote one short "
            "sentence. "
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


# --- the captioner --------------------------------------------------------------------------------------------------


def plain_runs(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that belong to no study."""
    return [run for run in runs if run.name.split("/")[0] not in STUDIES]


def best_of(runs: Iterable[Run]) -> Run | None:
    """Return the plain run with the highest CIDEr on val; None where none has one."""
    scored = {run.name: run for run in plain_runs(runs) if not run.blind and "CIDEr" in run.scores.get("val", {})}
    return max(scored.values(), key=lambda run: run.scores["val"]["CIDEr"], default=None)


def captioner_section(runs: Sequence[Run], omitted: Sequence[Omitted], best: Run | None) -> Section:
    """P2: the best run, the table of all runs, and their curves."""
    section = Section("P2: CLIP, projector, GPT-2 with LoRA")
    plain = plain_runs(runs)
    if not any(not run.blind for run in plain):
        section.blocks.append(Missing("a finished training run", "python p2_train.py --out RUNS/best"))
    section.blocks += [Text(describe(best))] if best else []
    section.blocks += [_unscored(run) for run in plain if "val" not in run.scores and not run.blind]
    if plain:
        section.blocks.append(run_table("p2_runs", "Runs, scored on unseen images", plain))
        section.blocks += [*_other_splits(plain), *_objects(plain)]
    if any(run.blind for run in plain):
        section.blocks.append(Text("A blind run was trained on captions of other images: what language alone scores."))
    section.blocks += [Text(f"Left out: {o.name}, since {o.reason}.") for o in omitted]
    section.blocks += curves("p2_curves", "the runs", plain)
    return section


def describe(run: Run) -> str:
    """Say in a sentence or two what a run was."""
    train, captioner = run.config["train"], run.config["captioner"]
    where, pool = "with" if train.get("lora_lm_head") else "without", captioner.get("pool", 1)
    averages = f"averages of {pool} x {pool} patches; " if pool > 1 else ""
    return (
        f"Best run here: {run.name} (setting {run.config['setting']}): encoder {captioner['encoder']}, frozen; "
        f"{averages}a linear projector; LoRA of rank {train['lora_rank']} and alpha {train['lora_alpha']:g} on c_attn, "
        f"attention c_proj and both MLP layers, {where} lm_head; {train.get('optimizer', 'adam')} at {train['lr']:g}; "
        f"{train['epochs']} epochs; {run.config['trainable_parameters']:,} trained parameters; captions by beam "
        f"search with {train.get('beam_size', UNKNOWN_ORIGIN)} beams in validation."
    )


def _unscored(run: Run) -> Missing:
    out = f"RUNS/{run.name}/val.json"
    remedy = (
        f"python p2_infer.py IMG_DIR {out} DECODER && "
        f"python evaluate.py --pred_file {out} --images_root IMG_DIR --annotation_file VAL.json --save"
    )
    return Missing(f"captions and scores of {run.name}", remedy)


def run_table(name: str, caption: str, runs: Iterable[Run]) -> Table:
    """Return one row per run: what it was, its scores, and the report's."""
    return Table(name, caption, [_run_row(run) for run in runs])


def _run_row(run: Run) -> dict[str, Cell]:
    train, scores = run.config["train"], run.scores.get("val", {})
    return {
        "run": run.name,
        "setting": run.config["setting"],
        "what": "blind" if run.blind else run.objective,
        "rank": train["lora_rank"],
        "alpha": f"{train['lora_alpha']:g}",
        "epochs": train["epochs"],
        "lr": f"{train['lr']:g}",
        "trainable": run.config["trainable_parameters"],
        "train, s": run.seconds,
        **compared(scores.get("CIDEr"), scores.get("CLIPScore"), REPORTED_P2.get(run.config["setting"])),
        "images": scores.get("images"),
        "world": world(run.config["profile"]),
        "device": scores.get("device", run.config["device"]),
    }


def _other_splits(runs: Sequence[Run]) -> list[Table]:
    rows = [
        {
            "run": run.name,
            "split": split,
            "images": s.get("images"),
            "CIDEr": s.get("CIDEr"),
            "CLIPScore": s.get("CLIPScore"),
            "world": world(run.config["profile"]),
            "device": s.get("device", UNKNOWN_ORIGIN),
        }
        for run in runs
        for split, s in run.scores.items()
        if split != "val"
    ]
    return [Table("p2_other_splits", "Other splits", rows)] if rows else []


def _objects(runs: Sequence[Run]) -> list[Table]:
    """Return the table of CHAIR, where a run was scored by it."""
    rows = [
        {
            "run": run.name,
            "split": split,
            "images": scores.get("images"),
            **{label: scores[label] for label in CHAIR},
            "world": world(run.config["profile"]),
        }
        for run in runs
        for split, scores in run.scores.items()
        if CHAIR[0] in scores
    ]
    caption = (
        "Objects: the share of captions that name one that is not there (CHAIRs), the share of all mentions that do "
        "(CHAIRi), and the share of the objects there that are named"
    )
    return [Table("p2_chair", caption, rows)] if rows else []


def curves(name: str, what: str, runs: Sequence[Run]) -> list[Row]:
    """Return the figures of the losses and the validation CIDEr of all runs that have a loss, or nothing."""
    runs = [r for r in runs if r.objective == "xe"]  # a loss of rewards has another scale
    if not runs:
        return []
    origins = ", ".join(sorted({f"{world(r.config['profile'])}, {r.config['device']}" for r in runs}))
    figures = [Figure(f"{name}_loss", draw_loss(runs), f"Loss curves of {what}")]
    if any(run.best_cider is not None for run in runs):
        figures.append(Figure(f"{name}_cider", draw_cider(runs), f"CIDEr curves of {what}"))
    caption = (
        f"Loss, solid on validation captions and dashed on training captions, and CIDEr of {what} by epoch, each on "
        f"its own validation subset ({origins})."
    )
    return [Row(figures, caption)]


# --- attention ------------------------------------------------------------------------------------------------------


def attention_section(root: Path, size: str, best: Run | None) -> Section:
    """P3: maps of both models, the best and the worst pair, and whether words look at what they name."""
    section, folder = Section("P3: which pixels each word looked at"), root / "attention"
    if folder.is_dir():
        section.blocks.append(Text("The files of the maps and of the grounding do not record the device."))
    where = f"({world(size)} world)" if size == "micro" else f"({world(size)})"
    for model, name in MODELS.items():
        section.blocks += _maps(folder / model, model, name, where)
    section.blocks += _pairs(folder, where, best)
    found = {model: read_grounding(folder / model / "grounding.csv") for model in MODELS}
    section.blocks += _side_by_side(found, size)
    for model, name in MODELS.items():
        section.blocks += _grounding(folder / model, model, name, size, found[model])
    return section


def _maps(folder: Path, model: str, name: str, where: str) -> list[Block]:
    """Return the pictures of a model's word maps."""
    files = sorted(path for path in folder.glob("*.png") if path.name != "grounding.png")
    sheets = [path for path in files if path.name.endswith(SHEET)]
    if not files:
        remedy = f"python p3_attention.py --model {model} --images IMAGES --out RUNS/attention/{model} --contact-sheet"
        return [Missing(f"maps of {name}", remedy)]
    by_word: list[Block] = [
        Figure(
            f"p3_{model}_{path.stem}",
            path.read_bytes(),
            f"Attention maps of every word, {name}, image {path.stem}",
            f"{name}, image {path.stem} {where}: one tile per word; below it, how much of the word's attention falls "
            "on the image.",
        )
        for path in files
        if path not in sheets
    ]
    by_method: list[Block] = [
        Figure(
            f"p3_{model}_{path.stem}",
            path.read_bytes(),
            f"Maps of the caption's nouns by every method, {name}, image {path.name.removesuffix(SHEET)}",
            f"{name}, image {path.name.removesuffix(SHEET)} {where}: a row per noun, a column per method.",
        )
        for path in sheets
    ]
    return by_word + by_method


def _pairs(folder: Path, where: str, best: Run | None) -> list[Block]:
    """Return the best and the worst pair of the best run by CLIPScore, with the report's."""
    if not (folder / "best_worst.png").is_file():
        run = f"RUNS/{best.name if best else 'best'}"
        remedy = (
            f"python p3_attention.py --model p2 --adapter {run}/best.safetensors --best-worst {run}/val_per_image.json "
            "--annotation-file VAL.json --images DIR --out RUNS/attention"
        )
        return [Missing("the best and the worst pair", remedy)]
    alt = "The pair of image and caption with the highest CLIPScore, and that with the lowest"
    picture = (folder / "best_worst.png").read_bytes()
    blocks: list[Block] = [Figure("p3_best_worst", picture, alt, f"Best and worst pair by CLIPScore {where}.")]
    per_image = read_object(best.folder / "val_per_image.json") if best else None
    if per_image:
        scores = sorted(row["CLIPScore"] for row in per_image.values() if "CLIPScore" in row)
        rows = [
            {"pair": pair, "CLIPScore": score, "report's CLIPScore": REPORTED_PAIRS[pair]}
            for pair, score in (("best", scores[-1]), ("worst", scores[0]))
        ]
        caption = f"CLIPScore of the best and the worst pair {where}; the report's is full size"
        blocks.append(Table("p3_pairs", caption, rows))
    files = [folder / f"{name}.png" for name in ("top-1", "last-1")]
    return blocks + [
        Figure(f"p3_{p.stem}", p.read_bytes(), f"Maps of the {p.stem} pair", f"Maps of the {p.stem} pair {where}.")
        for p in files
        if p.is_file()
    ]


def read_grounding(file: Path) -> list[dict[str, str]]:
    """Return of a grounding.csv each method's best row and all rows with a note; none where there is no such file."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    if not rows or not {"method", "layers", "heads", "row", "pointing", "mass_ratio", "iou", "note"} <= rows[0].keys():
        return []
    best = {row["method"]: row for row in reversed(rows)}  # the best pointing accuracy comes first
    return [row for row in rows if row["note"] or best[row["method"]] is row]


def _measured(row: Mapping[str, str], measure: str, title: str) -> dict[str, Cell]:
    """Return a measure of a row of grounding.csv, and its 95% interval where the file has intervals of it."""
    cells: dict[str, Cell] = {title: float(row[measure]) if row[measure] else None}
    if f"{measure}_low" in row:
        ends = row[f"{measure}_low"], row[f"{measure}_high"]
        cells[f"{title}, 95%"] = "{:.3f} to {:.3f}".format(*map(float, ends)) if all(ends) else None
    return cells


def _side_by_side(found: Mapping[str, Sequence[Mapping[str, str]]], size: str) -> list[Block]:
    """Return the best spec of each method of both models in one table."""
    if not all(found.values()):
        return []
    rows: dict[str, dict[str, Cell]] = {}
    for model, name in MODELS.items():
        for row in reversed(found[model]):  # a method's best row is its first: the last that stays here
            cells = _measured(row, "pointing", f"{name}: pointing") | _measured(row, "iou", f"{name}: IoU")
            rows[row["method"]] = rows.get(row["method"], {"method": row["method"]}) | cells
    columns = dict.fromkeys(column for cells in rows.values() for column in cells)
    every = [row for model in MODELS for row in found[model]]
    order = dict.fromkeys(row["method"] for row in sorted(every, key=lambda row: not row["layers"]))  # baselines last
    caption = f"Do words look at what they name? Each method by its best layers and heads ({world(size)})"
    return [Table("p3_grounding", caption, [columns | rows[method] for method in order])]


def _grounding(folder: Path, model: str, name: str, size: str, found: Sequence[Mapping[str, str]]) -> list[Block]:
    """Return whether words look at the boxes of what they name: the best specs, the default, the report's, chance."""
    file, chart = folder / "grounding.csv", folder / "grounding.png"
    if not file.is_file():
        remedy = f"python p3_attention.py --model {model} --grounding VAL.json --images DIR --out {folder}"
        if size == "full":  # the course's data has no boxes
            return [Missing(f"grounding of {name}", f"{remedy} --boxes INSTANCES.json", wanted=False)]
        return [Missing(f"grounding of {name}", remedy)]
    if not found:
        return [Text(f"Left out: {file.name} of {name}, since it is of another version or empty.")]
    rows: list[dict[str, Cell]] = [
        {
            **{column: row[column] or None for column in ("method", "layers", "heads", "row")},
            **dict(cell for name in MEASURES if name in row for cell in _measured(row, name, MEASURES[name]).items()),
            "note": row["note"] or None,
        }
        for row in found
    ]
    title = f"p3_grounding_{model}"
    about = "Each method by its best layers and heads, with 95% intervals over images"
    blocks: list[Block] = [Table(title, f"{name}: do words look at what they name? {about} ({world(size)})", rows)]
    if chart.is_file():
        caption = f"{name}: pointing game by method ({world(size)})."
        blocks.append(Figure(title, chart.read_bytes(), f"Pointing game by method, {name}", caption))
    return blocks


# --- speed, environment ---------------------------------------------------------------------------------------------


def environment_section(root: Path, runs: Sequence[Run], bench: Path, size: str) -> Section:
    """What took how long, and on what."""
    section = Section("Speed and environment")
    seconds = (read_object(root / "scores.json") or {}).get("seconds", {})
    if seconds:
        steps = [{"step": name, "seconds": float(value)} for name, value in seconds.items()]
        section.blocks.append(Table("steps", "Time of each step of the run", steps))
    elif size != "full":  # only the demo keeps them
        section.blocks.append(Missing("times of the steps (scores.json)", "make demo"))
    timed = [_speed_row(run, run.seconds) for run in runs if run.seconds]
    section.blocks += [Table("training_speed", "Training", timed)] if timed else []
    for file in sorted(bench.glob("*.json")):
        found = read_object(file) or {}
        if {"title", "machine", "rows"} <= found.keys() and found["rows"]:
            rows = [{column: row.get(column) for column in found["rows"][0]} for row in found["rows"]]
            section.blocks.append(Table(f"bench_{file.stem}", f"{found['title']} ({found['machine']})", rows))
    versions = sorted({(name, version) for run in runs for name, version in run.config["versions"].items()})
    if versions:
        rows = [{"package": name, "version": version} for name, version in versions]
        section.blocks.append(Table("versions", "Versions that the runs were made with", rows))
    return section


def _speed_row(run: Run, seconds: float) -> dict[str, Cell]:
    steps = run.epochs[-1].get("step")
    return {
        "run": run.name,
        "seconds": seconds,
        "steps": steps,
        "seconds per step": seconds / (steps or 1),
        "batch": f"{run.config['train']['batch_size']} {run.config['train'].get('batch_by', 'images')}",
        **origin(run),
    }


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object at ``path``, None where there is no file; ValueError where it is damaged."""
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; remove it, or make it again")
    return value
