"""The pictures of a report on attention: word maps over their image, the best and the worst pair, the grounding chart.

Maps are drawn over the *original* image: they fill the window that the model saw, and the rest of the image is dark.
All pictures are PNG, 160 dots per inch, written atomically; they are drawn without pyplot, so no state is shared.
"""

from __future__ import annotations

import contextlib
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from captioning.data.images import load_image
from captioning.files import atomic_path
from captioning.maps.attention import METHODS, Explanation, MapSpec, Window
from captioning.maps.comparison import Row
from captioning.maps.measures import Box
from captioning.maps.pairs import Pair

DPI = 160
COLOUR_MAP = "inferno"  # perceptually uniform: equal steps of attention look equally large, in grey print too
OPACITY = (0.0, 0.9)  # of the map over the image, at no attention and at a third of the scale and above
CUT = 99.5  # percentile that ends the colour scale: single outliers (sink patches) would leave the rest dark
OUTSIDE = 0.4  # brightness of the part of the image that the model never saw
TILE_AREA = 3.2  # square inches
TILE_SIDE = 5.0  # inches at most, for panoramas
GAP, TITLE, FOOT, MARGIN = 0.14, 0.27, 0.17, 0.2  # inches: between tiles, above a tile, below it, around all
SHEET = ".methods.png"  # how the name of a contact sheet ends
SHEET_AREA = 1.0  # square inches of a tile of the contact sheet
SHEET_GAP, SHEET_TITLE, SHEET_WORD = 0.06, 0.5, 0.85  # inches: between tiles, above the columns, of a row's word
MIN_WIDTH = 5.6  # inches of a figure: its caption and colour bar need room
GREY = "#5b6470"
PLAIN = "plain image"  # title of the tile without a map
MODELS = {"p1": "LLaVA", "p2": "tuned captioner"}
BASELINES = {"centre": "centre of the image", "random": "random cell", "mean image": "best fixed cell"}
CHART_ROWS = 12
# A "$" in a caption is a "$". (Any: matplotlib's stubs list every key.)
RC: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False, "font.family": "DejaVu Sans"}


def checked_photo(explanation: Explanation) -> Image.Image:
    """Return the image of an explanation, upright, after checking that all of the explanation can be drawn.

    Raises:
        OSError: the image is missing or must not be read.
        ValueError: it is damaged; there are no words or maps; maps that are not (words, rows, columns), negative or not
            finite; image masses that are not one per word; a window that is empty or reaches beyond the image.
    """
    path, words, window = explanation.path, len(explanation.words), explanation.window
    if not words or not explanation.word_maps:
        raise ValueError(f"{path}: {words} words and {len(explanation.word_maps)} sets of maps; at least one of each")
    for found in explanation.word_maps:
        shape = found.maps.shape
        if len(shape) != 3 or shape[0] != words or 0 in shape:
            raise ValueError(f"{path}: {found.spec}: maps of shape {shape}, not ({words}, rows, columns)")
        if not np.isfinite(found.maps).all() or found.maps.min() < 0:
            raise ValueError(f"{path}: {found.spec}: maps must be finite and not negative")
    mass = explanation.image_mass
    if mass is not None and (np.shape(mass) != (words,) or not np.isfinite(mass).all()):
        raise ValueError(f"{path}: image masses must be {words} finite numbers, one per word")
    left, top, right, bottom = window
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError(f"{path}: window {window} is not (left, top, right, bottom) in pixels")
    photo = explanation.photo or load_image(path)
    if right >= photo.width + 1 or bottom >= photo.height + 1:
        raise ValueError(f"{path}: window {window} is larger than the image of {photo.size} pixels")
    return photo


