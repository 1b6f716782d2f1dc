"""Batches of images, read ahead in threads, halved when memory runs out."""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from captioning.data.images import load_image

log = logging.getLogger(__name__)

READ_AHEAD = 2  # batches that are read while one is captioned


class Halving:
    """A batch function that meets an accelerator's end of memory with half as many items, from then on."""

    def __init__(self, function: Callable[[list], list]) -> None:
        self.function = function
        self.limit: int | None = None

    def __call__(self, items: list) -> list:
        """Return the results of all ``items``. Raises ValueError when a single one does not fit."""
        results: list = []
        while len(results) < len(items):
            chunk = items[len(results) : len(results) + (self.limit or len(items))]
            try:
                results += self.function(chunk)
                continue
            except torch.OutOfMemoryError as error:
                if len(chunk) == 1:
                    raise ValueError(
                        "out of memory with one image: use a smaller model, fewer beams, a lower "
                        "precision or --device cpu"
                    ) from error
            self.limit = len(chunk) // 2
            log.warning("out of memory with %d images at once; going on with %d", len(chunk), self.limit)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results


@dataclass(frozen=True)
class Job:
    """What a model does to images.

    Attributes:
        prepare: makes of an image (PIL, RGB) what ``caption`` takes; runs in threads, ahead of it.
        caption: makes captions of a list of those.
        draft: that of ``data.load_image``.
        begin: begins the work on a batch while the one before is captioned, and returns what ``caption`` takes then;
            for a device that works beside the program.
    """

    prepare: Callable[[Any], Any]
    caption: Callable[[list], list[str]]
    draft: int | None = None
    begin: Callable[[list], list] | None = None


def read_ahead(
    items: Iterable[Any], prepare: Callable[[Any], Any], size: int, load: Callable[[Any], Any] = load_image
) -> Iterator[list[tuple[Any, Future]]]:
    """Yield batches of (item, future of the prepared image) while threads read the batches behind them.

    Args:
        items: paths, or whatever ``load`` takes; no more of them are taken than are read ahead.
        prepare: as in :class:`Job`.
        size: items of a batch.
        load: makes an image of an item.
    """

    def read(item: Any) -> Any:
        return prepare(load(item))

    left = iter(items)
    # One image is too small a work for several threads; several here would fight with the model's for the cores.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), initializer=lambda: torch.set_num_threads(1)) as pool:
        waiting: deque[list[tuple[Any, Future]]] = deque()
        while True:
            while len(waiting) <= READ_AHEAD and (some := list(itertools.islice(left, size))):
                waiting.append([(item, pool.submit(read, item)) for item in some])
            if not waiting:
                return
            yield waiting.popleft()


def started_batches(
    batches: Iterable[list[tuple[Any, Future]]],
    begin: Callable[[list], list] | None,
    failed: Callable[[Any, Exception], None],
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield the readable items of each batch with what ``begin`` made of them, once it has had the next batch too.

    Without ``begin`` they come as they were prepared, and at once; batches without a readable item are left out.
    """
    readable = (found for batch in batches if (found := _readable(batch, failed))[0])
    if begin is None:
        yield from readable
        return
    begin = Halving(begin)
    ahead: deque[tuple[list[Any], list[Any]]] = deque()
    for found, prepared in readable:
        ahead.append((found, begin(prepared)))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def _readable(batch: list[tuple[Any, Future]], failed: Callable[[Any, Exception], None]) -> tuple[list[Any], list[Any]]:
    """Return the items of a batch that could be read, and what they became; ``failed`` is told of the others."""
    found, prepared = [], []
    for item, future in batch:
        try:
            prepared.append(future.result())
            found.append(item)
        except (ValueError, OSError) as error:
            failed(item, error)
    return found, prepared
