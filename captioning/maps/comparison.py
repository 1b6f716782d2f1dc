"""Do the maps point at what the words name? Every spec on the same captions, against boxes, with intervals and tests.

A caption that people wrote is read after its image, and the map of each word is compared with the boxes of what the
word is about. ``measure`` keeps what every word got; all tables are made of that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from captioning.data.images import load_image
from captioning.files import atomic_path, write_csv
from captioning.maps.attention import Heads, MapSpec, parse_layers
from captioning.maps.explainers import Explainer, read, specs_to_compare
from captioning.maps.faithfulness import Asked, Faithfulness, ask
from captioning.maps.grounding import THING, GroundedCaption
from captioning.maps.measures import (
    THRESHOLDS,
    MapMeasures,
    MeasuredMaps,
    Ratio,
    baselines,
    coverage,
    interval,
    measure_map,
    p_value,
    value,
)

log = logging.getLogger(__name__)
MEASURES = "pointing, map in box / area, IoU at its best threshold and at half of the maximum, average precision"
INTERVALS = ("pointing", "iou")  # the measures that get intervals and tests
CEILING = "the boxes, {} x {}"  # as a map, their share of each cell: what no map of this size can exceed by much


class Word(NamedTuple):
    """A word that was measured: its image's key, its number in the caption, its kind, and its boxes' share (0..1)."""

    image: str
    number: int
    text: str
    kind: str
    area: float


@dataclass
class Measured:
    """What every word got by every spec.

    Attributes:
        words: the W words that have boxes.
        maps: of each spec the W measures.
        ceiling: the W measures of the boxes themselves, taken as maps of the grid, and of each size that maps have.
        floor: pointing accuracy of what knows nothing of the word.
        images: how many images were measured.
    """

    words: list[Word] = field(default_factory=list)
    maps: dict[MapSpec, list[MapMeasures]] = field(default_factory=dict)
    ceiling: dict[tuple[int, ...], list[MapMeasures]] = field(default_factory=dict)
    floor: Mapping[str, float] = field(default_factory=dict)
    images: int = 0

    def stack(self, maps: Sequence[MapMeasures], kind: str = THING) -> MeasuredMaps:
        """Join the measures of all words, and keep those of a kind."""
        return MeasuredMaps.stack(maps, np.array([word.area for word in self.words])).of(self.of_kind(kind))

    def of_kind(self, kind: str) -> np.ndarray:
        """Return (W,): which words are of a kind."""
        return np.array([word.kind == kind for word in self.words])

    def kinds(self) -> list[str]:
        """Return the kinds of words that there are, things first."""
        return list(dict.fromkeys([THING, *(word.kind for word in self.words)]))

    def image_of(self, kind: str) -> list[str]:
        """Return the image of every word of a kind."""
        return [word.image for word in self.words if word.kind == kind]


def measure(explainer: Explainer, samples: Sequence[GroundedCaption], specs: Sequence[MapSpec]) -> Measured:
    """Measure every spec on the words of ``samples``; an image that cannot be read is named and left out.

    A word whose boxes lie outside of what the model sees of the image has none.

    Raises:
        ValueError: no image or no word could be measured.
    """
    found, mentions, unseen = Measured(maps={spec: [] for spec in specs}), [], 0
    for sample in tqdm(samples, "grounding", disable=None):
        try:
            image = load_image(sample.path)
        except (ValueError, OSError) as error:
            log.error("not measured: %s", error)
            continue
        found.images += 1
        window, words = explainer.window(image.size), sample.caption.split()
        attention = read(explainer, explainer.prepare(image), explainer.tokens(sample.caption), specs)
        grid = attention.capture.grid
        area = {m: float(coverage(m.boxes, window, grid).mean()) for m in sample.mentions if m.boxes}
        seen = [m for m in area if area[m]]
        unseen += len(area) - len(seen)
        mentions += [(m.boxes, window) for m in seen if m.kind == THING]
        found.words += [Word(str(sample.path), m.word, words[m.word], m.kind, area[m]) for m in seen]
        maps = {spec: attention.maps(spec) for spec in specs}
        sizes: set[tuple[int, ...]] = {grid, *(of_words.shape[1:] for of_words in maps.values())}
        shares = {size: [coverage(m.boxes, window, size) for m in seen] for size in sizes}
        for size, boxes in shares.items():
            mine = [measure_map(share, m.boxes, share, window) for m, share in zip(seen, boxes, strict=True)]
            found.ceiling.setdefault(size, []).extend(mine)
        for spec, of_words in maps.items():
            found.maps[spec] += [
                measure_map(of_words[m.word], m.boxes, share, window)
                for m, share in zip(seen, shares[of_words.shape[1:]], strict=True)
            ]
    if not found.images:
        raise ValueError(f"none of the {len(samples)} images could be measured")
    if not mentions:
        raise ValueError("no word could be measured: all boxes lie outside of what the model sees of the images")
    if unseen:
        log.warning("%d words not measured: their boxes lie outside of what the model sees of the images", unseen)
    found.floor = baselines(mentions, grid)
    return found


def compare(
    explainer: Explainer,
    samples: Sequence[GroundedCaption],
    specs: Sequence[MapSpec],
    notes: Mapping[MapSpec, str],
    asked_images: int,
    out: Path,
) -> tuple[Measured, list[Row]]:
    """Measure ``specs``, the default first, and write all tables to ``out``; return the measures and the things' rows.

    On the first ``asked_images`` the model is also asked how faithful the maps are, of each method by its best spec and
    of the specs that ``notes`` have something to say of.
    """
    default, found = specs[0], measure(explainer, samples, specs)
    rows, *others = (table(found, notes, default, kind) for kind in found.kinds())
    best = [spec for spec in specs if any(row[:4] == _names(spec) for row in best_of_each_method(rows))]
    asked = ask(explainer, samples[:asked_images], best) if asked_images else []
    rows = with_answers(rows, asked, default)
    kinds = with_answers([row for kind in others for row in kind], asked, default)
    write_tables(found, rows, kinds, asked, out)
    return found, rows


# --- tables ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of grounding.csv: a spec on the words of a kind, or a baseline, which has a name and few measures.

    ``pointing`` to ``precision`` are those of ``MeasuredMaps.ratios``, ``threshold`` is that of ``iou``, and from
    ``deletion`` to ``occlusion`` they are means of ``Faithfulness`` over the ``asked`` words. ``low`` and ``high`` end
    95% intervals over images, and ``p_`` are the paired tests' against the default.
    """

    method: str
    layers: str | None = None
    heads: str | None = None
    row: str | None = None
    pointing: float = float("nan")
    pointing_low: float | None = None
    pointing_high: float | None = None
    mass_ratio: float | None = None
    iou: float | None = None
    iou_low: float | None = None
    iou_high: float | None = None
    threshold: float | None = None
    iou_fixed: float | None = None
    precision: float | None = None
    p_pointing: float | None = None
    p_iou: float | None = None
    deletion: float | None = None
    deletion_low: float | None = None
    deletion_high: float | None = None
    p_deletion: float | None = None
    insertion: float | None = None
    random_layers: float | None = None
    occlusion: float | None = None
    asked: int | None = None
    kind: str | None = None
    words: int | None = None
    note: str = ""

    def __str__(self) -> str:
        name = f"{self.method} layers {self.layers} heads {self.heads} {self.row}" if self.layers else self.method
        line = f"{name:<44}{self.pointing:>7.3f}"
        cells = ((self.mass_ratio, 2), (self.iou, 3), (self.iou_fixed, 3), (self.precision, 3))
        return line + "".join(f"{'' if v is None else f'{v:.{n}f}':>7}" for v, n in cells) + f"  {self.note}"


