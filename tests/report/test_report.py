"""report.py on folders of runs that the tests write: what is told, what is named as missing, what is left out."""

import base64
import csv
import html
import io
import json
import re

import pytest
from PIL import Image

import report
from captioning.report import document, sections
from captioning.training.run_folder import find_runs

NAUGHTY = '<script>alert("x")</script> & "quotes"'


def png(colour="red", size=(40, 30)):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def write_run(folder, setting="1", epochs=2, done=2, cider=1.25, profile="micro", **train):
    folder.mkdir(parents=True)
    numbers = {"epochs": epochs, "batch_size": 8, "lr": 0.001, "lora_rank": 4, "lora_alpha": 4.0, "seed": 0, **train}
    config = {
        "setting": setting,
        "profile": profile,
        "train": numbers,
        "captioner": {"encoder": NAUGHTY},
        "trainable_parameters": 1234,
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {
            "kind": "epoch",
            "epoch": e,
            "step": 10 * e,
            "train_loss": 1.0,
            "val_loss": 1.1,
            "val_cider": e / 10,
            "seconds": 30.0 * e,
        }
        for e in range(1, done + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "best.safetensors").write_bytes(b"")
    scores = {"CIDEr": cider, "CLIPScore": 1.5, "images": 9, "device": "cpu"}
    (folder / "val_scores.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    write_run(root / "lora", setting="best")
    return root


def make(root, tmp_path, *flags):
    out = tmp_path / "report.html"
    assert report.main(["--runs", str(root), "--out", str(out), "--bench", str(tmp_path), *flags]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_needs_no_other_file_and_escapes_what_it_is_told(root, tmp_path):
    page = make(root, tmp_path)
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    assert html.escape(NAUGHTY) in page
    assert 'lang="en"' in page
    assert page.count("<h1>") == 1
    assert all(f'id="{name}"' in page for name in re.findall(r'href="#([^"]+)"', page))
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_numbers_stand_beside_the_reports_with_their_world_and_device(root, tmp_path):
    write_run(root / "settings" / "1", setting="1", cider=0.123456789)
    make(root, tmp_path)
    with (tmp_path / "report_files" / "p2_settings.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["CIDEr"]) == 0.123456789
    assert float(row["report's CIDEr"]) == 0.8844035428513431
    assert (row["world"], row["device"], row["trainable"]) == ("micro", "cpu", "1234")
    assert "0.1235" in (tmp_path / "report_files" / "p2_settings.md").read_text()


def test_settings_that_were_not_run_are_named_and_get_no_row(root, tmp_path):
    write_run(root / "settings" / "1", setting="1")
    page = make(root, tmp_path)
    assert "settings 2, 3, 4, 5, best" in page


def test_settings_of_several_seeds_are_averaged(root, tmp_path):
    for name, cider in (("1", 0.5), ("1-seed1", 0.7)):
        write_run(root / "settings" / name, setting="1", cider=cider)
    assert "0.600 ± 0.141" in make(root, tmp_path)


def test_missing_parts_are_named_with_the_command_that_makes_them(root, tmp_path):
    page = make(root, tmp_path)
    for what in (
        "captions and scores of both prompts",
        "--best-worst",
        "--grounding",
        "make settings",
        "--objective scst",
        "make ablation",
    ):
        assert what in page, what


def test_a_complete_part_is_not_called_missing(root, tmp_path):
    folder = root / "attention" / "p2"
    folder.mkdir(parents=True)
    (folder / "one.png").write_bytes(png())
    (folder / "grounding.csv").write_text(
        "method,layers,heads,row,pointing,mass_ratio,iou,note\nraw,all,mean,predict,0.5,2.0,0.3,default\n"
        "centre,,,,0.25,,,baseline\n"
    )
    (root / "attention" / "best_worst.png").write_bytes(png())
    page = make(root, tmp_path)
    assert "maps of The captioner" not in page
    assert "--best-worst" not in page
    assert page.count("<img ") == 3  # the map, the pair, the curves
    assert (tmp_path / "report_files" / "p3_p2_one.png").read_bytes() == png()
    assert "0.2500" in page


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
def test_a_run_that_cannot_be_trusted_is_named_and_left_out(spoil, reason, root, tmp_path):
    spoil(write_run(root / "odd", cider=9.87654))
    page = make(root, tmp_path)
    assert "Left out: odd" in page
    assert reason in page
    assert "9.8765" not in page


def test_a_training_still_going_on_is_left_out_and_one_stopped_early_is_not(root, tmp_path):
    write_run(root / "going", epochs=4, done=2, cider=9.87654)
    stopped = write_run(root / "stopped", epochs=4, done=2, cider=8.76543)
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "stopped", "epoch": 2}\n')
    page = make(root, tmp_path)
    assert "Left out: going, since its training has not ended (2 of 4 epochs" in page
    assert "9.8765" not in page
    assert "8.7654" in page


def test_no_run_and_no_folder(tmp_path, capsys):
    assert report.main(["--runs", str(tmp_path / "no"), "--out", str(tmp_path / "r.html")]) == 2
    assert "--runs" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    page = make(tmp_path / "empty", tmp_path)
    assert "No finished run is here" in page
    assert "a finished training run" in page


def test_micro_and_full_size_are_never_mixed_in_silence(root, tmp_path):
    assert "Micro world: all of our numbers" in make(root, tmp_path)
    write_run(root / "big", profile="full")
    assert "This folder holds both micro and full-size runs" in make(root, tmp_path)


def test_the_words_on_the_prompts_follow_the_numbers():
    one, two = {"CIDEr": 2.0, "CLIPScore": 1.0, "words": 9}, {"CIDEr": 1.0, "CLIPScore": 1.1, "words": 18}
    assert "as in the report" in sections.explain_prompts({"1": one, "2": two})
    assert "2.0 times as long" in sections.explain_prompts({"1": one, "2": two})
    turned = sections.explain_prompts({"1": two, "2": one})
    assert turned.count("Unlike in the report") == 2


def test_ablation_runs_are_averaged_over_seeds(root, tmp_path):
    for seed, done in ((0, 2), (1, 4)):
        write_run(root / "ablation" / "start" / str(seed), epochs=2, done=done, seed=seed)
    page = make(root, tmp_path)
    assert "0.300 ± 0.141" in page  # of 0.2 and 0.4
    assert "some variants have 2" in page


def test_a_variants_difference_is_to_the_start_of_the_same_seed(root, tmp_path):
    for name, seed, done in (("start", 0, 2), ("start", 1, 4), ("other", 1, 5), ("other", 0, 4)):
        write_run(root / "ablation" / name / str(seed), epochs=2, done=done, seed=seed)
    make(root, tmp_path)
    with (tmp_path / "report_files" / "p2_ablation.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert rows["other"]["difference"] == "0.150 ± 0.071"  # of 0.4 - 0.2 and 0.5 - 0.4
    assert rows["start"]["difference"] == ""
    assert list(rows) == ["other", "start"]  # the better first


def test_best_is_held_against_the_better_of_the_reports_settings(root, tmp_path):
    for name, setting, cider in (("1", "1", 0.5), ("2", "2", 0.4), ("best", "best", 0.6)):
        write_run(root / "settings" / name, setting=setting, cider=cider)
    page = html.unescape(make(root, tmp_path))
    assert "setting 1 is the best of the report's settings here: 0.500" in page
    assert "best, has 0.600 (+20%)" in page


def test_rewards_stand_beside_what_they_began_with_and_people(root, tmp_path):
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
    page = make(root, tmp_path)
    with (tmp_path / "report_files" / "p2_rewards.csv").open() as file:
        rows = {row["trained by"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["cross-entropy", "cider", "references"]
    assert rows["cross-entropy"]["CIDEr"] == "1.100 ± 0.141"
    assert rows["cider"]["CIDEr's gain, %"] == "17.5 ± 10.6"
    assert rows["cider"]["words a caption"] == "9.000 ± 0.000"
    assert rows["references"]["share that repeats a bigram"] == "0.050"
    assert "cider has +17.5 % CIDEr" in page
    assert "have 95% as many words as people's, and 25% of them repeat a bigram (5% of people's)" in html.unescape(page)
    assert "make rewards" not in page


def test_a_damaged_score_file_is_one_line_that_names_it(root, tmp_path, capsys):
    (root / "scores.json").write_text("{")
    assert report.main(["--runs", str(root), "--out", str(tmp_path / "r.html")]) == 2
    assert "scores.json" in capsys.readouterr().err


def test_tables_keep_every_digit_and_break_no_markdown(tmp_path):
    table = document.Table("t", "A table", ("a", "b"), [(0.1 + 0.2, "x|y"), (None, 12345)])
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


def test_runs_are_found_below_but_a_models_config_is_no_run(root):
    (root / "export").mkdir()
    (root / "export" / "config.json").write_text("{}")
    found, omitted = find_runs(root)
    assert [r.name for r in found] == ["lora"]
    assert not omitted
