"""The report's sections on studies: all settings, the ablation of the recipe, and CIDEr as a reward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import reduce
from operator import getitem
from statistics import mean

from captioning.report.document import Cell, Missing, Section, Table, Text
from captioning.report.sections import REPORTED_P2, curves, run_table, world
from captioning.training.run_folder import Run, spread


def study(runs: Iterable[Run], name: str) -> list[Run]:
    """The runs of one study."""
    return [run for run in runs if run.name.split("/")[0] == name]


def grouped(runs: Iterable[Run], key: Callable[[Run], Hashable]) -> dict[Hashable, list[Run]]:
    """Runs by ``key``, in order of their first one."""
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups


def settings_section(runs: Sequence[Run]) -> Section:
    """The report's five settings and this suite's own, by one rule."""
    chosen = study(runs, "settings")
    section = Section("P2: all settings")
    if not chosen:
        section.blocks.append(Missing("the study of all six settings", "make settings"))
        return section
    absent = sorted({*REPORTED_P2, "best"} - {r.config["setting"] for r in chosen})
    if absent:
        section.blocks.append(Missing(f"settings {', '.join(absent)}", "make settings"))
    scored = grouped([r for r in chosen if "val" in r.scores], lambda r: r.config["setting"])
    section.blocks += _seeds_table(scored)
    section.blocks += [Text(text) for text in (compare_settings(scored),) if text]
    section.blocks.append(run_table("p2_settings", "Settings, every run", chosen))
    if any(r.config["profile"] == "micro" for r in chosen):
        section.blocks.append(
            Text(
                "Settings are written for 10,000 photographs. On the micro world one rule holds for all of them: half "
                "the epochs, rounded up, at the same rank, alpha and dropout, with batches of 8, and learning rates "
                "times 3, since the decoder is 3 times as narrow and Adam's rate goes with one over the width "
                "(Yang et al., arXiv 2203.03466)."
            )
        )
    section.blocks += curves("p2_settings_curves", "the settings", chosen)
    return section


def _seeds_table(scored: dict[Hashable, list[Run]]) -> list[Table]:
    """Mean and spread by setting, where one was run with several seeds."""
    if all(len(group) < 2 for group in scored.values()):
        return []
    rows = [
        (
            name,
            len(group),
            *(spread([r.scores["val"][metric] for r in group]) for metric in ("CIDEr", "CLIPScore")),
            *REPORTED_P2.get(name, (None, None)),
            *_origin(group),
        )
        for name, group in scored.items()
    ]
    columns = ("setting", "seeds", "CIDEr", "CLIPScore", "report's CIDEr", "report's CLIPScore", "world", "device")
    return [Table("p2_settings_seeds", "Settings, mean ± standard deviation over seeds", columns, rows)]


def compare_settings(scored: dict[Hashable, list[Run]]) -> str:
    """Say how ``best`` stands against the better of the report's settings, where both were scored."""
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


def ablation_section(runs: Sequence[Run]) -> Section:
    """What each part of the recipe is worth, over seeds."""
    section = Section("P2: ablation of the recipe")
    chosen = [run for run in study(runs, "ablation") if run.name.count("/") == 2 and run.best_cider is not None]
    groups = grouped(chosen, lambda run: run.name.split("/")[1])
    if not groups:
        section.blocks.append(Missing("the ablation", "make ablation"))
        return section
    start = {run.config["train"]["seed"]: run.best_cider for run in groups.get("start", [])}
    rows: list[tuple[Cell, ...]] = []
    for name, group in sorted(groups.items(), key=lambda item: -mean(run.best_cider for run in item[1])):
        gains = [
            run.best_cider - start[run.config["train"]["seed"]]
            for run in group
            if name != "start" and run.config["train"]["seed"] in start
        ]
        rows.append(
            (
                name,
                len(group),
                spread([run.best_cider for run in group]),
                spread(gains) if gains else None,
                *_origin(group),
            )
        )
    section.blocks.append(
        Table(
            "p2_ablation",
            "CIDEr by variant, and its difference to the start of the same seed; mean ± standard deviation "
            "over seeds (development images, not the reported ones)",
            ("variant", "seeds", "CIDEr", "difference", "world", "device"),
            rows,
        )
    )
    few = min(len(group) for group in groups.values())
    if few < 3:
        section.blocks.append(Missing(f"seeds: some variants have {few}, and 3 are wanted", "make ablation"))
    return section


REWARD_MEASURES = {
    "val_cider": "CIDEr, beam",
    "greedy_cider": "CIDEr, greedy",
    "clipscore": "CLIPScore, beam",
    "length": "words a caption",
    "repeated_2": "captions that repeat a bigram",
    "val_loss": "loss, nats a token",
}


