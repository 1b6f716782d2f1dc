"""bench/full_size.sh in its small form: every part runs, and the table says what each took. Nothing about times."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from tiny import VOCAB_SIZE

from bench import full_size as bench
from bench import measured
from bench.arithmetic import PRESETS
from bench.stand_ins import TINY, VOCABULARY, write_decoder, write_tokenizer
from captioning.data.annotations import load_split
from captioning.data.tokenizer import Tokenizer
from captioning.profiles import PROFILES, ROOT
from decoder import build_decoder
from microworld.steps import flags

PARTS = ["feature cache", "training", "self-critical training", "inference", "attention maps", "CIDEr, start included"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What the small form printed and left, through the shell script, as a user types it."""
    folder = tmp_path_factory.mktemp("rehearsal")
    numbers = {"steps": 2, "scst_steps": 1, "images": 4, "val_images": 2, "workers": 1}
    words = flags(tiny=True, **numbers, device="cpu", out=folder / "found", work=folder / "work")
    command, environment = ["bash", "bench/full_size.sh", *words], {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_small_form_runs_every_part(rehearsal):
    folder, shown = rehearsal
    for script in ("p2_train.py", "p2_infer.py", "p3_attention.py", "evaluate.py"):
        assert f"$ python {script}" in shown
    rows = {row["part"]: row for row in json.loads((folder / "found.json").read_text())["rows"]}
    assert list(rows) == PARTS
    assert [row["count"] for row in rows.values()] == [2 * 2 + 2, 2, 1, 4, 1, 4]
    for row in rows.values():
        assert row["seconds"] > 0 and row["host memory, GB"] > 0.05
        assert row["a second"] == pytest.approx(row["count"] / row["seconds"])
    for name in PARTS[:-1]:
        assert rows[name]["TFLOP/s"] > 0
        assert math.isfinite(float(rows[name]["share of the matrix rate"].split("%")[0]))
    table = (folder / "found.md").read_text()
    assert table in shown
    assert all(f"| {name} |" in table for name in PARTS)
    tokens = json.loads((folder / "work" / "tokenizer" / "encoder.json").read_text())
    assert len(tokens) == VOCABULARY


def test_the_process_that_starts_the_parts_leaves_the_device_to_them(monkeypatch, tmp_path):
    """A CUDA context of its own would take memory from the card for as long as the rehearsal lasts."""

    def touched(*args):
        raise AssertionError("the device is looked at in this process")

    for name in ("pick_device", "machine", "settle_precision", "measure_rates"):
        monkeypatch.setattr(bench, name, touched)
    before = bench.in_child(bench.survey, "cpu", 64, 128)
    assert (before.kind, before.precision, next(iter(before.rates))) == ("cpu", "fp32", "fp32")
    monkeypatch.setattr(bench, "prepare", lambda *args: 12.0)
    monkeypatch.setattr(bench, "run_all", lambda *args: ({}, "stopped"))
    args = bench.build_parser().parse_args(["--tiny", "--device", "cpu"])
    assert bench.rehearse(args, TINY, before, tmp_path)["machine"] == before.machine
    assert bench.main(["--tiny", "--device", "nowhere"]) == 2


def test_only_the_wanted_parts_run_with_the_training_that_they_need(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(
        bench.Rehearsal, "__call__", lambda self, title, *words, **options: ran.append((title, options))
    )
    monkeypatch.setattr(bench, "check_results", lambda *args: None)
    (tmp_path / "unseen" / "images" / "val").mkdir(parents=True)
    (tmp_path / "unseen" / "images" / "val" / "a.jpg").touch()
    args = bench.build_parser().parse_args(["--setting", "best-h", "--pool", "2", "--parts", "inference"])
    size = bench.size_of(args)
    bench.run_all(bench.Rehearsal(tmp_path, "cpu", math.inf), size, bench.choose(args, size), args.parts)
    assert [title for title, _ in ran] == ["train", "inference"]
    assert (ran[0][1]["setting"], ran[0][1]["pool"]) == ("best-h", 2)
    assert (size.models.encoder, size.models.prefix) == (PRESETS["best-h"], 65)


def test_missing_results_are_noticed(rehearsal, tmp_path):
    work, numbers = tmp_path / "work", {"steps": 2, "scst_steps": 1, "images": 4, "maps": 1}
    shutil.copytree(rehearsal[0] / "work", work, symlinks=True)
    bench.check_results(work, numbers)
    shutil.rmtree(work / "maps")
    bench.check_results(work, numbers, ("train", "inference"))
    (work / "captions.json").write_text('{"a": "x"}')
    with pytest.raises(ValueError, match="1 captions instead of 4; 0 maps instead of 1"):
        bench.check_results(work, numbers)


def test_the_stand_in_tokenizer_has_the_whole_vocabulary_and_splits_as_the_micro_one(tmp_path, tiny_data):
    tokenizer, micro = write_tokenizer(tmp_path), Tokenizer(PROFILES["micro"].tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (VOCABULARY, VOCABULARY - 1)
    assert micro.vocab_size == VOCAB_SIZE
    captions = [c for s in load_split(tiny_data, "train") for c in s.captions]
    for text in [*captions, "Größe  a a\na", " a big red bus"]:
        pieces = [[t.decode([i]) for i in t.encode(text)] for t in (micro, tokenizer)]
        assert pieces[0] == pieces[1]
        assert tokenizer.decode(tokenizer.encode(text)) == text.strip()
    assert isinstance(tokenizer.decode(range(VOCABULARY)), str)


def test_the_small_decoder_has_the_whole_vocabulary(tmp_path):
    write_decoder(tmp_path / "decoder.safetensors", TINY.decoder)
    assert build_decoder(tmp_path / "decoder.safetensors").config == TINY.decoder
    assert TINY.decoder.vocab_size == VOCABULARY


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--workers", "0"], "--workers 0"),
        (["--images", "2", "--maps", "3"], "--maps 3: more than --images 2"),
        (["--parts", "train", "score"], "--parts score: there are captions to score only with inference"),
        (["--setting", "best-h"], "--setting best-h: is of the full size"),
        (["--pool", "0"], "--pool 0"),
        (["--minutes", "0"], "--minutes 0.0: must be more than 0"),
        (["--work", str(ROOT / "bench")], "exists already"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message, capsys):
    assert bench.main(["--tiny", "--device", "cpu", *flags]) == 2
    assert message in capsys.readouterr().err


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch, capsys):
    """The second command fails: the first one's rows are printed and written, and the exit code is 2."""
    part = {"count": 6, "seconds": 2.0, "host_gb": 1.0, "cuda_gb": 3.0}
    usage = {
        "seconds": 9.0,
        "host_gb": 1.0,
        "cuda_gb": 4.0,
        "work": [{"what": "cache", **part}, {"what": "train", **part}],
    }

    def run(self, title, *arguments, **options):
        if title == "scst":
            raise ValueError("the time was over during 'scst'")
        return usage

    monkeypatch.setattr(bench.Rehearsal, "__call__", run)
    monkeypatch.setattr(bench, "prepare", lambda *_: 50.0)
    assert bench.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "found")]) == 2
    shown = capsys.readouterr()
    assert "the time was over during 'scst'" in shown.err
    assert "Taken from the GPU by its allocator: train 4.0 GB." in shown.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["part"] for row in found["rows"]] == ["feature cache", "training"]
    assert found["failure"] == "the time was over during 'scst'"


