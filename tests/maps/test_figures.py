"""figures.py: maps land on the right pixels of the original image, and pictures hold what they say."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioning.maps import figures
from captioning.maps.attention import METHODS, Explanation, MapSpec, WordMaps
from captioning.maps.comparison import Row
from captioning.maps.pairs import Pair

LONG = " ".join(["a", "remarkably", "well-lit", "$5", "photograph", "of"] * 5)


def explanation(path, size=(120, 80), window=None, words=("a", "dog"), grid=(4, 6), hot=None, **more):
    """A grey image of ``size``; the last word of the only maps has its hot cell at row, column ``hot``."""
    Image.new("RGB", size, (128, 128, 128)).save(path)
    found = [WordMaps(MapSpec("raw", "2-3", "mean"), planted(hot, len(words), grid))]
    return Explanation(Path(path), " ".join(words), list(words), found, window or (0, 0, *size), "p2", **more)


def planted(hot=None, words=1, grid=(4, 6)):
    """Maps with little attention everywhere, but for the cell ``hot`` of the last word."""
    maps = np.full((words, *grid), 0.01, dtype=np.float32)
    if hot is not None:
        maps[-1][hot] = 0.5
    return maps


@pytest.fixture
def texts(monkeypatch):
    """The texts of the figures that are drawn, each with its box in pixels, by the figure's size in pixels."""
    from matplotlib.figure import Figure

    drawn = {}
    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        found = [t for t in figure.findobj(lambda artist: hasattr(artist, "get_text")) if t.get_visible()]
        drawn[tuple(figure.get_size_inches() * figure.dpi)] = [
            (t.get_text(), t.get_window_extent()) for t in found if t.get_text().strip()
        ]

    monkeypatch.setattr(Figure, "savefig", spy)
    return drawn


def assert_nothing_is_cut_off_or_run_together(texts):
    for (width, height), found in texts.items():
        for text, box in found:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{text!r} leaves the figure"
        for n, (one, box) in enumerate(found):
            for other, beside in found[:n]:
                assert not box.overlaps(beside), f"{one!r} lies over {other!r}"


SHAPES = {  # size, window, and the hot cell of a 4 x 6 grid
    "landscape": ((120, 80), (0, 0, 120, 80), (1, 4)),
    "portrait": ((80, 120), (0, 0, 80, 120), (3, 0)),
    "square": ((90, 90), (0, 0, 90, 90), (0, 5)),
    "cropped sides": ((160, 80), (40, 0, 120, 80), (2, 1)),
    "cropped top": ((80, 160), (0, 30, 80, 130), (2, 1)),
    "parts of pixels": ((200, 99), (50.3, 0, 149.8, 98.7), (0, 2)),
    "smaller than its grid": ((5, 3), (0, 0, 5, 3), (1, 4)),
}


@pytest.mark.parametrize(("size", "window", "hot"), SHAPES.values(), ids=SHAPES)
def test_a_planted_patch_lands_on_its_pixels_of_the_original(size, window, hot):
    heat = figures.spread(planted(hot)[0], size, window)
    assert heat.shape == size[::-1]
    left, top, right, bottom = window
    x0, x1 = (left + (right - left) * (hot[1] + n) / 6 for n in (0, 1))
    y0, y1 = (top + (bottom - top) * (hot[0] + n) / 4 for n in (0, 1))
    y, x = np.unravel_index(np.nanargmax(heat), heat.shape)
    assert x0 - 0.5 <= x + 0.5 <= x1 + 0.5
    assert y0 - 0.5 <= y + 0.5 <= y1 + 0.5
    if size[0] > 50:  # the weight of the patch lies around its centre, which a border cell alone cannot show
        inner = np.nan_to_num(heat - 0.01)
        rows, columns = np.nonzero(inner > 0.6 * inner.max())
        assert (columns.min() + columns.max() + 1) / 2 == pytest.approx((x0 + x1) / 2, abs=0.5 * (x1 - x0))
        assert (rows.min() + rows.max() + 1) / 2 == pytest.approx((y0 + y1) / 2, abs=0.5 * (y1 - y0))


def test_an_inner_patch_is_centred_to_the_pixel():
    """A grid that is shifted by half a cell, or a window by a pixel, still has its maximum in the right cell."""
    heat = np.nan_to_num(figures.spread(planted((2, 5), grid=(5, 8))[0], (200, 120), (20, 10, 180, 110)) - 0.01)
    x, y = (heat.sum(axis) @ (np.arange(heat.shape[1 - axis]) + 0.5) / heat.sum() for axis in (0, 1))
    assert (x, y) == pytest.approx((20 + 160 * 5.5 / 8, 10 + 100 * 2.5 / 5), abs=0.05)


