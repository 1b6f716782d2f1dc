"""Work begun before it is needed: files read in threads while a model works, batches begun while others are stored."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
READ_AHEAD = 2  # batches that are read while one is used


def read_ahead(
    items: Iterable[T], read: Callable[[T], R], size: int, threads: int | None = None
) -> Iterator[list[tuple[T, Future[R]]]]:
    """Yield batches of (item, future of ``read(item)``) while threads read the batches after them.

    What ``read`` raises is raised by the future's ``result``. Who stops early waits for what is being read, and for no
    more.

    Args:
        items: maybe an endless stream: no more than ``READ_AHEAD`` further batches are taken from it.
        read: called in threads, one of torch's threads in each.
        size: items of a batch; the last may have fewer.
        threads: how many; None for one a core, at most 8.
    """
    left = iter(items)
    waiting: deque[list[tuple[T, Future[R]]]] = deque()
    # One image is too little work for several threads; several here would compete with the model's for the cores.
    one = partial(torch.set_num_threads, 1)
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1), initializer=one) as pool:
        try:
            while True:
                while len(waiting) <= READ_AHEAD and (batch := list(itertools.islice(left, size))):
                    waiting.append([(item, pool.submit(read, item)) for item in batch])
                if not waiting:
                    return
                yield waiting.popleft()
        except GeneratorExit:
            pool.shutdown(wait=False, cancel_futures=True)


def one_behind(results: Iterable[T]) -> Iterator[T]:
    """Yield each result once the next one has been begun: a device works on that while this one is used.

    Where beginning the next one fails, the one before is yielded first.
    """
    left = iter(results)
    before: list[T] = []
    while True:
        try:
            now = list(itertools.islice(left, 1))
        except Exception:
            yield from before
            raise
        yield from before
        if not now:
            return
        before = now
