"""The page in a browser: a picture is sent, captioned and explained; errors are one line; two tabs at once."""

import time

import chromium
import pytest
from PIL import Image

from captioning.maps.attention import METHODS, MapSpec

pytestmark = pytest.mark.skipif(bool(chromium.ABSENT), reason=chromium.ABSENT)

SEND = """((name, type, bytes) => {
    const file = new File([Uint8Array.from(bytes)], name, {type}), data = new DataTransfer();
    data.items.add(file);
    const field = document.getElementById("file");
    field.files = data.files;
    field.dispatchEvent(new Event("change"));
})(...arguments)"""
FRAMES = "[...document.querySelectorAll('#maps iframe')].filter(f => f.contentDocument?.querySelector('article'))"
ANSWERS = "[...document.querySelectorAll('#answers article .text')].map(text => text.textContent)"


class Page:
    """The page in a tab of the browser."""

    def __init__(self, browser, server, width=1280):
        self.browser, self.url = browser, server.url
        browser.open(self, width)
        self.until("document.querySelectorAll('#strip button').length == 24")

    def as_uri(self):
        return self.url

    def run(self, script, *arguments):
        return self.browser.run(script, *arguments)

    def until(self, script, *arguments):
        """Wait until a JavaScript expression is true; return its value."""
        end = time.monotonic() + 300
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"), self.browser.log())
            time.sleep(0.05)
        return value

    def click(self, selector, number=0):
        self.run("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, number)

    def captions(self):
        """Wait until both models have answered."""
        self.until(f"{ANSWERS}.length == 2 && {FRAMES}.length == 2")
        return self.run(ANSWERS)


@pytest.fixture(scope="module")
def browser():
    with chromium.started() as shown:
        yield shown


@pytest.fixture
def page(browser, server, scenes):
    return Page(browser, server)


def test_a_scene_is_captioned_by_both_models_as_the_functions_say(page, studio, scenes):
    page.click("#strip button", 3)
    expected = studio.caption(scenes["scenes"][3]["picture"], next(iter(studio.adapters)), {})["answers"]
    assert page.captions() == [answer["caption"] for answer in expected]
    numbers = page.run("document.querySelector('#answers article .numbers').textContent")
    assert f"CIDEr {expected[0]['cider']:.3f}" in numbers and f"CLIPScore {expected[0]['clipscore']:.3f}" in numbers
    rows = page.run(
        "[...document.querySelectorAll('#answers article')[0].querySelectorAll('td')].map(c => c.textContent)"
    )
    assert rows[::2] == [row["caption"] for row in expected[0]["ranked"][1:]]
    assert page.browser.text("#references").startswith("People said: ")
    assert page.browser.log() == [] and page.browser.text("#error") == ""


def test_a_click_on_a_word_shows_its_map(page):
    page.click("#strip button", 3)
    page.captions()
    frame = f"{FRAMES}[0].contentDocument"
    assert not page.run(f"{frame}.querySelector('.stage').classList.contains('mapped')")
    page.run(f"{frame}.querySelectorAll('.words button')[2].click()")
    assert page.run(f"{frame}.querySelector('.stage').classList.contains('mapped')")
    status = page.run(f"{frame}.querySelector('.status').textContent")
    assert "word 2 of" in status
    heights = page.run(f"{FRAMES}.map(f => [f.clientHeight, f.contentDocument.documentElement.scrollHeight])")
    assert all(shown >= inside for shown, inside in heights), "no scroll bar within the page"
    assert page.browser.log() == []


class Frame:
    """The page of one model's maps."""

    def __init__(self, page, number):
        self.page, self.document = page, f"{FRAMES}[{number}].contentDocument"

    def run(self, script):
        """Return the value of a JavaScript expression of the frame's document ``d``."""
        return self.page.run(f"(d => {script})({self.document})")

    def choose(self, name, value):
        change = "field.dispatchEvent(new Event('change', {bubbles: true}));"
        self.run(f"{{ const field = d.querySelector('[name={name}]'); field.value = '{value}'; {change} }}")

    def offered(self, name):
        """What can be chosen, nothing where the choice is hidden."""
        field = f"d.querySelector('[name={name}]')"
        return self.run(f"{field}.offsetParent ? [...{field}.options].map(o => o.value) : []")

    def drawn(self):
        """Wait until a map is drawn; return its pixels."""
        self.page.until(f"(d => d.querySelector('.stage').classList.contains('mapped'))({self.document})")
        return self.run("d.querySelector('.stage canvas').toDataURL()")


@pytest.mark.parametrize("number", [0, 1])
def test_maps_by_every_method_are_made_when_they_are_chosen(page, studio, number):
    """Of the slow ones, which take LLaVA a minute, the captioner makes one."""
    page.click("#strip button", 3)
    page.captions()
    frame = Frame(page, number)
    frame.run("d.querySelectorAll('.words button')[2].click()")
    assert set(frame.offered("method")) == set(METHODS)
    found: dict[str, str] = {}  # a map by each method
    asked = [method for method, of in METHODS.items() if not of.slow or (method, number) == ("occlusion", 0)]
    for method in asked:
        frame.choose("method", method)
        found[method] = frame.drawn()
        assert frame.run("d.querySelector('.about').textContent") == METHODS[method].about
        choices = MapSpec(method).choices()
        for name in ("layers", "heads"):
            assert bool(frame.offered(name)) == (name in choices), "only what makes a difference is offered"
    if found["sinkless"] == found["raw"]:  # where no patch is a sink
        del found["sinkless"]
    assert len(set(found.values())) == len(found) > 6
    frame.choose("method", "raw")
    before = frame.drawn()
    assert len(frame.offered("layers")) >= 6 and len(frame.offered("heads")) >= 7
    frame.choose("layers", "1")
    frame.choose("heads", "2")
    assert frame.drawn() != before
    heights = page.run(f"{FRAMES}.map(f => [f.clientHeight, f.contentDocument.documentElement.scrollHeight])")
    assert all(shown >= inside for shown, inside in heights), "no scroll bar within the page"
    assert page.browser.log() == [] and page.browser.text("#error") == ""


def test_a_method_that_a_model_cannot_serve_is_one_line_and_the_others_go_on(page, studio, monkeypatch):
    def refuse(*asked):
        raise ValueError("grad needs gradients, which <this> model does not hand out")

    page.click("#strip button", 3)
    page.captions()
    frame = Frame(page, 0)
    frame.run("d.querySelectorAll('.words button')[2].click()")
    first = frame.drawn()
    monkeypatch.setattr(studio, "map", refuse)
    frame.choose("method", "grad")
    page.until(f"(d => d.querySelector('.status').textContent.includes('which <this> model'))({frame.document})")
    assert not frame.run("d.querySelector('.stage').classList.contains('mapped')")
    monkeypatch.undo()
    frame.choose("method", "relative")
    assert frame.drawn() != first
    frame.choose("method", "grad")
    frame.drawn()


def test_a_picture_is_sent_and_captioned(page, tmp_path, studio):
    Image.new("RGB", (80, 60), "orange").save(tmp_path / "mine.png")
    page.run(SEND, "mine.png", "image/png", list((tmp_path / "mine.png").read_bytes()))
    page.until("document.getElementById('hint').textContent == 'mine.png'")
    captions = page.captions()
    kept = next(name for name in reversed(studio.pictures) if name.endswith("/mine.png"))
    expected = studio.caption(kept, next(iter(studio.adapters)), {})["answers"]
    assert captions == [answer["caption"] for answer in expected]
    assert "CIDEr" not in page.browser.text("#answers") and page.browser.text("#references") == ""


def test_what_is_refused_is_one_line_and_the_page_goes_on(page):
    page.run(SEND, "notes.png", "image/png", list(b"no picture"))
    page.until(
        "document.getElementById('error').textContent.includes('notes.png: the file is of no known image format')"
    )
    page.run(SEND, "<b>big.png", "image/png", [0] * 1_200_000)
    page.until("document.getElementById('error').textContent.includes('<b>big.png: 1.2 MB, and 1.0 MB are taken')")
    page.run("document.querySelector('[name=\"captioner.beam_size\"]').value = 99")
    page.click("#strip button", 1)
    page.until(
        "document.querySelector('#answers .error')?.textContent.includes('beam size 99: a whole number from 1 to 20')"
    )
    page.run("document.querySelector('[name=\"captioner.beam_size\"]').value = 2")
    page.click("#again")
    page.captions()
    assert page.browser.text("#error") == ""


def test_scenes_are_drawn_anew_and_adapters_compared(page, studio):
    page.click("#tab-compare")
    page.click("#comparing button", 0)
    page.until("document.getElementById('error').textContent.startsWith('no picture is chosen')")
    page.click("#tab-scenes")
    page.run("document.querySelector('#drawing [name=seed]').value = 5")
    page.run("document.querySelector('#drawing [name=split]').value = 'val_novel'")
    page.click("#drawing button", 0)
    page.until("document.querySelector('#grid button')?.dataset.picture.startsWith('val_novel-5/')")
    page.click("#grid button", 2)
    page.captions()
    page.click("#tab-compare")
    page.click("#comparing button", 0)
    page.until("document.querySelectorAll('#compared article .text').length == 2")
    names = page.run("[...document.querySelectorAll('#compared h2')].map(h => h.textContent)")
    assert names == list(studio.adapters)
    page.click("#comparing button", 1)
    page.until("document.querySelectorAll('#compared tbody tr').length == 24")
    assert page.run("document.querySelectorAll('#compared th')[1].textContent").startswith(next(iter(studio.adapters)))


def test_two_tabs_at_once_have_their_own_pictures(page, server):
    first = page.browser.call("GET", "/window")
    page.click("#strip button", 4)
    second = page.browser.post("/window/new", type="tab")["handle"]
    try:
        page.browser.post("/window", handle=second)
        other = Page(page.browser, server)
        other.click("#strip button", 5)
        theirs = other.captions()
        page.browser.post("/window", handle=first)
        mine = page.captions()
        assert mine != theirs and page.run("document.querySelectorAll('#strip button')[4].ariaCurrent") == "true"
        page.browser.post("/window", handle=second)
        assert other.run(ANSWERS) == theirs
    finally:
        page.browser.post("/window", handle=second)
        page.browser.call("DELETE", "/window")
        page.browser.post("/window", handle=first)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(width, browser, server, scenes):
    page = Page(browser, server, width)
    page.click("#strip button", 2)
    page.captions()
    for tab in ("caption", "scenes", "compare"):
        page.click(f"#tab-{tab}")
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), tab


def test_nothing_is_asked_of_anybody_else(page):
    page.click("#strip button", 6)
    page.captions()
    names = page.run(
        f"[window, ...{FRAMES}.map(f => f.contentWindow)]"
        ".flatMap(w => w.performance.getEntriesByType('resource')).map(e => e.name)"
    )
    assert names and all(name.startswith((page.url, "data:")) for name in names)
