"""trainer.py: what an epoch learns and keeps, exact resuming from any step, signals, and steps without a number."""

import math
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from runs import STEPS, assert_same_run, records, same, signal_at, train, weights

from captioning.cli import BAD_INPUT, INTERRUPTED, STOPPED
from captioning.inference import captions
from captioning.inference.search import SearchResult
from captioning.models.captioner import Captioner
from captioning.scoring import evaluator
from captioning.training.config import SETTINGS, TrainConfig
from captioning.training.run_folder import RunFolder
from captioning.training.trainer import Trainer, steps_per_epoch

pytestmark = pytest.mark.usefixtures("constant_score")


@pytest.fixture
def scores(monkeypatch):
    """CIDEr of each validation, in turn."""
    values = []
    monkeypatch.setattr(evaluator, "cider", lambda references, predictions: (values.pop(0), {}))
    return values


# ------------------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize(
    ("flags", "expected"),
    [((), False), (("--precision", "bf16"), True), (("--setting", "1", "--report-faithful"), False)],
)
def test_on_a_processor_bf16_trains_where_it_is_asked_for(tmp_path, monkeypatch, bf16_processor, flags, expected):
    """It is faster; that it ends at the same CIDEr two seeds have not shown."""
    seen, loss = [], Captioner.loss

    def looked_at(captioner, *args):
        seen.append((torch.is_autocast_enabled("cpu"), captioner.decoder.h[0].mlp.c_fc.cast_weight is not None))
        return loss(captioner, *args)

    monkeypatch.setattr(Captioner, "loss", looked_at)
    assert train(tmp_path / "run", "--epochs", 1, *flags) == 0
    assert set(seen) == {(expected, expected)}


def test_first_only_the_projector_learns_and_lora_then_begins_without_momentum(tmp_path):
    out = tmp_path / "run"
    assert train(out, "--epochs", 1, "--projector-epochs", 1) == 0
    learned = [name for name, tensor in weights(out, "last").items() if name.endswith("lora_B") and tensor.any()]
    assert not learned
    optimizer = RunFolder(out).load_state().optimizer
    lora, projector = optimizer["param_groups"]
    assert not set(lora["params"]) & optimizer["state"].keys()
    assert set(projector["params"]) <= optimizer["state"].keys()
    assert train(tmp_path / "longer", "--projector-epochs", 1) == 0
    assert all(t.any() for name, t in weights(tmp_path / "longer", "last").items() if name.endswith("lora_B"))


@pytest.mark.parametrize("rule", ["beam", "report"])
def test_validation_is_searched_by_the_adapters_rule(rule, tmp_path, monkeypatch):
    validated = []
    monkeypatch.setattr(evaluator, "cider", lambda references, predictions: (validated.append(predictions) or 0.5, {}))
    monkeypatch.setattr(captions, "report_search", lambda _, batch, *sizes, rules: SearchResult([[9]] * batch, []))
    assert train(tmp_path / "run", "--epochs", 1, "--search-rule", rule) == 0
    assert (len(set(validated[-1].values())) == 1) == (rule == "report")


