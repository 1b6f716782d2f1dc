"""The pictures of a report on attention: word maps over their image, the best and the worst pair, the grounding chart.

Maps are undone to the *original* image: `overlay` fills the window that the model saw and leaves the rest empty. All
pictures are PNG, 160 dots an inch, written atomically; they are drawn without pyplot, so no state is shared.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from captioning.data.images import load_image
from captioning.files import atomic_path
from captioning.maps.attention import Explained, View

DPI = 160
COLOUR_MAP = "inferno"  # perceptually uniform: equal steps of attention look equally large, in grey print too
OPACITY = (0.0, 0.9)  # of the map over the image, at no attention and at a third of the scale and above
CUT = 99.5  # percentile that ends the colour scale: single outliers (sink patches) would leave the rest dark
OUTSIDE = 0.4  # brightness of the part of the image that the model never saw
TILE_AREA = 3.2  # square inches
TILE_SIDE = 5.0  # inches at most, for panoramas
GAP, TITLE, FOOT, MARGIN = 0.14, 0.27, 0.17, 0.2  # inches: between tiles, above a tile, below it, around all
MIN_WIDTH = 5.6  # inches of a figure: its caption and colour bar need room
GREY = "#5b6470"
START = "<|endoftext|>"  # the token before the first word; its tile is the plain image
CHART_ROWS = 12
RC = {"text.parse_math": False, "text.usetex": False, "font.family": "DejaVu Sans"}  # a "$" in a caption is a "$"


def check(explained: Explained) -> None:
    """Refuse what cannot be drawn honestly.

    Raises:
        ValueError: no words or views; a view whose maps are no (words, rows, columns), negative or not finite; image
            masses that are not one a word; an empty window.
    """
    words = len(explained.words)
    if not words or not explained.views:
        raise ValueError(f"{explained.path}: {words} words and {len(explained.views)} views; at least one of each")
    for view in explained.views:
        shape = view.maps.shape
        if len(shape) != 3 or shape[0] != words or 0 in shape:
            raise ValueError(f"{explained.path}: {_told(view)}: maps of shape {shape}, not ({words}, rows, columns)")
        if not np.isfinite(view.maps).all() or view.maps.min() < 0:
            raise ValueError(f"{explained.path}: {_told(view)}: maps must be finite and not negative")
    mass = explained.image_mass
    if mass is not None and (np.shape(mass) != (words,) or not np.isfinite(mass).all()):
        raise ValueError(f"{explained.path}: image masses must be {words} finite numbers, one a word")
    left, top, right, bottom = explained.window
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(f"{explained.path}: window {explained.window} is not (left, top, right, bottom) in pixels")


def check_window(explained: Explained, size: tuple[int, int]) -> None:
    """Raise ValueError when the window reaches beyond the image of ``size`` (width, height) by a pixel or more."""
    if explained.window[2] >= size[0] + 1 or explained.window[3] >= size[1] + 1:
        raise ValueError(f"{explained.path}: window {explained.window} is larger than the image of {size} pixels")


def overlay(explained: Explained, maps: np.ndarray) -> np.ndarray:
    """Return one map (gh, gw) on the pixels of the original image: (H, W) float32, NaN where the model saw nothing.

    The window is filled bicubically, without over- and undershoot. H and W are those of the upright image, as
    `data.load_image` gives it.

    Raises:
        ValueError: the map has no two dimensions, or the window reaches beyond the image.
    """
    size = load_image(explained.path).size
    check_window(explained, size)
    if maps.ndim != 2:
        raise ValueError(f"{explained.path}: a map of shape {maps.shape}; overlay takes one of (rows, columns)")
    return _spread(maps, size, explained.window)


def _spread(grid: np.ndarray, size: tuple[int, int], window: tuple[float, float, float, float]) -> np.ndarray:
    """Return ``grid`` over ``window`` of a picture of ``size`` (width, height): (H, W) float32, NaN outside."""
    rows, columns = grid.shape
    left, top, right, bottom = window
    x0, x1 = _covered(left, right, size[0])
    y0, y1 = _covered(top, bottom, size[1])
    box = np.array(
        [
            (x0 - left) / (right - left) * columns,
            (y0 - top) / (bottom - top) * rows,
            (x1 - left) / (right - left) * columns,
            (y1 - top) / (bottom - top) * rows,
        ]
    )
    box = tuple(box.clip(0, [columns, rows, columns, rows]))  # a border pixel may reach out by half of itself
    source = Image.fromarray(np.ascontiguousarray(grid, dtype=np.float32))
    full = np.full(size[::-1], np.nan, dtype=np.float32)
    filled = np.asarray(source.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=box))
    full[y0:y1, x0:x1] = filled.clip(grid.min(), grid.max())
    return full


def _covered(start: float, stop: float, length: int) -> tuple[int, int]:
    """First and last + 1 of the ``length`` pixels whose centre lies between ``start`` and ``stop``; at least one."""
    first = min(max(math.ceil(start - 0.5), 0), length - 1)
    return first, max(min(math.ceil(stop - 0.5), length), first + 1)


def palette() -> np.ndarray:
    """Return the colours of attention, (256, 4) uint8 RGBA from none to the scale's end; alpha is to cover an image."""
    from matplotlib import colormaps

    level = np.linspace(0, 1, 256)
    colours = colormaps[COLOUR_MAP](0.12 + 0.88 * level)  # its black start would darken the image, not colour it
    colours[:, 3] = np.interp(level, [0, 1 / 3], OPACITY)
    return (colours * 255).round().astype(np.uint8)