def test_only_the_window_is_filled_and_values_stay_in_their_range():
    heat = figures.spread(planted((2, 1))[0], (160, 80), (40, 0, 120, 80))
    assert np.isnan(heat[:, :40]).all() and np.isnan(heat[:, 120:]).all()
    inside = heat[:, 40:120]
    assert inside.min() == pytest.approx(0.01)  # bicubic filters undershoot: attention below zero
    assert inside.max() <= 0.5


def test_even_attention_stays_even_up_to_the_border():
    heat = figures.spread(planted()[0], (33, 21), (0.4, 0.6, 32.7, 20.2))
    assert np.isfinite(heat[1:20, 1:32]).all()
    assert heat[np.isfinite(heat)] == pytest.approx(0.01)


@pytest.fixture
def tiles(monkeypatch):
    """The pixels (H, W, 3) of each word's tile that is drawn."""
    drawn, coloured = [], figures._coloured
    monkeypatch.setattr(figures, "_coloured", lambda *args: drawn.append(coloured(*args)) or drawn[-1])
    return drawn


def test_the_map_follows_a_photograph_that_a_camera_stored_lying_down(tmp_path, tiles):
    """The window is in pixels of the upright image, as the model sees it, not of the stored one."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    item = explanation(tmp_path / "a.jpg", (80, 120), hot=(0, 5))
    Image.new("RGB", (120, 80)).save(item.path, exif=exif)
    figures.word_grid(item, tmp_path / "out.png")
    height, width = tiles[-1].shape[:2]
    y, x = np.unravel_index(tiles[-1].sum(-1).argmax(), (height, width))
    assert height / width == pytest.approx(1.5, rel=0.01) and x / width > 0.8 and y / height < 0.25


def test_colours_grow_lighter_and_denser_with_attention():
    colours = figures.palette().astype(int)
    assert colours.shape == (256, 4)
    assert (np.diff(colours[:, :3] @ [299, 587, 114]) >= -600).all() and (np.diff(colours[:, 3]) >= 0).all()
    assert colours[0, 3] == 0, "no attention must leave the image as it is"


def test_the_scale_forgives_single_outliers_and_no_attention():
    maps = np.full((10, 12, 12), 0.1)
    maps[0, 0, 0] = 50
    assert figures.scale_end(maps) == pytest.approx(0.1)
    assert figures.scale_end(np.zeros((2, 4, 4))) == 1
    maps[:] = 0
    maps[0, 0, 0] = 0.3
    assert figures.scale_end(maps) == 0.3


@pytest.mark.parametrize("size", [(90, 90), (640, 480), (480, 640), (900, 150), (150, 900)])
@pytest.mark.parametrize("caption", ["a", LONG], ids=["word", "long"])
def test_word_grids_of_any_shape_cut_nothing_off(tmp_path, texts, size, caption):
    words = tuple(caption.split())
    item = explanation(
        tmp_path / f"{'name' * 30}.png",
        size,
        words=words,
        hot=(1, 1),
        notes={"CLIPScore": "0.81"},
        image_mass=np.linspace(0, 1, len(words)),
    )
    figures.word_grid(item, tmp_path / "out.png")
    assert_nothing_is_cut_off_or_run_together(texts)
    (found,) = ([text for text, _ in found] for found in texts.values())
    shown = [text for text in found if text in {*words, "plain image"}]
    tiles = ["plain image", *words]
    assert sorted(shown) == sorted(tiles + [caption] * (len(words) == 1)), "every word has its title, $ and all"
    assert " ".join(caption.split()) in [" ".join(text.split()) for text in found]
    assert {"maps: raw, layers 2-3, heads mean", METHODS["raw"].about} <= set(found)
    assert any(text.startswith("tuned captioner  ·  namename") for text in found)
    assert sum(text.endswith(" on the image") for text in found) == len(words)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.info["dpi"][0] >= 150
        assert 800 <= picture.width <= 3600 and picture.height <= 3600
        about = picture.info["Description"]
    how = "maps: raw, layers 2-3, heads mean, row predict"
    assert about == f"tuned captioner, {item.path.name}: {item.caption} | {how}"


SPECS = [MapSpec("raw", "all"), MapSpec("grad", "2-3", "max"), MapSpec("rollout", "all"), MapSpec("relative", "all")]
BOX = (60, 20, 40, 40)


def sheet(path, size=(120, 80), words=("a", "dog", "and", "dog"), absent=(), **more):
    """An explanation with maps by the specs that are not ``absent``; the last word's hot cell is in ``BOX``."""
    found = [WordMaps(spec, planted((1, 4), len(words))) for spec in SPECS if spec not in absent]
    return broken(explanation(path, size, words=words, **more), word_maps=found)