def test_the_projector_has_its_own_learning_rate(tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def noted(optimizer, *args, **kwargs):
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    flags = ("--epochs", 1, "--lr", 0.001, "--projector-lr", 0.004, "--schedule", "constant", "--warmup", 0)
    assert train(tmp_path / "run", *flags) == 0
    assert set(seen) == {(0.001, 0.004)}


def test_lora_plus_is_the_rate_of_b_over_that_of_a(tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def noted(optimizer, *args, **kwargs):
        seen.append([(group["lr"], len(group["params"])) for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    flags = ("--epochs", 1, "--lr", 0.001, "--projector-lr", 0.002, "--schedule", "constant", "--warmup", 0)
    assert train(tmp_path / "run", *flags, "--lora-plus", 8) == 0
    (a, count), projector, b = seen[0]
    assert (a, projector, b) == (0.001, (0.002, 2), (0.008, count))
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", step)
        assert train(tmp_path / "run", "--resume", "--epochs", 1, *flags[2:], "--lora-plus", 8) == 0


def test_first_only_the_projector_learns_with_lora_plus_too(tmp_path):
    assert train(tmp_path / "run", "--epochs", 1, "--projector-epochs", 1, "--lora-plus", 8) == 0
    assert not any(t.any() for name, t in weights(tmp_path / "run", "last").items() if name.endswith("lora_B"))


def test_the_best_adapter_is_the_one_of_the_best_cider_and_not_the_last(tmp_path, monkeypatch, scores):
    scores[:] = [0.4, 0.9, 0.2]
    kept, save = [], Captioner.save_adapter
    monkeypatch.setattr(Captioner, "save_adapter", lambda model, path: (kept.append(path.stem), save(model, path)))
    assert train(tmp_path / "run", "--epochs", 3) == 0
    assert kept == ["last", "best", "last", "best", "last"]
    assert [r["best"] for r in records(tmp_path / "run", "epoch")] == [True, True, False]


def test_without_java_the_best_epoch_is_that_of_the_lowest_loss(tmp_path, monkeypatch):
    def no_java(references, predictions):
        raise FileNotFoundError("java")

    monkeypatch.setattr(evaluator, "cider", no_java)
    assert train(tmp_path / "run") == 0
    losses = [r["val_loss"] for r in records(tmp_path / "run", "epoch")]
    assert [r["best"] for r in records(tmp_path / "run", "epoch")] == [True, losses[1] < losses[0]]
    assert (tmp_path / "run" / "loss.png").is_file()


def test_training_stops_when_patience_is_over(tmp_path, scores):
    scores[:] = [0.5, 0.4, 0.45, 0.9]
    assert train(tmp_path / "run", "--epochs", 9, "--patience", 2) == 0
    assert [r["epoch"] for r in records(tmp_path / "run", "epoch")] == [1, 2, 3]
    assert records(tmp_path / "run", "stopped")


@pytest.mark.parametrize(("setting", "steps"), [*((name, 3125) for name in "12345"), ("best", 625)])
def test_steps_an_epoch_at_full_size(setting, steps):
    captions = [range(5)] * 10_000
    assert steps_per_epoch(SETTINGS[setting], captions) == steps
    assert steps_per_epoch(replace(SETTINGS[setting], accumulate=2), captions) == math.ceil(steps / 2)


def test_steps_of_captions_count_those_that_an_epoch_shows():
    config = TrainConfig(batch_by="captions", batch_size=4, captions_per_image=2)
    assert steps_per_epoch(config, [range(1), range(2), range(5)]) == 2  # 1 + 2 + 2 captions


def test_captions_are_counted_in_batches_and_logged(tmp_path):
    assert train(tmp_path / "run", "--epochs", 1, "--batch-by", "captions") == 0
    assert [record["step"] for record in records(tmp_path / "run", "step")] == list(range(1, 16))  # 60 captions


def test_gradients_that_are_not_cleared_are_summed_over_all_steps_but_those_without_a_number(tmp_path, monkeypatch):
    """Over a step's batches too. The rate is too small to change a weight, so both runs have the same gradients."""
    taken, step, loss = [], torch.optim.Adam.step, Captioner.loss

    def noted(optimizer, *args, **kwargs):
        taken.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return step(optimizer, *args, **kwargs)

    def spoilt(captioner, *args):
        calls.append(captioner.training)
        return loss(captioner, *args) * (math.nan if sum(calls) == 4 else 1)  # of the second step

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    monkeypatch.setattr(Captioner, "loss", spoilt)
    flags = ("--optimizer", "adam", "--lr", 1e-30, "--clip", 0, "--lora-dropout", 0, "--accumulate", 2)
    for name in ("clear-gradients", "no-clear-gradients"):
        calls = []
        assert train(tmp_path / name, *flags, f"--{name}") == 0
    cleared, summed = taken[:3], taken[3:]
    assert len(summed) == 3  # of four steps
    for tensors in zip(*cleared, *summed, strict=True):
        totals = torch.stack(tensors[:3]).cumsum(0)
        assert totals.abs().max() > 0 or not torch.stack(tensors).any()
        assert torch.allclose(torch.stack(tensors[3:]), totals, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("step", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM), (4, signal.SIGINT)]
)
def test_a_signal_ends_the_run_after_its_step_to_resume_exactly(unbroken, tmp_path, monkeypatch, step, number):
    out, handler = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, step, number)
        assert train(out) == STOPPED
    assert signal.getsignal(number) == handler
    assert records(out)[-1]["step"] == step + 1
    assert train(out, "--resume") == 0
    assert_same_run(out, unbroken)


@pytest.fixture
def interruptible():
    """SIGINT as a terminal has it: a job in the background of a shell is started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_stops_immediately(tmp_path, monkeypatch):
    take = Trainer.train_step

    def interrupted(trainer, batches):
        os.kill(os.getpid(), signal.SIGINT)
        while not trainer.stop.requested:  # two signals sent at once may arrive as one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        return take(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert train(tmp_path / "run", "--save-every", 1) == INTERRUPTED
    assert not RunFolder(tmp_path / "run").has_state


@pytest.mark.parametrize(
    "flags",
    [
        ("--accumulate", "2"),
        ("--captions-per-image", "2"),
        ("--optimizer", "adam"),
        ("--lora-dropout", "0.5"),
        ("--batch-by", "captions", "--captions-per-image", "1"),
        ("--no-clear-gradients", "--projector-epochs", "1"),
        ("--setting", "1", "--report-faithful", "--captions-per-image", "1"),
    ],
)
def test_options_resume_bit_for_bit(tmp_path, monkeypatch, flags):
    unbroken, out = tmp_path / "unbroken", tmp_path / "run"
    assert train(unbroken, *flags) == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGTERM)
        assert train(out, *flags) == STOPPED
    assert train(out, *flags, "--resume") == 0
    assert_same_run(out, unbroken)


def test_a_run_on_a_gpu_resumes_on_a_cpu_with_the_cpus_optimiser(unbroken, tmp_path, monkeypatch):
    """torch's own would take the saved run's choice of kernels, whose numbers are others."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, 1, signal.SIGTERM)
        assert train(out) == STOPPED
    state = RunFolder(out).load_state()
    for group in state.optimizer["param_groups"]:
        group["fused"] = True
    RunFolder(out).save_state(state)
    assert train(out, "--resume") == 0
    assert_same_run(out, unbroken)


def test_a_run_that_died_in_its_second_epoch_resumes_from_the_first(unbroken, tmp_path, monkeypatch):
    out, step = tmp_path / "run", Trainer.train_step

    def interrupted(trainer, batches):
        if trainer.progress.step == STEPS + 1:
            raise KeyboardInterrupt
        return step(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        assert train(out) == INTERRUPTED
    assert len(records(out, "epoch")) == 1
    halfway = weights(out, "last")
    assert train(out, "--resume") == 0
    assert_same_run(out, unbroken)  # steps taken again were once listed twice, and the curve ran backwards
    assert not same(halfway, weights(out, "last"))


@pytest.mark.parametrize("where", ["keep", "validate", "save_state", "write_metrics"])
def test_dying_around_the_end_of_an_epoch_loses_and_doubles_nothing(unbroken, tmp_path, monkeypatch, where):
    """The line of an epoch was once written after the state: dying in between lost it for good."""
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
        assert train(out, "--save-every", 1) == INTERRUPTED
    assert train(out, "--save-every", 1, "--resume") == 0
    assert_same_run(out, unbroken)


def test_a_run_stopped_before_its_first_state_can_be_started_again(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", lambda trainer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(out)
    assert train(out) == 0
    assert [r["epoch"] for r in records(out, "epoch")] == [1, 2]


def test_a_finished_run_resumes_to_itself(unbroken, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".safetensors"}
    assert train(out, "--resume", "--log-every", 2, "--max-skipped", 3) == 0  # flags that change no result
    assert {name: (out / name).read_bytes() for name in before} == before
    assert_same_run(out, unbroken)


# ------------------------------------------------------------------------------------------ steps without a number


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
    assert [r["step"] for r in records(out, "skipped")] == [2]
    assert [r["step"] for r in records(out, "step")] == [1, 3]
    first, second, third = seen
    assert same(second, third)  # the bad step changed nothing
    assert not same(first, second)
    assert all(tensor.isfinite().all() for tensor in weights(out, "last").values())
    assert math.isfinite(records(out)[-1]["train_loss"])


def test_too_many_in_a_row_end_the_run_and_spare_the_last_adapter(tmp_path, monkeypatch, capsys):
    out, loss, calls = tmp_path / "run", Captioner.loss, []

    def spoilt(captioner, *args):
        calls.extend([1] * captioner.training)
        return loss(captioner, *args) * (math.nan if len(calls) > STEPS else 1)

    monkeypatch.setattr(Captioner, "loss", spoilt)
    monkeypatch.setattr(Trainer, "val_loss", lambda trainer, count: 1.0)
    assert train(out, "--max-skipped", 2) == BAD_INPUT
    error = capsys.readouterr().err
    assert "not finite in 2 steps in a row, up to step 5" in error
    assert "--lr" in error
    assert [r["skipped"] for r in records(out, "skipped")] == [1, 2]
    assert len(records(out, "epoch")) == 1
    assert all(tensor.isfinite().all() for tensor in weights(out, "last").values())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_out_of_memory_names_the_flags(tmp_path, monkeypatch, capsys, error):
    def full(captioner, *args):
        raise error

    monkeypatch.setattr(Captioner, "loss", full)
    assert train(tmp_path / "run") == BAD_INPUT
    assert "--batch-size 2 --accumulate 2" in capsys.readouterr().err
    assert train(tmp_path / "run", "--batch-size", 1) == BAD_INPUT
    assert "--captions-per-image 1" in capsys.readouterr().err
    assert train(tmp_path / "run", "--batch-size", 1, "--batch-by", "captions") == BAD_INPUT
    assert "start again with a lower --lora-rank" in capsys.readouterr().err
