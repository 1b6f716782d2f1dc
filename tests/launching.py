"""Start a script in several processes, as ``accelerate launch`` and torchrun do."""

import os
import subprocess
import sys
from pathlib import Path

from captioning.profiles import ROOT

TORCHRUN = "torch.distributed.run --standalone --nproc_per_node"
ACCELERATE = (  # as p2_train.sh has it; it takes longer to start
    "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--main_process_port 0 --num_processes"
)


def launch(count, script, *arguments, launcher=TORCHRUN, timeout=500):
    """Run ``script``, which can import its neighbours, in ``count`` processes; return what came of it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(script).parent)]),
    }
    command = [sys.executable, "-m", *launcher.split(), count, script]
    process = subprocess.Popen(
        [*map(str, command), *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher that is killed would leave its processes behind
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
