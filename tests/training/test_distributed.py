"""distributed.py, and training in several processes: what one process learns, bit by bit of it, several learn too."""

import dataclasses
import json
import os
import subprocess
import sys

import launched
import pytest
import torch
from safetensors.torch import load_file

from captioning import distributed
from captioning.distributed import ALONE
from captioning.profiles import PROFILES, ROOT
from captioning.scoring import evaluator, tokenizers
from p2_train import main

SMALL = (
    "--profile",
    "micro",
    "--device",
    "cpu",
    "--lora-rank",
    "4",
    "--val-images",
    "5",
    "--beam-size",
    "2",
    "--max-new-tokens",
    "8",
    "--log-every",
    "1",
)
EXACT = (*SMALL, "--lora-dropout", "0")


def launch(count, *command, timeout=300):
    """Run a script in several processes as `accelerate launch` does, one thread each; return what came of it."""
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "--num_processes",
        str(count),
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    process = subprocess.Popen(
        [sys.executable, *launcher, *map(str, command)],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # killed, the launcher would leave its processes behind
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


# ------------------------------------------------------------------------------------------- what they do together

TOGETHER = """
import math, os, sys
from pathlib import Path
import torch
from captioning import distributed
from captioning.data.feature_cache import CacheSpec, FeatureCache

with distributed.join(torch.device("cpu")) as crew:
    rank, count = crew.rank, crew.count
    assert (count, crew.first) == (3, rank == 0) and torch.distributed.get_backend() == "gloo"
    assert [list(crew.share(range(n))) for n in (7, 1)] == [list(range(rank, 7, 3)), [0] if rank == 0 else []]
    assert crew.gather(f"of {rank}") == ["of 0", "of 1", "of 2"]
    assert crew.from_first(lambda: torch.full((2,), rank)).tolist() == [0, 0]
    assert crew.total(rank, 0.25) == [3.0, 0.75] and math.isnan(crew.total(math.nan if rank == 2 else 1.0)[0])
    assert crew.any(rank == 1) and not crew.any(False)
    done = []
    assert crew.spread(lambda i: done.append(i) or i * i, range(8)) == [i * i for i in range(8)]
    assert done == list(range(rank, 8, 3)) and crew.spread(str, []) == []

    a, b = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3))
    a.grad = torch.full((2, 2), float(rank))
    b.grad = torch.ones(3) if rank == 1 else None  # a process without an image has no gradient
    crew.sum_gradients([a, b])
    assert a.grad.tolist() == [[3.0, 3.0]] * 2 and b.grad.tolist() == [1.0] * 3

    paths = sorted(Path(sys.argv[1]).glob("image*"))
    encoded = []
    def encode(batch):
        encoded.extend(batch)
        if any(path.read_text() == "broken" for path in batch):
            raise ValueError(f"{batch[0].name} is broken")
        return torch.stack([torch.full((2, 3), float(path.read_text())) for path in batch])
    def open_cache(limit=math.inf):
        encoded.clear()
        spec = CacheSpec(sys.argv[2], {"encoder": "e"}, (2, 3), limit=limit, batch_size=2)
        return FeatureCache.open(spec, paths, encode, crew)
    cache = open_cache(limit=7 * 12)
    assert sorted(path for part in crew.gather(encoded) for path in part) == paths[:7]  # each once, by one of them
    cache = open_cache()
    assert sorted(path for part in crew.gather(encoded) for path in part) == paths[7:]
    assert cache.gather(range(len(paths)))[:, 0, 0].tolist() == [float(path.read_text()) for path in paths]
    assert open_cache() is not None and not encoded

    def fail():
        if rank:
            raise ValueError(f"process {rank} has no image")
    try:
        crew.together(fail)
    except ValueError as error:
        assert rank == 1 and "process 1" in str(error)
    except SystemExit as stop:
        assert rank != 1 and stop.code == 2
    try:
        crew.together(lambda: crew.check_same("captions", 7 if rank == 2 else 8))
    except ValueError as error:
        assert rank == 0 and "captions differ between process 0 and process 2" in str(error)
    except SystemExit:
        assert rank
    Path(sys.argv[1], "image-late").write_text("broken") if rank == 0 else None
    crew.wait()
    paths = sorted(Path(sys.argv[1]).glob("image*"))
    try:
        open_cache()
    except ValueError as error:
        assert "image-late is broken" in str(error) and [p.name for p in encoded] == ["image-late"]
    except SystemExit:
        assert not encoded
    del paths[0]
    try:  # as on two machines without a common file system
        spec = CacheSpec(f"{sys.argv[2]}-{rank // 2}", {"encoder": "e"}, (2, 3))
        FeatureCache.open(spec, paths, encode, crew)
    except ValueError as error:
        assert rank == 2 and "does not see the features" in str(error), error
    except SystemExit:
        assert rank < 2
    else:
        raise AssertionError("a cache that only some can see was opened")
    Path(sys.argv[1], f"done{rank}").touch()
"""


def test_what_processes_do_together(tmp_path):
    for k in range(11):
        (tmp_path / f"image{k:02d}").write_text(str(k))
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    result = launch(3, script, tmp_path, tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("done*"))) == 3


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


