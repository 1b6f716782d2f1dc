"""evaluate.py: what the command line prints and writes, and one clear line for everything that can go wrong."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from caption_layouts import ID_FILES, PREDICTION_FILES, REFERENCE_FILES, karpathy, write_run
from scoring_examples import BOTH_TOKENIZERS, CAPTIONS, PREDICTIONS, REFERENCES, STEMS, annotation_content, needs_java

import evaluate
from captioning.cli import BAD_INPUT, PARTIAL
from captioning.profiles import ROOT
from captioning.scoring import ptb
from captioning.scoring.tokenizers import TOKENIZERS

EXAMPLES = ROOT / "examples"
CIDER = ("--metrics", "cider", "--tokenizer", "ptb")  # the metric that is computed soonest


@pytest.fixture(autouse=True)
def separate_caches(tmp_path_factory, monkeypatch):
    """Keep what one test caches from the others and from the repository."""
    for name, profile in evaluate.PROFILES.items():
        monkeypatch.setitem(evaluate.PROFILES, name, replace(profile, cache=str(tmp_path_factory.mktemp("cache"))))


@pytest.fixture
def files(tmp_path):
    """Return ``write(predictions, annotations) -> argv`` for the two required flags."""

    def write(predictions=PREDICTIONS, annotations=None):
        (tmp_path / "pred.json").write_text(json.dumps(predictions))
        (tmp_path / "val.json").write_text(json.dumps(annotation_content() if annotations is None else annotations))
        return ["--pred_file", str(tmp_path / "pred.json"), "--annotation_file", str(tmp_path / "val.json")]

    return write


@pytest.mark.parametrize("flag", ["--cache", "--no-cache"])
def test_references_kept_between_runs_change_no_score(files, tmp_path, monkeypatch, flag):
    argv = [*files(), "--metrics", "cider,bleu,rouge", "--tokenizer", "ptb", flag]
    tokenized, tokenize = [], ptb.tokenize
    monkeypatch.setattr(ptb, "tokenize", lambda captions: tokenized.append(len(captions)) or tokenize(captions))
    found = []
    for run in range(2):
        out = tmp_path / f"{run}.json"
        assert evaluate.main([*argv, "--per-image", str(out)]) == 0
        found.append(out.read_bytes())
    assert found[0] == found[1]
    kept = list((Path(evaluate.PROFILES["full"].cache) / "references").glob("*"))
    assert len(kept) == (flag == "--cache")
    references, predictions = tokenized[:2]
    assert tokenized[2:] == ([predictions] if flag == "--cache" else [references, predictions])


def test_openai_weights_are_refused_for_a_gelu_model(files, images, capsys, caplog):
    """open_clip runs ViT-B-32 + openai with GELU and a mere warning: published scores were wrong because of it."""
    argv = [*files(), "--images_root", str(images), "--clip-model", "ViT-B-32", "--clip-weights", "openai"]
    assert scored(argv, annotations_of=STEMS) == BAD_INPUT
    assert "use --clip-model ViT-B-32-quickgelu" in caplog.text
    assert capsys.readouterr().out == ""


def scored(argv, annotations_of, metrics="clipscore"):
    """Call main with the annotation and prediction files of ``argv`` rewritten for the images ``annotations_of``."""
    pred, annotations = Path(argv[1]), Path(argv[3])
    pred.write_text(json.dumps({stem: CAPTIONS[stem] for stem in annotations_of}))
    references = {stem: [f"a {stem} ball", "a cube"] for stem in annotations_of}
    annotations.write_text(json.dumps(annotation_content(references)))
    return evaluate.main([*argv, "--metrics", metrics, "--device", "cpu"])


def test_the_prompt_stands_before_every_caption(images, paths, scorer, files, clip_folder, capsys):
    prompt = "A photo depicts "
    expected = evaluate.clipscore(scorer, paths, {stem: prompt + caption for stem, caption in CAPTIONS.items()})
    assert evaluate.clipscore(scorer, paths, CAPTIONS, prefix=prompt) == pytest.approx(expected, abs=1e-6)
    argv = [*files(), "--images_root", str(images), "--clip-model", str(clip_folder), "--clip-prompt", prompt]
    assert scored(argv, STEMS) == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(np.mean([*expected.values()]), abs=1e-6)


@needs_java
def test_the_script_prints_one_line_imports_nothing_of_clip_and_may_run_twice_at_once(files):
    """Java's tokenizer needs no ptb.py either. pycocoevalcap's own writes its temporary file beside its jar."""
    code = (
        "import sys, evaluate; code = evaluate.main(sys.argv[1:]);"
        "unused = {'open_clip', 'timm', 'PIL', 'torchvision', 'decoder', 'captioning.models'};"
        "unused |= {'captioning.scoring.ptb'};"
        "assert not unused & sys.modules.keys();"
        "sys.exit(code)"
    )
    argv = [*files(), "--metrics", "cider,rouge", "--no-cache"]  # a cache would be in the repository
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, "-c", code, *argv], cwd=ROOT, **pipes) for _ in range(2)]
    first, second = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], first
    assert first == second
    scores = f"CIDEr: {evaluate.cider(REFERENCES, PREDICTIONS)[0]} | ROUGE-L: "
    assert first[0].startswith(scores)
    assert first[0].count("\n") == 1
    assert first[1] == f"I captioning: tokenizer ptb-java: {TOKENIZERS['ptb-java']}\n"


@needs_java
def test_both_metrics_and_both_files(tmp_path, files, images, paths, clip_folder, scorer, capsys):
    out, rows = tmp_path / "out" / "scores.json", tmp_path / "out" / "rows.json"
    argv = [*files(), "--images-root", str(images), "--clip-model", str(clip_folder), "--batch_size", "2"]
    argv += ["--json", str(out), "--per_image", str(rows)]
    assert scored(argv, STEMS, metrics="clipscore, CIDEr") == 0
    result, per_image = json.loads(out.read_text()), json.loads(rows.read_text())

    expected = evaluate.clipscore(scorer, paths, CAPTIONS)
    assert result["CLIPScore"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert capsys.readouterr().out == f"CIDEr: {result['CIDEr']} | CLIPScore: {result['CLIPScore']}\n"
    assert (result["images"], result["metrics"], result["errors"]) == (7, ["CIDEr", "CLIPScore"], {})
    assert (result["device"], result["precision"], result["clip_model"]) == ("cpu", "fp32", str(clip_folder))
    assert {"torch", "open_clip_torch", "pycocoevalcap"} <= result["versions"].keys()
    assert "3.4.1" in result["tokenizer"]

    order = [row["CLIPScore"] for row in per_image.values()]
    assert order == sorted(order, reverse=True) != sorted(order)
    assert {stem: row["caption"] for stem, row in per_image.items()} == CAPTIONS
    assert {stem: row["CLIPScore"] for stem, row in per_image.items()} == pytest.approx(expected, abs=1e-6)
    assert np.mean([row["CIDEr"] for row in per_image.values()]) == pytest.approx(result["CIDEr"])


def test_per_image_without_clipscore_is_sorted_by_cider(tmp_path, files):
    assert evaluate.main([*files(), *CIDER, "--per_image", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    scores = evaluate.cider(REFERENCES, PREDICTIONS, "ptb")[1]
    assert list(rows) == sorted(scores, key=scores.get, reverse=True)
    assert rows["d"] == {"CIDEr": scores["d"], "caption": PREDICTIONS["d"]}


def test_when_java_is_asked_for_and_missing_clipscore_is_still_computed(
    tmp_path, files, images, clip_folder, monkeypatch, capsys, caplog
):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "scores.json"
    argv = [*files(), "--images_root", str(images), "--clip-model", str(clip_folder), "--json", str(out)]
    assert scored([*argv, "--tokenizer", "ptb-java"], STEMS, metrics="cider,clipscore") == PARTIAL
    result = json.loads(out.read_text())
    assert capsys.readouterr().out == f"CLIPScore: {result['CLIPScore']}\n"
    assert "CIDEr" not in result
    assert "Java" in result["errors"]["CIDEr"]
    assert "CIDEr not computed: --tokenizer ptb-java needs Java" in caplog.text


def test_with_nothing_computed_there_is_no_output(tmp_path, files, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = [*files(), "--metrics", "cider,meteor,spice", "--tokenizer", "ptb-java"]
    assert evaluate.main([*argv, "--json", str(tmp_path / "scores.json")]) == BAD_INPUT
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "scores.json").exists()


def test_without_images_cider_is_still_computed(tmp_path, files, capsys, caplog):
    root = ["--images_root", str(tmp_path)]
    for argv, message in [([], "--images_root is needed"), (root, "4 of 4 images are not there (a.png, b.png")]:
        assert evaluate.main([*files(), "--tokenizer", "ptb", *argv]) == PARTIAL
        assert capsys.readouterr().out.startswith("CIDEr: ")
        assert message in caplog.text


def test_an_empty_prediction_is_scored_with_a_warning(files, caplog, capsys):
    assert evaluate.main([*files({**PREDICTIONS, "b": " "}), *CIDER]) == 0
    assert "1 of 4 predicted captions are empty: b" in caplog.text
    assert capsys.readouterr().out.startswith("CIDEr: ")
    assert evaluate.cider(REFERENCES, {**PREDICTIONS, "b": ""}, "ptb")[1]["b"] == 0


def test_missing_and_extra_predictions_are_both_named(files, capsys):
    predictions = dict.fromkeys("abc", "x") | {f"e{i}.png": "x" for i in range(9)}
    assert evaluate.main([*files(predictions), "--metrics", "cider"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert "1 missing from the predictions (d)" in error
    assert "9 extra in the predictions (e0.png, e1.png, e2.png, e3.png, e4.png and 4 more)" in error


def test_wrong_annotations_and_predictions_are_named_in_one_line(files, capsys):
    for name, content in [("val.json", {"annotations": []}), ("pred.json", {"predictions": []})]:
        assert evaluate.main(files(**content)) == BAD_INPUT
        assert re.fullmatch(rf"error: \S*{name}: holds no image; write it as .*\n", capsys.readouterr().err)


def test_scores_are_saved_beside_the_predictions_where_report_py_looks(files, tmp_path):
    argv = [*files(), *CIDER]
    assert evaluate.main([*argv, "--json", str(tmp_path / "s.json"), "--per-image", str(tmp_path / "p.json")]) == 0
    assert evaluate.main([*argv, "--save"]) == 0
    assert (tmp_path / "pred_per_image.json").read_bytes() == (tmp_path / "p.json").read_bytes()
    assert json.loads((tmp_path / "pred_scores.json").read_text())["CIDEr"] > 0
    assert evaluate.main([*argv, "--save", "--per-image", str(tmp_path / "own.csv")]) == 0
    assert (tmp_path / "own.csv").is_file()


def test_references_lie_beside_the_folder_of_images_by_default(files, tmp_path, capsys):
    """As training data does: `--annotation-file DATA/val.json` is what `--images-root DATA/images/val` means."""
    pred = files()[:2]
    (tmp_path / "images" / "val").mkdir(parents=True)
    for images, code in (("images/val", 0), ("images/test", BAD_INPUT), ("images", BAD_INPUT)):
        assert evaluate.main([*pred, *CIDER, "--images-root", str(tmp_path / images)]) == code
    assert evaluate.main([*pred, *CIDER]) == evaluate.main([*pred, *CIDER, "--images-root", "/"]) == BAD_INPUT
    assert set(capsys.readouterr().err.splitlines()) >= {
        "error: --annotation-file: name the references; without it they are DATA/val.json for images in DATA/images/val"
    }


@pytest.mark.parametrize("name", ["a.zip", "nowhere", "*.jpg"])
def test_a_folder_of_images_that_is_none_is_called_so(name, files, tmp_path, caplog):
    """It was said that all pictures were missing from it."""
    (tmp_path / "a.zip").touch()
    argv = [*files(), "--metrics", "cider,clipscore", "--tokenizer", "ptb", "--images-root", str(tmp_path / name)]
    assert evaluate.main(argv) == PARTIAL
    assert f"--images_root {tmp_path / name}: no such folder; give the one that holds the pictures" in caplog.text


def test_the_annotations_are_read_once(files, monkeypatch):
    read, load = [], evaluate.load_annotations
    monkeypatch.setattr(evaluate, "load_annotations", lambda file, split: read.append(file) or load(file, split))
    argv = files()
    assert evaluate.main([*argv, *CIDER, "--compare", argv[1]]) == 0
    assert read == [Path(argv[3])]


def test_missing_files_and_wrong_flags_are_named(files, capsys):
    argv = files()
    for extra, message in [
        (["--pred_file", "nowhere.json"], "nowhere.json: no such file"),
        (["--metrics", "cider,blue"], "--metrics cider,blue: unknown"),
        (["--metrics", ""], "--metrics : unknown"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--device", "toaster"], "--device toaster"),
    ]:
        assert evaluate.main([*argv, *extra]) == BAD_INPUT
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("metrics", "asked"), [("cider,rouge", []), ("cider,clipscore", [None])])
def test_a_device_is_looked_for_where_clip_needs_one(files, monkeypatch, metrics, asked):
    """Scores of words do not stop at a GPU that torch does not see."""
    found = []
    monkeypatch.setattr(evaluate, "pick_device", lambda name, announce: found.append(name))
    evaluate.main([*files(), "--metrics", metrics])
    assert found == asked


EXPECTED = {"ptb-java": 1.417998065871006, "ptb": 1.417998065871006}  # the README's


def example(*flags, pred="predictions"):
    argv = ["--pred_file", EXAMPLES / f"{pred}.json", "--annotation_file", EXAMPLES / "references.json"]
    return [*map(str, argv), "--profile", "micro", "--device", "cpu", *map(str, flags)]


@pytest.mark.parametrize("tokenizer", BOTH_TOKENIZERS)
def test_the_readmes_example_by_each_tokenizer(tokenizer, capsys):
    assert evaluate.main(example("--metrics", "cider", "--tokenizer", tokenizer)) == 0
    printed = capsys.readouterr()
    assert float(printed.out.removeprefix("CIDEr: ")) == pytest.approx(EXPECTED[tokenizer], abs=1e-8)


def test_everything_that_needs_no_java(tmp_path, capsys, monkeypatch):
    """All of the README's metrics but METEOR and SPICE, with every output, on a machine without Java."""
    monkeypatch.setenv("PATH", str(tmp_path))
    names = {"--json": "out.json", "--per_image": "rows.csv", "--html": "page.html"}
    outputs = [word for flag, name in names.items() for word in (flag, tmp_path / name)]
    argv = example("--images_root", EXAMPLES / "images", "--metrics", "all", "--bootstrap", 200, *outputs)
    argv += ["--compare", str(EXAMPLES / "weaker.json"), "--train-annotations", str(EXAMPLES / "references.json")]
    assert evaluate.main(argv) == PARTIAL
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["CIDEr"] == pytest.approx(EXPECTED["ptb"], abs=1e-8)
    assert result["CLIPScore"] == pytest.approx(1.3941642766, abs=1e-4)
    assert result["RefCLIPScore"] == pytest.approx(0.9045876638, abs=1e-4)
    assert result["BLEU-4"] == pytest.approx(0.2882621696, abs=1e-9)
    assert result["ROUGE-L"] == pytest.approx(0.5564914995, abs=1e-9)
    assert set(result["errors"]) == {"METEOR", "SPICE"}
    means = {"CIDEr", "CLIPScore", "RefCLIPScore", "ROUGE-L"}
    assert result["intervals"].keys() == result["comparison"].keys() == means
    assert result["comparison"]["CIDEr"]["wins"] == 6
    assert result["captions"]["vocabulary"] == 75
    assert result["references"]["captions"] == 96  # four of each of the 24 pictures
    assert result["tokenizer"].startswith("ptb: pure Python")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"CIDEr: {result['CIDEr']} | CLIPScore: {result['CLIPScore']} | RefCLIPScore: ")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open(encoding="utf-8", newline="")))
    order = [float(row["CLIPScore"]) for row in rows]
    assert order == sorted(order, reverse=True)
    assert np.mean([float(row["CIDEr"]) for row in rows]) == pytest.approx(result["CIDEr"])
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<img ") == 24


