"""Training in several processes, and captioning/distributed.py: what one process learns, several learn too.

Starting processes takes seconds, so one launch of three and one of two make all trainings that the tests look at.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import launched
import pytest
import torch
from launching import ACCELERATE, launch
from runs import records, same, weights
from safetensors.torch import load_file

from captioning import distributed
from captioning.cli import STOPPED
from captioning.distributed import ALONE
from captioning.profiles import PROFILES, ROOT
from captioning.scoring import evaluator

SMALL = "--profile micro --device cpu --val-images 5 --beam-size 2 --max-new-tokens 8 --log-every 1"
EXACT = f"{SMALL} --lora-rank 4 --lora-dropout 0"
UNEVEN = f"{EXACT} --batch-size 5 --epochs 2"  # 12 images in batches of 5, 5 and 2: nothing for the third process
CASES = {
    "uneven": UNEVEN,
    "accumulated": f"{EXACT} --batch-size 4 --accumulate 2 --epochs 3 --projector-epochs 1 --captions-per-image 2 "
    "--label-smoothing 0.1 --clip 0.3 --lora-enable 1,0,1",
    "single": f"{EXACT} --batch-size 1 --epochs 1 --cache-gb 0.00001",
    "captions": f"{EXACT} --batch-by captions --batch-size 7 --captions-per-image 3 --epochs 1",
    "faithful": f"{SMALL} --setting 1 --report-faithful --lora-rank 4 --batch-size 7 --captions-per-image 3 --epochs 1",
    "poisoned": UNEVEN,
    "rewarded": f"{SMALL} --objective scst --samples 3 --batch-size 5 --accumulate 2 --epochs 2 --patience 0",
}
LONG = f"{EXACT} --batch-size 5 --epochs 3"  # three steps an epoch
DROPOUT = f"{SMALL} --lora-rank 4 --lora-dropout 0.5 --batch-size 5 --epochs 2"


def arguments(out, flags):
    return [*flags.split(), "--out", str(out)]


@pytest.fixture(autouse=True, scope="module")
def scores(micro):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "cider", launched.digest)
        yield


@pytest.fixture(scope="module")
def train():
    """Train in this process only."""
    return lambda out, flags, fault=None: launched.train(ALONE, arguments(out, flags), fault)


@pytest.fixture(scope="module")
def train_together():
    """Make trainings, each (out, flags, fault, exit code), one after another in several processes."""

    def together(count, job, *runs, **more):
        runs = [(arguments(out, flags), fault, code) for out, flags, fault, code in runs]
        job.write_text(json.dumps({"profile": dataclasses.asdict(PROFILES["micro"]), "runs": runs, **more}))
        result = launch(count, ROOT / "tests" / "launched.py", job)
        assert result.returncode == 0, result.stderr
        return result

    return together


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory, train):
    """The flags of the case ``rewarded``, with an adapter to start from."""
    start = tmp_path_factory.mktemp("start")
    assert train(start, f"{EXACT} --epochs 1") == 0
    return f"{CASES['rewarded']} --init-adapter {start / 'last.safetensors'}"


@pytest.fixture(scope="module")
def three(tmp_path_factory, train_together, rewarded):
    """What three processes made: a run of every case, one that was stopped, and the checks of exchanges."""
    folder = tmp_path_factory.mktemp("three")
    faults = dict.fromkeys(CASES, "watch") | {"poisoned": "poison", "rewarded": "even"}
    runs = [(folder / name, flags, faults[name], 0) for name, flags in (CASES | {"rewarded": rewarded}).items()]
    runs.append((folder / "stopped", LONG, "terminate", STOPPED))
    (folder / "exchanges").mkdir()
    result = train_together(3, folder / "job.json", *runs, exchanges=str(folder / "exchanges"))
    return folder, result


@pytest.fixture(scope="module")
def two(tmp_path_factory, train, train_together, three):
    """What two processes made: of runs that others began, and with dropout a run unbroken and resumed."""
    folder = tmp_path_factory.mktemp("two")
    assert train(folder / "begun", UNEVEN, "terminate") == STOPPED
    shutil.copytree(three[0] / "stopped", folder / "stopped")
    runs = [
        (folder / "stopped", f"{LONG} --resume", "terminate_later", STOPPED),
        (folder / "begun", f"{UNEVEN} --resume", None, 0),
        (folder / "unbroken", DROPOUT, None, 0),
        (folder / "broken", DROPOUT, "terminate", STOPPED),
        (folder / "broken", f"{DROPOUT} --resume", None, 0),
    ]
    return folder, train_together(2, folder / "job.json", *runs)


def assert_same_run(ours, theirs, loss=1e-5, weight=5e-5):
    """The same lines with the same numbers, and the same adapters, up to the order in which floats are added."""
    mine, wanted = records(ours), records(theirs)
    assert [line.keys() for line in mine] == [line.keys() for line in wanted]
    for line, other in zip(mine, wanted, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, abs=loss, rel=loss)
    for name in ("last", "best"):
        found, expected = weights(ours, name), weights(theirs, name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=0, atol=weight), (name, key)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_three_processes_learn_what_one_learns(case, three, train, rewarded, tmp_path):
    """And exchange no more than the gradients and a few numbers, which ``launched.watch`` checks."""
    fault = {"poisoned": "poison", "rewarded": "even"}.get(case)
    assert train(tmp_path / "one", rewarded if case == "rewarded" else CASES[case], fault) == 0
    assert_same_run(three[0] / case, tmp_path / "one")


def test_all_processes_skip_a_step_and_one_says_so(three):
    folder, result = three
    assert [line["step"] for line in records(folder / "poisoned", "skipped")] == [2]
    assert result.stderr.count("step 2 skipped") == 1


def test_processes_without_an_image_are_named_and_config_tells_their_number(three):
    folder, result = three
    assert result.stderr.count("2 of the 3 processes have no image of a batch and only wait") == 1  # of "single"
    assert json.loads((folder / "uneven" / "config.json").read_text())["processes"] == 3


def test_rewards_change_from_epoch_to_epoch(three):
    assert len({line["reward"] for line in records(three[0] / "rewarded", "epoch") if "reward" in line}) == 2


def test_a_signal_at_one_process_stops_all_after_one_step_and_any_number_resumes(three, two, train, tmp_path):
    """Three processes are stopped in an epoch, two in the next one, one ends it: an unbroken run's adapter."""
    for (folder, result), step in ((three, 4), (two, 8)):
        assert f"stopped after step {step} of 9" in result.stdout
        assert [line["step"] for line in records(folder / "stopped", "step")] == list(range(1, step + 1))
    assert three[1].stderr.count("stopping after this step") == 1  # the others heard of it from the one that had it
    state = load_file(three[0] / "stopped" / "training_state.safetensors")
    assert {name for name in state if name.startswith("random.")} == {"random.cpu", "random.cpu.1", "random.cpu.2"}
    out = two[0] / "stopped"
    assert train(tmp_path / "unbroken", LONG) == 0
    assert train(out, f"{LONG} --resume") == 0
    assert_same_run(out, tmp_path / "unbroken")