def scale_end(maps: np.ndarray) -> float:
    """Return the value at which the colours of ``maps`` end: nearly their largest, and 1 where nothing is attended."""
    return float(np.percentile(maps, CUT)) or float(maps.max()) or 1.0


def _coloured(photo: Image.Image, heat: np.ndarray, end: float) -> np.ndarray:
    """Blend ``heat`` (H, W; NaN outside the window) over the photograph in grey: (H, W, 3) float in 0..1."""
    grey = np.asarray(ImageOps.grayscale(photo), dtype=np.float32)[..., None] / 255
    seen = ~np.isnan(heat)
    level = (np.nan_to_num(heat) / end).clip(0, 1)
    colour = palette()[(level * 255).round().astype(int)] / 255
    alpha = colour[..., 3:]
    return np.where(seen[..., None], colour[..., :3] * alpha + grey * (1 - alpha), grey * OUTSIDE)


@contextlib.contextmanager
def _figure(width: float, height: float, out: Path) -> Iterator[Any]:
    """Yield a white figure of ``width`` x ``height`` inches; afterwards write it to ``out`` as PNG, atomically."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(out) as temporary:
            figure.savefig(temporary, format="png")


def _place(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Add axes whose corner is ``left`` and ``top`` inches from the figure's upper left one."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _write(figure: Any, left: float, top: float, text: str, **style: Any) -> Any:
    """Write ``text`` at ``left`` and ``top`` inches from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.text(left / across, 1 - top / down, text, **({"va": "top"} | style))


def _fit(figure: Any, text: Any, width: float, smallest: float = 6.0) -> None:
    """Shrink ``text`` until it is at most ``width`` inches wide, then cut it; long words must not run together."""

    def too_wide() -> bool:
        return text.get_window_extent(figure.canvas.get_renderer()).width > width * figure.dpi

    while too_wide() and text.get_fontsize() > smallest:  # step by step: hinting makes widths jump
        text.set_fontsize(text.get_fontsize() - 0.25)
    while too_wide() and len(text.get_text()) > 2:
        text.set_text(text.get_text().removesuffix("…")[:-1] + "…")


def line(text: object) -> str:
    """``text`` on one line, and without what no font can draw (halves of surrogate pairs in odd file names)."""
    return " ".join(str(text).split()).encode("utf-8", "replace").decode("utf-8")


def _wrapped(text: object, width: float, size: float) -> list[str]:
    """``text`` in lines of about ``width`` inches at ``size`` points; a letter is about 0.55 of its size wide."""
    return textwrap.wrap(line(text), max(int(width * 72 / (size * 0.55)), 8), break_on_hyphens=False) or [""]


def _told(view: View) -> str:
    """What a view is, as legends have it."""
    return f"{view.method}, layers {view.layers}, heads {view.heads}"


def _tile_size(width: int, height: int) -> tuple[float, float]:
    """Inches of a tile for an image of ``width`` x ``height`` pixels: equal areas, whatever the aspect ratio."""
    ratio = math.sqrt(width / height)
    across, down = math.sqrt(TILE_AREA) * ratio, math.sqrt(TILE_AREA) / ratio
    shrink = min(1.0, TILE_SIDE / across, TILE_SIDE / down)
    return across * shrink, down * shrink


def _columns(count: int, tile_width: float, tile_height: float) -> int:
    """Columns that bring ``count`` tiles near a 4:3 page, with as few empty places as its rows allow."""
    columns = min(max(round(math.sqrt(count * tile_height * 4 / 3 / tile_width)), 1), count)
    return math.ceil(count / math.ceil(count / columns))