def test_a_comparison_is_the_difference_of_two_runs(tmp_path, capsys):
    out = tmp_path / "out.json"
    scores = {}
    for name in ("predictions", "weaker"):
        assert evaluate.main(example(*CIDER, pred=name)) == 0
        scores[name] = float(capsys.readouterr().out.removeprefix("CIDEr: "))
    flags = [*CIDER, "--compare", EXAMPLES / "weaker.json", "--json", out]
    assert evaluate.main(example(*flags)) == 0
    result = json.loads(out.read_text())["comparison"]["CIDEr"]
    assert result["difference"] == pytest.approx(scores["predictions"] - scores["weaker"])
    assert len(result["largest"]) == result["wins"] + result["losses"] == 6
    assert capsys.readouterr().out.count("\n") == 2 + 6


def test_partial_scores_say_so_on_every_line(files, capsys, tmp_path):
    """CIDEr of a subset is not comparable with CIDEr of the whole."""
    predictions = {key: PREDICTIONS[key] for key in "abc"} | {"extra": "a cat"}
    argv = [*files(predictions), *CIDER, "--json", str(tmp_path / "out.json")]
    assert evaluate.main(argv) == BAD_INPUT
    assert "--allow-partial" in capsys.readouterr().err
    assert evaluate.main([*argv, "--allow-partial", "--bootstrap", "10"]) == 0
    printed = capsys.readouterr()
    subset = {key: REFERENCES[key] for key in "abc"}
    mean = evaluate.cider(subset, {key: PREDICTIONS[key] for key in "abc"}, "ptb")[0]
    assert printed.out.startswith(f"CIDEr: {mean} | PARTIAL: 3 of 4 images\n")
    assert all("PARTIAL: 3 of 4 images" in line for line in printed.out.splitlines())
    assert json.loads((tmp_path / "out.json").read_text())["partial"] == "3 of 4 images"
    assert evaluate.main([*files({"x": "y"}), "--allow-partial"]) == BAD_INPUT


