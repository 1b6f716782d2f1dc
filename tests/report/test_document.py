"""document.py: tables and pictures as the page and the files beside it have them."""

import base64
import io
import re

from PIL import Image
from report_runs import png

from captioning.report import document


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
