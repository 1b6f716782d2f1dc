"""The processes that share a run, as ``accelerate launch`` starts them, and the few things that they do together.

A script that was started without a launcher is alone: ``ALONE`` does the same things by itself and joins nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from captioning.cli import BAD_INPUT
from captioning.device import launched, launched_precision
from captioning.imports import import_guarded

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=30)  # one may work while the others wait; a process that dies is left to the launcher


@dataclass(frozen=True)
class Processes:
    """The processes of a run and which of them this one is; every method is called by all of them, in one order.

    As a context manager it parts from the others at the end: no process leaves before all have come so far.
    """

    rank: int = 0  # number of this process
    count: int = 1  # how many there are
    _main_memory: Any = field(default=None, repr=False, compare=False)  # the group that exchanges what is there

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.count > 1 and kind is None:
            self.wait()
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of ``items``, every ``count``-th of them: nothing where there are too few."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Return when all have come here."""
        if self.count > 1:
            _meet(dist.barrier, group=self._main_memory)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, in every process; tensors must lie in main memory."""
        found = [value] * self.count
        if self.count > 1:
            _meet(dist.all_gather_object, found, value, group=self._main_memory)
        return found

    def spread(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return ``function`` of every item, in order and in every process, each computed by one process."""
        parts = self.gather(self.together(lambda: [function(item) for item in self.share(items)]))
        return [parts[i % self.count][i // self.count] for i in range(len(items))]

    def together(self, work: Callable[[], T]) -> T:
        """Do ``work`` in every process and return this one's result; where it fails in one, all of them end.

        Raises:
            ValueError, OSError: what ``work`` raised, in the first process where it did; the others exit silently.
        """
        if self.count == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except (ValueError, OSError) as caught:
            error = caught
        failed = [rank for rank, bad in enumerate(self.gather(error is not None)) if bad]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise SystemExit(BAD_INPUT)
        return result

    def from_first(self, work: Callable[[], T]) -> T:
        """Do ``work`` in the first process only and return its result in all; errors as ``together``."""
        results: list[Any] = [self.together(work if self.first else lambda: None)]
        if self.count > 1:
            _meet(dist.broadcast_object_list, results, src=0, group=self._main_memory)
        return results[0]

    def total(self, *values: float) -> list[float]:
        """Return the sum over all processes of each value; NaN in one process makes the sum NaN."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        _meet(dist.all_reduce, sums, group=self._main_memory)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        return self.total(float(flag))[0] > 0

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in one exchange; None counts as zeros."""
        if self.count == 1:
            return
        parameters = list(parameters)
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([part.reshape(-1) for part in parts])
        sums = flat if flat.device.type in ("cpu", "cuda") else flat.cpu()  # what the group of all can exchange
        _meet(dist.all_reduce, sums)
        for parameter, summed in zip(parameters, sums.to(flat.device).split([p.numel() for p in parts]), strict=True):
            parameter.grad = summed.view_as(parameter)

    def check_same(self, what: str, value: Any) -> None:
        """Raise ValueError where ``value``, plain data, is not the same in all processes."""
        own = hashlib.sha256(repr(value).encode()).hexdigest()  # it may be large
        others = [rank for rank, digest in enumerate(self.gather(own)) if digest != own]
        if others:
            raise ValueError(
                f"{what} differ between process {self.rank} and process {others[0]}; give all machines "
                "the same files and the same command"
            )


ALONE = Processes()


def join(device: torch.device, precisions: Sequence[str] = ("bf16",)) -> Processes:
    """Join the processes that ``accelerate launch`` (or torchrun) started beside this one; ``ALONE`` without it.

    Args:
        device: where this process computes; on CUDA gradients travel by NCCL, else by gloo, and so they do where
            processes share a GPU, which NCCL refuses.
        precisions: accelerate's ``mixed_precision`` that the script follows; another one is warned of.

    Raises:
        ValueError: the launcher's processes could not be joined.
    """
    count, rank, local = launched("WORLD_SIZE", 1), launched("RANK", -1), launched("LOCAL_RANK", -1)
    asked = launched_precision()
    if asked and asked not in precisions and rank < 1:
        log.warning("accelerate's mixed_precision %s is not followed here; the script's own flag decides", asked)
    if count == 1:
        return ALONE
    if not 0 <= rank < count or local < 0:
        raise ValueError(
            f"WORLD_SIZE={count}: {count} processes are announced, and RANK and LOCAL_RANK do not say which of them "
            "this is; unset WORLD_SIZE, or start by accelerate launch or torchrun"
        )
    crowded = launched("LOCAL_WORLD_SIZE", count) > torch.cuda.device_count()
    on_gpus = device.type == "cuda" and not crowded
    state = import_guarded("accelerate").PartialState(cpu=not on_gpus, timeout=PATIENCE)
    if state.num_processes != count:  # accelerate falls back silently to one process
        raise ValueError(f"{count} processes were launched and accelerate joins {state.num_processes}")
    return Processes(state.process_index, count, _meet(dist.new_group, backend="gloo", timeout=PATIENCE))


def _meet(collective: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call what all processes must call; ConnectionError where one of them has died."""
    try:
        return collective(*args, **kwargs)
    except RuntimeError as error:
        raise ConnectionError("another process of this run has ended; its own message tells why") from error
