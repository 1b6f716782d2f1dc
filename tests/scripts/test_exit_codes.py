"""README's table of exit codes, row by row: each script where its condition holds."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from runs import STEPS, records, same, signal_at, train, weights

import evaluate
import p1_llava_caption
import p2_export
import p2_infer
import p3_attention
import report
from captioning.cli import BAD_INPUT, INTERRUPTED, PARTIAL, STOPPED, UNHEARD
from captioning.profiles import PROFILES, ROOT
from captioning.training import run_folder
from captioning.training.trainer import Trainer

EXAMPLES = ROOT / "examples"
SCORING = ["--profile", "micro", "--pred-file", EXAMPLES / "predictions.json", "--tokenizer", "ptb", "--no-cache"]
SCORING += ["--annotation-file", EXAMPLES / "references.json"]


pytestmark = pytest.mark.usefixtures("micro", "constant_score")


def run(script, *words):
    return script.main([*map(str, words)])


@pytest.fixture
def broken(tiny_data, tmp_path):
    """Data of which a picture of each split ends early, and the names of these two."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    pictures = [sorted((data / "images" / split).iterdir())[2] for split in ("train", "val")]
    for picture in pictures:
        picture.write_bytes(picture.read_bytes()[:300])
    return data, pictures


# ------------------------------------------------------------------------------------------------------ 3: done except


@pytest.fixture
def commands(unbroken, tmp_path):
    """Each script's command on a folder of images."""
    small = ["--profile", "micro", "--device", "cpu", "--max-new-tokens", "4"]
    own = ["--adapter", unbroken / "best.safetensors"]
    decoder = PROFILES["micro"].decoder

    def listed(folder):
        (tmp_path / "list.txt").write_text("\n".join(map(str, sorted(folder.iterdir()))))
        return tmp_path / "list.txt"

    return {
        "p1": lambda images: (p1_llava_caption, images, tmp_path / "out.json", *small),
        "p2": lambda images: (p2_infer, images, tmp_path / "out.json", decoder, *small, *own),
        "p2, a list": lambda images: (p2_infer, listed(images), tmp_path / "out.jsonl", decoder, *small, *own),
        "p2, one JSON of a list": lambda images: (
            p2_infer,
            listed(images),
            tmp_path / "out.json",
            decoder,
            *small,
            *own,
        ),
        "p3": lambda images: (p3_attention, "--model", "p2", "--images", images, "--out", tmp_path, *small, *own),
    }


@pytest.mark.parametrize("name", ["p1", "p2", "p2, a list", "p2, one JSON of a list", "p3"])
def test_a_picture_that_ends_early_is_named_and_the_rest_is_done(name, broken, commands, caplog):
    data, (_, picture) = broken
    assert run(*commands[name](data / "images" / "val")) == PARTIAL
    assert picture.name in caplog.text


def test_training_goes_on_without_pictures_that_cannot_be_read(broken, tiny_data, tmp_path, caplog):
    """As if the annotations had not named them; it ended at the first one, after all that had been encoded before."""
    data, pictures = broken
    assert train(tmp_path / "run", "--data", data) == PARTIAL
    for picture in pictures:
        assert len(re.findall(rf"left out: {re.escape(str(picture))}: ", caplog.text)) == 1
    assert "1 of 12 images cannot be read; training goes on without them" in caplog.text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["unreadable_images"] == {"train": 1, "val": 1}

    for split, picture in zip(("train", "val"), pictures, strict=True):
        content = json.loads((data / f"{split}.json").read_text())
        (left_out,) = [image["id"] for image in content["images"] if image["file_name"] == picture.name]
        content["images"] = [image for image in content["images"] if image["id"] != left_out]
        content["annotations"] = [text for text in content["annotations"] if text["image_id"] != left_out]
        (data / f"{split}.json").write_text(json.dumps(content))
    assert train(tmp_path / "without", "--data", data) == 0
    assert records(tmp_path / "run") == records(tmp_path / "without")
    assert same(weights(tmp_path / "run", "last"), weights(tmp_path / "without", "last"))


@pytest.mark.parametrize("flags", [[], ["--cache-gb", "0"]])
def test_training_without_some_pictures_is_stopped_and_resumed_as_any(flags, broken, tmp_path, monkeypatch):
    """Also where images are encoded again in every epoch."""
    common = ["--data", broken[0], *flags]
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGTERM)
        assert train(tmp_path / "run", *common) == STOPPED
    assert train(tmp_path / "run", *common, "--resume") == PARTIAL
    assert train(tmp_path / "whole", *common) == PARTIAL
    assert same(weights(tmp_path / "run", "last"), weights(tmp_path / "whole", "last"))


def test_training_on_nothing_that_can_be_read_is_refused(broken, tmp_path, capsys):
    for path in (broken[0] / "images" / "train").iterdir():
        path.write_bytes(b"no picture")
    assert train(tmp_path / "run", "--data", broken[0]) == BAD_INPUT
    assert "none of the 12 images can be read" in capsys.readouterr().err.splitlines()[-1]