# ------------------------------------------------------------------------------------------------------- training


@pytest.fixture(autouse=True, scope="module")
def micro(tiny_profile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "micro", tiny_profile)
        patch.setattr(evaluator, "cider", launched.digest)
        patch.setattr(tokenizers, "pick_tokenizer", lambda name: "ptb")  # no Java
        yield


def train(out, *flags, fault=None):
    """Train in this process alone."""
    return launched.train(ALONE, [*flags, "--out", str(out)], fault)


def train_together(count, folder, *runs):
    """Make runs, each (out, flags, fault, exit code), one after another in ``count`` processes."""
    job = folder / "job.json"
    runs = [([*flags, "--out", str(out)], fault, code) for out, flags, fault, code in runs]
    job.write_text(json.dumps({"profile": dataclasses.asdict(PROFILES["micro"]), "runs": runs}))
    result = launch(count, ROOT / "tests" / "launched.py", job)
    assert result.returncode == 0, result.stderr
    return result


def records(out, *kinds):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if not kinds or line["kind"] in kinds]


def assert_same_run(ours, theirs, loss=1e-5, weight=5e-5):
    """The same lines with the same numbers, and the same adapters, up to the order in which floats are added."""
    mine, wanted = records(ours), records(theirs)
    assert [line.keys() for line in mine] == [line.keys() for line in wanted]
    for line, other in zip(mine, wanted, strict=True):
        assert line["kind"] == other["kind"]
        numbers = line.keys() - {"kind", "seconds"}
        assert [line[k] for k in numbers] == pytest.approx([other[k] for k in numbers], abs=loss, rel=loss)
    for name in ("last", "best"):
        found, expected = (load_file(out / f"{name}.safetensors") for out in (ours, theirs))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.allclose(found[key], tensor, rtol=0, atol=weight), (name, key)
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}


CASES = {
    # 12 images in batches of 5, 5 and 2, the last with nothing for the third process
    "uneven": (*EXACT, "--batch-size", "5", "--epochs", "2"),
    "accumulated": (
        *EXACT,
        "--batch-size",
        "4",
        "--accumulate",
        "2",
        "--epochs",
        "3",
        "--projector-epochs",
        "1",
        "--captions-per-image",
        "2",
        "--label-smoothing",
        "0.1",
        "--clip",
        "0.3",
        "--lora-enable",
        "1,0,1",
    ),
    "single": (*EXACT, "--batch-size", "1", "--epochs", "1", "--cache-gb", "0.00001"),
}


def test_three_processes_learn_what_one_learns(tmp_path):
    ours, theirs = tmp_path / "three", tmp_path / "one"
    runs = [(ours / name, flags, "watch", 0) for name, flags in CASES.items()]
    runs.append((ours / "poisoned", CASES["uneven"], "poison", 0))
    for name, flags in CASES.items():
        assert train(theirs / name, *flags) == 0
    assert train(theirs / "poisoned", *CASES["uneven"], fault="poison") == 0
    result = train_together(3, tmp_path, *runs)
    for name in (*CASES, "poisoned"):
        assert_same_run(ours / name, theirs / name)
    assert [line["step"] for line in records(ours / "poisoned", "skipped")] == [2]
    assert result.stderr.count("step 2 skipped") == 1  # all skip it, one says so
    assert result.stderr.count("2 of the 3 processes have no image of a batch and only wait") == 1  # of "single"
    assert json.loads((ours / "uneven" / "config.json").read_text())["processes"] == 3


def test_rewarded_training_rewards_the_same_captions(tmp_path):
    start = tmp_path / "start"
    assert train(start, *EXACT, "--epochs", "1") == 0
    flags = (
        *SMALL[:4],
        *SMALL[6:],
        "--objective",
        "scst",
        "--samples",
        "3",
        "--batch-size",
        "5",
        "--accumulate",
        "2",
        "--epochs",
        "2",
        "--patience",
        "0",
        "--init-adapter",
        str(start / "last.safetensors"),
    )
    assert train(tmp_path / "one", *flags, fault="even") == 0
    train_together(3, tmp_path, (tmp_path / "three", flags, "even", 0))
    assert_same_run(tmp_path / "three", tmp_path / "one")
    assert len({line["reward"] for line in records(tmp_path / "one", "epoch") if "reward" in line}) == 2


