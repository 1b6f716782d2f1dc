"""bench/presets.py: the computed table is the one in the docs, and its sums are those of the parts that are tested."""

import pytest

from bench import arithmetic, presets
from captioning.profiles import PRESETS, ROOT


def test_the_table_of_the_docs_is_what_is_computed(capsys, tmp_path):
    assert presets.main(["--out", str(tmp_path / "found")]) == 0
    shown = capsys.readouterr().out.strip()
    assert shown in (ROOT / "docs" / "full_size.md").read_text(encoding="utf-8")
    assert (tmp_path / "found.md").read_text().strip() == shown
    assert all(f"`{setting}`" in shown for setting in PRESETS)


@pytest.mark.parametrize(("precision", "gigabytes"), [("bf16", 6.0), ("fp32", 7.7)])
def test_memory_of_best_is_that_of_the_readme(precision, gigabytes):
    assert presets.memory(arithmetic.CaptionerShape(), precision, 16) == pytest.approx(gigabytes, abs=0.05)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{gigabytes} GB" in readme


def test_no_setting_trains_ten_million_parameters():
    assert all(presets.shape_of(*pair).trained < 10_000_000 for pair in presets.POOLED)
    assert {setting for setting, _ in presets.POOLED} == {"best", *PRESETS}
