"""The report's sections on studies: all settings, the report's to the letter, variants of ours, CIDEr as a reward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from captioning.report.document import Block, Cell, Missing, Section, Table, Text
from captioning.report.sections import (
    REPORTED_P2,
    compared,
    curves,
    origin,
    plain_runs,
    read_object,
    run_table,
    world,
)
from captioning.training.run_folder import Run

MICRO_SETTINGS = (
    "Settings are written for 10,000 photographs. On the micro world one rule holds for all of them: half the epochs, "
    "rounded up, in batches of half the size (8 images for best, 8 captions for the report's settings), so that a "
    "scene gets as many optimiser steps as a photograph does; and learning rates times 3, since the decoder is a third "
    "as wide and Adam's learning rate scales with one over the width (Yang et al., arXiv 2203.03466). Rank, alpha and "
    "dropout stay."
)


def study(runs: Iterable[Run], name: str) -> list[Run]:
    """Return the runs of one study."""
    return [run for run in runs if run.name.split("/")[0] == name]


def grouped(runs: Iterable[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Return runs by ``key``, in order of their first one."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups


def seed(run: Run) -> int:
    """Return the seed of a run."""
    return run.config["train"]["seed"]


def _unless_full(size: str, what: str, remedy: str) -> list[Block]:
    """Name a study of the micro world that is missing, but not to those who work at full size."""
    return [] if size == "full" else [Missing(what, remedy)]


# --- settings -------------------------------------------------------------------------------------------------------


TO_THE_LETTER = " to the letter"  # a setting with --report-faithful
SCORES = ("CIDEr", "CLIPScore")


def kind(run: Run) -> str:
    """Return a run's setting, and whether it was run as the report's code ran it."""
    return run.config["setting"] + (TO_THE_LETTER if run.config.get("report_faithful") else "")


def settings_section(root: Path, runs: Sequence[Run], size: str) -> Section:
    """The report's five settings, to the letter and with sound practice, and this suite's own, by one rule.

    At full size they are the plain runs, as ``bash p2_train.sh --setting 1`` leaves them.
    """
    studied = study(runs, "settings")
    plain = [run for run in plain_runs(runs) if run.objective == "xe" and not run.blind] if size == "full" else []
    section = Section("P2: all settings")
    if not studied and size != "full":
        section.blocks.append(Missing("the study of all six settings", "make settings"))
        return section
    section.blocks += _absent_settings({kind(run) for run in [*studied, *plain]}, size)
    scored = grouped([r for r in [*studied, *plain] if set(SCORES) <= r.scores.get("val", {}).keys()], kind)
    section.blocks.append(_reported_table(scored))
    if found := comparisons(root, "settings"):
        section.blocks += [*_against_tables("settings", "All settings", found), *_few_seeds(found, "make settings")]
    else:
        section.blocks += _seeds_table(scored)
    text = compare_settings(scored)
    section.blocks += [Text(text)] if text else []
    if studied:  # plain runs have a table of their own
        section.blocks.append(run_table("p2_settings", "Settings, every run", studied))
    if any(r.config["profile"] == "micro" for r in studied):
        section.blocks.append(Text(MICRO_SETTINGS))
    section.blocks += curves("p2_settings_curves", "the settings", studied)
    return section


def _absent_settings(there: Collection[str], size: str) -> list[Block]:
    """Name the settings that were not run; at full size, where each takes a while, none has to be."""
    wanted = [
        ("", "", {*REPORTED_P2, "best"}),
        (TO_THE_LETTER, " --report-faithful --out RUNS/{}-letter", {*REPORTED_P2}),
    ]
    blocks: list[Block] = []
    for how, flags, names in wanted:
        absent = sorted(name for name in names if name + how not in there)
        if absent:
            remedy = (
                f"bash p2_train.sh --setting {absent[0]}{flags.format(absent[0])}"
                if size == "full"
                else "make settings"
            )
            blocks.append(Missing(f"settings {', '.join(absent)}{how}", remedy, wanted=size != "full"))
    return blocks


def _reported_table(scored: Mapping[str, list[Run]]) -> Table:
    """Return a row per setting of the report and per size: its own numbers, ours to the letter, and ours without."""
    sizes = sorted({run.config["profile"] for group in scored.values() for run in group} | {"full"})
    rows: list[dict[str, Cell]] = []
    for size in sizes:
        for name, reported in REPORTED_P2.items():
            row: dict[str, Cell] = {"setting": name, "world": world(size)}
            row |= {f"the report: {m}": reported[i] if size == "full" else None for i, m in enumerate(SCORES)}
            for how, title in ((TO_THE_LETTER, "ours to the letter"), ("", "ours, sound practice")):
                group = [run for run in scored.get(name + how, []) if run.config["profile"] == size]
                row |= {f"{title}: {m}": spread([run.scores["val"][m] for run in group]) for m in SCORES}
            rows.append(row)
    caption = "The report's settings: its own numbers, ours to the letter, ours with sound practice elsewhere"
    return Table("p2_reported", caption, rows)


def _seeds_table(scored: Mapping[str, list[Run]]) -> list[Table]:
    """Return mean and spread by setting, where one was run with several seeds."""
    if all(len(group) < 2 for group in scored.values()):
        return []
    rows = []
    for name, group in scored.items():
        cider, clipscore = (spread([r.scores["val"][metric] for r in group]) for metric in ("CIDEr", "CLIPScore"))
        scores = compared(cider, clipscore, REPORTED_P2.get(group[0].config["setting"]))
        rows.append({"setting": name, "seeds": len(group), **scores, **origin(group[0])})
    return [Table("p2_settings_seeds", "Settings, mean ± standard deviation over seeds", rows)]


def compare_settings(scored: Mapping[str, list[Run]]) -> str:
    """Compare ``best`` with the better of the report's settings, where both were scored."""
    means = {
        name: [mean(r.scores["val"][m] for r in group) for m in ("CIDEr", "CLIPScore")]
        for name, group in scored.items()
    }
    theirs = max((name for name in means if name != "best"), key=lambda name: means[name][0], default=None)
    if theirs is None or "best" not in means:
        return ""
    (cider, clip), (their_cider, their_clip) = means["best"], means[theirs]
    relative = f" ({cider / their_cider - 1:+.0%})" if their_cider else ""
    return (
        f"By mean CIDEr, setting {theirs} is the best of the report's settings here: {their_cider:.3f}, CLIPScore "
        f"{their_clip:.3f}. This suite's own, best, has {cider:.3f}{relative} and {clip:.3f}."
    )