def test_a_signal_at_one_process_stops_all_behind_one_step_and_any_number_goes_on(tmp_path):
    """Three processes are stopped in an epoch, two in the next one, one ends it: an unbroken run's adapter."""
    unbroken, out = tmp_path / "unbroken", tmp_path / "run"
    flags = (*EXACT, "--batch-size", "5", "--epochs", "3")  # three steps an epoch
    assert train(unbroken, *flags) == 0
    result = train_together(3, tmp_path, (out, flags, "terminate", 4))
    assert "stopped after step 4 of 9" in result.stdout
    assert result.stderr.count("stopping after this step") == 1  # the others heard of it from the one that was told
    state = load_file(out / "training_state.safetensors")
    assert {name for name in state if name.startswith("random.")} == {"random.cpu", "random.cpu.1", "random.cpu.2"}
    assert [line["step"] for line in records(out, "step")] == [1, 2, 3, 4]
    result = train_together(2, tmp_path, (out, (*flags, "--resume"), "terminate_later", 4))
    assert "stopped after step 8 of 9" in result.stdout
    assert train(out, *flags, "--resume") == 0
    assert_same_run(out, unbroken)


def test_two_go_on_with_what_one_began_and_with_dropout_resume_bit_for_bit(tmp_path):
    exact, flags = ((*SMALL, "--lora-dropout", rate, "--batch-size", "5", "--epochs", "2") for rate in ("0", "0.5"))
    assert train(tmp_path / "exact", *exact) == 0
    assert train(tmp_path / "begun", *exact, fault="terminate") == 4
    unbroken, broken, alone = (tmp_path / name for name in ("unbroken", "broken", "alone"))
    train_together(
        2,
        tmp_path,
        (tmp_path / "begun", (*exact, "--resume"), None, 0),
        (unbroken, flags, None, 0),
        (broken, flags, "terminate", 4),
        (broken, (*flags, "--resume"), None, 0),
    )
    assert_same_run(tmp_path / "begun", tmp_path / "exact")
    found, wanted = (load_file(out / "last.safetensors") for out in (broken, unbroken))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    # Each draws masks of its own, so these are other than a lone process's, and the losses of the same kind.
    states, generator = load_file(unbroken / "training_state.safetensors"), torch.Generator()
    seeds = [generator.set_state(states[name]).initial_seed() for name in ("random.cpu", "random.cpu.1")]
    assert seeds[0] != seeds[1]
    assert train(alone, *flags) == 0
    losses = [torch.tensor([line["loss"] for line in records(out, "step")]) for out in (unbroken, alone)]
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.5


def test_a_bad_flag_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "training_state.safetensors").write_bytes(b"a run")
    script = tmp_path / "main.py"
    script.write_text("import sys, p2_train\nsys.exit(p2_train.main())\n")
    result = launch(2, script, "--profile", "micro", "--device", "cpu", "--out", tmp_path / "taken")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "holds a run already; add --resume" in errors[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--device", "cuda:1"]) == 2
    assert "--device cuda:1: every process would take it" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ p2_train.sh

NVIDIA_SMI = """#!/bin/sh
for gpu in $LISTED; do echo "GPU $gpu: NVIDIA H100 (UUID: GPU-$gpu)"; done
"""
PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo "$USABLE"; else printf '%s\\n' "$@"; fi
"""


def shell(tmp_path, listed, usable, *flags):
    """Run p2_train.sh on a machine with such GPUs; return the words of the command that it starts."""
    for name, text in (("nvidia-smi", NVIDIA_SMI), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "LISTED": listed,
        "USABLE": usable,
    }
    result = subprocess.run(
        ["bash", ROOT / "p2_train.sh", *flags], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_the_shell_script_starts_a_process_for_every_gpu(tmp_path):
    words = shell(tmp_path, "0 1 2 3", "4", "--epochs", "4", "--out", "a folder")
    assert words[:2] == ["-m", "accelerate.commands.launch"]
    assert words[words.index("--num_processes") + 1] == "4"
    assert words[words.index("p2_train.py") :] == ["p2_train.py", "--epochs", "4", "--out", "a folder"]


@pytest.mark.parametrize(
    ("listed", "usable", "flags"),
    [
        ("", "0", []),
        ("0", "1", []),
        ("0 1", "1", []),
        ("0 1", "2", ["--device", "cuda:1"]),
        ("0 1", "2", ["--device=cpu"]),
    ],
)
def test_the_shell_script_starts_one_plain_process_otherwise(listed, usable, flags, tmp_path):
    assert shell(tmp_path, listed, usable, "--epochs", "4", *flags) == ["p2_train.py", "--epochs", "4", *flags]