def test_partial_comparison_takes_what_all_files_name(files, tmp_path, capsys):
    (tmp_path / "other.json").write_text(json.dumps({key: PREDICTIONS[key] for key in "bcd"}))
    argv = [*files(PREDICTIONS), *CIDER, "--allow-partial", "--compare", str(tmp_path / "other.json")]
    assert evaluate.main(argv) == 0
    assert "PARTIAL: 3 of 4 images" in capsys.readouterr().out.splitlines()[1]


def test_an_extra_prediction_alone_is_partial_too(files, capsys):
    argv = [*files({**PREDICTIONS, "extra": "a cat"}), *CIDER, "--allow-partial"]
    assert evaluate.main(argv) == 0
    assert "PARTIAL" not in capsys.readouterr().out, "every annotated image is scored"


def test_wrong_output_flags_are_refused_before_anything_is_scored(files, capsys):
    for flags, message in [
        (["--per_image", "rows.txt"], "--per-image rows.txt: must end in .json or .csv"),
        (["--html", "x.html"], "--html x.html: needs --images-root"),
        (["--bootstrap", "1"], "--bootstrap 1: must be at least 2"),
        (["--tokenizer", "nltk"], "--tokenizer nltk: use auto"),
        (["--train-annotations", "gone.json"], "gone.json: no such file"),
        (["--compare", "gone.json"], "gone.json: no such file"),
    ]:
        assert evaluate.main([*files(), "--metrics", "cider", *flags]) == BAD_INPUT
        assert message in capsys.readouterr().err