def spread(grid: np.ndarray, size: tuple[int, int], window: Window) -> np.ndarray:
    """Return a map (gh, gw) over ``window`` of a picture of ``size`` (width, height): (H, W) float32, NaN outside.

    The window is filled bicubically, without over- and undershoot.
    """
    rows, columns = grid.shape
    left, top, right, bottom = window
    x0, x1 = _covered(left, right, size[0])
    y0, y1 = _covered(top, bottom, size[1])
    xs = np.clip([(x - left) / (right - left) * columns for x in (x0, x1)], 0, columns)
    ys = np.clip([(y - top) / (bottom - top) * rows for y in (y0, y1)], 0, rows)  # a border pixel may reach out by half
    source = Image.fromarray(np.ascontiguousarray(grid, dtype=np.float32))
    filled = source.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC, box=(xs[0], ys[0], xs[1], ys[1]))
    full = np.full(size[::-1], np.nan, dtype=np.float32)
    full[y0:y1, x0:x1] = np.asarray(filled).clip(grid.min(), grid.max())
    return full


def _covered(start: float, stop: float, length: int) -> tuple[int, int]:
    """Return first and last + 1 of the ``length`` pixels whose centre is between ``start`` and ``stop``; never none."""
    first = min(max(math.ceil(start - 0.5), 0), length - 1)
    return first, max(min(math.ceil(stop - 0.5), length), first + 1)


def palette() -> np.ndarray:
    """Return the colours from no attention to the scale's end, (256, 4) uint8 RGBA, to draw over an image."""
    from matplotlib import colormaps

    level = np.linspace(0, 1, 256)
    colours = colormaps[COLOUR_MAP](0.12 + 0.88 * level)  # its black start would darken the image, not colour it
    colours[:, 3] = np.interp(level, [0, 1 / 3], OPACITY)
    return (colours * 255).round().astype(np.uint8)


def scale_end(maps: np.ndarray) -> float:
    """Return the value at which the colours of ``maps`` end: nearly their largest, and 1 where all are 0."""
    return float(np.percentile(maps, CUT)) or float(maps.max()) or 1.0


def _coloured(photo: Image.Image, heat: np.ndarray, end: float) -> np.ndarray:
    """Blend ``heat`` (H, W; NaN outside the window) over the photograph in grey: (H, W, 3) float in 0..1."""
    grey = np.asarray(ImageOps.grayscale(photo), dtype=np.float32)[..., None] / 255
    seen = ~np.isnan(heat)
    level = (np.nan_to_num(heat) / end).clip(0, 1)
    colour = palette()[(level * 255).round().astype(int)] / 255
    alpha = colour[..., 3:]
    return np.where(seen[..., None], colour[..., :3] * alpha + grey * (1 - alpha), grey * OUTSIDE)


def with_map(explanation: Explanation, word: int, side: int) -> tuple[Image.Image, Image.Image]:
    """Return the photograph, and in grey with the default map of a word over it; the longer sides have ``side`` pixels.

    Raises:
        OSError, ValueError: as :func:`checked_photo`.
    """
    photo = checked_photo(explanation)
    scale, maps = side / max(photo.size), explanation.word_maps[0].maps
    small = photo.resize([max(round(length * scale), 1) for length in photo.size], Image.Resampling.LANCZOS)
    heat = spread(maps[word], small.size, _scaled(explanation.window, photo, small))
    return small, Image.fromarray((_coloured(small, heat, scale_end(maps)) * 255).round().astype(np.uint8))


def _scaled(window: Window, photo: Image.Image, small: Image.Image) -> Window:
    """Return a window of ``photo`` in pixels of ``small``, the same picture in another size."""
    left, top, right, bottom = np.multiply(window, np.tile(np.divide(small.size, photo.size), 2)).tolist()
    return left, top, right, bottom


@contextlib.contextmanager
def _figure(width: float, height: float, out: Path, about: str = "") -> Iterator[Any]:
    """Yield a white figure of ``width`` x ``height`` inches; afterwards write it to ``out`` as PNG, atomically.

    ``about`` is kept in the file as its description, for whoever finds the picture without its folder.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(out) as temporary:
            figure.savefig(temporary, format="png", metadata={"Description": line(about)} if about else None)


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
    """Return ``text`` on one line, with "?" for what no font can draw: control characters and single surrogates."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", " ".join(str(text).split()))


