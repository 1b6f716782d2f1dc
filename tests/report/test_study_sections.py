"""study_sections.py: means over seeds, and what is compared with what."""

import csv
import html
import json

from report_runs import write_run


def test_numbers_stand_beside_the_reports_with_their_world_and_device(root, tmp_path, make):
    write_run(root / "settings" / "1", setting="1", cider=0.123456789)
    make(root)
    with (tmp_path / "report_files" / "p2_settings.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["CIDEr"]) == 0.123456789
    assert float(row["report's CIDEr"]) == 0.8844035428513431
    assert (row["world"], row["device"], row["trainable"]) == ("micro", "cpu", "1234")
    assert "0.1235" in (tmp_path / "report_files" / "p2_settings.md").read_text()


def test_settings_that_were_not_run_are_named_and_get_no_row(root, make):
    write_run(root / "settings" / "1", setting="1")
    page = make(root)
    assert "settings 2, 3, 4, 5, best" in page


def test_the_reports_own_numbers_stand_beside_ours_to_the_letter_and_without_by_size(root, tmp_path, make):
    for name, cider, faithful in (("1", 0.5, False), ("1-letter", 0.3, True), ("1-letter-seed1", 0.5, True)):
        folder = write_run(root / "settings" / name, setting="1", cider=cider)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"report_faithful": faithful}))
    page = html.unescape(make(root))
    with (tmp_path / "report_files" / "p2_reported.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["setting"], row["world"]) for row in rows] == [(s, w) for w in ("full size", "micro") for s in "12345"]
    full, micro = rows[0], rows[5]
    assert full["the report: CIDEr"] == "0.8844035428513431"
    assert full["ours to the letter: CIDEr"] == full["ours, sound practice: CIDEr"] == ""  # no one has run it
    assert micro["the report: CIDEr"] == ""  # it has no micro size
    assert micro["ours to the letter: CIDEr"] == "0.400 ± 0.141"
    assert micro["ours, sound practice: CIDEr"] == "0.500"
    assert "settings 2, 3, 4, 5 to the letter" in page
    assert "setting 1 to the letter" in page  # a group of its own in the other tables


def write_comparison(root, study, name, gain, seeds=3, base="base", own="own", splits=("val", "val_novel"), **more):
    """What a study leaves of one row: the base's CIDEr is 0.25, 0.5, 0.75 by seed, the row's is ``gain`` above."""
    before = [0.25, 0.5, 0.75][:seeds]
    paired = {"difference": gain, "low": -1, "high": 1, "p_value": 0.0625, "wins": 1, "ties": 2, "losses": 3}
    part = {
        "device": "cpu",
        "images": 500,
        base: {"CIDEr": before, "CLIPScore": [1.0] * seeds, **more},
        own: {"CIDEr": [value + gain for value in before], "CLIPScore": [1.0] * seeds, **more},
        "paired": {"CIDEr": paired, "CLIPScore": paired | {"difference": 0.0, "p_value": 1.0}},
    }
    study_of = {"what": name, "against": base, "profile": "micro", "seeds": list(range(seeds))}
    folder = root / study / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    content = study_of | (dict.fromkeys(splits, part) if splits else part)
    (folder / "comparison.json").write_text(json.dumps(content))
    return content


def rows_of(tmp_path, table):
    with (tmp_path / "report_files" / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def test_points_of_the_reports_code_are_compared_with_all_of_them(root, tmp_path, make):
    assert "make letter" in make(root)
    for name, gain, seeds in (("gradients cleared", 0.25, 3), ("beams replaced", -0.125, 2)):
        write_comparison(root, "letter", name, gain, seeds, "literal", "sound", splits=())
    page = make(root)
    first, better, worse = rows_of(tmp_path, "p2_letter")
    assert (first["what"], first["CIDEr"]) == ("setting 1 to the letter", "0.500 ± 0.250")
    assert first["CIDEr: difference"] == first["CIDEr: p"] == first["CIDEr: 95% interval"] == ""
    assert (better["what"], better["CIDEr"], better["CIDEr: p"]) == ("gradients cleared", "0.750 ± 0.250", "0.0625")
    assert better["CIDEr: 95% interval"] == "[-1.000, +1.000]"
    assert (worse["what"], worse["seeds"], worse["CIDEr: difference"]) == ("beams replaced", "2", "-0.125")
    assert worse["CIDEr: by seed"] == "-0.125 -0.125"
    assert "some rows have 2, and 3 are wanted" in page


def test_variants_stand_below_best_by_what_they_gain_on_both_splits(root, tmp_path, make):
    assert "make variants" in make(root)
    for name, gain in (("no dropout", -0.1), ("LoRA+ 8", 0.2)):
        write_comparison(root, "variants", name, gain, base="best", own=name)
    page = make(root)
    assert "make variants" not in page
    for table in ("p2_variants_val", "p2_variants_val_novel"):
        rows = rows_of(tmp_path, table)
        assert [row["what"] for row in rows] == ["best", "LoRA+ 8", "no dropout"]
        assert (rows[0]["CIDEr"], rows[1]["CIDEr"]) == ("0.500 ± 0.250", "0.700 ± 0.250")
        assert rows[1]["CIDEr: difference"] == "0.2"


def test_settings_of_several_seeds_are_averaged(root, make):
    for name, cider in (("1", 0.5), ("1-seed1", 0.7)):
        write_run(root / "settings" / name, setting="1", cider=cider)
    assert "0.600 ± 0.141" in make(root)


def test_settings_of_the_study_stand_below_best_on_both_splits(root, tmp_path, make):
    for name, gain in (("1", -0.2), ("1-letter", -0.1)):
        write_run(root / "settings" / name, setting="1", cider=0.5)
        write_comparison(root, "settings", name, gain, seeds=2, base="best", own=name)
    page = make(root)
    for table in ("p2_settings_val", "p2_settings_val_novel"):
        rows = rows_of(tmp_path, table)
        assert [row["what"] for row in rows] == ["best", "1-letter", "1"]
        assert (rows[0]["CIDEr"], rows[1]["CIDEr: difference"]) == ("0.375 ± 0.177", "-0.1")
    assert "some rows have 2, and 3 are wanted" in page
    assert not (tmp_path / "report_files" / "p2_settings_seeds.csv").exists()  # these tables have the spread


def test_best_is_held_against_the_better_of_the_reports_settings(root, make):
    for name, setting, cider in (("1", "1", 0.5), ("2", "2", 0.4), ("best", "best", 0.6)):
        write_run(root / "settings" / name, setting=setting, cider=cider)
    page = html.unescape(make(root))
    assert "setting 1 is the best of the report's settings here: 0.500" in page
    assert "best, has 0.600 (+20%)" in page


def test_rewards_stand_beside_equally_long_cross_entropy_and_people(root, tmp_path, make):
    assert "make rewards" in make(root)
    style = {"mean_length": [9.0] * 3, "repeated_2": [0.25] * 3}
    for name, gain, loss in (("start", -0.1, 0.8), ("cider", 0.2, 0.9)):
        written = write_comparison(root, "rewards", name, gain, base="more cross-entropy", own=name, **style)
        for split in ("val", "val_novel"):
            written[split] |= {"references": {"mean_length": 9.5, "repeated_2": 0.05}}
            for side, value in ((name, loss), ("more cross-entropy", 0.798)):
                written[split][side] |= {"val_loss": [value] * 3}
        (root / "rewards" / name / "comparison.json").write_text(json.dumps(written))
    page = html.unescape(make(root))
    rows = rows_of(tmp_path, "p2_rewards_val")
    assert [row["what"] for row in rows] == ["more cross-entropy", "cider", "start"]
    assert (rows[1]["words per caption"], rows[1]["validation loss"]) == ("9.000 ± 0.000", "0.900 ± 0.000")
    assert "what all rows began with by -0.2% (0.800 nats per token before), and its CIDEr by +25.0%" in page
    assert "cider has +40.0 % CIDEr [-200.0, +200.0] and +0.000 CLIPScore" in page
    assert "have 95% as many words as people's, and 25% of them repeat a bigram (5% of people's)" in page
    assert "make rewards" not in page