# --- layouts --------------------------------------------------------------------------------------------------------

PAIRS = [  # every layout once
    *((name, "coco.json") for name in (*PREDICTION_FILES, *ID_FILES)),
    *(("flat.json", name) for name in REFERENCE_FILES if name != "lavis_gt.json"),
    ("coco_results.json", "lavis_gt.json"),
]


@pytest.mark.parametrize(("predictions", "references"), PAIRS)
def test_every_layout_gives_the_same_score(tmp_path, capsys, predictions, references):
    pred, annotations = tmp_path / f"pred_{predictions}", tmp_path / references
    pred.write_text({**PREDICTION_FILES, **ID_FILES}[predictions])
    annotations.write_text(REFERENCE_FILES[references])
    argv = ["--pred_file", str(pred), "--annotation_file", str(annotations), *CIDER]
    assert evaluate.main([*argv, "--compare", str(pred)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0].removeprefix("CIDEr: ")) == pytest.approx(evaluate.cider(REFERENCES, PREDICTIONS, "ptb")[0])
    assert lines[1].endswith("0 wins, 4 ties, 0 losses")


def test_the_folder_that_p2_infer_writes_is_scored(tmp_path, files, capsys):
    folder = write_run(tmp_path / "out.jsonl", [{s: PREDICTIONS[s]} for s in PREDICTIONS])
    assert evaluate.main([*files(), "--pred_file", str(folder), *CIDER]) == 0
    assert capsys.readouterr().out.startswith("CIDEr: ")


