"""What test_processes.py launches in several processes: captions of a folder, then of shards."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from level_captioner import grey, say
from shard_runs import run

from captioning.distributed import join
from captioning.inference.batches import Entry, Job
from captioning.inference.folder import PredictionLog, caption_images


def caption_folder(images, out, processes):
    entries = list(map(Entry.of, sorted(Path(images).iterdir())))
    with PredictionLog(Path(out), {"model": "m"}, processes=processes) as predictions:
        caption_images(predictions, entries, Job(grey, say), 2)
        assert len(predictions.finish(entries)) == len(entries)


def captioner(said, processes, killed_after):
    """Return a captioner that notes who captioned what; all processes are killed at once, each in its N-th batch."""
    batches = []

    def caption(levels):
        with Path(said).open("a") as file:
            file.write("".join(f"{level} {processes.rank}\n" for level in levels))
        batches.append(levels)
        if len(batches) == killed_after:
            Path(f"{said}.{processes.rank}").touch()
            while not all(Path(f"{said}.{rank}").exists() for rank in range(processes.count)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return say(levels)

    return caption


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    with join(torch.device("cpu")) as processes:
        if "images" in job:
            caption_folder(job["images"], job["predictions"], processes)
        code = run(
            job["tars"], job["out"], captioner(job["said"], processes, job.get("killed_after")), processes=processes
        )
    sys.exit(code)
