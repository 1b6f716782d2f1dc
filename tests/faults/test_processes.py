"""Faults of running jobs: kills at random moments, full disks, files that vanish, two writers.

Every job is a process of the script itself. What counts is what is left in the end: each run is taken up again until it
is done, and must then equal an unbroken one.
"""

import json
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from jobs import Jobs, kill_after

from captioning.cli import BAD_INPUT, PARTIAL, STOPPED
from captioning.models.adapter import read_adapter
from captioning.training.run_folder import RunFolder

SAVE_EVERY = 2
TRAIN = (
    "--profile",
    "micro",
    "--device",
    "cpu",
    "--batch-size",
    "2",
    "--epochs",
    "3",
    "--lora-rank",
    "4",
    "--val-images",
    "4",
    "--beam-size",
    "2",
    "--max-new-tokens",
    "8",
    "--log-every",
    "1",
    "--save-every",
    SAVE_EVERY,
)
INFER = ("--profile", "micro", "--device", "cpu", "--beam-size", "2", "--max-new-tokens", "12", "--batch-size", "4")
SIZES = [pytest.param(3, id="small"), pytest.param(50, id="campaign", marks=pytest.mark.faults)]
FEW = [pytest.param(1, id="small"), pytest.param(10, id="campaign", marks=pytest.mark.faults)]


@pytest.fixture(scope="module")
def jobs(tiny_profile):
    with Jobs(tiny_profile) as server:
        yield server


@pytest.fixture(scope="module")
def unbroken(jobs, tmp_path_factory):
    """A whole run, and the seconds that it takes with its features cached."""
    folder = tmp_path_factory.mktemp("unbroken")
    for name in ("first", "run"):
        code, seconds = jobs.run("p2_train", [*TRAIN, "--out", folder / name], folder / "log")
        assert code == 0, (folder / "log").read_text()
    return folder / "run", seconds