def test_karpathys_split_is_the_predicted_one_or_the_one_asked_for(tmp_path, files, capsys):
    argv = files(annotations=karpathy())
    assert evaluate.main([*argv, *CIDER]) == 0
    whole = capsys.readouterr().out
    assert evaluate.main([*argv, *CIDER, "--split", "test"]) == 0
    assert capsys.readouterr().out == whole
    for flags, message in [
        (["--split", "val"], "4 extra in the predictions (d, c, b, a)"),
        (["--split", "dev"], "has no split 'dev'; its splits are test, train, val"),
    ]:
        assert evaluate.main([*argv, *CIDER, *flags]) == BAD_INPUT
        assert message in capsys.readouterr().err
    argv = files({**PREDICTIONS, "z": "one"}, karpathy())
    assert evaluate.main([*argv, *CIDER]) == BAD_INPUT
    assert "the predictions are of its splits test, val; say which by --split" in capsys.readouterr().err
    assert evaluate.main([*argv, *CIDER, "--split", "test,val"]) == 0
    assert evaluate.main([*files(), *CIDER, "--split", "test"]) == BAD_INPUT
    assert "has no splits; leave the flag out" in capsys.readouterr().err


def test_copies_are_counted_of_karpathys_training_splits(tmp_path, files):
    argv = files({**PREDICTIONS, "a": "another, held back at first", "b": "one to choose by"}, karpathy())
    argv += [*CIDER, "--train-annotations", argv[3], "--json", str(tmp_path / "out.json")]
    assert evaluate.main(argv) == 0
    assert json.loads((tmp_path / "out.json").read_text())["captions"]["copied"] == 0.25