def word_grid(explained: Explained, view: View, out: Path) -> None:
    """Write a PNG of the plain image and, a tile a word, the maps of ``view`` over it, on one colour scale.

    The share of a word's attention that falls on the image stands below its tile where ``view`` is the default view,
    which is the one that it was measured in.

    Raises:
        ValueError: what `check` refuses, or a window that reaches beyond the image.
    """
    check(explained)
    photo = load_image(explained.path)
    check_window(explained, photo.size)
    across, down = _tile_size(*photo.size)
    mass = explained.image_mass if view is explained.views[0] else None
    step = (across + GAP, down + TITLE + GAP + (FOOT if mass is not None else 0))
    count = len(explained.words) + 1
    columns = _columns(count, *step)
    width = max(columns * step[0] - GAP + 2 * MARGIN, MIN_WIDTH)
    caption = _wrapped(explained.caption, width - 2 * MARGIN, 13)
    head = MARGIN + 0.24 * len(caption) + 0.3
    height = head + math.ceil(count / columns) * step[1] + 0.72
    start = (width - columns * step[0] + GAP) / 2
    corners = [(start + n % columns * step[0], head + TITLE + n // columns * step[1]) for n in range(count)]
    with _figure(width, height, Path(out)) as figure:
        _heading(figure, caption, explained)
        end = scale_end(view.maps)
        tiles = _tiles(explained, view, photo, (round(across * DPI), round(down * DPI)), end)
        for number, ((left, top), (title, pixels)) in enumerate(zip(corners, tiles, strict=True)):
            axis = _place(figure, left, top, across, down)
            axis.imshow(pixels, aspect="auto", interpolation="nearest")
            axis.set_axis_off()
            style = {"va": "bottom", "ha": "center"} | ({"color": GREY} if number == 0 else {})
            _fit(figure, _write(figure, left + across / 2, top - 0.05, title, fontsize=11, **style), across + GAP / 2)
            if mass is not None and number:
                share = f"image {mass[number - 1]:.0%}"
                _write(figure, left + across / 2, top + down + 0.04, share, ha="center", fontsize=6.5, color=GREY)
        _colour_bar(figure, height - 0.55, end, bool(view.maps.max() > end), _told(view))


def _heading(figure: Any, caption: list[str], explained: Explained) -> None:
    """The caption, and below it the model, the file and the notes in small print."""
    width = figure.get_size_inches()[0]
    title = _write(figure, width / 2, MARGIN, "\n".join(caption), ha="center", fontsize=13, linespacing=1.25)
    _fit(figure, title, width - MARGIN)
    facts = [explained.model, explained.path.name, *(f"{name} {value}" for name, value in explained.notes.items())]
    small = line("  ·  ".join(facts)).replace(" · ", "  ·  ")
    below = MARGIN + 0.24 * len(caption) + 0.06
    _fit(figure, _write(figure, width / 2, below, small, ha="center", fontsize=8, color=GREY), width - MARGIN)


def _tiles(
    explained: Explained, view: View, photo: Image.Image, size: tuple[int, int], end: float
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield title and pixels (H, W, 3) of each tile; ``size`` is (width, height) in pixels."""
    small = photo.resize(size, Image.Resampling.LANCZOS)
    shrink = np.tile(np.divide(size, photo.size), 2)
    window = tuple(np.asarray(explained.window) * shrink)
    yield START, np.asarray(small) / 255
    for word, grid in zip(explained.words, view.maps, strict=True):
        yield line(word), _coloured(small, _spread(grid, size, window), end)


def _colour_bar(figure: Any, top: float, end: float, cut: bool, label: str) -> None:
    """A horizontal colour bar from 0 to ``end``, with an arrow where some values lie beyond."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    width = min(4.0, figure.get_size_inches()[0] - 4 * MARGIN)
    axis = _place(figure, (figure.get_size_inches()[0] - width) / 2, top, width, 0.11)
    colours = ListedColormap(palette() / 255)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, end), colours),
        cax=axis,
        orientation="horizontal",
        extend="max" if cut else "neither",
        extendfrac=0.03,
    )
    bar.outline.set_linewidth(0.4)
    axis.tick_params(labelsize=7, length=2, width=0.4, pad=2)
    axis.locator_params(nbins=5)
    axis.set_xlabel(f"attention: {line(label)}", fontsize=8, labelpad=3)