def test_a_pair_whose_picture_cannot_be_read_spares_the_other(broken, commands, tmp_path, caplog, capsys):
    data, (_, picture) = broken
    stems = sorted(path.stem for path in (data / "images" / "val").iterdir())
    scores = {stem: {"CLIPScore": 0.5, "caption": "A ball."} for stem in stems}
    scores[picture.stem]["CLIPScore"] = 0.9
    (tmp_path / "per_image.json").write_text(json.dumps(scores))
    words = [*commands["p3"](data / "images" / "val"), "--best-worst", tmp_path / "per_image.json"]
    assert run(*words) == PARTIAL
    assert f"not explained: {picture}: " in caplog.text
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["Last-1"]
    assert (tmp_path / "best_worst.png").is_file() and not (tmp_path / "top-1.png").exists()
    for path in (data / "images" / "val").iterdir():
        path.write_bytes(b"no picture")
    assert run(*words) == BAD_INPUT
    assert "neither the best nor the worst pair" in capsys.readouterr().err


def test_a_metric_that_cannot_be_computed_spares_the_others(tmp_path, capsys, caplog):
    """Here for want of images; where none can be, nothing was done."""
    (tmp_path / "images").mkdir()
    for flags in ([], ["--images-root", tmp_path / "images"]):
        assert run(evaluate, *SCORING, *flags) == PARTIAL
        assert re.fullmatch(r"CIDEr: 1\.4\d+\n", capsys.readouterr().out)
        assert "CLIPScore not computed: " in caplog.text
        assert run(evaluate, *SCORING, *flags, "--metrics", "clipscore") == BAD_INPUT
        assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------- 0: done; 4: stopped; 130: Ctrl-C


def test_what_is_done_is_done(tmp_path, capsys):
    assert run(evaluate, *SCORING, "--metrics", "cider") == 0
    assert train(tmp_path / "run") == 0
    assert run(report, "--runs", tmp_path, "--out", tmp_path / "report.html") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_training_that_is_asked_to_stop_has_saved_its_state(number, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 1, number)
        assert train(tmp_path / "run") == STOPPED
    assert records(tmp_path / "run")[-1]["step"] == 2 < 2 * STEPS
    assert train(tmp_path / "run", "--resume") == 0
    assert same(weights(tmp_path / "run", "last"), weights(unbroken, "last"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_training_that_is_asked_to_stop_before_its_first_step_has_saved_that_too(
    number, unbroken, tmp_path, monkeypatch
):
    check = Trainer.sanity_check
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "sanity_check", lambda trainer: os.kill(os.getpid(), number) or check(trainer))
        assert train(tmp_path / "run") == STOPPED
    assert run_folder.RunFolder(tmp_path / "run").has_state
    assert train(tmp_path / "run", "--resume") == 0
    assert records(tmp_path / "run") == records(unbroken)
    assert same(weights(tmp_path / "run", "last"), weights(unbroken, "last"))


def test_training_that_is_asked_to_stop_while_it_is_prepared_starts_again(unbroken, tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr("captioning.training.setup.cached_features", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        assert train(tmp_path / "run") == STOPPED
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "stopped before the first step; start again by the same command" in capsys.readouterr().out
    assert not run_folder.RunFolder(tmp_path / "run").has_state
    assert train(tmp_path / "run") == 0
    assert same(weights(tmp_path / "run", "last"), weights(unbroken, "last"))


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("p1", (p1_llava_caption, "load_llava")),
        ("p2", (p2_infer, "load_captioner")),
        ("p2, a list", (p2_infer, "load_captioner")),
        ("p3", (p3_attention, "explain_each")),
    ],
)
def test_ctrl_c_in_a_run_over_images(name, where, tiny_data, commands, monkeypatch, capsys):
    monkeypatch.setattr(*where, interrupted)
    assert run(*commands[name](tiny_data / "images" / "val")) == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_ctrl_c_elsewhere(unbroken, tmp_path, monkeypatch):
    """In training before its first step too: there is no state to go on from yet."""
    monkeypatch.setattr(evaluate.Evaluator, "evaluate", interrupted)
    assert run(evaluate, *SCORING) == INTERRUPTED
    monkeypatch.setattr(p2_export, "write_gpt2", interrupted)
    own = ["--profile", "micro", "--adapter", unbroken / "best.safetensors"]
    assert run(p2_export, tmp_path / "export", *own) == INTERRUPTED
    monkeypatch.setattr("captioning.training.setup.cached_features", interrupted)
    assert train(tmp_path / "run") == INTERRUPTED
    assert not run_folder.RunFolder(tmp_path / "run").has_state


# --------------------------------------------------------------------------------------- 2: bad input, 141: not heard


@pytest.mark.parametrize("name", ["p1", "p2", "p3"])
def test_a_folder_that_is_not_there_is_one_line(name, commands, tmp_path, capsys):
    assert run(*commands[name](tmp_path / "nowhere")) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "nowhere" in line


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "scores.json"))

    monkeypatch.setattr(os, "replace", full)
    assert run(evaluate, *SCORING, "--metrics", "cider", "--json", tmp_path / "scores.json") == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and "No space left" in line and "scores.json" in line


def test_a_reader_that_has_gone_before_the_end(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", *map(str, SCORING), "--metrics", "cider"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == UNHEARD and "error" not in done.stderr.lower()