# --- rows held against one row: to the letter, variants -------------------------------------------------------------


SPLITS = {"val": "unseen scenes", "val_novel": "scenes with colour-thing pairs that no training showed"}
PAIRED = (
    "mean ± standard deviation over seeds; differences by image, each image's score a mean over seeds, with their 95 % "
    "bootstrap intervals and p of a paired randomisation test"
)


Studies = Sequence[Mapping[str, Any]]


def comparisons(root: Path, name: str) -> list[dict[str, Any]]:
    """Return what a study's rows are held against and how they differ, the row with the most CIDEr first."""
    found = [read_object(path) or {} for path in sorted((root / name).glob("*/comparison.json"))]
    return sorted(found, key=lambda study: -study.get("val", study)["paired"]["CIDEr"]["difference"])


def _most_seeds(found: Studies) -> Mapping[str, Any]:
    """Return the row with the most seeds, which shows what all are held against."""
    return max(found, key=lambda row: len(row["seeds"]))


def _few_seeds(found: Studies, remedy: str) -> list[Block]:
    few = min(len(study["seeds"]) for study in found)
    return [] if few >= 3 else [Missing(f"seeds: some rows have {few}, and 3 are wanted", remedy)]


def _compared_row(what: str, study: Mapping[str, Any], part: Mapping[str, Any], own: str, base: str) -> dict[str, Cell]:
    """Return a row of a table of comparisons; of the row that others are held against, where ``own`` is ``base``."""
    row: dict[str, Cell] = {"what": what, "seeds": len(study["seeds"])}
    for metric in SCORES:
        paired = part["paired"][metric] if own != base else {}
        by_seed = [value - other for value, other in zip(part[own][metric], part[base][metric], strict=True)]
        row |= {
            metric: spread(part[own][metric]),
            f"{metric}: difference": paired.get("difference"),
            f"{metric}: 95% interval": f"[{paired['low']:+.3f}, {paired['high']:+.3f}]" if paired else None,
            f"{metric}: p": paired.get("p_value"),
            f"{metric}: by seed": " ".join(f"{value:+.3f}" for value in by_seed) if paired else None,
        }
    return row | {"world": world(study["profile"]), "device": part["device"]}


