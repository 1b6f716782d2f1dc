"""CUDA paths on fake tensors: nothing mismatches, and each case costs what the table of budgets says."""

import functools
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
TABLE = json.loads((HERE / "budgets.json").read_text())
BUDGETS, AIMS = TABLE["budgets"], TABLE["at most"]
SAME_VERSIONS = all(metadata.version(name).split("+")[0] == version for name, version in TABLE["versions"].items())
COMPILER = os.environ.get("CXX", "g++")

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER}) for the hooks"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA of its own"),
]


def kind(name):
    """Cases of a kind share a process: most of its time goes into starting."""
    return "train" if name.startswith("train") else "search" if "search" in name else "other"


@functools.cache
def rehearse(wanted):
    """Run the cases of a kind in a process of their own: the hooks must be there before torch is."""
    command = [sys.executable, HERE, *(name for name in BUDGETS if kind(name) == wanted), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BUDGETS)
def test_a_case_runs_without_mismatch_and_costs_what_the_table_says(name):
    facts = rehearse(kind(name))[name]
    assert not facts["wrong"], "\n".join(facts["wrong"])
    if not SAME_VERSIONS:
        pytest.skip(f"no mismatch; the table was counted with {TABLE['versions']}")
    assert facts["counts"] == BUDGETS[name], (
        f"the cost of {name!r} has changed; if it was meant to, run `python -m tests.cuda_rehearsal --write` and "
        f"commit budgets.json; --why shows the operators; the host waits at {facts['waits']}"
    )


@pytest.mark.parametrize("name", AIMS)
def test_no_table_is_written_that_gives_up_what_was_reached(name):
    assert {what: BUDGETS[name][what] for what, most in AIMS[name].items() if BUDGETS[name][what] > most} == {}


def test_a_part_of_a_batch_launches_as_many_kernels_as_the_whole():
    """So several GPUs that share 16 images hardly train faster than one, as docs/scaling.md and p2_train.sh say."""
    assert BUDGETS["train best, 4 images"] == BUDGETS["train best, 9.0"]