def reward_section(runs: Sequence[Run]) -> Section:
    """Self-critical training: over seeds against what it began with, and each run before and after."""
    section = Section("P2: CIDEr as a reward (SCST)")
    tuned = [r for r in runs if r.objective == "scst"]
    if not study(tuned, "rewards"):
        section.blocks.append(Missing("the study of rewards over seeds", "make rewards"))
    section.blocks += _rewards_blocks(runs)
    if not tuned:
        remedy = "python p2_train.py --objective scst --init-adapter RUNS/lora/best.safetensors --out RUNS/scst"
        section.blocks.append(Missing("a run with --objective scst", remedy))
        return section
    rows: list[tuple[Cell, ...]] = []
    for run in tuned:
        before = next((e for e in run.epochs if e["epoch"] == 0), {})
        after = max((e for e in run.epochs if e["epoch"] > 0), key=lambda e: e.get("val_cider", -1), default={})
        rows += [
            (
                run.name,
                label,
                before.get(key),
                after.get(key),
                after.get(f"reference_{key}"),
                after.get("val_images"),
                world(run.config["profile"]),
                run.config["device"],
            )
            for key, label in REWARD_MEASURES.items()
            if key in after
        ]
    columns = ("run", "measure", "before", "after", "references", "images", "world", "device")
    section.blocks.append(
        Table("p2_scst", "Before and after self-critical training, on the run's validation images", columns, rows)
    )
    return section


def _rewards_blocks(runs: Sequence[Run]) -> list[Table | Text]:
    """All validation images by beam search: cross-entropy alone, each reward of the study, and people's captions."""
    tuned = [run for run in study(runs, "rewards") if run.name.count("/") == 2 and "val" in run.scores]
    if not tuned:
        return []
    before = [run for run in study(runs, "settings") if run.config["setting"] == "best" and "val" in run.scores]
    people = next((run.scores["val"]["references"] for run in tuned if "references" in run.scores["val"]), None)
    groups = grouped(tuned, lambda run: run.name.split("/")[1])
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            len(group),
            _spread(_scored(group, "CIDEr")),
            _spread(_gains(group, before), 1) if group is not before else None,
            _spread(_scored(group, "CLIPScore")),
            *(_spread(_scored(group, "captions", key)) for key in ("mean_length", "repeated_2")),
            *_origin(group),
        )
        for name, group in {"cross-entropy": before, **groups}.items()
        if group
    ]
    if people:
        rows.append(
            (
                "references",
                None,
                None,
                None,
                None,
                f"{people['mean_length']:.3f}",
                f"{people['repeated_2']:.3f}",
                world(tuned[0].config["profile"]),
                None,
            )
        )
    columns = (
        "trained by",
        "seeds",
        "CIDEr",
        "CIDEr's gain, %",
        "CLIPScore",
        "words a caption",
        "share that repeats a bigram",
        "world",
        "device",
    )
    table = Table(
        "p2_rewards",
        "What rewards add to cross-entropy, on all validation images; mean ± standard deviation over seeds",
        columns,
        rows,
    )
    compared = (compare_reward(name, group, before, people) for name, group in groups.items())
    return [table, *(Text(text) for text in compared if text)]


def compare_reward(name: str, group: Sequence[Run], before: Sequence[Run], people: dict[str, float] | None) -> str:
    """Say how captions by a reward stand against those before, and people's; nothing where something is not known."""
    gains, lengths = _gains(group, before), _scored(group, "captions", "mean_length")
    seeds = {run.config["train"]["seed"] for run in group}
    same = [run for run in before if run.config["train"]["seed"] in seeds]
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
    """What every run of a group has on val under these keys; empty where one lacks it."""
    try:
        return [reduce(getitem, path, run.scores["val"]) for run in group]
    except KeyError:
        return []


def _gains(group: Sequence[Run], before: Sequence[Run]) -> list[float]:
    """By how many percent each run's CIDEr is above that of the run with its seed before."""
    start = {run.config["train"]["seed"]: run.scores["val"]["CIDEr"] for run in before}
    return [
        100 * (run.scores["val"]["CIDEr"] / start[run.config["train"]["seed"]] - 1)
        for run in group
        if run.config["train"]["seed"] in start
    ]


def _spread(values: Sequence[float], digits: int = 3) -> str | None:
    return spread(values, digits) if values else None


def _origin(group: Sequence[Run]) -> tuple[str, str]:
    return world(group[0].config["profile"]), group[0].config["device"]
