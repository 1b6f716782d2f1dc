"""gallery.py: a page that is complete and escaped, and shows each picture at most once."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from captioning.scoring import gallery

EVIL = '<script>alert("x")</script> & "quotes" \'too\''


@pytest.fixture
def pictures(tmp_path):
    def make(count):
        paths = {}
        for place in range(count):
            paths[f"im {place}"] = tmp_path / f"im {place}.png"
            Image.new("RGBA" if place % 2 else "L", (600, 40 + place)).save(paths[f"im {place}"])
        return paths

    return make


def make_page(paths, caption="a cat"):
    ranking = {image: {"CIDEr": 9.0 - k, "caption": f"{caption} {k}"} for k, image in enumerate(paths)}
    references = {image: [f"reference of {image}", EVIL] for image in paths}
    text, unreadable = gallery.page(ranking, references, paths, ["CIDEr: 0.5 <b>"], "tokenizer & device")
    assert not unreadable
    return text


class Outline(HTMLParser):
    """Collects headings, pictures' texts and every tag; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.titles, self.alts, self.links = set(), [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "img":
            self.alts.append(attrs["alt"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (5, 5), (13, 13), (20, 20), (30, 30), (60, 36)])
def test_every_picture_is_shown_at_most_once(pictures, count, shown):
    outline = Outline(make_page(pictures(count)))
    assert len(outline.alts) == len(set(outline.alts)) == shown
    assert outline.alts[0] == "a cat 0"
    if count > gallery.SHOWN:
        assert outline.titles[1].startswith("Worst")
        assert outline.alts[gallery.SHOWN] == f"a cat {count - 1}", "the worst comes first among the worst"


def test_captions_and_references_are_escaped(pictures):
    page = make_page(pictures(2), EVIL)
    assert "script" not in Outline(page).tags
    assert "&lt;script&gt;" in page
    assert "CIDEr: 0.5 &lt;b&gt;" in page
    assert Outline(page).alts[0] == EVIL + " 0"


def test_the_page_needs_no_other_file_and_fits_a_telephone(pictures):
    page = make_page(pictures(3))
    assert all(link.startswith("data:image/jpeg;base64,") for link in Outline(page).links)
    assert not re.search(r"https?://|url\(|@import", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_pictures_are_small(pictures):
    (link,) = Outline(make_page(pictures(1))).links
    with Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) as image:
        assert max(image.size) == gallery.PIXELS


def test_a_broken_picture_is_named_and_spares_the_page(pictures, tmp_path, caplog):
    (tmp_path / "x.png").write_bytes(b"no picture")
    paths = {**pictures(2), "x": tmp_path / "x.png", "y": tmp_path / "y.png"}
    ranking = {name: {"CIDEr": 0.5, "caption": "a cat"} for name in paths}
    text, unreadable = gallery.page(ranking, {name: ["a dog"] for name in paths}, paths, [], "")
    assert unreadable == ["x", "y"]
    assert (text.count("<img "), text.count("The picture cannot be read.")) == (2, 2)
    assert "x.png: the file is of no known image format" in caplog.text and "y.png" in caplog.text
