"""What every benchmark shares: the machine in words, peak memory, and results as Markdown and JSON."""

from __future__ import annotations

import argparse
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from captioning.files import markdown_table, write_json, write_text
from captioning.kernels.onednn import ReorderedLinear, can_reorder

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def machine(device: torch.device) -> str:
    """Say in one line what the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"


def peak_memory(device: torch.device) -> float:
    """Return the peak so far in GB: of the accelerator's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kB


def in_turn(
    rivals: dict[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each rival, run in turn ``repeats`` times, so that noise meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            seconds[name].append(timed(run, device, clock))
    return {name: median(values) for name, values in seconds.items()}


def timed(run: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one run, the device's work included."""
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def add_common_flags(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add ``--repeats``, ``--out`` and ``--device``, which every benchmark of models takes."""
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each, in turn")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add ``--clock``: which time is measured."""
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: processor seconds, for a machine that does other work; "
        "set OMP_NUM_THREADS=1, since they add up over threads",
    )


class Floor:
    """What the hardware allows: bytes over the measured rate of copying, operations over that of one big product.

    On a CPU that is the faster of a plain product and one with a weight reordered for oneDNN.

    Args:
        device: where.
        dtype: of numbers moved and multiplied.
        clock: as the benchmark's.
        size: rows and columns of the matrices that are measured.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter, size: int = 2048
    ) -> None:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        source = torch.ones(16 * size * size, device=device)
        target = torch.empty_like(source)
        rivals = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
        if can_reorder(device, dtype):  # on some CPUs more than twice as fast as the plain product
            reordered = ReorderedLinear(b, None, dtype)
            rivals["reordered"] = lambda: reordered(a)
        in_turn(rivals, 1, device, clock)
        seconds = in_turn(rivals, 5, device, clock)
        self.bytes_a_second = 2 * source.nbytes / seconds["copy"]  # read and written
        self.operations_a_second = 2 * size**3 / min(seconds["product"], seconds.get("reordered", math.inf))

    def seconds(self, moved: float, operations: float) -> float:
        """Return the least time in which ``moved`` bytes are read and ``operations`` done, both at once."""
        return max(moved / self.bytes_a_second, operations / self.operations_a_second)

    def __str__(self) -> str:
        return f"{self.bytes_a_second / 1e9:.1f} GB/s, {self.operations_a_second / 1e9:.0f} GFLOP/s"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return ``rows``, dictionaries of one set of keys, as a Markdown table."""
    columns = list(rows[0])
    return markdown_table(columns, [[_cell(row[c]) for c in columns] for row in rows]).rstrip("\n")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(title: str, rows: Sequence[dict[str, Any]], device: torch.device, out: Path | None) -> None:
    """Print a table; with ``out`` write it as OUT.json and OUT.md too."""
    text = f"## {title}\n\n{machine(device)}\n\n{markdown(rows)}\n"
    print(text)
    if out:
        write_text(out.with_suffix(".md"), text)
        write_json(out.with_suffix(".json"), {"title": title, "machine": machine(device), "rows": list(rows)})
