"""Run one of the suite's scripts as it is and write down what it took: seconds, peak memory, and the work it reports.

    python -m bench.measured USAGE.json p2_infer.py IMG_DIR OUT.json DECODER

The scripts report what they have done through ``captioning.timing.Timer``: what, how many of it, and the seconds. Peaks
are those since the report before, so that caching and training of one process are separate; the process as a whole has
its own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch

from captioning.cli import FlagParser, command, setup_logging
from captioning.files import write_json

GB = 1e9


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = FlagParser(prog="python -m bench.measured", description=__doc__.split("\n\n")[0])
    parser.add_argument("usage", type=Path, metavar="USAGE.json", help="file of the results")
    parser.add_argument("script", type=Path, metavar="SCRIPT.py", help="what to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="its arguments")
    return parser


class Peaks:
    """Peak memory in GB since the last look and since the start: of the process, and of CUDA where it is used.

    On CUDA a part's peak is what its tensors held, the process's what the allocator took from the card.
    """

    def __init__(self) -> None:
        self.host, self.cuda = 0.0, 0.0

    def look(self) -> dict[str, float | None]:
        """Return the peaks since the last look, and start again."""
        host, cuda = peak_host(), None
        if torch.cuda.is_initialized():
            devices = range(torch.cuda.device_count())
            cuda = max(torch.cuda.max_memory_allocated(i) for i in devices) / GB
            # Taken from the card, but for the CUDA context; memory that is no longer in use stays taken.
            self.cuda = max(self.cuda, *(torch.cuda.max_memory_reserved(i) / GB for i in devices))
            for i in devices:
                torch.cuda.reset_peak_memory_stats(i)
        self.host = max(self.host, host)
        with contextlib.suppress(OSError):  # where it may not be reset, later peaks are those since the start
            Path("/proc/self/clear_refs").write_text("5")
        return {"host_gb": host, "cuda_gb": cuda}


def peak_host() -> float:
    """Return the peak of resident memory in GB, shared pages of mapped files included."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")) / GB


class WorkHandler(logging.Handler):
    """Collects what ``Timer.report`` logs: what was done, how many of it, seconds."""

    def __init__(self, peaks: Peaks) -> None:
        super().__init__(logging.INFO)
        self.peaks = peaks
        self.work: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line that reports work."""
        if hasattr(record, "work"):
            what, count, seconds = record.work
            self.work.append({"what": what, "count": count, "seconds": seconds, **self.peaks.look()})


def run_script(script: Path, arguments: list[str]) -> int:
    """Run ``script`` as ``python script arguments…`` would; return its exit code."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


@command
def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    args = build_parser().parse_args(argv)
    if not args.script.is_file():
        raise FileNotFoundError(f"{args.script}: no such script")
    setup_logging()  # first, so that the script's own call finds its handler and leaves ours alone
    peaks = Peaks()
    handler = WorkHandler(peaks)
    logging.getLogger().addHandler(handler)
    started = time.perf_counter()
    code = run_script(args.script, args.arguments)
    seconds = time.perf_counter() - started
    last = peaks.look()
    usage = {
        "exit_code": code,
        "seconds": seconds,
        "host_gb": peaks.host,
        "cuda_gb": None if last["cuda_gb"] is None else peaks.cuda,
        "work": handler.work,
    }
    write_json(args.usage, usage)
    return code


if __name__ == "__main__":
    sys.exit(main())