@pytest.fixture(scope="module")
def pictures(tiny_data, tmp_path_factory):
    """Forty pictures: enough for a job that lasts."""
    folder = tmp_path_factory.mktemp("pictures")
    originals = sorted((tiny_data / "images" / "train").iterdir()) + sorted((tiny_data / "images" / "val").iterdir())
    for copy in range(2):
        for number, path in enumerate(originals):
            shutil.copy(path, folder / f"{copy}-{number:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def captioned(jobs, unbroken, pictures, tiny_profile, tmp_path_factory):
    """The arguments that caption the pictures, the captions of an unbroken run, and its seconds."""
    folder = tmp_path_factory.mktemp("captioned")

    def argv(out, images=pictures):
        return [images, out, tiny_profile.decoder, "--adapter", unbroken[0] / "best.safetensors", *INFER]

    code, seconds = jobs.run("p2_infer", argv(folder / "out.json"), folder / "log")
    assert code == 0, (folder / "log").read_text()
    return argv, (folder / "out.json").read_text(), seconds


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same_run(out, other):
    """Whether two run folders hold the same numbers and the same adapters, to the last bit."""
    return metrics(out) == metrics(other) and all(same_adapter(out, other, name) for name in ("best", "last"))


def same_adapter(out, other, name):
    mine, theirs = (read_adapter(run / f"{name}.safetensors")[1] for run in (out, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def train_argv(out):
    return [*TRAIN, "--out", out, *(["--resume"] if RunFolder(out).has_state else [])]


def finish(jobs, out, log):
    """Take a run up until it is done."""
    code, _ = jobs.run("p2_train", train_argv(out), log)
    assert code == 0, log.read_text()


def steps_lost(out):
    """How many steps the metrics tell of that the newest state does not hold."""
    if not (out / "metrics.jsonl").exists():
        return 0
    lines = (out / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    told = max((json.loads(line)["step"] for line in lines), default=0)
    kept = RunFolder(out).load_state().progress.step if RunFolder(out).has_state else 0
    return told - kept


@pytest.mark.parametrize(
    ("number", "kills"),
    [
        pytest.param(signal.SIGKILL, 3, id="SIGKILL-small"),
        pytest.param(signal.SIGTERM, 2, id="SIGTERM-small"),
        pytest.param(signal.SIGKILL, 50, id="SIGKILL-campaign", marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, 20, id="SIGTERM-campaign", marks=pytest.mark.faults),
    ],
)
def test_training_killed_at_random_moments_ends_as_if_never_killed(jobs, unbroken, tmp_path, tally, kills, number):
    rng, (reference, seconds) = random.Random(9), unbroken
    done, log = 0, tmp_path / "log"
    run = 0
    while done < kills:
        out = tmp_path / f"run{run}"
        code, _ = jobs.run("p2_train", train_argv(out), log, kill_after(rng.uniform(0, seconds), number))
        # SIGTERM while the program itself is still being loaded ends the process as ever.
        assert code in (0, -number, STOPPED), log.read_text()
        if code == 0:
            run += 1
            assert same_run(out, reference)
            continue
        done += 1
        lost = steps_lost(out)
        bearable = SAVE_EVERY if code == -signal.SIGKILL else 0
        outcome = "absorbed" if lost <= bearable else "lost results"
        tally(f"training gets {number.name} at a random moment", outcome, f"{lost} steps")
    finish(jobs, tmp_path / f"run{run}", log)
    assert same_run(tmp_path / f"run{run}", reference)


@pytest.mark.parametrize("kills", SIZES)
def test_inference_killed_at_random_moments_ends_as_if_never_killed(jobs, captioned, tmp_path, tally, kills):
    rng, (argv, expected, seconds) = random.Random(10), captioned
    done, log, part = 0, tmp_path / "log", tmp_path / "out.json.part.jsonl"
    out, kept = tmp_path / "out.json", 0
    while done < kills:
        code, _ = jobs.run("p2_infer", argv(out), log, kill_after(rng.uniform(0, seconds)))
        assert code in (0, -signal.SIGKILL), log.read_text()
        if out.exists():
            assert out.read_text() == expected, "captions differ from those of an unbroken run"
        if code == 0:
            out.unlink()
            kept = 0
            continue
        done += 1
        lines = part.read_bytes().count(b"\n") if part.exists() else 0
        outcome = "absorbed" if lines >= kept or out.exists() else "lost results"
        tally("inference gets SIGKILL at a random moment", outcome, f"{kept} lines became {lines}")
        kept = 0 if out.exists() else lines
    code, _ = jobs.run("p2_infer", argv(out), log)
    assert (code, out.read_text()) == (0, expected)


@pytest.mark.parametrize("count", FEW)
def test_a_full_disk_loses_nothing(jobs, unbroken, captioned, tmp_path, tally, count):
    """The limit on a file's size fails writes as a full disk does, in the middle of a file."""
    rng, log = random.Random(11), tmp_path / "log"
    largest = max(path.stat().st_size for path in unbroken[0].iterdir())
    for number in range(count):
        out = tmp_path / f"run{number}"
        stop = kill_after(rng.uniform(0, 0.6) * unbroken[1], signal.SIGTERM)
        done = jobs.run("p2_train", train_argv(out), log, stop)[0] == 0
        code, _ = jobs.run("p2_train", train_argv(out), log, largest_file=rng.randrange(largest))
        assert code == (0 if done else BAD_INPUT) and "Traceback" not in log.read_text(), log.read_text()
        finish(jobs, out, log)
        tally("training: no room for a file", "clean errors" if same_run(out, unbroken[0]) else "silent damage")

        argv, expected, _ = captioned
        out = tmp_path / f"out{number}.json"
        code, _ = jobs.run("p2_infer", argv(out), log, largest_file=rng.randrange(len(expected)))
        assert code == BAD_INPUT and "Traceback" not in log.read_text(), log.read_text()
        assert not out.exists()
        assert jobs.run("p2_infer", argv(out), log)[0] == 0
        tally("inference: no room for a file", "clean errors" if out.read_text() == expected else "silent damage")


@pytest.mark.faults
def test_a_full_file_system_loses_nothing(jobs, unbroken, tmp_path, tally):
    size = sum(path.stat().st_size for path in unbroken[0].iterdir())
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    for share in (0.3, 0.6, 0.9):
        options = ["-t", "tmpfs", "-o", f"size={int(size * share)}", "tmpfs"]
        if subprocess.run(["mount", *options, disk], capture_output=True, check=False).returncode:
            pytest.skip("no right to mount a tmpfs here")
        try:
            code, _ = jobs.run("p2_train", train_argv(disk / "run"), log)
            assert code == BAD_INPUT and "Traceback" not in log.read_text(), log.read_text()
            subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
            finish(jobs, disk / "run", log)
            outcome = "clean errors" if same_run(disk / "run", unbroken[0]) else "silent damage"
            tally("training: a tmpfs fills up", outcome)
        finally:
            subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("count", FEW)
def test_files_that_vanish_under_a_job_end_it_cleanly(jobs, unbroken, captioned, tmp_path, tally, pictures, count):
    rng, log = random.Random(12), tmp_path / "log"
    argv, expected, seconds = captioned
    for number in range(count):
        images, out = tmp_path / f"images{number}", tmp_path / f"out{number}.json"
        shutil.copytree(pictures, images)

        def remove(pid, images=images):
            time.sleep(rng.uniform(0, 0.5 * seconds))
            for path in rng.sample(sorted(images.iterdir()), 20):
                path.unlink()

        code, _ = jobs.run("p2_infer", argv(out, images), log, remove)
        assert code in (0, PARTIAL, BAD_INPUT) and "Traceback" not in log.read_text(), log.read_text()
        found = json.loads(out.read_text()).items() if out.exists() else set()
        wrong = found - json.loads(expected).items()
        tally("inference: images vanish", "silent damage" if wrong else "clean errors" if code else "absorbed")

        run = tmp_path / f"run{number}"

        def empty(pid, run=run):
            time.sleep(rng.uniform(0.2, 0.9) * unbroken[1])
            shutil.rmtree(run, ignore_errors=True)

        code, _ = jobs.run("p2_train", train_argv(run), log, empty)
        assert code in (0, BAD_INPUT) and "Traceback" not in log.read_text(), log.read_text()
        # Without an error the run was done before, or its last files were written again.
        whole = code or not (run / "last.safetensors").exists() or same_adapter(run, unbroken[0], "last")
        outcome = "clean errors" if code else "absorbed"
        tally("training: the run folder vanishes", outcome if whole else "silent damage")
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.parametrize("count", FEW)
def test_of_two_writers_one_is_refused(jobs, unbroken, captioned, tiny_profile, tmp_path, tally, count):
    rng, (argv, expected, seconds) = random.Random(13), captioned
    with Jobs(tiny_profile) as others:
        for number in range(count):
            run, out = tmp_path / f"run{number}", tmp_path / f"out{number}.json"
            for name, script, words, lasts in (
                ("training", "p2_train", train_argv(run), unbroken[1]),
                ("inference", "p2_infer", argv(out), seconds),
            ):
                jobs.start(script, words, tmp_path / "log")
                time.sleep(rng.uniform(0, 0.3) * lasts)
                codes = sorted([others.run(script, words, tmp_path / "log")[0], jobs.wait()])
                assert "Traceback" not in (tmp_path / "log").read_text(), (tmp_path / "log").read_text()
                # The second inference may come when the first is done, or between its start and its lock.
                assert codes == [0, BAD_INPUT] or (name == "inference" and codes == [0, 0])
                whole = same_run(run, unbroken[0]) if name == "training" else out.read_text() == expected
                outcome = "clean errors" if codes[1] else "absorbed"
                tally(f"{name}: two writers", outcome if whole else "silent damage")