def test_a_rehearsal_ends_when_its_time_is_over(tmp_path):
    run = bench.Rehearsal(tmp_path, "cpu", 0.0)
    with pytest.raises(ValueError, match="the time was over during 'train'; give more --minutes"):
        run("train", "p2_train.py", help=True)


def test_a_part_that_fails_ends_the_rehearsal(tmp_path):
    run = bench.Rehearsal(tmp_path, "cpu", math.inf)
    with pytest.raises(ValueError, match="the part 'score' failed with exit code 2"):
        run("score", "evaluate.py", pred_file=tmp_path / "nowhere", annotation_file="nowhere", metrics="cider")


def test_work_is_added_up_and_its_absence_noticed():
    part = {"what": "cache", "count": 3, "seconds": 2.0, "host_gb": 1.0, "cuda_gb": 4.0}
    usage = {"work": [part, {**part, "count": 5, "host_gb": 2.0, "cuda_gb": 3.0}, {**part, "what": "train"}]}
    assert bench.work_of(usage, "cache") == {"count": 8, "seconds": 4.0, "host_gb": 2.0, "cuda_gb": 4.0}
    with pytest.raises(ValueError, match="did not report 'explain'"):
        bench.work_of(usage, "explain")


def test_a_measured_script_reports_work_memory_and_its_exit_code(tmp_path):
    """In its own process: a peak belongs to the work before the line that reports it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import logging, sys\n"
        "import numpy as np\n"
        "a = np.ones(25_000_000); a.sum(); del a\n"  # 0.2 GB
        "logging.getLogger().warning('big', extra={'work': ('big', 2, 0.5)})\n"
        "logging.getLogger().warning('small', extra={'work': ('small', 1, 0.25)})\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    usage = tmp_path / "usage.json"
    command = [sys.executable, "-m", "bench.measured", usage, script, "3"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 3
    found = json.loads(usage.read_text())
    assert (found["exit_code"], found["cuda_gb"]) == (3, None)
    big, small = found["work"]
    assert (big["what"], big["count"], big["seconds"]) == ("big", 2, 0.5)
    assert found["host_gb"] == big["host_gb"] >= small["host_gb"]
    assert big["host_gb"] > 0.2


def test_a_script_that_is_not_there_is_named(tmp_path, capsys):
    assert measured.main([str(tmp_path / "usage.json"), str(tmp_path / "none.py")]) == 2
    assert "none.py: no such script" in capsys.readouterr().err


def test_numbers_of_the_size_with_those_that_flags_give():
    args = bench.build_parser().parse_args(["--batch-size", "7"])
    numbers = bench.choose(args, TINY)
    assert numbers["batch_size"] == 7
    assert numbers["steps"] == TINY.numbers["steps"]
    parts = {part.name: part for part in bench.parts_of(TINY, numbers, 50, "bf16")}
    assert parts["feature cache"].count == 7 * TINY.numbers["steps"] + TINY.numbers["val_images"]
    assert parts["training"].operations == 7 * TINY.models.train(50)
    assert (parts["training"].kind, parts["attention maps"].kind) == ("bf16", "fp32")
