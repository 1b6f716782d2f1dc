"""A folder of one run, and the report of a folder."""

import pytest
from report_runs import png, write_run

import report
from captioning.report import sections


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    write_run(root / "lora", setting="best")
    return root


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write the report of a folder and return the page; drawing curves, most of the time, is left out."""
    for name in ("draw_loss", "draw_cider"):
        monkeypatch.setattr(sections, name, lambda runs: png("blue"))

    def make(root):
        out = tmp_path / "report.html"
        assert report.main(["--runs", str(root), "--out", str(out), "--bench", str(tmp_path)]) == 0
        return out.read_text(encoding="utf-8")

    return make
