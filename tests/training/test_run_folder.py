"""What a run must not lose: exact resuming from any step, damaged states, two writers, signals, skipped steps."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from captioning.cli import INTERRUPTED, STOPPED
from captioning.models.adapter import read_adapter
from captioning.models.captioner import Captioner
from captioning.profiles import PROFILES, ROOT
from captioning.scoring import evaluator
from captioning.tensors import read_tensors, write_tensors
from captioning.training.run_folder import BEFORE, NEWEST, Progress, RunFolder, State
from captioning.training.trainer import Trainer
from p2_train import main

EPOCHS, STEPS = 2, 3  # 12 images in batches of 4
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7, dtype=torch.int64)}
SMALL = (
    "--profile",
    "micro",
    "--device",
    "cpu",
    "--batch-size",
    "4",
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
    "1",
    "--lora-dropout",
    "0.3",
)


@pytest.fixture(autouse=True, scope="module")
def micro(tiny_profile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "micro", tiny_profile)
        patch.setattr(evaluator, "cider", lambda references, predictions: (0.5, {}))
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(out) == 0
    return out


def train(out, *flags):
    return main([*SMALL, "--epochs", str(EPOCHS), "--out", str(out), *map(str, flags)])


def metrics(out):
    """All lines without the one figure that a clock makes."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(out, other):
    assert metrics(out) == metrics(other)
    for name in ("best", "last"):
        mine, theirs = (read_adapter(folder / f"{name}.safetensors")[1] for folder in (out, other))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine.keys() | theirs.keys()), name


