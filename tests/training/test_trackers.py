"""trackers.py: what metrics.jsonl gets, the trackers get; by TensorBoard itself, and by a stand-in for the others."""

import importlib.util

import pytest
import torch
from runs import records, train

from captioning.training.trackers import Trackers, flat
from captioning.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("constant_score")


@pytest.fixture
def tracking():
    return pytest.importorskip("accelerate.tracking")


def stand_in(tracking, monkeypatch, *names):
    """Put a tracker that keeps what it is given in the place of these, and let them alone be installed."""
    given = []

    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "stand-in", False, None

        def __init__(self, run_name, **kwargs):
            super().__init__()
            self.given = {"project": run_name, **kwargs, "lines": []}
            given.append(self.given)

        def start(self):
            self.given["started"] = True

        def store_init_configuration(self, values):
            self.given["config"] = values

        def log(self, values, step=None, **kwargs):
            self.given["lines"].append((step, values))

        def finish(self):
            self.given["finished"] = True

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: list(names))
    for name in names:
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Tracker)
    return given


@pytest.mark.parametrize("name", ["wandb", "trackio", "all"])
def test_a_tracker_gets_the_config_and_every_line(name, tracking, tmp_path, monkeypatch):
    given = stand_in(tracking, monkeypatch, *(("wandb", "trackio") if name == "all" else (name,)))
    out = tmp_path / "my run"
    assert train(out, "--epochs", 1, "--log-with", name) == 0
    assert len(given) == (2 if name == "all" else 1)
    for tracker in given:
        assert tracker["project"] == "captioning"
        assert tracker["name"] == "my run"
        assert tracker["started"]
        assert tracker["finished"]
        assert tracker["config"]["train.lora_rank"] == 4
        steps, losses = zip(*((line["step"], line.get("loss")) for line in records(out)), strict=True)
        assert [step for step, _ in tracker["lines"]] == list(steps)
        assert [values["step/loss"] for _, values in tracker["lines"][:3]] == list(losses[:3])
        assert tracker["lines"][3][1]["epoch/val_cider"] == 0.5
    assert not torch.distributed.is_initialized()


def test_a_tracker_ends_with_a_run_that_fails(tracking, tmp_path, monkeypatch):
    given = stand_in(tracking, monkeypatch, "wandb")
    monkeypatch.setattr(Trainer, "validate", lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", "--log-with", "wandb")
    assert given[0]["finished"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "all"])
def test_a_missing_tracker_is_named_with_its_package(name, tracking, tmp_path, monkeypatch, capsys):
    stand_in(tracking, monkeypatch)
    assert train(tmp_path / "run", "--log-with", name) == 2
    error = capsys.readouterr().err
    assert f"--log-with {name}: not installed" in error
    board = "`pip install -e '.[tensorboard]'`"
    assert (board if name in ("tensorboard", "all") else f"`pip install {name}`") in error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_the_numbers_of_a_resumed_run_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert train(out, "--epochs", 1, "--log-with", "tensorboard") == 0
    assert train(out, "--epochs", 1, "--log-with", "tensorboard", "--resume") == 0  # nothing is left to do
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("step/loss")]
    assert shown == [(line["step"], pytest.approx(line["loss"])) for line in records(out) if line["kind"] == "step"]
    assert events.Scalars("epoch/val_cider")[0].value == 0.5
    assert list((out / "tensorboard").rglob("hparams.yml"))


def test_a_config_is_flat_for_a_tracker():
    config = {"train": {"lr": 0.1, "lora": {"rank": 4}}, "lora_enable": (True, False), "git": None, "cls": True}
    assert flat(config) == {
        "train.lr": 0.1,
        "train.lora.rank": 4,
        "lora_enable": "[true, false]",
        "git": "null",
        "cls": True,
    }


def test_trackers_hand_on_numbers_only(tracking, tmp_path, monkeypatch):
    given = stand_in(tracking, monkeypatch, "wandb")
    trackers = Trackers("wandb", tmp_path)
    trackers.log({"kind": "epoch", "step": 7, "val_loss": 1.5, "best": True, "note": "words"})
    assert given[0]["lines"] == [(7, {"epoch/val_loss": 1.5, "epoch/best": 1.0})]
