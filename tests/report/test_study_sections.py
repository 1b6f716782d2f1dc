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


def test_points_of_the_reports_code_are_compared_with_all_of_them(root, tmp_path, make):
    assert "make letter" in make(root)
    for name, gain, seeds in (("gradients cleared", 0.25, 3), ("beams replaced", -0.125, 2)):
        literal = [0.25, 0.5, 0.75][:seeds]
        paired = {"difference": gain, "low": -1, "high": 1, "p_value": 0.0625, "wins": 1, "ties": 2, "losses": 3}
        study = {
            "what": name,
            "profile": "micro",
            "device": "cpu",
            "seeds": list(range(seeds)),
            "literal": {"CIDEr": literal, "CLIPScore": [1.0] * seeds},
            "sound": {"CIDEr": [value + gain for value in literal], "CLIPScore": [1.0] * seeds},
            "paired": {"CIDEr": paired, "CLIPScore": paired | {"difference": 0.0, "p_value": 1.0}},
        }
        folder = root / "letter" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        (folder / "comparison.json").write_text(json.dumps(study))
    page = make(root)
    with (tmp_path / "report_files" / "p2_letter.csv").open() as file:
        first, better, worse = csv.DictReader(file)
    assert (first["what"], first["CIDEr"]) == ("setting 1 to the letter", "0.500 ± 0.250")
    assert first["CIDEr: difference"] == first["CIDEr: p"] == ""
    assert (better["what"], better["CIDEr"], better["CIDEr: p"]) == ("gradients cleared", "0.750 ± 0.250", "0.0625")
    assert (worse["what"], worse["seeds"], worse["CIDEr: difference"]) == ("beams replaced", "2", "-0.125")
    assert "some rows have 2, and 3 are wanted" in page


def test_settings_of_several_seeds_are_averaged(root, make):
    for name, cider in (("1", 0.5), ("1-seed1", 0.7)):
        write_run(root / "settings" / name, setting="1", cider=cider)
    assert "0.600 ± 0.141" in make(root)


def test_best_is_held_against_the_better_of_the_reports_settings(root, make):
    for name, setting, cider in (("1", "1", 0.5), ("2", "2", 0.4), ("best", "best", 0.6)):
        write_run(root / "settings" / name, setting=setting, cider=cider)
    page = html.unescape(make(root))
    assert "setting 1 is the best of the report's settings here: 0.500" in page
    assert "best, has 0.600 (+20%)" in page


def test_ablation_runs_are_averaged_over_seeds(root, make):
    for seed, done in ((0, 2), (1, 4)):
        write_run(root / "ablation" / "start" / str(seed), epochs=2, done=done, seed=seed)
    page = make(root)
    assert "0.300 ± 0.141" in page  # of 0.2 and 0.4
    assert "some variants have 2" in page


def test_a_variants_difference_is_to_the_start_of_the_same_seed(root, tmp_path, make):
    for name, seed, done in (("start", 0, 2), ("start", 1, 4), ("other", 1, 5), ("other", 0, 4)):
        write_run(root / "ablation" / name / str(seed), epochs=2, done=done, seed=seed)
    make(root)
    with (tmp_path / "report_files" / "p2_ablation.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert rows["other"]["difference"] == "0.150 ± 0.071"  # of 0.4 - 0.2 and 0.5 - 0.4
    assert rows["start"]["difference"] == ""
    assert list(rows) == ["other", "start"]  # the better first


def test_rewards_stand_beside_what_they_began_with_and_people(root, tmp_path, make):
    for seed, before, after in ((0, 1.0, 1.1), (1, 1.2, 1.5)):
        name = "best" if seed == 0 else f"best-seed{seed}"
        write_run(root / "settings" / name, setting="best", cider=before, seed=seed)
        tuned = write_run(root / "rewards" / "cider" / str(seed), cider=after, seed=seed, objective="scst")
        scores = json.loads((tuned / "val_scores.json").read_text())
        scores |= {
            "captions": {"mean_length": 9.0, "repeated_2": 0.25},
            "references": {"mean_length": 9.5, "repeated_2": 0.05},
        }
        (tuned / "val_scores.json").write_text(json.dumps(scores))
    page = make(root)
    with (tmp_path / "report_files" / "p2_rewards.csv").open() as file:
        rows = {row["trained by"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["cross-entropy", "cider", "references"]
    assert rows["cross-entropy"]["CIDEr"] == "1.100 ± 0.141"
    assert rows["cider"]["CIDEr's gain, %"] == "17.5 ± 10.6"
    assert rows["cider"]["words per caption"] == "9.000 ± 0.000"
    assert rows["references"]["share that repeats a bigram"] == "0.050"
    assert "cider has +17.5 % CIDEr" in page
    assert "have 95% as many words as people's, and 25% of them repeat a bigram (5% of people's)" in html.unescape(page)
    assert "make rewards" not in page