def table(found: Measured, notes: Mapping[MapSpec, str], default: MapSpec, kind: str = THING) -> list[Row]:
    """Return a row per spec for the words of a kind, the best pointing accuracy first.

    For things the baselines follow, and what a perfect map of this grid would get.

    Args:
        found: what was measured.
        notes: what to say of a spec.
        default: the spec that the others are tested against.
        kind: of the words.
    """
    images, base = found.image_of(kind), found.stack(found.maps[default], kind).ratios()
    rows = []
    for spec, maps in found.maps.items():
        stack = found.stack(maps, kind)
        ratios = stack.ratios()
        tests = {f"p_{name}": p_value(ratios[name], base[name], images) for name in INTERVALS if spec != default}
        cells = _cells(stack, ratios, images, kind) | tests
        rows.append(Row(spec.method, spec.layers, spec.heads, spec.row, **cells, note=notes.get(spec, "")))
    rows.sort(key=lambda row: -row.pointing)
    if kind != THING:
        return rows
    ceilings = [
        Row(CEILING.format(*size), **_cells(stack, stack.ratios(), images, kind), note="ceiling")
        for size, stack in sorted((size, found.stack(maps, kind)) for size, maps in found.ceiling.items())
    ]
    return [*rows, *ceilings, *(Row(name, pointing=hits, note="baseline") for name, hits in found.floor.items())]


def _cells(stack: MeasuredMaps, ratios: Mapping[str, Ratio], images: Sequence[str], kind: str) -> dict[str, Any]:
    """Return what :class:`Row` has of the measures of a kind's words, each in one of ``images``."""
    cells: dict[str, Any] = {name: value(ratio) for name, ratio in ratios.items()}
    for name in INTERVALS:
        cells[f"{name}_low"], cells[f"{name}_high"] = interval(ratios[name], images)
    return cells | {"threshold": float(THRESHOLDS[stack.threshold]), "kind": kind, "words": len(images)}


