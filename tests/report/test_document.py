"""document.py: tables and pictures as the page and the files beside it have them."""

import base64
import io
import re

import pytest
from PIL import Image
from report_runs import png

from captioning.report import document
from captioning.report.document import Figure, Missing, Section, Table, Text


def test_tables_keep_every_digit_and_break_no_markdown(tmp_path):
    table = document.Table("t", "A table", [{"a": 0.1 + 0.2, "b": "x|y"}, {"a": None, "b": 12345}])
    parts = document.write("t", [], [document.Section("s", [table])], tmp_path / "r.html")
    assert (parts / "t.csv").read_text() == "a,b\n0.30000000000000004,x|y\n,12345\n"
    assert (parts / "t.md").read_text() == ("A table\n\n| a | b |\n|---|---|\n| 0.3000 | x\\|y |\n| – | 12,345 |\n")


def test_large_pictures_are_shrunk_for_the_page_only(root, tmp_path):
    figure = document.Figure("big", png(size=(3200, 100)), "a", "b")
    document.write("t", [], [document.Section("s", [figure])], tmp_path / "p.html")
    encoded = re.search(r"base64,([^\"]+)", (tmp_path / "p.html").read_text()).group(1)
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert image.width == document.PIXELS
    assert (tmp_path / "p_files" / "big.png").read_bytes() == figure.png


def section_of(page, anchor):
    """The content of a section of the page."""
    return re.search(rf'<section aria-labelledby="{anchor}">(.*?)</section>', page, re.DOTALL)[1]


SECTIONS = [
    Section("Nothing of this one", [Missing("all <of> it", "make all")]),
    Section("Partly", [Text("words"), Missing("the rest", "python p1.py A && B"), Text("more words")]),
    Section("Complete", [Table("t", "A table", [{"a": 1}])]),
]


def test_contents_name_what_is_there_and_one_list_at_the_end_what_is_not():
    page = document.page("t", [], SECTIONS)
    contents = re.search(r"<nav.*?</nav>", page, re.DOTALL)[0]
    assert re.findall(r'href="#(.*?)">(.*?)</a>', contents) == [
        ("partly", "Partly"),
        ("complete", "Complete"),
        ("not-here-yet", "Not here yet"),
    ]
    assert re.findall(r'<h2 id="(.*?)"', page) == ["partly", "complete", "not-here-yet"], "in the same order"
    assert "the rest" not in section_of(page, "partly")
    missing = section_of(page, "not-here-yet")
    assert re.findall(r"<h3>(.*?)</h3>", missing) == ["Nothing of this one", "Partly"]
    assert re.findall(r"<li>(.*?)<br><code>(.*?)</code></li>", missing) == [
        ("all &lt;of&gt; it", "make all"),
        ("the rest", "python p1.py A &amp;&amp; B"),
    ]


def test_where_nothing_is_missing_there_is_no_such_list():
    page = document.page("t", [], SECTIONS[2:])
    assert "Not here yet" not in page
    assert page.count("<li>") == 1


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        ([1, None, 2.5], True),
        (["0.300 ± 0.141", "-0.400", None], True),
        ([None], True),
        (["2.13.0", "1.2"], False),
        (["32", "best"], False),
    ],
)
def test_numbers_and_means_are_aligned_to_the_right(cells, right):
    table = Table("t", "A table", [{"a": cell} for cell in cells]).html()
    assert ('<th scope="col" class="n">' in table) == right
    assert table.count('<td class="n">') == right * len(cells)


@pytest.fixture(scope="module")
def wide_page(tmp_path_factory):
    """A page with what is wider than a phone: a table of many columns, a large picture, long words and commands."""
    words = "no_word_breaks_in_this_very_long_name_of_a_file_" * 3
    table = Table("t", words, [{f"column {n}": f"cell {n}" for n in range(20)}] * 40)
    figure = Figure("f", png(size=(1600, 900)), "a", words)
    sections = [Section(f"{n}: a section with a title of some length", [Text(words), table, figure]) for n in range(9)]
    page = tmp_path_factory.mktemp("page") / "page.html"
    document.write(words, [Text(words, world=True)], [*sections, Section("x", [Missing(words, words)])], page)
    return page


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 768, 1088, 1280])
def test_the_page_is_never_wider_than_the_window(width, dark, browser, wide_page):
    browser.open(wide_page, width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth > e.clientWidth)")
    assert browser.run("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    assert browser.log() == []


@pytest.mark.parametrize(("width", "at_side"), [(390, False), (1280, True)])
def test_the_contents_stay_in_view_and_cover_no_heading(width, at_side, browser, wide_page):
    browser.open(wide_page, width=width, fragment="#5-a-section-with-a-title-of-some-length")
    box = "(e => (b => [b.left, b.top, b.right, b.bottom])(e.getBoundingClientRect()))(document.querySelector(%r))"
    left, top, right, bottom = browser.run(box % "nav")
    assert (top, left) == (0, 0) or at_side
    heading = browser.run(box % ":target")
    assert 0 <= top <= heading[1] < 200
    assert right <= heading[0] if at_side else bottom <= heading[1]


def test_the_first_tabs_lead_to_the_content_and_through_the_contents(browser, wide_page):
    browser.open(wide_page, width=390)
    focused = "document.activeElement.textContent"
    browser.press("tab")
    assert browser.run(focused) == "Skip to the content"
    for number in range(9):
        browser.press("tab")
        assert browser.run(focused).startswith(f"{number}: ")
        left, right = browser.run("(b => [b.left, b.right])(document.activeElement.getBoundingClientRect())")
        assert 0 <= left < right <= 390, "an entry beyond the edge comes into view"
