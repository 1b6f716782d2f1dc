"""From images to captions, a batch at a time: read ahead in threads, and in smaller batches once memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from captioning.data.images import decode_image, load_image
from captioning.data.listing import key_of
from captioning.device import ran_out_of_memory
from captioning.messages import naming
from captioning.read_ahead import one_behind, read_ahead

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """An image to caption, not decoded yet."""

    key: str  # by which its caption is found
    name: str  # how messages refer to it
    source: Path | bytes | ValueError  # its path, the content of its file, or why there is neither

    @classmethod
    def of(cls, path: Path) -> Entry:
        """Return the entry of an image file; its key is that of the file's name."""
        return cls(key_of(path.name), str(path), path)

    def load(self, draft: int | None = None) -> Image.Image:
        """Return the image as ``data.images.load_image`` does. Raises ValueError or OSError naming it."""
        if isinstance(self.source, ValueError):
            raise self.source
        if isinstance(self.source, Path):
            return load_image(self.source, draft)
        return decode_image(self.source, self.name, draft)


class ShrinkingBatch:
    """A function of a batch that halves its batches, from then on, when the accelerator's memory runs out."""

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
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                if len(chunk) == 1:
                    raise ValueError(
                        "out of memory with one image: use a smaller model, fewer beams, a lower "
                        "precision or --device cpu"
                    ) from error
            self.limit = len(chunk) // 2
            log.warning("out of memory with %d images at once; continuing with %d", len(chunk), self.limit)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results


@dataclass
class Job:
    """What a model does to images. Both functions of batches shrink them when the device's memory runs out.

    ``begin`` is for a device that works beside the program: it starts the work on a batch while the batch before it is
    captioned, and returns what ``caption`` takes then.
    """

    prepare: Callable[[Image.Image], Any]  # turns a decoded RGB image into what caption takes; runs in threads
    caption: Callable[[list], list[str]]
    draft: int | None = None  # that of data.images.load_image
    begin: Callable[[list], list] | None = None

    def __post_init__(self) -> None:
        self.caption = ShrinkingBatch(self.caption)
        if self.begin is not None:
            self.begin = ShrinkingBatch(self.begin)

    def read(self, entry: Entry) -> Any:
        """Return an entry's image, prepared. Raises ValueError naming it, whatever is wrong with it."""
        try:
            return self.prepare(entry.load(self.draft))
        except Exception as error:  # of any type: one picture must not end a run
            log.debug("%s", entry.name, exc_info=True)
            raise ValueError(naming(entry.name, error)) from error


Failed = Callable[[Entry, Exception], None]  # called with each entry that cannot be read, and why


def caption_entries(entries: Iterable[Entry], job: Job, batch_size: int, failed: Failed) -> Iterator[dict[str, str]]:
    """Yield the captions of one batch after another, ``{key: caption}``; what cannot be read is left out."""
    batches = _readable(read_ahead(entries, job.read, batch_size), failed)
    if (begin := job.begin) is not None:
        batches = one_behind((found, begin(prepared)) for found, prepared in batches)
    for found, prepared in batches:
        yield dict(zip([entry.key for entry in found], job.caption(prepared), strict=True))


def _readable(batches: Iterable[list[tuple[Entry, Future]]], failed: Failed) -> Iterator[tuple[list[Entry], list[Any]]]:
    """Yield the entries of each batch that could be read, and their prepared images; no empty batch."""
    for batch in batches:
        found, prepared = [], []
        for entry, future in batch:
            try:
                prepared.append(future.result())
                found.append(entry)
            except ValueError as error:
                failed(entry, error)
        if found:
            yield found, prepared
