"""run_folder.py: states that survive a kill, one writer, finished runs, and run folders of the last version."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, records, signal_at, train
from safetensors.torch import save_file
from tiny import TINY_ENCODER, VOCAB_SIZE

from captioning.cli import BAD_INPUT, STOPPED
from captioning.models.encoder import build_encoder
from captioning.profiles import PROFILES, ROOT
from captioning.training.run_folder import BEFORE, NEWEST, Progress, RunFolder, State, find_runs, read_run
from decoder import Decoder, DecoderConfig, gpt2_state_dict
from p2_train import main

pytestmark = pytest.mark.usefixtures("constant_score")
NO_OPTIMIZER = {"state": {}, "param_groups": []}


def test_a_state_comes_back_as_it_was(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.5}], betas=(0.8, 0.9))
    weight.sum().backward()
    optimizer.step()
    progress = Progress(2, 1, 7, [0.5, 0.25], 3, 1, 0.75, "val_cider", 1)
    state = State({"a.b": weight.detach()}, optimizer.state_dict(), {"cpu": torch.get_rng_state()}, progress)
    state.write(tmp_path / "state")
    found = State.read(tmp_path / "state")
    assert found.progress == progress
    assert torch.equal(found.adapter["a.b"], weight)
    assert torch.equal(found.random["cpu"], state.random["cpu"])
    again = torch.optim.AdamW([{"params": [weight], "lr": 0.1}])
    again.load_state_dict(found.optimizer)
    assert again.param_groups[0]["lr"] == 0.5
    assert again.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_only_two_states_are_kept_and_a_kill_between_renames_leaves_one(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(4):
        folder.save_state(State({"a": torch.zeros(2)}, NO_OPTIMIZER, {}, Progress(step=step)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NEWEST, BEFORE])
    assert folder.load_state().progress.step == 3
    folder.newest.unlink()
    assert folder.load_state().progress.step == 2


def test_a_damaged_newest_state_gives_way_to_the_one_before(unbroken, tmp_path, monkeypatch, caplog):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, 4, signal.SIGTERM)
        assert train(out, "--save-every", 1) == STOPPED
    newest = RunFolder(out).newest
    content = bytearray(newest.read_bytes())
    content[-1000] ^= 1  # one bit of the optimiser's moments: every length and name is still right
    newest.write_bytes(content)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # cut short by the kill
    assert train(out, "--resume") == 0
    assert "checksum" in caplog.text
    assert "continuing from the state before" in caplog.text
    assert_same_run(out, unbroken)


def test_where_no_state_is_intact_nothing_is_resumed(unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    for state in out.glob("training_state*.safetensors"):
        state.write_bytes(state.read_bytes()[:200])
    assert train(out, "--resume") == BAD_INPUT
    assert "no state is intact" in capsys.readouterr().err


def test_a_second_writer_is_refused_and_leftovers_go(unbroken, tmp_path, capsys):
    left = tmp_path / ".last.safetensors.abc.tmp"
    left.write_text("half")
    with RunFolder(tmp_path).lock():
        assert not left.exists()
        with pytest.raises(ValueError, match="another process is writing this run"):
            RunFolder(tmp_path).lock()
    RunFolder(tmp_path).lock().close()
    with RunFolder(unbroken).lock():
        assert train(unbroken, "--resume") == BAD_INPUT
    assert "another process" in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_work(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert train(tmp_path / "run") == BAD_INPUT
    assert "free some space" in capsys.readouterr().err


def test_a_cider_is_never_compared_with_a_loss():
    by_cider, by_loss = Progress(), Progress()
    ciders = [{"val_loss": 2.0, "val_cider": 0.4}, {"val_loss": 1.0}, {"val_loss": 3.0, "val_cider": 0.5}]
    assert [by_cider.is_better(record) for record in ciders] == [True, False, True]
    losses = [{"val_loss": 2.0}, {"val_loss": 3.0, "val_cider": 9.0}, {"val_loss": math.nan}, {"val_loss": 1.0}]
    assert [by_loss.is_better(record) for record in losses] == [True, False, False, True]
    assert (by_loss.criterion, by_loss.best, by_loss.stale) == ("val_loss", -1.0, 0)


# ------------------------------------------------------------------------------------------------ the last version

FIXTURE = ROOT / "tests" / "fixtures" / "run_before"  # a run that SIGTERM ended in step 5 of 6, and its lines unbroken
ENCODER = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 16, "img_size": 48, "crop_pct": 1.0}
FLAGS = (
    "--profile micro --device cpu --batch-size 4 --epochs 2 --lora-rank 1 --no-lora-lm-head --val-images 2 "
    "--beam-size 2 --max-new-tokens 6 --log-every 1 --lora-dropout 0 --out run"
)


def patterned(state):
    """Return weights that are the same on every machine, as random ones are not."""
    made = {}
    for offset, name in enumerate(sorted(state)):
        k = torch.arange(state[name].numel())
        mixed = (k * k * 31 + k * 17 + offset * 101) % 1009
        made[name] = (mixed.double() / 1009 - 0.5).float().reshape(state[name].shape)
    return made


@pytest.fixture
def run_before(tiny_profile, tmp_path, monkeypatch):
    """A copy of the run folder that the last version wrote, and the models that it was made with."""
    monkeypatch.chdir(tmp_path)
    small = DecoderConfig(vocab_size=VOCAB_SIZE, n_positions=96, n_embd=64, n_layer=1, n_head=1)
    save_file(patterned(gpt2_state_dict(Decoder(small))), "decoder.safetensors")
    save_file(patterned(build_encoder(TINY_ENCODER, "random", ENCODER).state_dict()), "encoder.safetensors")
    files = {
        "decoder_files": ("decoder.safetensors",),
        "encoder_weights": "encoder.safetensors",
        "cache": str(tmp_path / "cache"),
    }
    profile = replace(tiny_profile, **files, encoder_kwargs=ENCODER)
    monkeypatch.setitem(PROFILES, "micro", profile)
    out = tmp_path / "run"
    shutil.copytree(FIXTURE, out)
    config = (out / "config.json").read_text().replace("DATA", str(Path(tiny_profile.data).resolve()))
    (out / "config.json").write_text(config)
    return out


def test_a_run_of_the_last_version_resumes_by_the_flags_that_are_named_and_is_reported(run_before, capsys):
    assert main([*FLAGS.split(), "--resume"]) == BAD_INPUT  # the rates of best were others
    rates = "--lr 0.002 --projector-lr 0.002"
    assert f"other values of train.lr, train.projector_lr; its own: {rates}\n" in capsys.readouterr().err
    assert main([*FLAGS.split(), "--resume", *rates.split()]) == 0
    found = records(run_before)
    wanted = [json.loads(line) for line in (FIXTURE / "unbroken.jsonl").read_text().splitlines()]
    assert [line.keys() for line in found] == [line.keys() - {"seconds"} for line in wanted]
    for line, other in zip(found, wanted, strict=True):
        assert line.pop("kind") == other["kind"]
        assert line == pytest.approx({key: other[key] for key in line}, rel=1e-4)
    assert read_run(run_before).best_cider == 0.5


def test_a_finished_run_of_the_last_version_is_found(run_before):
    assert "has not ended (1 of 2 epochs" in find_runs(run_before.parent)[1][0].reason
    shutil.copy(FIXTURE / "unbroken.jsonl", run_before / "metrics.jsonl")
    (run,), omitted = find_runs(run_before.parent)
    assert not omitted
    assert (run.name, run.objective, len(run.steps), len(run.epochs), run.seconds) == ("run", "xe", 6, 2, 0.4)


@pytest.mark.parametrize(("option", "value"), [("average_last", 2), ("rank_stabilized", True), ("draws", "sample")])
def test_a_run_with_an_option_that_is_gone_is_not_resumed(run_before, capsys, option, value):
    config = json.loads((run_before / "config.json").read_text())
    config["train"][option] = value
    (run_before / "config.json").write_text(json.dumps(config))
    assert main([*FLAGS.split(), "--resume"]) == BAD_INPUT
    assert f"started with other values of train.{option}" in capsys.readouterr().err
