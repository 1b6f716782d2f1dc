"""report.py on folders of runs that the tests write: which runs are left out, and what the page says about sizes."""

import html
import re

import pytest
from report_runs import NAUGHTY, write_maps, write_run

import report
from captioning.training.run_folder import find_runs


def test_the_page_needs_no_other_file_and_escapes_its_content(root, make):
    page = make(root)
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    assert html.escape(NAUGHTY) in page
    assert 'lang="en"' in page
    assert page.count("<h1>") == 1
    assert all(f'id="{name}"' in page for name in re.findall(r'href="#([^"]+)"', page))
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "config.json").write_text("{"), "half-written"),
        (lambda f: (f / "config.json").write_text('{"setting": "1"}'), "another version"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "metrics.jsonl").write_text('{"kind": "epo'), "half-written"),
        (lambda f: (f / "val_scores.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / "best.safetensors").unlink(), "best.safetensors is missing"),
    ],
)
def test_a_run_that_cannot_be_trusted_is_named_and_left_out(spoil, reason, root, make):
    spoil(write_run(root / "odd", cider=9.87654))
    page = make(root)
    assert "Left out: odd" in page
    assert reason in page
    assert "9.8765" not in page


def test_a_training_still_going_on_is_left_out_and_one_stopped_early_is_not(root, make):
    write_run(root / "going", epochs=4, done=2, cider=9.87654)
    stopped = write_run(root / "stopped", epochs=4, done=2, cider=8.76543)
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "stopped", "epoch": 2}\n')
    page = make(root)
    assert "Left out: going, since its training has not ended (2 of 4 epochs" in page
    assert "9.8765" not in page
    assert "8.7654" in page


def test_no_run_and_no_folder(tmp_path, capsys, make):
    assert report.main(["--runs", str(tmp_path / "no"), "--out", str(tmp_path / "r.html")]) == 2
    assert "--runs" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    page = make(tmp_path / "empty")
    assert "No finished run is here" in page
    assert "a finished training run" in page


def test_micro_and_full_size_are_never_mixed_silently(root, make):
    assert "Micro world: all of our numbers" in make(root)
    write_run(root / "big", profile="full")
    assert "This folder holds both micro and full-size runs" in make(root)


def test_a_damaged_score_file_is_one_line_that_names_it(root, tmp_path, capsys, make):
    (root / "scores.json").write_text("{")
    assert report.main(["--runs", str(root), "--out", str(tmp_path / "r.html")]) == 2
    assert "scores.json" in capsys.readouterr().err


def test_runs_are_found_below_but_a_models_config_is_no_run(root):
    (root / "export").mkdir()
    (root / "export" / "config.json").write_text("{}")
    found, omitted = find_runs(root)
    assert [r.name for r in found] == ["lora"]
    assert not omitted


@pytest.fixture
def full_page(root, tmp_path, make):
    """The report of a folder with a picture at the head, a study and parts that are missing."""
    write_maps(root, "7", ("A red ball.", "The ball rolls."), ["ball."])
    write_run(root / "settings" / "best-with-a-long-name-seed12", setting="best")
    make(root)
    return tmp_path / "report.html"


def test_a_phone_shows_the_picture_at_once_and_no_page_wider_than_itself(browser, full_page):
    browser.open(full_page, width=390, height=844)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    heads = browser.run("[...document.querySelectorAll('header img')].map(i => i.getBoundingClientRect().bottom)")
    assert len(heads) == 3 and max(heads) <= 844, "above the fold"


def test_on_paper_tables_are_whole_and_nothing_sticks(browser, full_page):
    browser.open(full_page, width=688)  # an A4 page without its margins, in CSS pixels
    browser.devtools("Emulation.setEmulatedMedia", media="print")
    assert (
        browser.run("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length") == 0
    )
    assert browser.run("document.documentElement.scrollWidth") <= 688
    assert browser.run("getComputedStyle(document.querySelector('nav')).position") == "static"


def test_every_chapter_is_in_the_contents_and_none_is_empty(browser, full_page):
    browser.open(full_page)
    links = browser.run("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert browser.run("[...document.querySelectorAll('main > section > h2')].map(h => h.id)") == links
    assert links[-1] == "not-here-yet"
    assert browser.run("[...document.querySelectorAll('main > section')].every(s => s.children.length > 1)")
