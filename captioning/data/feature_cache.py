"""The frozen encoder's tokens of every image, computed once and kept on disk.

:class:`CacheSpec` names a folder with three files:

    key.json       what decides the features: encoder, weights, transform, shape, number format
    features.bin   rows of N x D numbers, one image after another
    rows.sha256    line i: SHA-256 of the image file that row i was made from, and the row's CRC-32

Rows are found by the *content* of image files: a changed image is encoded again, a renamed or copied one is not, and
splits share a folder. A row is listed only once it is on disk, so a killed build resumes where it stopped. One run
builds at a time (a POSIX file lock), with all its processes in parallel; another run waits, and then finds the rows.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import operator
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captioning.distributed import ALONE, Processes
from captioning.files import read_json, sha256_of, waiting_lock, write_json
from captioning.messages import naming, some
from captioning.read_ahead import one_behind, read_ahead
from captioning.timing import Timer

log = logging.getLogger(__name__)

Read = Callable[[Path], Any]  # an image file to what Encode takes a list of; called in threads
Encode = Callable[[list[Any]], torch.Tensor]  # b of them to (b, N, D) on any device
Images = list[tuple[str, Path]]  # SHA-256 of an image's file, and its path


@dataclass(frozen=True)
class CacheSpec:
    """Which cache it is, and how it grows.

    Attributes:
        root: parent folder of all caches.
        key: whatever decides the features beside the image: encoder name, hash of its weights, transform, …
        shape: (N, D) of one image's features.
        dtype: float16 or float32 on disk.
        limit: bytes; images for which the folder has no room below it are not stored.
        batch_size: images that are encoded at once.
        progress: show a bar where stderr is a terminal.

    Raises:
        ValueError: a batch size below 1, or an unsupported dtype.
    """

    root: str | os.PathLike
    key: dict[str, str]
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float16
    limit: float = math.inf
    batch_size: int = 16
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be 1 or more")
        if self.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"features are cached as torch.float16 or torch.float32, not as {self.dtype}")

    @property
    def identity(self) -> dict[str, Any]:
        """The content of ``key.json``; its hash names the folder, so another key is another cache."""
        return {"key": self.key, "shape": list(self.shape), "dtype": str(self.dtype), "format": 2}

    @functools.cached_property
    def folder(self) -> Path:
        """Where the three files are."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode())
        return Path(self.root) / digest.hexdigest()[:16]

    @property
    def features(self) -> Path:
        """The file of the rows."""
        return self.folder / "features.bin"

    @property
    def listing(self) -> Path:
        """The file that says which image each row is of."""
        return self.folder / "rows.sha256"

    @property
    def row_bytes(self) -> int:
        """The size of one image's features on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class FeatureCache:
    """Encoder tokens of a list of images, memory-mapped; :meth:`open` encodes and stores what is missing.

    Images beyond the limit of the cache's size are encoded whenever they are asked for, and rounded as stored ones are.

    Attributes:
        readable: numbers of the images that have features; the log names the others, which cannot be read.
    """

    def __init__(
        self, spec: CacheSpec, rows: np.ndarray, encode: Callable[[list[int]], torch.Tensor], readable: Sequence[int]
    ) -> None:
        self._spec, self.readable = spec, list(readable)
        self._rows = rows  # (images,), each image's row in the file; -1 for those that are not stored
        self._encode = encode  # the features of images that are not stored, by their numbers
        shape, kind = (int(rows.max()) + 1, *spec.shape), str(spec.dtype).removeprefix("torch.")
        self._features: np.ndarray = np.empty(shape, kind)
        if shape[0]:  # numpy maps no empty file
            self._features = np.memmap(spec.features, kind, mode="r", shape=shape)

    @classmethod
    def open(
        cls,
        spec: CacheSpec,
        paths: Sequence[Path],
        encode: Encode,
        processes: Processes = ALONE,
        read: Read = lambda path: path,
    ) -> FeatureCache:
        """Open the cache for ``paths``, after encoding and storing what is missing.

        Args:
            spec: which cache.
            paths: the images; ``cache[i]`` belongs to ``paths[i]``.
            encode: maps b images, as ``read`` returns them, to (b, N, D) on any device.
            processes: those that open it together; ``spec.root`` must be one folder for all of them.
            read: reads an image, in threads and ahead of ``encode``; left out, that gets the paths.

        Raises:
            FileNotFoundError: an image is missing.
            ValueError: no paths, no image that can be read, too little disk space, or features of the wrong shape or
                out of the range of ``spec.dtype``.
        """
        if not paths:
            raise ValueError("a feature cache needs at least one image")
        digests = processes.spread(sha256_of, paths)
        with waiting_lock(spec.folder / "lock") if processes.first else contextlib.nullcontext():
            row_of, missing = processes.from_first(lambda: _plan(spec, digests, paths))
            row_of |= _fill(spec, missing, encode, processes, read)
        processes.together(lambda: _check_seen(spec, len(row_of)))
        rows = np.array([row_of.get(digest, -1) for digest in digests])
        unread = {digest for digest, _ in missing if digest not in row_of}  # and perhaps some beyond the limit
        beyond = [(d, path) for d, path in zip(digests, paths, strict=True) if d not in row_of and d not in unread]
        unread |= _unreadable(dict(beyond), read, spec.batch_size, processes)
        readable = [i for i, digest in enumerate(digests) if digest not in unread]
        if not readable:
            raise ValueError(f"none of the {len(paths)} images can be read; the first is {paths[0]}")

        def encode_anew(indices: list[int]) -> torch.Tensor:
            [(_, features)] = _encoded(spec, [("", paths[i]) for i in indices], len(indices), encode, read, _refuse)
            return features

        return cls(spec, rows, encode_anew, readable)

    def only(self, numbers: Sequence[int]) -> FeatureCache:
        """Return the cache of the images ``numbers``, counted from 0 in it."""
        kept = set(self.readable)
        readable = [i for i, number in enumerate(numbers) if number in kept]
        encode, rows = self._encode, self._rows[list(numbers)]
        return FeatureCache(self._spec, rows, lambda indices: encode([numbers[i] for i in indices]), readable)

    @property
    def complete(self) -> bool:
        """Whether all images are stored, so that none is encoded when it is asked for."""
        return bool((self._rows >= 0).all())

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return a copy of the features of one image: (N, D)."""
        return self.gather([index])[0]

    def gather(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return a copy of the features of the images ``indices``: (B, N, D).

        Raises:
            IndexError: an index is outside of the list of images.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        rows = self._rows[numbers]
        stored = rows >= 0
        if stored.all():
            return torch.from_numpy(np.asarray(self._features[rows]))
        found = np.empty((len(rows), *self._features.shape[1:]), self._features.dtype)
        found[stored] = self._features[rows[stored]]
        found[~stored] = self._encode(numbers[~stored].tolist()).numpy()
        return torch.from_numpy(found)


# --- what is stored, and what is missing ----------------------------------------------------------------------------


def _plan(spec: CacheSpec, digests: Sequence[str], paths: Sequence[Path]) -> tuple[dict[str, int], Images]:
    """Return {digest: row} of what is stored, and the images that are to be encoded and stored.

    Raises:
        ValueError: the disk has no room for them.
    """
    row_of = _stored_rows(spec)
    missing = {digest: path for digest, path in zip(digests, paths, strict=True) if digest not in row_of}
    room = int(max(0, min(spec.limit / spec.row_bytes - len(row_of), len(missing))))
    if room < len(missing):
        log.warning(
            "feature cache %s: %d images are beyond its limit of %.1f GB and are encoded every time",
            spec.folder,
            len(missing) - room,
            spec.limit / 1e9,
        )
    _check_disk(spec, room, len(set(digests)))
    return row_of, list(missing.items())[:room]


def _stored_rows(spec: CacheSpec) -> dict[str, int]:
    """Return {digest: row} of what a cache holds; drop unfinished rows, and everything where it is damaged."""
    features, listing = spec.features, spec.listing
    if not features.exists() and not listing.exists():
        return _start_empty(spec)
    if not _has_key(spec):
        log.warning("feature cache %s is stale: its key.json is not this encoder's; rebuilding it", spec.folder)
        return _start_empty(spec)
    features.touch()
    listing.touch()
    lines = listing.read_bytes().split(b"\n")[:-1]  # a torn last line has no newline
    entries = [re.fullmatch("([0-9a-f]{64}) ([0-9a-f]{8})", line.decode("ascii", "replace")) for line in lines]
    row_of = {entry[1]: row for row, entry in enumerate(entries) if entry}
    size, expected = features.stat().st_size, len(lines) * spec.row_bytes
    if size < expected or len(row_of) < len(lines) or not _fit_checksums(spec, [e[2] for e in entries if e]):
        log.warning("feature cache %s is damaged (%d bytes for %d rows); rebuilding it", spec.folder, size, len(lines))
        return _start_empty(spec)
    if size > expected:
        log.warning("feature cache %s: dropping %d bytes of unfinished rows", spec.folder, size - expected)
        os.truncate(features, expected)
    os.truncate(listing, sum(len(line) + 1 for line in lines))
    return row_of


def _has_key(spec: CacheSpec) -> bool:
    try:
        return read_json(spec.folder / "key.json") == spec.identity
    except (FileNotFoundError, ValueError):
        return False


def _fit_checksums(spec: CacheSpec, checksums: Iterable[str]) -> bool:
    with spec.features.open("rb") as file:
        return all(zlib.crc32(file.read(spec.row_bytes)) == int(checksum, 16) for checksum in checksums)


def _start_empty(spec: CacheSpec) -> dict[str, int]:
    for file in (spec.folder / "key.json", spec.listing, spec.features):
        file.unlink(missing_ok=True)  # not truncated: another process may still have the old file mapped
    spec.listing.touch()
    spec.features.touch()
    write_json(spec.folder / "key.json", spec.identity)
    return {}


def _check_disk(spec: CacheSpec, missing: int, wanted: int) -> None:
    needed, free = missing * spec.row_bytes, shutil.disk_usage(spec.folder).free
    log.info(
        "feature cache %s: %d of %d images to encode, %.1f MB to write, %.1f GB free on that disk",
        spec.folder,
        missing,
        wanted,
        needed / 1e6,
        free / 1e9,
    )
    if needed > free:
        raise ValueError(
            f"{spec.folder}: the features of {missing} images need {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB are "
            "free; free some space or choose another folder with --cache"
        )


def _check_seen(spec: CacheSpec, count: int) -> None:
    """Check that the rows that other processes wrote are in this one's file system too."""
    if not spec.features.exists() or spec.features.stat().st_size < count * spec.row_bytes:
        raise ValueError(
            f"{spec.folder}: a process does not see the features that the others wrote; choose a folder with "
            "--cache that all machines share"
        )


# --- encoding and storing -------------------------------------------------------------------------------------------


def _fill(spec: CacheSpec, missing: Images, encode: Encode, processes: Processes, read: Read) -> dict[str, int]:
    """Encode and store images, every process its share; return {digest: row} of them, in every process."""
    timer, size = Timer("cache"), spec.batch_size
    own = processes.share([missing[i : i + size] for i in range(0, len(missing), size)])
    hidden = None if spec.progress and processes.first else True

    def build() -> dict[str, int]:
        _check_seen(spec, 0)
        row_of: dict[str, int] = {}
        todo = [image for batch in own for image in batch]
        with tqdm(total=sum(map(len, own)), desc="encoding", unit="image", disable=hidden) as bar:
            for images, features in _encoded(spec, todo, size, encode, read, _leave_out):
                row_of |= _append_rows(spec, [digest for digest, _ in images], features)
                bar.update(len(images))
        return row_of

    added = processes.gather(processes.together(build))
    if missing:
        timer.report(log, len(missing), "feature cache: %d images encoded")
    return functools.reduce(operator.or_, added)


def _encoded(
    spec: CacheSpec,
    images: Images,
    size: int,
    encode: Encode,
    read: Read,
    failed: Callable[[Path, BaseException], None],
) -> Iterator[tuple[Images, torch.Tensor]]:
    """Yield batches of images with their features (b, N, D), checked, in main memory and rounded as they are stored.

    Threads read the next images meanwhile, and a GPU encodes the next batch. ``failed`` gets those that cannot be read.
    """

    def begun() -> Iterator[tuple[Images, torch.Tensor]]:
        for batch in read_ahead(images, lambda image: read(image[1]), size):
            good, inputs = [], []
            for image, future in batch:
                if error := future.exception():  # of any type: one picture must not end a run
                    failed(image[1], error)
                else:
                    good.append(image)
                    inputs.append(future.result())
            if good:
                yield good, encode(inputs).detach()

    for batch, features in one_behind(begun()):
        yield batch, _checked(spec, [path for _, path in batch], features)


def _leave_out(path: Path, error: BaseException) -> None:
    log.error("left out: %s", naming(path, error))
    log.debug("%s", path, exc_info=error)


def _refuse(path: Path, error: BaseException) -> None:
    raise ValueError(naming(path, error)) from error


def _unreadable(images: dict[str, Path], read: Read, size: int, processes: Processes) -> set[str]:
    """Return those images that cannot be read, in every process, each of which tries a part."""

    def check() -> set[str]:
        bad = set()
        for batch in read_ahead(processes.share(list(images.items())), lambda image: read(image[1]), size):
            for (digest, path), future in batch:
                if error := future.exception():
                    _leave_out(path, error)
                    bad.add(digest)
        return bad

    return set().union(*processes.gather(check()))


def _checked(spec: CacheSpec, paths: list[Path], features: torch.Tensor) -> torch.Tensor:
    if features.shape != (len(paths), *spec.shape):
        raise ValueError(f"the encoder gave features {tuple(features.shape)}, not {(len(paths), *spec.shape)}")
    stored = features.to(spec.dtype).cpu()
    finite = stored.isfinite().all(dim=2).all(dim=1)  # (b,)
    if not finite.all():
        names = [path for path, good in zip(paths, finite.tolist(), strict=True) if not good]
        raise ValueError(f"features not finite in {spec.dtype}: {some(names)}; cache in float32, or check the encoder")
    return stored


def _append_rows(spec: CacheSpec, digests: Sequence[str], features: torch.Tensor) -> dict[str, int]:
    """Append rows (b, N, D) to a cache that several processes build; return {digest: row} of them."""
    rows = features.numpy()
    lines = [f"{digest} {zlib.crc32(row):08x}\n" for digest, row in zip(digests, rows, strict=True)]
    with waiting_lock(spec.features):
        count = spec.listing.stat().st_size // len(lines[0])
        # A process that died in between may have left rows that are not listed, and half a line.
        os.truncate(spec.features, count * spec.row_bytes)
        os.truncate(spec.listing, count * len(lines[0]))
        # The order matters: a row that is listed must be on disk, whenever the process dies.
        _append(spec.features, rows.tobytes())
        _append(spec.listing, "".join(lines).encode())
    return {digest: count + i for i, digest in enumerate(digests)}


def _append(file: Path, content: bytes) -> None:
    with file.open("ab") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