def test_two_resume_what_one_began(two, three):
    assert_same_run(two[0] / "begun", three[0] / "uneven")


def test_with_dropout_several_processes_resume_bit_for_bit_and_draw_their_own_masks(two, train, tmp_path):
    folder, alone = two[0], tmp_path / "alone"
    assert same(weights(folder / "broken", "last"), weights(folder / "unbroken", "last"))
    # Each draws its own masks, so these are others than one process's, and the losses of the same kind.
    states, generator = load_file(folder / "unbroken" / "training_state.safetensors"), torch.Generator()
    seeds = [generator.set_state(states[name]).initial_seed() for name in ("random.cpu", "random.cpu.1")]
    assert seeds[0] != seeds[1]
    assert train(alone, DROPOUT) == 0
    losses = [torch.tensor([line["loss"] for line in records(out, "step")]) for out in (folder / "unbroken", alone)]
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.5


# ----------------------------------------------------------------------------------------------------- distributed.py


def test_what_processes_do_together(three):
    """``launched.exchange``, ``fail`` and ``share_a_cache`` check it; all three processes came to the end."""
    assert len(list((three[0] / "exchanges").glob("done*"))) == 3


def test_alone_nothing_is_exchanged_and_nothing_joined(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.join(torch.device("cpu")) as processes:
        assert processes == ALONE
        assert processes.first
        assert list(processes.share([1, 2, 3])) == [1, 2, 3]
        assert processes.gather("x") == ["x"]
        assert processes.spread(abs, [-1, 2]) == [1, 2]
        assert processes.total(1, 2.5) == [1, 2.5]
        assert processes.any(True)
        assert not processes.any(False)
        assert processes.from_first(lambda: 3) == processes.together(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            processes.together(lambda: 1 / 0)
        weight = torch.nn.Parameter(torch.zeros(2))
        processes.sum_gradients([weight])
        assert weight.grad is None
        processes.check_same("captions", 1)
        processes.wait()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("device", "gpus", "by_nccl"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False), ("cpu", 0, False)]
)
def test_nccl_is_for_gradients_of_processes_with_a_gpu_each_and_never_for_waiting(device, gpus, by_nccl, monkeypatch):
    """A GPU that waits in NCCL is busy waiting, two processes on one GPU cannot use it, and CPUs need not."""
    joined = {}

    def partial_state(cpu, timeout):
        joined["nccl"] = not cpu
        return SimpleNamespace(num_processes=2, process_index=0)

    def new_group(backend, timeout):
        joined["exchanges"] = backend
        return "the group"

    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(distributed, "import_guarded", lambda name: SimpleNamespace(PartialState=partial_state))
    monkeypatch.setattr(distributed.dist, "new_group", new_group)
    assert distributed.join(torch.device(device)).count == 2
    assert joined == {"nccl": by_nccl, "exchanges": "gloo"}