@pytest.mark.parametrize("size", [(120, 80), (60, 200), (640, 90)])
def test_a_contact_sheet_has_a_row_per_word_and_a_column_per_method(tmp_path, texts, tiles, monkeypatch, size):
    from matplotlib.figure import Figure

    cells, draw = [], Figure.figimage
    monkeypatch.setattr(Figure, "figimage", lambda self, *args: cells.append(args) or draw(self, *args))
    item = sheet(tmp_path / "a.png", size, notes={"CLIPScore": "0.81"})
    figures.contact_sheet(item, SPECS, {1: [], 3: [BOX]}, tmp_path / "out.png")
    assert len(tiles) == 2 * 4 and len(cells) == 2 * (1 + 4), "the plain image comes first"
    places = {(x, y) for _, x, y in cells}
    assert len({x for x, _ in places}) == 5 and len({y for _, y in places}) == 2 and len(places) == 10
    assert_nothing_is_cut_off_or_run_together(texts)
    (found,) = ([text for text, _ in found] for found in texts.values())
    assert [text for text in found if text in METHODS] == ["raw", "grad", "rollout", "relative"]
    assert found.count("dog") == 2 and "a" not in found and "layers 2-3\nheads max" in found
    with Image.open(tmp_path / "out.png") as picture:
        about = picture.info["Description"]
    assert about.endswith("| maps: " + "; ".join(map(str, SPECS)))


def test_a_contact_sheet_frames_what_the_word_names_where_it_is_known(tmp_path, monkeypatch):
    """On the original's pixels, whatever the tile's size, in the plain image too."""
    made, row = [], figures._sheet_row
    monkeypatch.setattr(figures, "_sheet_row", lambda *args: iter(made.append(list(row(*args))) or made[-1]))
    item = sheet(tmp_path / "a.png")
    for boxes in ([], [BOX]):
        figures.contact_sheet(item, SPECS, {3: boxes}, tmp_path / "out.png")
    bare, framed = (dict(tiles) for tiles in made)
    assert bare.keys() == framed.keys() == {0, 1, 2, 3, 4}
    scale = framed[0].shape[1] / 120
    left, middle = round(BOX[0] * scale), round((BOX[1] + BOX[3] / 2) * scale)
    for column, tile in framed.items():
        assert tile[middle, left].min() == 1 and tile[middle, left - 1].max() == 0, "white on black"
        assert (tile != bare[column]).any(-1).mean() < 0.1, "the frame hides nothing"
        y, x = np.unravel_index(bare[column].sum(-1).argmax(), tile.shape[:2])
        assert column == 0 or (BOX[0] < x / scale < BOX[0] + BOX[2] and BOX[1] < y / scale < BOX[1] + BOX[3])


def test_a_method_that_a_model_cannot_serve_has_the_reason_in_its_column(tmp_path, texts, tiles):
    absent = {SPECS[2]: "rollout needs the attention of the image's own rows; capture all rows"}
    item = sheet(tmp_path / "a.png", absent=absent)
    figures.contact_sheet(item, SPECS, {1: [BOX]}, tmp_path / "out.png", absent)
    assert len(tiles) == 3
    assert_nothing_is_cut_off_or_run_together(texts)
    (found,) = ([text for text, _ in found] for found in texts.values())
    assert "rollout" in found and any(" ".join(text.split()) == absent[SPECS[2]] for text in found)
    with pytest.raises(ValueError, match=r"a\.png: no word of 'a dog and dog' to show"):
        figures.contact_sheet(item, SPECS, {}, tmp_path / "none.png")


def test_tiles_keep_the_aspect_ratio_and_show_the_patch(tmp_path, tiles):
    item = explanation(tmp_path / "a.png", (320, 160), (80, 0, 240, 160), hot=(0, 0))
    figures.word_grid(item, tmp_path / "out.png")
    height, width = tiles[1].shape[:2]
    assert width / height == pytest.approx(2, rel=0.01)
    points = ((7 / 24, 1 / 8), (0.1, 0.1), (0.6, 0.6))
    patch, outside, grey = (tiles[1][round(height * y), round(width * x)] for x, y in points)
    assert patch[0] > 0.9 and patch[0] - patch[2] > 0.2, "the hot cell is coloured"
    assert np.ptp(grey) < 0.05 and grey.mean() > 0.4, "little attention leaves the image seen"
    assert np.ptp(outside) == 0 and outside.mean() == pytest.approx(figures.OUTSIDE * 128 / 255, abs=0.01)


def test_one_word_longer_than_its_tile_is_shrunk_and_then_cut(tmp_path, texts):
    item = explanation(tmp_path / "a.png", (100, 500), words=("unbelievable", "pneumono" * 12, "a"))
    figures.word_grid(item, tmp_path / "out.png")
    (found,) = ([text for text, _ in found] for found in texts.values())
    assert {"unbelievable", "plain image"} <= set(found), "what fits when it is smaller stays whole"
    assert any(text.startswith("pneumono") and text.endswith("…") for text in found)
    assert_nothing_is_cut_off_or_run_together(texts)