def _study_section(
    title: str,
    study: str,
    missing: str,
    tables: Callable[[Studies], list[Table]],
    root: Path,
    size: str,
) -> Section:
    """Return the section of a study whose rows are held against one row; ``tables`` makes its tables of them."""
    section, remedy = Section(title), f"make {study}"
    found = comparisons(root, study)
    if found:
        section.blocks += [*tables(found), *_few_seeds(found, remedy)]
    else:
        section.blocks += _unless_full(size, missing, remedy)
    return section


def letter_section(root: Path, size: str) -> Section:
    """What each point of the report's code was worth: turned alone to sound practice, against all of them."""
    missing = "the study of the report's setting 1 to the letter"
    return _study_section("P2: the report's code, point by point", "letter", missing, _letter_tables, root, size)


def _letter_tables(found: Studies) -> list[Table]:
    most = _most_seeds(found)
    rows = [_compared_row("setting 1 to the letter", most, most, "literal", "literal")]
    rows += [_compared_row(study["what"], study, study, "sound", "literal") for study in found]
    caption = f"Setting 1 to the letter, and with one point of it turned to sound practice; {PAIRED}"
    return [Table("p2_letter", caption, rows)]


def variants_section(root: Path, size: str) -> Section:
    """What each part of the recipe is worth: every variant against the setting best."""
    missing = "the study of variants"
    tables = partial(_against_tables, "variants", "Variants of the setting best (development)")
    return _study_section("P2: variants of the recipe", "variants", missing, tables, root, size)


def _against_tables(study: str, title: str, found: Studies) -> list[Table]:
    """Return a table per split: the row that a study's others are held against, then those."""
    most = _most_seeds(found)
    tables, base = [], most["against"]
    for split, scenes in SPLITS.items():
        rows = [_compared_row(base, most, most[split], base, base)]
        rows += [_compared_row(row["what"], row, row[split], row["what"], base) for row in found]
        caption = f"{title}, on {most[split]['images']} {scenes}; {PAIRED}"
        tables.append(Table(f"p2_{study}_{split}", caption, rows))
    return tables


# --- rewards --------------------------------------------------------------------------------------------------------

REWARD_MEASURES = {
    "val_cider": "CIDEr, beam",
    "greedy_cider": "CIDEr, greedy",
    "clipscore": "CLIPScore, beam",
    "length": "words per caption",
    "repeated_2": "captions that repeat a bigram",
    "val_loss": "loss, nats per token",
}


def reward_section(root: Path, runs: Sequence[Run], size: str, best: Run | None) -> Section:
    """Self-critical training: over seeds against further cross-entropy, and each run before and after."""
    section = Section("P2: CIDEr as a reward (SCST)")
    tuned = [r for r in runs if r.objective == "scst"]
    found = comparisons(root, "rewards")
    section.blocks += _rewards_blocks(found) or _unless_full(size, "the study of rewards over seeds", "make rewards")
    if not tuned:
        start = f"RUNS/{best.name if best else 'best'}/best.safetensors"
        remedy = f"python p2_train.py --objective scst --init-adapter {start} --out RUNS/scst"
        section.blocks.append(Missing("a run with --objective scst", remedy, wanted=size != "full"))
    rows = [row for run in tuned for row in _before_and_after(run)]
    if rows:
        caption = "Before and after self-critical training, on the run's validation images"
        section.blocks.append(Table("p2_scst", caption, rows))
    return section