ENDED = """
import os, signal, sys, torch
from pathlib import Path
from captioning import cli, distributed
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it when a process has died: none may miss its line
@cli.command
def main(argv=None):
    with distributed.join(torch.device("cpu")) as crew:
        if crew.rank == 1:
            os._exit(9)
        crew.wait()
code = main()
Path(sys.argv[1]).write_text(str(code))
sys.exit(code)
"""


def test_a_process_that_dies_ends_the_others_with_one_line(tmp_path):
    """Wherever the others are: joining, in a collective, or between two."""
    script = tmp_path / "ended.py"
    script.write_text(ENDED)
    result = launch(2, script, tmp_path / "code")
    assert result.returncode != 0
    assert (tmp_path / "code").read_text() == "2"
    assert result.stderr.count("error: another process of this run has ended; its own message tells why") == 1
    assert "exitcode  : 9" in result.stderr


def test_a_picture_that_cannot_be_read_is_left_out_by_all(tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    picture = sorted((data / "images" / "train").iterdir())[3]
    picture.write_bytes(picture.read_bytes()[:300])
    small = "--profile micro --device cpu --epochs 1 --batch-size 4 --val-images 2 --beam-size 1 --max-new-tokens 4"
    command = ("p2_train.py", *small.split(), "--data", data, "--cache", tmp_path / "cache", "--out", tmp_path / "run")
    result = launch(2, *command)
    assert result.stderr.count("left out: ") == result.stderr.count("1 of 12 images cannot be read") == 1
    assert result.returncode != 0 and (tmp_path / "run" / "best.safetensors").is_file()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["processes"], config["unreadable_images"]) == (2, {"train": 1, "val": 0})


def test_a_bad_flag_is_refused_in_one_line(tiny_data, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "training_state.safetensors").write_bytes(b"a run")
    command = ("p2_train.py", "--profile", "micro", "--device", "cpu", "--data", tiny_data, "--out", tmp_path / "taken")
    result = launch(2, *command, launcher=ACCELERATE)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "holds a run already; add --resume" in errors[0]