def test_what_could_be_names_or_ids_is_said_by_a_flag(files, capsys):
    content = annotation_content({"100": ["a dog"], "101": ["two cats"], "102": ["a ball"]})
    for image, number in zip(content["images"], (101, 100, 102), strict=True):
        image["file_name"] = f"{number}.png"
    argv = [*files({"100": "two cats", "101": "a dog", "102": "a ball"}, content), *CIDER]
    assert evaluate.main(argv) == BAD_INPUT
    assert "'100' could be the id of 101.png and the name of 100.png" in capsys.readouterr().err
    scores = []
    for keys in ("names", "ids"):
        assert evaluate.main([*argv, "--pred-keys", keys]) == 0
        scores.append(float(capsys.readouterr().out.removeprefix("CIDEr: ")))
    assert scores[0] > scores[1]


# --- captions beyond CLIP's context ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncate", "mean"])
def test_what_became_of_long_captions_is_said_and_written(files, images, clip_folder, tmp_path, caplog, how):
    argv = [
        *files(),
        "--images_root",
        str(images),
        "--clip-model",
        str(clip_folder),
        "--json",
        str(tmp_path / "out.json"),
    ]
    argv += ["--clip-long", how]
    captions = {**CAPTIONS, "im2": "a red ball and " * 40}
    Path(argv[1]).write_text(json.dumps(captions))
    Path(argv[3]).write_text(json.dumps(annotation_content({stem: ["a ball"] for stem in STEMS})))
    assert evaluate.main([*argv, "--metrics", "clipscore,refclipscore", "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["clip_long"] == how
    assert result["counts"][{"truncate": "truncated", "mean": "averaged"}[how]] == 1
    assert f"long captions: {how}" in caplog.text
    done = {"truncate": "were cut for it", "mean": "were taken in windows, whose mean counts"}[how]
    assert f"1 captions are longer than CLIP's context and {done}: im2" in caplog.text