def _before_and_after(run: Run) -> list[dict[str, Cell]]:
    """Return a row per measure: of the epoch before training and of the best epoch."""
    before = next((e for e in run.epochs if e["epoch"] == 0), {})
    after = max((e for e in run.epochs if e["epoch"] > 0), key=lambda e: e.get("val_cider", -1), default={})
    return [
        {
            "run": run.name,
            "measure": label,
            "before": before.get(key),
            "after": after.get(key),
            "references": after.get(f"reference_{key}"),
            "images": after.get("val_images"),
            **origin(run),
        }
        for key, label in REWARD_MEASURES.items()
        if key in after
    ]


def _rewards_blocks(found: Studies) -> list[Block]:
    """Each reward, and the captioner that it began with, against equally long further cross-entropy."""
    if not found:
        return []
    blocks: list[Block] = []
    most, base = _most_seeds(found), found[0]["against"]
    for split, scenes in SPLITS.items():
        sides = [(base, most), *((study["what"], study) for study in found)]
        rows = [
            _compared_row(name, study, study[split], name, base) | _style(study[split][name]) for name, study in sides
        ]
        caption = f"Further training of a captioner, on {most[split]['images']} {scenes}; {PAIRED}"
        blocks.append(Table(f"p2_rewards_{split}", caption, rows))
    texts = [levelled_off(study) for study in found if study["what"] == "start"]
    texts += [compare_reward(study) for study in found if study["what"] != "start"]
    return [*blocks, *(Text(text) for text in texts if text), *_few_seeds(found, "make rewards")]


def _style(side: Mapping[str, Any]) -> dict[str, Cell]:
    return {
        "words per caption": spread(side.get("mean_length", [])),
        "share that repeats a bigram": spread(side.get("repeated_2", [])),
        "validation loss": spread(side.get("val_loss", [])),
    }


def levelled_off(study: Mapping[str, Any]) -> str:
    """Say what further cross-entropy still brings to the captioner that all rows began with."""
    base, start = study["val"][study["against"]], study["val"]["start"]
    before, after = (mean(side["val_loss"]) if side.get("val_loss") else 0.0 for side in (start, base))
    if not before:
        return ""
    cider = mean(base["CIDEr"]) / mean(start["CIDEr"]) - 1
    return (
        f"Further cross-entropy changes the validation loss of what all rows began with by {after / before - 1:+.1%} "
        f"({before:.3f} nats per token before), and its CIDEr by {cider:+.1%}."
    )


def compare_reward(study: Mapping[str, Any]) -> str:
    """Compare captions by a reward with those of equally long cross-entropy and with people's."""
    val, base = study["val"], study["val"][study["against"]]
    own, people, cider, clip = val[study["what"]], val.get("references"), *(val["paired"][m] for m in SCORES)
    scale = 100 / mean(base["CIDEr"])
    gain, low, high = (cider[key] * scale for key in ("difference", "low", "high"))
    text = (
        f"Against equally long further cross-entropy, {study['what']} has {gain:+.1f} % CIDEr [{low:+.1f}, "
        f"{high:+.1f}] and {clip['difference']:+.3f} CLIPScore [{clip['low']:+.3f}, {clip['high']:+.3f}]"
    )
    if not people:
        return text + "."
    words, repeating = mean(own["mean_length"]) / people["mean_length"], mean(own["repeated_2"])
    return text + (
        f"; its captions have {words:.0%} as many words as people's, and {repeating:.0%} of them repeat a bigram "
        f"({people['repeated_2']:.0%} of people's)."
    )


def spread(values: Sequence[float], digits: int = 3) -> str | None:
    """Return ``mean ± standard deviation`` of several values, the one value, or None of none."""
    if not values:
        return None
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
