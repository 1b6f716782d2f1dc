"""The report's sections on studies: all settings, the ablation of the recipe, and CIDEr as a reward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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


def settings_section(runs: Sequence[Run], size: str) -> Section:
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
    section.blocks += [_reported_table(scored), *_seeds_table(scored)]
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


# --- to the letter ----------------------------------------------------------------------------------------------------


def letter_section(root: Path, size: str) -> Section:
    """What each point of the report's code was worth: turned alone to sound practice, against all of them."""
    section, remedy = Section("P2: the report's code, point by point"), "make letter"
    found = [read_object(path) or {} for path in sorted((root / "letter").glob("*/comparison.json"))]
    if not found:
        section.blocks += _unless_full(size, "the study of the report's setting 1 to the letter", remedy)
        return section
    found.sort(key=lambda study: -study["paired"]["CIDEr"]["difference"])
    rows = [_letter_row("setting 1 to the letter", max(found, key=lambda study: len(study["seeds"])), "literal")]
    rows += [_letter_row(study["what"], study, "sound") for study in found]
    caption = (
        "Setting 1 to the letter, and with one point of it turned to sound practice; mean ± standard deviation over "
        "seeds; differences and p of a paired test by image, each image's score a mean over seeds"
    )
    section.blocks.append(Table("p2_letter", caption, rows))
    few = min(len(study["seeds"]) for study in found)
    if few < 3:
        section.blocks.append(Missing(f"seeds: some rows have {few}, and 3 are wanted", remedy))
    return section


def _letter_row(what: str, study: Mapping[str, Any], side: str) -> dict[str, Cell]:
    row: dict[str, Cell] = {"what": what, "seeds": len(study["seeds"])}
    for metric in SCORES:
        paired = study["paired"][metric] if side == "sound" else {}
        row |= {
            metric: spread(study[side][metric]),
            f"{metric}: difference": paired.get("difference"),
            f"{metric}: p": paired.get("p_value"),
        }
    return row | {"world": world(study["profile"]), "device": study["device"]}


# --- ablation -------------------------------------------------------------------------------------------------------


def ablation_section(runs: Sequence[Run], size: str) -> Section:
    """What each part of the recipe is worth, over seeds."""
    section = Section("P2: ablation of the recipe")
    chosen = [run for run in study(runs, "ablation") if run.name.count("/") == 2 and run.best_cider is not None]
    groups = grouped(chosen, lambda run: run.name.split("/")[1])
    if not groups:
        section.blocks += _unless_full(size, "the ablation", "make ablation")
        return section
    ciders = {name: [(seed(run), run.best_cider or 0.0) for run in group] for name, group in groups.items()}
    start = dict(ciders.get("start", []))
    rows: list[dict[str, Cell]] = []
    for name, found in sorted(ciders.items(), key=lambda item: -mean(cider for _, cider in item[1])):
        gains = [cider - start[number] for number, cider in found if name != "start" and number in start]
        scores = {"CIDEr": spread([cider for _, cider in found]), "difference": spread(gains)}
        rows.append({"variant": name, "seeds": len(found), **scores, **origin(groups[name][0])})
    caption = (
        "CIDEr by variant, and its difference to the start of the same seed; mean ± standard deviation over seeds "
        "(development images, not the reported ones)"
    )
    section.blocks.append(Table("p2_ablation", caption, rows))
    few = min(len(group) for group in groups.values())
    if few < 3:
        section.blocks.append(Missing(f"seeds: some variants have {few}, and 3 are wanted", "make ablation"))
    return section


# --- rewards --------------------------------------------------------------------------------------------------------

REWARD_MEASURES = {
    "val_cider": "CIDEr, beam",
    "greedy_cider": "CIDEr, greedy",
    "clipscore": "CLIPScore, beam",
    "length": "words per caption",
    "repeated_2": "captions that repeat a bigram",
    "val_loss": "loss, nats per token",
}


