"""What every benchmark shares: flags, inputs, the machine in words, times, peak memory, and tables of results."""

from __future__ import annotations

import math
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from captioning.cli import FlagParser, positive_int
from captioning.data.listing import list_images
from captioning.device import has_bf16
from captioning.files import markdown_table, write_json, write_text
from captioning.imports import import_guarded
from captioning.kernels.onednn import ReorderedLinear, can_reorder
from decoder import Decoder, gpt2_state_dict
from microworld.scenes import generate

CPU = torch.device("cpu")
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


# --- flags and inputs -------------------------------------------------------------------------------------------------


def make_parser(name: str, doc: str | None, repeats: int = 3, device: bool = True, clock: bool = False) -> FlagParser:
    """Return the parser of ``python -m bench.NAME`` with the flags that benchmarks share.

    Args:
        name: of the benchmark.
        doc: its docstring, whose first paragraph describes it.
        repeats: default of ``--repeats``; 0 leaves it out.
        device: add ``--device``.
        clock: add ``--clock``.
    """
    parser = FlagParser(prog=f"python -m bench.{name}", description=(doc or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    if repeats:
        parser.add_argument("--repeats", type=positive_int, default=repeats, help="timed runs of each, in turn")
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    if clock:
        text = "cpu: processor seconds, for a machine that does other work; set OMP_NUM_THREADS=1, as threads add up"
        parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help=text)
    return parser


def draw_scenes(folder: Path, count: int, split: str = "val") -> list[Path]:
    """Draw ``count`` scenes of the micro world below ``folder``; return the images' paths."""
    generate(folder, split, count, seed=0, workers=1)
    return list_images(folder / "images" / split)


def transformers_gpt2(decoder: Decoder, eos: int, **options: float) -> Any:
    """Return transformers' GPT-2 with the decoder's weights."""
    transformers, c = import_guarded("transformers"), decoder.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.n_positions,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
        **options,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.load_state_dict(gpt2_state_dict(decoder))
    return model


# --- measuring --------------------------------------------------------------------------------------------------------


def machine(device: torch.device = CPU) -> str:
    """Say in one line what the figures were taken on."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"


def peak_memory(device: torch.device = CPU) -> float:
    """Return the peak so far in GB: of the accelerator's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kB


def timed(run: Callable[[], Any], device: torch.device = CPU, clock: Clock = time.perf_counter) -> float:
    """Return the seconds of one run, the device's work included."""
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def in_turn(
    rivals: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device = CPU, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Return the median seconds of each rival, run in turn ``repeats`` times, so that noise meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            seconds[name].append(timed(run, device, clock))
    return {name: median(values) for name, values in seconds.items()}


class Floor:
    """What the hardware allows: bytes at the measured rate of copying, operations at that of one big product.

    On a CPU that is the faster of a plain product and one with a weight reordered for oneDNN.

    Args:
        device: where.
        dtype: of numbers moved and multiplied.
        clock: as the benchmark's.
        size: rows and columns of the matrices that are measured; None: large enough for the device.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, clock: Clock = time.perf_counter, size: int | None = None
    ) -> None:
        size = size or (6144 if device.type == "cuda" else 2048)
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


def measure_rates(device: torch.device, size: int | None = None) -> tuple[dict[str, float], float]:
    """Return the operations a second of matrix products by type, and the bytes a second of copying."""
    kinds = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_bf16(device) else {})
    floors = {kind: Floor(device, dtype, size=size) for kind, dtype in kinds.items()}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {kind: floor.operations_a_second for kind, floor in floors.items()}, floors["fp32"].bytes_a_second


# --- results ----------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return ``rows``, dictionaries of one set of keys, as a Markdown table."""
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return markdown_table(list(rows[0]), cells).rstrip("\n")


def report(title: str, rows: Sequence[dict[str, Any]], device: torch.device, out: Path | None) -> None:
    """Print a table; with ``out`` write it as OUT.json and OUT.md too."""
    text = f"## {title}\n\n{machine(device)}\n\n{markdown(rows)}\n"
    print(text)
    if out:
        write_text(out.with_suffix(".md"), text)
        write_json(out.with_suffix(".json"), {"title": title, "machine": machine(device), "rows": list(rows)})