def best_worst(pairs: Sequence[tuple[str, Path, str, Sequence[str], float]], out: Path) -> None:
    """Write a PNG of image-caption pairs side by side, as (title, path, caption, references, CLIPScore) each.

    Raises:
        ValueError: no pair is given.
    """
    if not pairs:
        raise ValueError("no image-caption pair to draw; give at least one")
    column, picture, gap = 4.6, 3.5, 0.4  # inches
    said = [_wrapped(caption, column, 12.5) for _, _, caption, _, _ in pairs]
    known = [[line for text in references for line in _bullet(text, column)] for _, _, _, references, _ in pairs]
    text_top = MARGIN + 0.38 + picture + 0.15
    references_top = text_top + 0.225 * max(map(len, said)) + 0.12
    height = references_top + 0.24 + 0.165 * max(map(len, known)) + MARGIN
    with _figure(len(pairs) * (column + gap) - gap + 2 * MARGIN, height, Path(out)) as figure:
        for number, (title, path, _, _, score) in enumerate(pairs):
            left = MARGIN + number * (column + gap)
            heading = _write(figure, left, MARGIN, line(title), fontsize=12, weight="bold")
            _fit(figure, heading, column - 1.6)
            _write(figure, left + column, MARGIN, f"CLIPScore {score:.3f}", fontsize=12, ha="right")
            axis = _place(figure, left, MARGIN + 0.38, column, picture)
            axis.imshow(_thumbnail(path, (round(column * DPI), round(picture * DPI))), interpolation="antialiased")
            axis.set_anchor("W")
            axis.set_axis_off()
            _write(figure, left, text_top, "\n".join(said[number]), fontsize=12.5, linespacing=1.25)
            small = {"fontsize": 9, "color": GREY, "linespacing": 1.25}
            _write(figure, left, references_top, f"references · {line(Path(path).name)}", **small)
            _write(figure, left, references_top + 0.2, "\n".join(known[number]), **small)


def _bullet(text: str, width: float) -> list[str]:
    first, *rest = _wrapped(text, width - 0.2, 9)
    return [f"– {first}", *(f"   {line}" for line in rest)]


def _thumbnail(path: Path, size: tuple[int, int]) -> Image.Image:
    """The image at ``path``, shrunk to fit ``size`` (width, height)."""
    photo = load_image(path)
    photo.thumbnail(size, Image.Resampling.LANCZOS)
    return photo


def grounding_chart(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write a PNG of pointing accuracy: the best dozen ways of looking and, below them in grey, every baseline.

    Args:
        rows: ``{"method", "layers", "heads", "pointing", "mass_ratio", "iou"}`` of a way of looking,
            ``{"name", "pointing"}`` of a baseline; pointing and iou in 0..1, mass_ratio 1 where attention is spread
            evenly.
        out: the picture's path.

    Raises:
        ValueError: there is no row of a way of looking.
    """
    ranked = sorted(rows, key=lambda row: -row["pointing"])
    ways = [row for row in ranked if "method" in row][:CHART_ROWS]
    baselines = [row for row in ranked if "method" not in row]
    if not ways:
        raise ValueError("no way of looking to chart; give rows with method, layers, heads and pointing")
    shown = ways + baselines
    places = [n + 0.6 * (n >= len(ways)) for n in range(len(shown))]
    names = [f"{r['method']} · layers {r['layers']} · {r['heads']}" if "method" in r else r["name"] for r in shown]
    with _figure(8.4, 1.15 + 0.3 * (places[-1] + 1), Path(out)) as figure:
        width, height = figure.get_size_inches()
        axis = _place(figure, 2.75, 0.62, width - 2.75 - 1.75, height - 0.62 - 0.53)
        axis.barh(
            places,
            [row["pointing"] for row in shown],
            height=0.72,
            color=["#2f6c9f" if "method" in row else "#b6bdc6" for row in shown],
        )
        if baselines:
            axis.plot([baselines[0]["pointing"]] * 2, [-0.6, places[len(ways)]], color=GREY, lw=0.8, ls=(0, (4, 3)))
        _label_bars(axis, shown, places)
        axis.set(ylim=(places[-1] + 0.6, -0.6), xlim=(0, 1.15 * ranked[0]["pointing"] or 1))
        axis.set_yticks(places, [textwrap.shorten(line(name), 44, placeholder="…") for name in names], fontsize=8.5)
        axis.set_xlabel("pointing accuracy: the maximum lies in a box of the named thing", fontsize=8.5, loc="left")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.tick_params(axis="x", labelsize=8, color=GREY)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        _write(figure, MARGIN, 0.14, "Do the maps point at what the words name?", fontsize=11.5, weight="bold")


def _label_bars(axis: Any, rows: Sequence[dict[str, Any]], places: Sequence[float]) -> None:
    """Write each bar's value at its end, and its further measures, where there are any, in columns at the right."""
    columns = {"mass_ratio": ("mass ratio", "{:.2f}", 1.12), "iou": ("IoU", "{:.2f}", 1.3)}
    beside = axis.get_yaxis_transform()  # across in shares of the axes, down in bars
    for place, row in zip(places, rows, strict=True):
        axis.annotate(
            f"{row['pointing']:.1%}",
            (row["pointing"], place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
        for key, (_, style, at) in columns.items():
            if key in row:
                axis.text(at, place, style.format(row[key]), transform=beside, va="center", ha="center", fontsize=8.5)
    for key, (title, _, at) in columns.items():
        if any(key in row for row in rows):
            axis.text(at, -0.75, title, transform=beside, ha="center", va="bottom", fontsize=8, color=GREY)
