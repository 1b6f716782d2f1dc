"""The processes that a launcher started to caption images together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from captioning.imports import import_guarded


@dataclass(frozen=True)
class Workers:
    """The processes that share a run, as ``accelerate launch`` starts them, and which of them this one is."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        """Return when all have come here; alone, at once."""
        if self.count > 1:
            # The slowest may need days more than the fastest; a process that dies is the launcher's business.
            state = import_guarded("accelerate").PartialState(
                cpu=not torch.cuda.is_available(), timeout=timedelta(days=30)
            )
            if state.num_processes != self.count:  # accelerate falls back to one process in silence
                raise ValueError(f"{self.count} processes were launched and accelerate joins {state.num_processes}")
            state.wait_for_everyone()


ALONE = Workers()


def find_workers() -> Workers:
    """Return what the launcher says in the environment; one process without it."""
    return Workers(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