def _wrapped(text: object, width: float, size: float) -> list[str]:
    """Wrap ``text`` into lines of about ``width`` inches at ``size`` points; a letter is 0.55 of its size wide."""
    return textwrap.wrap(line(text), max(int(width * 72 / (size * 0.55)), 8), break_on_hyphens=False) or [""]


def _tile_size(width: int, height: int, area: float = TILE_AREA) -> tuple[float, float]:
    """Return inches of a tile for an image of ``width`` x ``height`` pixels: equal areas, whatever the aspect ratio."""
    ratio = math.sqrt(width / height)
    across, down = math.sqrt(area) * ratio, math.sqrt(area) / ratio
    shrink = min(1.0, TILE_SIDE / across, TILE_SIDE / down)
    return across * shrink, down * shrink


def _columns(count: int, tile_width: float, tile_height: float) -> int:
    """Return how many columns bring ``count`` tiles near a 4:3 page, with as few empty places as the rows allow."""
    columns = min(max(round(math.sqrt(count * tile_height * 4 / 3 / tile_width)), 1), count)
    return math.ceil(count / math.ceil(count / columns))


def word_grid(explanation: Explanation, out: Path) -> None:
    """Write a PNG of the plain image and, one tile per word, its default maps over it, all on one colour scale.

    Below each tile, where it was measured: the share of the word's attention that falls on the image.

    Raises:
        OSError, ValueError: as :func:`checked_photo`.
    """
    photo = checked_photo(explanation)
    word_maps, mass = explanation.word_maps[0], explanation.image_mass
    across, down = _tile_size(*photo.size)
    step = (across + GAP, down + TITLE + GAP + (FOOT if mass is not None else 0))
    count = len(explanation.words) + 1
    columns = _columns(count, *step)
    width = max(columns * step[0] - GAP + 2 * MARGIN, MIN_WIDTH)
    caption = _wrapped(explanation.caption, width - 2 * MARGIN, 13)
    head = MARGIN + 0.24 * len(caption) + 0.3
    height = head + math.ceil(count / columns) * step[1] + 0.88
    start = (width - columns * step[0] + GAP) / 2
    corners = [(start + n % columns * step[0], head + TITLE + n // columns * step[1]) for n in range(count)]
    spec = word_maps.spec
    with _figure(width, height, Path(out), f"{_origin(explanation)} | maps: {spec}, row {spec.row}") as figure:
        _heading(figure, caption, explanation)
        end = scale_end(word_maps.maps)
        tiles = _tiles(explanation, photo, (round(across * DPI), round(down * DPI)), end)
        for number, ((left, top), (title, pixels)) in enumerate(zip(corners, tiles, strict=True)):
            figure.figimage(pixels, round(left * DPI), round((height - top) * DPI) - len(pixels))  # from the lower left
            style = {"va": "bottom", "ha": "center"} | ({"color": GREY} if number == 0 else {})
            _fit(figure, _write(figure, left + across / 2, top - 0.05, title, fontsize=11, **style), across + GAP / 2)
            if mass is not None and number:
                share = f"{mass[number - 1]:.0%} on the image"
                _write(figure, left + across / 2, top + down + 0.04, share, ha="center", fontsize=6.5, color=GREY)
        _colour_bar(figure, height - 0.71, end, bool(word_maps.maps.max() > end), f"maps: {spec}")
        about = METHODS[spec.method].about
        foot = _write(figure, width / 2, height - 0.09, about, ha="center", va="bottom", fontsize=7, color=GREY)
        _fit(figure, foot, width - MARGIN)


def _origin(explanation: Explanation) -> str:
    """Return the model, the image and its caption in a line."""
    return f"{MODELS[explanation.model]}, {explanation.path.name}: {explanation.caption}"


def _heading(figure: Any, caption: list[str], explanation: Explanation) -> None:
    """Write the caption, and below it the model, the file and the notes in small print."""
    width = figure.get_size_inches()[0]
    title = _write(figure, width / 2, MARGIN, "\n".join(caption), ha="center", fontsize=13, linespacing=1.25)
    _fit(figure, title, width - MARGIN)
    notes = [f"{name} {value}" for name, value in explanation.notes.items()]
    small = "  ·  ".join(map(line, [MODELS[explanation.model], explanation.path.name, *notes]))
    below = MARGIN + 0.24 * len(caption) + 0.06
    _fit(figure, _write(figure, width / 2, below, small, ha="center", fontsize=8, color=GREY), width - MARGIN)


def _tiles(
    explanation: Explanation, photo: Image.Image, size: tuple[int, int], end: float
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield title and pixels (H, W, 3) of each tile; ``size`` is (width, height) in pixels."""
    small = photo.resize(size, Image.Resampling.LANCZOS)
    window = _scaled(explanation.window, photo, small)
    yield PLAIN, np.asarray(small) / 255
    for word, grid in zip(explanation.words, explanation.word_maps[0].maps, strict=True):
        yield line(word), _coloured(small, spread(grid, size, window), end)


def _colour_bar(figure: Any, top: float, end: float, cut: bool, label: str) -> None:
    """Draw a horizontal colour bar from 0 to ``end``, with an arrow where some values are larger (``cut``)."""
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
    axis.set_xlabel(line(label), fontsize=8, labelpad=3)


def contact_sheet(
    explanation: Explanation,
    specs: Sequence[MapSpec],
    rows: Mapping[int, Sequence[Box]],
    out: Path,
    absent: Mapping[MapSpec, str] | None = None,
) -> None:
    """Write a PNG of one image by several methods: a row per word, and in it the plain image and a map by each method.

    Args:
        explanation: the image with its maps.
        specs: the columns.
        rows: the words to show, by place, each with the boxes (x, y, width, height in pixels) of what it names.
        out: the picture's path.
        absent: the specs that the explanation has no maps of, each with the reason, which their columns say instead.

    Raises:
        OSError, ValueError: as :func:`checked_photo`; there is no row.
    """
    photo, made = checked_photo(explanation), {found.spec: found.maps for found in explanation.word_maps}
    if not rows:
        raise ValueError(f"{explanation.path}: no word of {explanation.caption!r} to show; give at least one")
    across, down = _tile_size(*photo.size, area=SHEET_AREA)
    step, size = (across + SHEET_GAP, down + SHEET_GAP), (round(across * DPI), round(down * DPI))
    left = MARGIN + SHEET_WORD + SHEET_GAP
    width = max(left + (len(specs) + 1) * step[0] - SHEET_GAP + MARGIN, MIN_WIDTH)
    caption = _wrapped(explanation.caption, width - 2 * MARGIN, 13)
    top = MARGIN + 0.24 * len(caption) + 0.3 + SHEET_TITLE
    height = top + len(rows) * step[1] + 0.32
    about = f"{_origin(explanation)} | maps: {'; '.join(str(spec) for spec in specs if spec in made)}"
    with _figure(width, height, Path(out), about) as figure:
        _heading(figure, caption, explanation)
        for number, spec in enumerate(specs, 1):
            at = left + number * step[0] + across / 2
            _column_title(figure, at, top, across, spec)
            if spec not in made:
                reason = "\n".join(_wrapped((absent or {}).get(spec, "not made"), across, 6.5))
                _write(figure, at, top, reason, ha="center", fontsize=6.5, color=GREY)
        for number, (place, boxes) in enumerate(rows.items()):
            word = _write(
                figure,
                MARGIN + SHEET_WORD,
                top + number * step[1] + down / 2,
                line(explanation.words[place]),
                fontsize=11,
                ha="right",
                va="center",
            )
            _fit(figure, word, SHEET_WORD)
            grids = {n: made[spec][place] for n, spec in enumerate(specs, 1) if spec in made}
            for column, tile in _sheet_row(explanation, photo, grids, boxes, size):
                x, y = left + column * step[0], height - top - number * step[1]  # y from below
                figure.figimage(tile, round(x * DPI), round(y * DPI) - len(tile))
        foot = "each map on its own colours, from nothing to its largest value; a frame: the box of what the word names"
        foot = _write(figure, width / 2, height - 0.12, foot, ha="center", va="bottom", fontsize=7, color=GREY)
        _fit(figure, foot, width - MARGIN)


def _column_title(figure: Any, at: float, bottom: float, width: float, spec: MapSpec) -> None:
    """Write a method's name above its column, whose middle is at ``at`` inches, and below it layers and heads."""
    small = "\n".join(f"{name} {value}" for name, value in spec.choices().items())
    style = {"ha": "center", "va": "bottom"}
    _fit(figure, _write(figure, at, bottom - 0.27, spec.method, fontsize=10, **style), width)
    _write(figure, at, bottom - 0.05, small, fontsize=6, color=GREY, linespacing=1.2, **style)


def _sheet_row(
    explanation: Explanation,
    photo: Image.Image,
    grids: Mapping[int, np.ndarray],
    boxes: Sequence[Box],
    size: tuple[int, int],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield column and pixels of a word's tiles, each of ``size`` (width, height): the plain image as 0, and maps."""
    small = photo.resize(size, Image.Resampling.LANCZOS)
    window, scale = _scaled(explanation.window, photo, small), np.tile(np.divide(size, photo.size), 2)
    lit = {n: _coloured(small, spread(grid, size, window), scale_end(grid)) for n, grid in grids.items()}
    for column, pixels in {0: np.asarray(small) / 255, **lit}.items():
        tile = Image.fromarray((pixels * 255).round().astype(np.uint8))
        draw = ImageDraw.Draw(tile)
        for x, y, w, h in (np.multiply(box, scale).round().tolist() for box in boxes):
            for reach, colour in ((1, "black"), (0, "white")):  # seen on light and on dark ground
                draw.rectangle((x - reach, y - reach, x + w + reach, y + h + reach), outline=colour)
        yield column, np.asarray(tile) / 255


def best_worst(pairs: Sequence[Pair], out: Path) -> None:
    """Write a PNG of image-caption pairs side by side, each with its CLIPScore and its references.

    Raises:
        ValueError: no pair is given.
    """
    if not pairs:
        raise ValueError("no image-caption pair to draw; give at least one")
    column, picture, gap = 4.6, 3.5, 0.4  # inches
    captions = [_wrapped(pair.caption, column, 12.5) for pair in pairs]
    references = [[line for text in pair.references for line in _bullet(text, column)] for pair in pairs]
    text_top = MARGIN + 0.38 + picture + 0.15
    references_top = text_top + 0.225 * max(map(len, captions)) + 0.12
    height = references_top + 0.24 + 0.165 * max(map(len, references)) + MARGIN
    with _figure(len(pairs) * (column + gap) - gap + 2 * MARGIN, height, Path(out)) as figure:
        for number, pair in enumerate(pairs):
            left = MARGIN + number * (column + gap)
            heading = _write(figure, left, MARGIN, line(pair.title), fontsize=12, weight="bold")
            _fit(figure, heading, column - 1.6)
            _write(figure, left + column, MARGIN, f"CLIPScore {pair.clipscore:.3f}", fontsize=12, ha="right")
            axis = _place(figure, left, MARGIN + 0.38, column, picture)
            photo = load_image(pair.path)
            photo.thumbnail((round(column * DPI), round(picture * DPI)), Image.Resampling.LANCZOS)
            axis.imshow(photo, interpolation="antialiased")
            axis.set_anchor("W")
            axis.set_axis_off()
            _write(figure, left, text_top, "\n".join(captions[number]), fontsize=12.5, linespacing=1.25)
            small = {"fontsize": 9, "color": GREY, "linespacing": 1.25}
            _write(figure, left, references_top, f"references · {line(pair.path.name)}", **small)
            _write(figure, left, references_top + 0.2, "\n".join(references[number]), **small)


def _bullet(text: str, width: float) -> list[str]:
    first, *rest = _wrapped(text, width - 0.2, 9)
    return [f"– {first}", *(f"   {line}" for line in rest)]


def grounding_chart(rows: Sequence[Row], out: Path) -> None:
    """Write a PNG of pointing accuracy: the best dozen specs and, below them in grey, every baseline.

    Args:
        rows: as ``comparison.table`` makes them, in any order.
        out: the picture's path.

    Raises:
        ValueError: all rows are baselines.
    """
    ranked = sorted(rows, key=lambda row: -row.pointing)
    best = [row for row in ranked if row.layers is not None][:CHART_ROWS]
    baselines = [row for row in ranked if row.note == "baseline"]
    if not best:
        raise ValueError("nothing to chart but baselines; give rows with layers and heads")
    shown = best + baselines
    places = [n + 0.6 * (n >= len(best)) for n in range(len(shown))]
    with _figure(8.4, 1.15 + 0.3 * (places[-1] + 1), Path(out)) as figure:
        width, height = figure.get_size_inches()
        axis = _place(figure, 2.75, 0.62, width - 2.75 - 1.75, height - 0.62 - 0.53)
        colours = ["#2f6c9f" if row in best else "#b6bdc6" for row in shown]
        axis.barh(places, [row.pointing for row in shown], height=0.72, color=colours)
        if baselines:
            axis.plot([baselines[0].pointing] * 2, [-0.6, places[len(best)]], color=GREY, lw=0.8, ls=(0, (4, 3)))
        _label_bars(axis, shown, places)
        axis.set(ylim=(places[-1] + 0.6, -0.6), xlim=(0, 1.15 * ranked[0].pointing or 1))
        axis.set_yticks(places, [_name(row) for row in shown], fontsize=8.5)
        axis.set_xlabel("pointing accuracy: the maximum is in a box of the named thing", fontsize=8.5, loc="left")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.tick_params(axis="x", labelsize=8, color=GREY)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        _write(figure, MARGIN, 0.14, "Do the maps point at what the words name?", fontsize=11.5, weight="bold")


def _name(row: Row) -> str:
    """Return a bar's title; the row of a token is named where it is not the usual one."""
    if row.layers is None:
        name = BASELINES.get(row.method, row.method)
    else:
        name = f"{row.method} · layers {row.layers} · {row.heads}" + " · own row" * (row.row == "own")
    return textwrap.shorten(line(name), 44, placeholder="…")


def _label_bars(axis: Any, rows: Sequence[Row], places: Sequence[float]) -> None:
    """Write each bar's value at its end, and the further measures of specs in columns at the right."""
    beside = axis.get_yaxis_transform()  # across in shares of the axes, down in bars
    columns = {"mass / area": ([row.mass_ratio for row in rows], 1.12), "IoU": ([row.iou for row in rows], 1.3)}
    for place, row in zip(places, rows, strict=True):
        end = (row.pointing, place)
        axis.annotate(f"{row.pointing:.1%}", end, (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    for title, (values, at) in columns.items():
        axis.text(at, -0.75, title, transform=beside, ha="center", va="bottom", fontsize=8, color=GREY)
        for place, value in zip(places, values, strict=True):
            if value is not None:
                axis.text(at, place, f"{value:.2f}", transform=beside, va="center", ha="center", fontsize=8.5)