def broken(item, **change):
    return Explanation(**{**item.__dict__, **change})


def test_bad_maps_name_the_file_and_leave_the_old_picture(tmp_path):
    item = explanation(tmp_path / "a.png", hot=(1, 1))
    out = tmp_path / "out.png"
    out.write_text("old")
    good = item.word_maps[0].maps

    def seen(*maps):
        return [{"word_maps": [WordMaps(MapSpec("raw", "3", "max"), m)]} for m in maps]

    bad = {
        "finite and not negative": seen(-good, good * np.nan),
        r"not \(2, rows, columns\)": seen(good[:1], good[0], good[:, :0]),
        "at least one of each": [{"word_maps": []}, {"words": []}],
        "masses": [{"image_mass": np.ones(3)}, {"image_mass": np.array([0.5, np.nan])}],
        "larger than the image": [{"window": (0, 0, 121, 80)}, {"window": (0, 0, 120, 82)}],
        "is not": [{"window": (40, 0, 40, 80)}, {"window": (0, -1, 120, 80)}],
    }
    for message, changes in bad.items():
        for change in changes:
            with pytest.raises(ValueError, match=rf"a\.png.*{message}"):
                figures.word_grid(broken(item, **change), out)
    assert out.read_text() == "old"


def test_best_and_worst_show_caption_references_and_score(tmp_path, texts):
    pairs = []
    for name, size in (("wide", (300, 60)), ("tall", (60, 300))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        references = ["one $x$ two", LONG, *["three"] * 3] if name == "tall" else ["four"]
        caption = LONG if name == "wide" else "a"
        pairs.append(Pair(f"{name} " * 9, tmp_path / f"{name}.png", caption, references, 0.32196))
    figures.best_worst(pairs, tmp_path / "out.png")
    (found,) = ([" ".join(text.split()) for text, _ in found] for found in texts.values())
    assert_nothing_is_cut_off_or_run_together(texts)
    assert LONG in found and found.count("CLIPScore 0.322") == 2
    assert f"– one $x$ two – {LONG} – three – three – three" in found
    with pytest.raises(ValueError, match="at least one"):
        figures.best_worst([], tmp_path / "none.png")


def row(pointing, layers="3"):
    return Row("raw", layers, "mean", "predict", pointing, mass_ratio=1.5, iou=0.2)


def baseline(name, pointing):
    return Row(name, pointing=pointing, note="baseline")


@pytest.mark.parametrize("count", [1, 40])
def test_the_chart_has_the_best_rows_in_order_and_every_baseline(tmp_path, texts, count):
    rows = [row((n * 7 % count + 1) / (count + 1), str(n)) for n in range(count)]
    baselines = [baseline("random", 0.0), baseline("mean $image$", 0.3)]
    figures.grounding_chart([*baselines, *rows], tmp_path / "out.png")
    assert_nothing_is_cut_off_or_run_together(texts)
    (found,) = ([text for text, _ in found] for found in texts.values())
    named = [text for text in found if text.startswith("raw · ")]
    best = sorted(rows, key=lambda r: -r.pointing)[:12]
    assert named == [f"raw · layers {r.layers} · mean" for r in best]
    assert {"random cell", "mean $image$", "0.0%", "30.0%", f"{best[0].pointing:.1%}"} <= set(found)
    assert found.count("1.50") == found.count("0.20") == min(count, 12)


def test_a_chart_without_baselines_or_success(tmp_path, texts):
    figures.grounding_chart([row(0.0)], tmp_path / "out.png")
    (found,) = ([text for text, _ in found] for found in texts.values())
    assert "0.0%" in found
    with pytest.raises(ValueError, match="nothing to chart but baselines"):
        figures.grounding_chart([baseline("centre point", 0.2)], tmp_path / "none.png")


def test_odd_text_is_drawn_without_a_complaint(tmp_path):
    item = explanation(tmp_path / "a.png", words=("$", "$\\frac{$", "a\nb", "_x^2", "\udc80", "\x01"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.word_grid(item, tmp_path / "out.png")


def test_pictures_leave_matplotlib_as_it_was(tmp_path):
    """A report draws many pictures: with pyplot each would stay in memory, and settings would reach other figures."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    before, open_figures = dict(mpl.rcParams), plt.get_fignums()
    item = explanation(tmp_path / "a.png")
    figures.word_grid(item, tmp_path / "out.png")
    assert (dict(mpl.rcParams), plt.get_fignums()) == (before, open_figures)
