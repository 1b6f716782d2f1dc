"""CUDA paths on fake tensors: nothing mismatches, and each case costs what the table of budgets says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
BUDGETS = json.loads((HERE / "budgets.json").read_text())
COMPILER = os.environ.get("CXX", "g++")

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER}) for the hooks"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA of its own"),
]


def rehearse(name):
    """Run a case in a process of its own: the hooks must be there before torch is."""
    command = [sys.executable, HERE, name, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])[name]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_case_runs_without_mismatch_and_within_its_budget(name):
    facts = rehearse(name)
    assert not facts["wrong"]
    assert facts["counts"] == BUDGETS[name], (
        f"the cost of {name!r} has changed; if it was meant to, run `python tests/cuda_rehearsal --write` and commit "
        f"budgets.json; --why shows the operators; the host waits at {facts['waits']}"
    )
