"""What every benchmark shares: the machine in words, peak memory, and results as Markdown and JSON."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import runtime


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


def in_turn(rivals: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each rival, run in turn ``repeats`` times, so that noise meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return ``rows``, dictionaries of one set of keys, as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(title: str, rows: Sequence[dict[str, Any]], device: torch.device, out: Path | None) -> None:
    """Print a table; with ``out`` write it as OUT.json and OUT.md too."""
    text = f"## {title}\n\n{machine(device)}\n\n{markdown(rows)}\n"
    print(text)
    if out:
        runtime.write_text(out.with_suffix(".md"), text)
        runtime.write_json(out.with_suffix(".json"), {"title": title, "machine": machine(device), "rows": list(rows)})
