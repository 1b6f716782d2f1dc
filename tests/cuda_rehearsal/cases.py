"""All that is rehearsed, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fake_gpu import FakeGpu  # first: it loads the hooks before torch  # isort: skip

from inference_cases import search, search_full
from stage import Facts
from training_cases import train, train_full

from captioning.training.config import SETTINGS

# name: compute capability, function
CASES: dict[str, tuple[tuple[int, int], Callable[[FakeGpu], Facts]]] = {
    "train best": ((8, 0), train_full),
    "train best, 7.5": ((7, 5), partial(train, config=SETTINGS["best"])),
    "train best, 9.0": ((9, 0), partial(train, config=SETTINGS["best"])),
    "train 1": ((8, 0), partial(train, config=SETTINGS["1"])),
    "train 4": ((8, 0), partial(train, config=SETTINGS["4"])),
    "beam search": ((8, 0), search_full),
    "beam search, 7.5": ((7, 5), search),
    "beam search, compiled": ((8, 0), partial(search, compiled=True)),
    "greedy search": ((8, 0), partial(search, beams=1)),
}


def run(name: str) -> Facts:
    """Run one case."""
    capability, case = CASES[name]
    with FakeGpu(capability) as gpu:
        return case(gpu)
