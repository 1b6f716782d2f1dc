"""viewer.py: the page as a user has it in a browser, by mouse, touch and keyboard, and what must not run in it."""

import base64
import contextlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from captioning.maps import viewer
from captioning.maps.attention import METHODS, Explanation, MapSpec, WordMaps

EVIL = "<script>window.hacked=1</script>"
EVIL_FILE = '"><img src=x onerror=window.hacked=2>.png'


def explanation(path, size=(120, 80), window=None, hot=(1, 4), words=("a", "dog", "runs"), found=None, **more):
    """An image of ``size`` whose last word has its hot cell at row, column ``hot`` of a 4 x 6 grid."""
    Image.new("RGB", size, (90, 140, 190)).save(path)
    maps = np.full((len(words), 4, 6), 0.01, dtype=np.float32)
    maps[-1][hot] = 0.5
    return Explanation(path, " ".join(words), list(words), found or raw(maps), window or (0, 0, *size), "p2", **more)


def raw(maps):
    return [WordMaps(MapSpec("raw", "3", "mean"), maps)]


def content(text):
    """The data that a page embeds."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def coloured_centre(picture, box):
    """Where the colours of the map are hottest inside ``box`` (x, y, width, height): shares of the box."""
    x, y, width, height = box
    pixels = np.asarray(picture.crop((round(x), round(y), round(x + width), round(y + height))))
    green = pixels[..., 1]  # it rises with attention all the way
    rows, columns = np.nonzero(green > 0.85 * green.max())
    return (columns.mean() + 0.5) / pixels.shape[1], (rows.mean() + 0.5) / pixels.shape[0]


@pytest.fixture(scope="module")
def plain_page(tmp_path_factory):
    """Two images; the first with five sets of maps, which are not every combination of choices."""
    folder = tmp_path_factory.mktemp("viewer")
    maps = np.random.default_rng(0).random((3, 4, 6), dtype=np.float32)
    names = ["raw 3 mean", "raw 3 max", "raw all mean", "grad all top", "grad 2 mean"]
    found = [WordMaps(MapSpec(*name.split()), maps * n) for n, name in enumerate(names, start=1)]
    first = explanation(folder / "first.png", found=found, image_mass=np.array([0.25, 0.5, 0.75]))
    second = explanation(folder / "second.png", notes={"CLIPScore": "0.81"})
    viewer.write([first, second], folder / "page.html", "Word maps")
    return folder / "page.html"


def test_the_maps_keep_their_values_within_half_a_step_of_a_byte(tmp_path):
    maps = np.random.default_rng(1).random((3, 4, 6), dtype=np.float32) * 7
    item = explanation(tmp_path / "a.png", found=raw(maps))
    view = content(viewer.page([item], "t"))["items"][0]["views"][0]
    levels = np.frombuffer(base64.b64decode(view["maps"]), dtype=np.uint8).reshape(3, *view["grid"])
    assert np.abs(levels / 255 * view["peak"] - maps).max() <= maps.max() / 255 * 0.51
    assert 0.9 * maps.max() < view["end"] <= view["peak"]


def test_every_method_has_its_line_and_only_what_it_depends_on_is_offered(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "blind", replace(METHODS["raw"], about="sees nothing", layers="", heads=False))
    maps = np.ones((3, 4, 6), dtype=np.float32)
    found = [WordMaps(spec, maps) for spec in (MapSpec("blind"), MapSpec("raw", "2"))]
    shown = content(viewer.page([explanation(tmp_path / "a.png", found=found)], "t"))
    assert {name: of["about"] for name, of in shown["methods"].items()} == {n: m.about for n, m in METHODS.items()}
    assert [[v["method"], v["layers"], v["heads"]] for v in shown["items"][0]["views"]] == [
        ["blind", "", ""],
        ["raw", "2", "mean"],
    ]
    assert shown["offer"] == []


def test_choices_that_make_no_difference_are_hidden(browser, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "blind", replace(METHODS["raw"], about="sees <nothing>", layers="", heads=False))
    maps = np.ones((3, 4, 6), dtype=np.float32)
    found = [WordMaps(spec, maps) for spec in (MapSpec("blind"), MapSpec("raw", "2"), MapSpec("raw", "all"))]
    viewer.write([explanation(tmp_path / "a.png", found=found)], tmp_path / "page.html", "t")
    browser.open(tmp_path / "page.html", fragment="#item=0&word=1")
    shown = "['layers', 'heads'].map(n => document.querySelector(`[name=${n}]`).offsetParent !== null)"
    assert browser.options("method") == ["blind", "raw"] and browser.run(shown) == [False, False]
    assert browser.text(".about") == "sees <nothing>"
    browser.choose("method", "raw")
    assert browser.run(shown) == [True, True] and browser.options("layers") == ["2", "all"]
    assert browser.text(".about") == METHODS["raw"].about
    assert browser.log() == []


def test_maps_without_any_attention_are_no_division_by_zero(tmp_path):
    maps = np.zeros((3, 4, 6), dtype=np.float32)
    view = content(viewer.page([explanation(tmp_path / "a.png", found=raw(maps))], "t"))
    assert base64.b64decode(view["items"][0]["views"][0]["maps"]) == bytes(72)


def test_photographs_are_embedded_small_and_the_window_in_shares(tmp_path):
    item = content(viewer.page([explanation(tmp_path / "a.png", (2000, 1000), (500, 0, 1500, 1000))], "t"))["items"][0]
    encoded = base64.b64decode(item["photo"].removeprefix("data:image/jpeg;base64,"))
    (tmp_path / "a.jpg").write_bytes(encoded)
    with Image.open(tmp_path / "a.jpg") as photo:
        assert (photo.format, photo.size) == ("JPEG", (800, 400))
    assert (item["window"], item["aspect"]) == ([0.25, 0, 0.75, 1], 2)


def test_small_photographs_are_not_blown_up(tmp_path):
    item = content(viewer.page([explanation(tmp_path / "a.png")], "t"))["items"][0]
    (tmp_path / "a.jpg").write_bytes(base64.b64decode(item["photo"].split(",")[1]))
    with Image.open(tmp_path / "a.jpg") as photo:
        assert photo.size == (120, 80)


@pytest.mark.parametrize("text", ["</script>", "<!--", "<script>", "</SCRIPT >", "\u2028", "\udc80", "{{policy}}"])
def test_no_text_ends_its_script_or_breaks_the_page(tmp_path, text):
    item = explanation(tmp_path / "a.png", words=("a", text), notes={text: text})
    out = tmp_path / "page.html"
    viewer.write([item], out, f"title {text}")
    written = out.read_text(encoding="utf-8")
    block = written.split('type="application/json">')[1].split("</script>")[0]
    assert not set(block) & set("<>&")
    assert content(written)["items"][0]["words"][1] == text
    assert written.count("<script") == viewer.TEMPLATE.read_text(encoding="utf-8").count("<script")
    assert written.count("default-src") == 1, "a title that looks like a mark of the template was filled in"


def test_the_page_names_no_address(plain_page):
    text = re.sub(r'"photo":"[^"]*"', "", plain_page.read_text(encoding="utf-8"))
    assert not re.findall(r"https?:|src=\"(?!\")|@import|url\(", text.replace('src=""', ""))


def test_bad_input_names_the_file(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        viewer.page([], "Word maps")
    with pytest.raises(ValueError, match=r"a\.png: window .* larger than the image"):
        viewer.page([explanation(tmp_path / "a.png", window=(0, 0, 130, 80))], "t")
    with pytest.raises(ValueError, match=r"a\.png: raw, layers 3.*not \(3, rows, columns\)"):
        viewer.page([explanation(tmp_path / "a.png", found=raw(np.ones((2, 4, 6))))], "t")
    item = explanation(tmp_path / "a.png")
    item.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        viewer.page([item], "t")


def test_a_failed_page_leaves_the_old_one(tmp_path):
    out = tmp_path / "page.html"
    out.write_text("old")
    with pytest.raises(ValueError, match="masses"):
        viewer.write([explanation(tmp_path / "a.png", image_mass=np.ones(2))], out, "t")
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "a.png"}


@pytest.mark.parametrize(
    ("size", "window", "hot"),
    [
        ((120, 80), (0, 0, 120, 80), (1, 4)),
        ((80, 120), (0, 0, 80, 120), (3, 0)),
        ((90, 90), (0, 0, 90, 90), (0, 5)),
        ((160, 80), (40, 0, 120, 80), (2, 1)),
        ((80, 160), (0, 30, 80, 130), (2, 1)),
    ],
    ids=["landscape", "portrait", "square", "cropped sides", "cropped top"],
)
def test_a_planted_patch_lights_up_at_its_place_of_the_image(browser, tmp_path, size, window, hot):
    item = explanation(tmp_path / "a.png", size, window, hot)
    viewer.write([item], tmp_path / "page.html", "t")
    browser.open(tmp_path / "page.html", fragment="#item=0&word=2")
    box = browser.run("(b => [b.x, b.y, b.width, b.height])(document.querySelector('.stage').getBoundingClientRect())")
    assert box[2] / box[3] == pytest.approx(size[0] / size[1], rel=0.01), "the image lost its aspect ratio"
    assert box[3] <= 0.71 * 900, "a tall image must leave the window room"
    left, top, right, bottom = window
    x, y = left + (right - left) * (hot[1] + 0.5) / 6, top + (bottom - top) * (hot[0] + 0.5) / 4
    wanted = (x / size[0], y / size[1])
    for cells in (False, True):
        browser.choose("cells", cells)
        assert coloured_centre(browser.screenshot(tmp_path / "shot.png"), box) == pytest.approx(wanted, abs=0.03)
    across, down = (f"{100 * share:.0f}" for share in np.floor(np.multiply(wanted, 100) + 0.5) / 100)
    assert f"strongest {across}% from the left and {down}% from the top" in browser.text(".status")


def test_captions_and_file_names_are_text_and_never_run(browser, tmp_path):
    with contextlib.suppress(OSError):  # what the file system refuses cannot come from it
        Image.new("RGB", (8, 8)).save(tmp_path / EVIL_FILE)
    path = tmp_path / EVIL_FILE
    if not path.exists():
        pytest.skip("this file system refuses such a file name")
    item = explanation(path, words=("a", EVIL, f"</script>{EVIL}"), notes={"<!--": EVIL})
    viewer.write([item], tmp_path / "page.html", f"</title>{EVIL}")
    browser.open(tmp_path / "page.html")
    browser.choose("all", True)
    assert browser.run("window.hacked") is None
    assert browser.text("article h2") == EVIL_FILE
    assert browser.text("h1") == f"</title>{EVIL}"
    assert browser.run("[...document.querySelectorAll('.words button')].map(b => b.textContent)")[1:] == item.words
    assert EVIL in browser.text(".notes")
    assert browser.run("[document.scripts.length, document.querySelectorAll('img[src=x]').length]") == [2, 0]
    assert browser.log() == []


def test_the_policy_stops_what_escaping_would_miss(browser, tmp_path):
    """The second wall: were markup ever to get through, the browser itself would run and load nothing."""
    viewer.write([explanation(tmp_path / "a.png")], tmp_path / "page.html", "t")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    hole = f'<main>{EVIL}<img src="https://example.org/x.png" onerror="window.hacked=2">'
    (tmp_path / "page.html").write_text(text.replace("<main>", hole), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('.words button').length") == 4, "the page's own script must run"
    assert sum("Content Security Policy" in message for message in browser.log()) >= 2


def test_words_by_keyboard(browser, plain_page):
    browser.open(plain_page)
    focused = "document.activeElement.textContent"
    browser.press("tab")
    assert browser.run(focused) == "plain image"
    for key, word in [
        ("right", "a"),
        ("right", "dog"),
        ("left", "a"),
        ("end", "runs"),
        ("right", "runs"),
        ("home", "plain image"),
        ("left", "plain image"),
        ("end", "runs"),
    ]:
        browser.press(key)
        assert browser.run(focused) == word
        assert browser.text("[aria-pressed=true]") == word
    assert "word 3 of 3" in browser.text(".status")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus must be seen"
    browser.press("home", "tab")
    assert browser.run("document.activeElement.name") == "method", "the words are one stop of the Tab key"
    browser.run("document.querySelector('.words [aria-pressed=true]').focus()")
    browser.press("escape")
    assert browser.text("[aria-pressed=true]") == "plain image"
    assert browser.run("getComputedStyle(document.querySelector('.window')).visibility") == "hidden"


def test_words_by_mouse_and_by_touch(browser, plain_page):
    browser.open(plain_page)
    browser.pointer("mouse", *browser.word(0, 1))
    assert browser.text("[aria-pressed=true]") == "dog"
    browser.pointer("mouse", 2, 2)
    assert browser.text("[aria-pressed=true]") == "plain image", "hovering lasts as long as the pointer stays"
    browser.pointer("mouse", *browser.word(0, 1), "pointerDown", "pointerUp")
    browser.pointer("mouse", 2, 2)
    assert browser.text("[aria-pressed=true]") == "dog", "a click stays"
    browser.pointer("touch", *browser.word(1, 2), "pointerDown", "pointerUp")
    assert "word 3 of 3" in browser.text("article:nth-of-type(2) .status")
    assert browser.text("article:nth-of-type(1) [aria-pressed=true]") == "dog", "each image has its own word"


def test_only_combinations_that_exist_are_offered_and_what_is_chosen_stays(browser, plain_page):
    browser.open(plain_page, fragment="#item=0&word=1")
    offered = [browser.options(name) for name in ("method", "layers", "heads")]
    assert offered == [["raw", "grad"], ["3", "all"], ["mean", "max"]]
    assert "50% of its attention" in browser.text(".status")
    before = browser.text(".end")
    browser.choose("layers", "all")
    assert browser.options("heads") == ["mean"]
    assert "its attention" not in browser.text(".status"), "the share was measured in the default view"
    assert float(browser.text(".end").split()[-1]) == pytest.approx(3 * float(before.split()[-1]), rel=0.05)
    browser.choose("method", "grad")
    assert browser.options("layers") == ["all", "2"]
    assert browser.run("['method', 'layers', 'heads'].map(n => document.querySelector(`[name=${n}]`).value)") == [
        "grad",
        "all",
        "top",
    ]
    assert browser.text("[aria-pressed=true]") == "dog"


def test_all_words_at_once_and_own_scales(browser, plain_page):
    browser.open(plain_page, fragment="#item=1&word=0")
    tiles = "[...document.querySelectorAll('article')[1].querySelectorAll('.tiles figcaption')].map(f => f.textContent)"
    centre = """(c => [...c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data])(
        document.querySelectorAll('article')[1].querySelector('.stage canvas'))"""
    assert browser.run(tiles) == []
    assert browser.run(centre)[3] < 30, "a word with little attention is faint beside one with much"
    browser.run("['all', 'own'].forEach(n => document.querySelectorAll(`[name=${n}]`)[1].click())")
    assert browser.run(tiles) == ["a", "dog", "runs"]
    assert browser.run(centre)[3] > 200, "on its own scale its largest value has the brightest colour"


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_is_wider_than_a_phone(browser, tmp_path, width):
    words = ("a", "pneumonoultramicroscopicsilicovolcanoconiosis" * 2, *["word"] * 30)
    item = explanation(tmp_path / f"{'long_name' * 20}.png", (600, 60), words=words, notes={"note": "x" * 200})
    viewer.write([item], tmp_path / "page.html", "title" * 30)
    browser.open(tmp_path / "page.html", width, 700)
    browser.choose("all", True)
    assert browser.run("document.documentElement.scrollWidth") == width
    small = "[...document.querySelectorAll('.words button')].filter(b => b.getBoundingClientRect().height < 32).length"
    assert browser.run(small) == 0, "fingers need room"


def test_light_and_dark_are_readable(browser, plain_page):
    colours = "['color', 'backgroundColor'].map(k => getComputedStyle(document.querySelector(arguments[0]))[k])"
    for dark in (False, True):
        browser.open(plain_page, dark=dark, fragment="#item=0&word=0")
        (page,) = browser.run("[getComputedStyle(document.body).backgroundColor]")
        assert (luminance(page) < 0.1) == dark
        card = browser.run(colours, "article")[1]
        for text, ground in [
            browser.run(colours, "[aria-pressed=true]"),
            (browser.run(colours, "h2")[0], card),
            (browser.run(colours, ".status")[0], card),
        ]:
            low, high = sorted((luminance(text), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (dark, text, ground)  # WCAG 2.2, AA
        assert browser.log() == []


def luminance(colour):
    """Relative luminance of a CSS ``rgb(…)`` colour, as WCAG 2.2 defines it."""
    levels = np.array([int(part) / 255 for part in re.findall(r"\d+", colour)[:3]])
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_links_to_what_does_not_exist_open_the_plain_page(browser, plain_page):
    for fragment in ("#item=9&word=1", "#item=0&word=99", "#item=__proto__&word=constructor", "#%"):
        browser.open(plain_page, fragment=fragment)
        assert browser.text("[aria-pressed=true]") == "plain image"
        assert browser.log() == []
