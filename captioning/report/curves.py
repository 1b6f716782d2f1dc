"""Curves of trainings, to be told apart on a phone, on grey paper and by those who see no difference in colour."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from captioning.training.run_folder import Run

SIZE, FONT, DPI = (4.6, 3.3), 10, 200  # inches, points: at this size half a page wide on paper, a phone wide on screens
RC: dict[Any, Any] = {  # a "$" in a run's name is a "$". (Any: matplotlib's stubs list every key.)
    "font.size": FONT,
    "axes.titlesize": FONT,
    "text.parse_math": False,
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.1,
}
LEGEND_ROW, COLUMNS = 0.22, 3  # inches; labels beside each other
# Okabe and Ito's colours without yellow, which paper swallows (https://jfly.uni-koeln.de/color); 70 pairs with markers.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^DvPX*<>"
Style = dict[str, Any]  # matplotlib's words for a line
SOLID: Style = {"ls": "-", "lw": 1.6, "ms": 5}
DASHED: Style = {"ls": (0, (4, 2)), "lw": 1.1, "ms": 4, "mfc": "white"}


def label(run: Run) -> str:
    """Return what a run is called in a legend: seeds of one run share a name, and a line's style."""
    return run.name.partition("-seed")[0]


def draw_loss(runs: Sequence[Run]) -> bytes:
    """Return a PNG of the losses by epoch: solid on validation captions, dashed on training captions."""

    def draw(axis: Any, styles: dict[str, Style]) -> None:
        for run in runs:
            epochs, style = [e["epoch"] for e in run.epochs], styles[label(run)]
            axis.plot(epochs, [e["train_loss"] for e in run.epochs], **style | DASHED)
            axis.plot(epochs, [e["val_loss"] for e in run.epochs], **style | SOLID)
        axis.set(ylabel="loss per token (nats)", title="Loss: validation solid, training dashed")

    return _drawn(runs, draw)


def draw_cider(runs: Sequence[Run]) -> bytes:
    """Return a PNG of the validation CIDEr by epoch."""

    def draw(axis: Any, styles: dict[str, Style]) -> None:
        for run in runs:
            values = [e.get("val_cider", math.nan) for e in run.epochs]
            axis.plot([e["epoch"] for e in run.epochs], values, **styles[label(run)] | SOLID)
        axis.set(ylabel="CIDEr", title="CIDEr of validation captions", ylim=(0, None))

    return _drawn(runs, draw)


def _drawn(runs: Sequence[Run], draw: Callable[[Any, dict[str, Style]], None]) -> bytes:
    """Return a PNG of what ``draw`` puts on axes of epochs, with a legend below."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    labels = list(dict.fromkeys(map(label, runs)))
    styles: dict[str, Style] = {
        name: {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)]} for n, name in enumerate(labels)
    }
    width, height = SIZE
    columns = min(len(labels), COLUMNS)
    with mpl.rc_context(RC):
        canvas = Figure(figsize=(width, height + LEGEND_ROW * math.ceil(len(labels) / columns)), layout="constrained")
        axis = canvas.subplots()
        draw(axis, styles)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", lw=0.6)
        lines = [Line2D([], [], label=name, **styles[name] | SOLID) for name in labels]
        canvas.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=FONT - 1)
        content = io.BytesIO()
        canvas.savefig(content, format="png", dpi=DPI)
    return content.getvalue()