def reward_section(runs: Sequence[Run], size: str, best: Run | None) -> Section:
    """Self-critical training: over seeds against the runs that it started from, and each run before and after."""
    section = Section("P2: CIDEr as a reward (SCST)")
    tuned = [r for r in runs if r.objective == "scst"]
    if not study(tuned, "rewards"):
        section.blocks += _unless_full(size, "the study of rewards over seeds", "make rewards")
    section.blocks += _rewards_blocks(runs)
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


def _rewards_blocks(runs: Sequence[Run]) -> list[Block]:
    """All validation images by beam search: cross-entropy alone, each reward of the study, and people's captions."""
    tuned = [run for run in study(runs, "rewards") if run.name.count("/") == 2 and "val" in run.scores]
    if not tuned:
        return []
    before = [run for run in study(runs, "settings") if run.config["setting"] == "best" and "val" in run.scores]
    people = next((run.scores["val"]["references"] for run in tuned if "references" in run.scores["val"]), None)
    groups = grouped(tuned, lambda run: run.name.split("/")[1])
    rows = [_reward_row("cross-entropy", before, [])] if before else []
    rows += [_reward_row(name, group, before) for name, group in groups.items()]
    if people:
        words, repeated = (f"{people[key]:.3f}" for key in ("mean_length", "repeated_2"))
        rows.append(
            dict.fromkeys(rows[0])
            | {"trained by": "references", "words per caption": words, "share that repeats a bigram": repeated}
            | {"world": origin(tuned[0])["world"]}
        )
    caption = "What rewards add to cross-entropy, on all validation images; mean ± standard deviation over seeds"
    texts = [compare_reward(name, group, before, people) for name, group in groups.items()]
    return [Table("p2_rewards", caption, rows), *(Text(text) for text in texts if text)]


def _reward_row(name: str, group: Sequence[Run], before: Sequence[Run]) -> dict[str, Cell]:
    return {
        "trained by": name,
        "seeds": len(group),
        "CIDEr": spread(_scored(group, "CIDEr")),
        "CIDEr's gain, %": spread(_gains(group, before), 1),
        "CLIPScore": spread(_scored(group, "CLIPScore")),
        "words per caption": spread(_scored(group, "captions", "mean_length")),
        "share that repeats a bigram": spread(_scored(group, "captions", "repeated_2")),
        **origin(group[0]),
    }


def compare_reward(name: str, group: Sequence[Run], before: Sequence[Run], people: dict[str, float] | None) -> str:
    """Compare captions by a reward with those before it and with people's; nothing where something is unknown."""
    gains, lengths = _gains(group, before), _scored(group, "captions", "mean_length")
    seeds = {seed(run) for run in group}
    same = [run for run in before if seed(run) in seeds]
    clip, old_clip = _scored(group, "CLIPScore"), _scored(same, "CLIPScore")
    if not (gains and lengths and clip and old_clip and people):
        return ""
    words = mean(lengths) / people["mean_length"]
    repeating = mean(_scored(group, "captions", "repeated_2"))
    return (
        f"Against cross-entropy alone, {name} has {mean(gains):+.1f} % CIDEr and "
        f"{mean(clip) - mean(old_clip):+.3f} CLIPScore; its captions have {words:.0%} as many words as people's, "
        f"and {repeating:.0%} of them repeat a bigram ({people['repeated_2']:.0%} of people's)."
    )


def _scored(group: Sequence[Run], *path: str) -> list[float]:
    """Return what every run of a group has on val under these keys; empty where one lacks it."""
    found: list[Any] = [run.scores["val"] for run in group]
    for key in path:
        if not all(key in value for value in found):
            return []
        found = [value[key] for value in found]
    return found


def _gains(group: Sequence[Run], before: Sequence[Run]) -> list[float]:
    """Return by how many percent each run's CIDEr is above that of the run with the same seed in ``before``."""
    start = {seed(run): run.scores["val"]["CIDEr"] for run in before}
    return [100 * (run.scores["val"]["CIDEr"] / start[seed(run)] - 1) for run in group if seed(run) in start]


def spread(values: Sequence[float], digits: int = 3) -> str | None:
    """Return ``mean ± standard deviation`` of several values, the one value, or None of none."""
    if not values:
        return None
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