def send_at(monkeypatch, step, number):
    """Send ourselves a signal in the middle of ``step``."""
    take = Trainer.train_step

    def interrupted(trainer, batches):
        if trainer.progress.step == step:
            os.kill(os.getpid(), number)
        return take(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_a_signal_ends_the_run_behind_its_step_to_resume_exactly(unbroken, tmp_path, monkeypatch, step, number):
    out, handler = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        send_at(patch, step, number)
        assert train(out, "--save-every", 1000) == STOPPED
    assert signal.getsignal(number) == handler
    assert metrics(out)[-1]["step"] == step + 1
    assert train(out, "--resume", "--save-every", 1000) == 0
    assert_same_run(out, unbroken)


@pytest.fixture
def interruptible():
    """SIGINT as a terminal has it: a job in the background of a shell is started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    take = Trainer.train_step

    def interrupted(trainer, batches):
        os.kill(os.getpid(), signal.SIGINT)
        while not trainer.stop.requested:  # two signals sent at once may arrive as one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        return take(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert train(tmp_path / "run") == INTERRUPTED
    assert not RunFolder(tmp_path / "run").has_state


@pytest.mark.parametrize("flags", [("--accumulate", "2"), ("--captions-per-image", "2"), ("--optimizer", "adam")])
def test_options_resume_bit_for_bit(tmp_path, monkeypatch, flags):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(whole, *flags) == 0
    with monkeypatch.context() as patch:
        send_at(patch, 2, signal.SIGTERM)
        assert train(out, *flags) == STOPPED
    assert train(out, *flags, "--resume") == 0
    assert_same_run(out, whole)


@pytest.mark.parametrize("where", ["keep", "validate", "save_state", "write_metrics"])
def test_dying_around_the_end_of_an_epoch_loses_and_doubles_nothing(unbroken, tmp_path, monkeypatch, where):
    """The line of an epoch was once written behind the state: dying in between lost it for good."""
    out, method = tmp_path / "run", getattr(Trainer, where)

    def dies(trainer, *args):
        if trainer.progress.step < STEPS or (where == "save_state" and trainer.progress.epoch == 0):
            return method(trainer, *args)
        result = method(trainer, *args)
        if where == "write_metrics" and args[0]["kind"] != "epoch":
            return result
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, where, dies)
        assert train(out) == INTERRUPTED
    assert train(out, "--resume") == 0
    assert_same_run(out, unbroken)


def test_a_damaged_newest_state_gives_way_to_the_one_before(unbroken, tmp_path, monkeypatch, caplog):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_at(patch, 4, signal.SIGTERM)
        assert train(out) == STOPPED
    newest = out / NEWEST
    content = bytearray(newest.read_bytes())
    content[-1000] ^= 1  # one bit of the optimiser's moments: every length and name is still right
    newest.write_bytes(content)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # torn by the kill
    assert train(out, "--resume") == 0
    assert "checksum" in caplog.text and "continuing from the state before" in caplog.text
    assert_same_run(out, unbroken)


def test_a_finished_run_resumes_to_itself(unbroken, tmp_path):
    before = {path.name: path.read_bytes() for path in unbroken.iterdir() if path.suffix == ".safetensors"}
    assert train(unbroken, "--resume") == 0
    assert {name: (unbroken / name).read_bytes() for name in before} == before


def test_flags_that_change_no_result_may_change_on_resuming(unbroken):
    assert train(unbroken, "--resume", "--log-every", 2, "--max-skipped", 3) == 0


# ---------------------------------------------------------------------------------------- steps without a number


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [0, 1])
def test_a_step_without_a_number_is_skipped_and_counted(tmp_path, monkeypatch, spoil, clip):
    out, loss, seen = tmp_path / "run", Captioner.loss, []

    def spoilt(captioner, *args):
        value = loss(captioner, *args)
        if not captioner.training:
            return value
        seen.append({name: p.detach().clone() for name, p in captioner.trainable().items()})
        if len(seen) != 2:
            return value
        infinite_slope = (captioner.projector.weight * 0).sqrt().sum()  # its value is 0
        return value * math.nan if spoil == "loss" else value + infinite_slope

    monkeypatch.setattr(Captioner, "loss", spoilt)
    assert train(out, "--epochs", 1, "--clip", clip) == 0
    assert [r["step"] for r in metrics(out) if r["kind"] == "skipped"] == [2]
    assert [r["step"] for r in metrics(out) if r["kind"] == "step"] == [1, 3]
    first, second, third = seen
    assert all(torch.equal(second[name], third[name]) for name in first)  # the bad step changed nothing
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in read_adapter(out / "last.safetensors")[1].values())
    assert math.isfinite(metrics(out)[-1]["train_loss"])


def test_out_of_memory_names_the_flags(tmp_path, monkeypatch, capsys):
    def full(captioner, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Captioner, "loss", full)
    assert train(tmp_path / "run") == 2
    assert "--batch-size 2 --accumulate 2" in capsys.readouterr().err
    assert train(tmp_path / "run", "--batch-size", 1) == 2
    assert "--captions-per-image 1" in capsys.readouterr().err


def test_a_full_disk_is_told_before_work(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert train(tmp_path / "run") == 2
    assert "free some space" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- files


def test_tensors_and_texts_come_back_and_any_flipped_byte_is_noticed(tmp_path):
    file = tmp_path / "file.safetensors"
    write_tensors(file, TENSORS, {"text": "é"})
    tensors, texts = read_tensors(file)
    assert texts == {"text": "é"}
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            tensors, texts = read_tensors(file)
        except ValueError as error:
            assert str(file) in str(error)
            continue
        # What is left undetected is the checksum's own name, and padding: nothing that is used.
        assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
        assert texts["text"] == "é"


def test_a_file_without_a_checksum_is_read(tmp_path):
    """Adapters of earlier versions have none."""
    save_file(TENSORS, tmp_path / "old.safetensors", metadata={"captioner": "{}"})
    assert read_tensors(tmp_path / "old.safetensors")[1] == {"captioner": "{}"}


def test_only_two_states_are_kept_and_a_kill_between_renames_leaves_one(tmp_path):
    folder = RunFolder(tmp_path)
    for count in range(4):
        folder.save_state(State(TENSORS, {"state": {}, "param_groups": []}, {}, Progress(step=count)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NEWEST, BEFORE])
    assert folder.load_state().progress.step == 3
    folder.newest.unlink()
    assert folder.load_state().progress.step == 2


def test_a_second_writer_is_refused_and_leftovers_go(unbroken, tmp_path, capsys):
    left = tmp_path / ".last.safetensors.abc.tmp"
    left.write_text("half")
    code = (
        "from pathlib import Path; from captioning.training.run_folder import RunFolder; "
        f"RunFolder(Path({str(tmp_path)!r})).lock()"
    )
    with RunFolder(tmp_path).lock():
        assert not left.exists()
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "another process is writing this run" in result.stderr
    with RunFolder(unbroken).lock():
        assert train(unbroken, "--resume") == 2
    assert "another process" in capsys.readouterr().err