def with_answers(rows: Sequence[Row], asked: Sequence[Asked], default: MapSpec) -> list[Row]:
    """Return rows of one or more kinds of words with what the model said of their words' maps."""
    by_row: dict[tuple[Any, ...], list[Asked]] = {}
    for answer in asked:
        by_row.setdefault((_names(answer.spec), answer.kind), []).append(answer)
    found = []
    for row in rows:
        kind = row.kind or THING  # random values' row has none
        mine = by_row.get((tuple(row[:4]), kind), [])
        base = by_row.get((_names(default), kind), [])
        found.append(row._replace(**_answers(mine, base)) if mine else row)
    return found


def _names(spec: MapSpec | None) -> tuple[str | None, ...]:
    return (spec.method, spec.layers, spec.heads, spec.row) if spec else ("random", None, None, None)


def _answers(mine: Sequence[Asked], base: Sequence[Asked]) -> dict[str, Any]:
    images, one = [answer.image for answer in mine], np.ones(len(mine))
    cells: dict[str, Any] = {
        name: value((np.array([getattr(answer.faithful, name) for answer in mine]), one))
        for name in Faithfulness._fields
    }
    deletion, theirs = ((np.array([a.faithful.deletion for a in answers]), one) for answers in (mine, base))
    cells["deletion_low"], cells["deletion_high"] = interval(deletion, images)
    if mine is not base:
        cells["p_deletion"] = p_value(deletion, theirs, images)
    return {name: None if cell != cell else cell for name, cell in cells.items()} | {"asked": len(mine)}


def best_of_each_method(rows: Sequence[Row]) -> list[Row]:
    """Return each method's row with the best pointing accuracy, and all rows with a note; ``rows`` as ``table``."""
    first = {row.method: row for row in reversed(rows)}
    return [row for row in rows if row.note or first[row.method] is row]


def write_tables(found: Measured, rows: Sequence[Row], kinds: Sequence[Row], asked: Sequence[Asked], out: Path) -> None:
    """Write grounding.csv, grounding_kinds.csv (words of other kinds), grounding_words.npz and grounding_asked.csv.

    The last has a row for every word and spec, or ``random``, of which the model was asked.

    The npz holds ``image``, ``number``, ``text``, ``kind`` and ``area`` (W,) of the words, the ``specs`` (S,) in words,
    and of each spec and word ``hit``, ``mass``, ``precision`` (S, W), ``overlap`` and ``union`` (S, W, T) at the
    ``thresholds`` (T,).
    """
    write_csv(out / "grounding.csv", Row._fields, rows)
    write_csv(out / "grounding_kinds.csv", Row._fields, kinds)
    about = [name for name in Asked._fields if name not in ("spec", "faithful")]
    write_csv(
        out / "grounding_asked.csv",
        [*about, *Row._fields[:4], *Faithfulness._fields],
        [[*(getattr(a, name) for name in about), *_names(a.spec), *a.faithful] for a in asked],
    )
    columns: dict[str, Any] = {name: np.array([getattr(word, name) for word in found.words]) for name in Word._fields}
    by_spec = [list(zip(*maps, strict=True)) for maps in found.maps.values()]
    columns |= {
        name: np.array([spec[n] for spec in by_spec], bool if name == "hit" else np.float32)
        for n, name in enumerate(MapMeasures._fields)
    }
    specs = np.array([f"{spec}, {spec.row}" for spec in found.maps])
    with atomic_path(out / "grounding_words.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, specs=specs, thresholds=THRESHOLDS, **columns)


# --- which specs ----------------------------------------------------------------------------------------------------


def parse_specs(texts: Sequence[str], default: MapSpec, n_layer: int, n_head: int) -> list[MapSpec]:
    """Return the specs that ``texts`` name: ``grad`` for all of that method that are usually compared, or one spec as
    ``method,layers``, ``method,layers,heads`` or ``method,layers,heads,row``, what is left out being the default's.

    Raises:
        ValueError: there is no such method, row, layer or head, or the text is of another form.
    """
    usual, specs = specs_to_compare(n_layer, n_head, slow=True), []
    for text in texts:
        method, *rest = (part.strip() for part in text.split(","))
        if len(rest) > 3 or not all((method, *rest)):
            raise ValueError(f"--specs {text}: give a method, or method,layers,heads,row such as grad,all,mean")
        one = replace(default, method=method, **dict(zip(("layers", "heads", "row"), rest, strict=False)))
        parse_layers(one.layers, n_layer)  # refuse what the model lacks before any work
        Heads.parse(one.heads, n_head)
        specs += [one] if rest else [spec for spec in usual if spec.method == method] or [one]
    return specs
