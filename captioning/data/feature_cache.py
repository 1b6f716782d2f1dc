"""The frozen encoder's tokens of every image, computed once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from captioning.distributed import ALONE, Processes
from captioning.files import read_json, write_json
from captioning.messages import some
from captioning.timing import Timer

log = logging.getLogger(__name__)


class FeatureCache:
    """Encoder tokens of a list of images, computed once, then memory-mapped.

    One folder per key holds ``features.bin`` (rows of N x D numbers), ``rows.sha256`` (line i: digest of the image
    file that row i was made from, and the row's CRC-32, checked whenever a cache is opened) and ``key.json``. Rows are
    found by the *content* of image files, so a changed image is encoded anew, a renamed or copied one is not, and
    splits share a folder. A row is listed only after it is on disk, so a killed build goes on where it stopped. One
    run builds at a time (a POSIX file lock), all its processes in parallel; another one waits, then finds the rows.
    Images beyond the limit of its size are encoded whenever they are asked for, and rounded as the cached ones are.
    """

    def __init__(
        self,
        file: Path,
        rows: np.ndarray,
        shape: tuple[int, int],
        dtype: torch.dtype,
        encode: Callable[[list[int]], torch.Tensor] | None = None,
    ) -> None:
        self._arguments = (file, rows, shape, dtype, encode)
        self._rows = rows  # (images,), row in the file of each image; -1 for those that are not in it
        self._encode = encode
        whole, kind = (int(rows.max()) + 1, *shape), _numpy_dtype(dtype)
        self._features = np.memmap(file, kind, mode="r", shape=whole) if whole[0] else np.empty(whole, kind)

    @classmethod
    def open(
        cls,
        root: str | os.PathLike,
        key: dict[str, str],
        paths: Sequence[Path],
        shape: tuple[int, int],
        encode: Callable[[list[Path]], torch.Tensor],
        dtype: torch.dtype = torch.float16,
        batch_size: int = 16,
        progress: bool = True,
        limit: float = math.inf,
        processes: Processes = ALONE,
    ) -> FeatureCache:
        """Open the cache of ``paths`` under ``root``, encoding what is not yet there.

        Args:
            root: parent of the caches of all keys.
            key: whatever else decides the features: encoder name, hash of its weights, transform, …
            paths: the images; ``cache[i]`` belongs to ``paths[i]``.
            shape: (N, D) of one image's features.
            encode: maps b paths to (b, N, D) on any device.
            dtype: float16 or float32 on disk.
            batch_size: the largest b.
            progress: show a bar where stderr is a terminal.
            limit: bytes; images for which the folder has no room below it are not cached.
            processes: those that open it together; ``root`` must be one folder for all of them.

        Raises:
            FileNotFoundError: an image is missing.
            ValueError: no paths, a batch size below 1, an unsupported dtype, too little disk space, or features of
                the wrong shape or out of the range of ``dtype``.
        """
        if not paths:
            raise ValueError("a feature cache needs at least one image")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        row_bytes = int(np.prod(shape)) * _numpy_dtype(dtype).itemsize
        identity = {"key": key, "shape": list(shape), "dtype": str(dtype), "format": 2}
        folder = Path(root) / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        digests = processes.spread(_digest, paths)

        def begin() -> tuple[dict[str, int], list[tuple[str, Path]]]:
            row_of = _recover_rows(folder, identity, row_bytes)
            missing = {digest: path for digest, path in zip(digests, paths, strict=True) if digest not in row_of}
            room = int(max(0, min(limit / row_bytes - len(row_of), len(missing))))
            if room < len(missing):
                log.warning(
                    "feature cache %s: %d images are beyond its limit of %.1f GB and are encoded every time",
                    folder,
                    len(missing) - room,
                    limit / 1e9,
                )
            _check_disk(folder, room, len(set(digests)), row_bytes)
            return row_of, list(missing.items())[:room]

        with _locked(folder) if processes.first else contextlib.nullcontext():
            row_of, missing = processes.from_first(begin)
            timer = Timer("cache")
            share = processes.share([missing[i : i + batch_size] for i in range(0, len(missing), batch_size)])
            batches = _shown(share, progress and processes.first)
            added = processes.together(lambda: _build_rows(folder, batches, encode, shape, dtype))
            for rows in processes.gather(added):
                row_of |= rows
        processes.together(lambda: _check_seen(folder, len(row_of) * row_bytes))
        if missing:
            timer.report(log, len(missing), "feature cache: %d images encoded")
        rows = np.array([row_of.get(digest, -1) for digest in digests])

        def encode_rest(indices: list[int]) -> torch.Tensor:
            return _encode_checked(encode, [Path(paths[i]) for i in indices], shape, dtype)

        rest = encode_rest if rows.min() < 0 else None  # a closure, which would keep a whole cache from being pickled
        return cls(folder / "features.bin", rows, tuple(shape), dtype, rest)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return a copy of the features of one image: (N, D)."""
        return self.gather([index])[0]

    def gather(self, indices: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Return a copy of the features of ``indices``: (B, N, D).

        Raises:
            IndexError: an index is outside of the list of images.
        """
        indices = np.asarray(indices, dtype=np.int64)
        rows = self._rows[indices]
        cached = rows >= 0
        if cached.all():
            return torch.from_numpy(np.asarray(self._features[rows]))
        found = np.empty((len(rows), *self._features.shape[1:]), self._features.dtype)
        found[cached] = self._features[rows[cached]]
        found[~cached] = self._encode(indices[~cached].tolist()).numpy()
        return torch.from_numpy(found)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the place of the features and not the features: a data loader's worker maps the file anew."""
        return FeatureCache, self._arguments


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"features are cached as torch.float16 or torch.float32, not as {dtype}")
    return np.dtype(str(dtype).removeprefix("torch."))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl  # POSIX only; the other parts of this module run anywhere

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when the process dies
        yield


def _recover_rows(folder: Path, identity: dict[str, Any], row_bytes: int) -> dict[str, int]:
    """Return {digest: row} of what a cache folder holds; drop unfinished rows, and everything where it is damaged."""
    features, listing, key_file = folder / "features.bin", folder / "rows.sha256", folder / "key.json"
    if not features.exists() and not listing.exists():
        return _new_cache(folder, identity)
    try:
        stale = read_json(key_file) != identity
    except (FileNotFoundError, ValueError):
        stale = True
    if stale:
        log.warning("feature cache %s is stale: its key.json is not this encoder's; building it anew", folder)
        return _new_cache(folder, identity)
    lines = listing.read_bytes().split(b"\n")[:-1] if listing.exists() else []  # a torn last line has no newline
    parts = [re.fullmatch("([0-9a-f]{64}) ([0-9a-f]{8})", line.decode("ascii", "replace")) for line in lines]
    row_of = {part[1]: row for row, part in enumerate(parts) if part}
    size, expected = features.stat().st_size if features.exists() else -1, len(lines) * row_bytes
    if size < expected or len(row_of) < len(lines) or not _rows_are_whole(features, row_bytes, parts):
        log.warning("feature cache %s is damaged (%d bytes for %d rows); building it anew", folder, size, len(lines))
        return _new_cache(folder, identity)
    if size > expected:
        log.warning("feature cache %s: dropping %d bytes of unfinished rows", folder, size - expected)
        os.truncate(features, expected)
    if listing.exists():
        os.truncate(listing, sum(len(line) + 1 for line in lines))
    return row_of


def _rows_are_whole(features: Path, row_bytes: int, parts: list[re.Match]) -> bool:
    with features.open("rb") as file:
        return all(zlib.crc32(file.read(row_bytes)) == int(part[2], 16) for part in parts)


def _new_cache(folder: Path, identity: dict[str, Any]) -> dict[str, int]:
    for name in ("key.json", "rows.sha256", "features.bin"):
        (folder / name).unlink(missing_ok=True)  # not truncated: another process may still have the old file mapped
    (folder / "features.bin").touch()
    write_json(folder / "key.json", identity)
    return {}


def _check_disk(folder: Path, missing: int, wanted: int, row_bytes: int) -> None:
    needed, free = missing * row_bytes, shutil.disk_usage(folder).free
    log.info(
        "feature cache %s: %d of %d images to encode, %.1f MB to write, %.1f GB free on that disk",
        folder,
        missing,
        wanted,
        needed / 1e6,
        free / 1e9,
    )
    if needed > free:
        raise ValueError(
            f"{folder}: the features of {missing} images need {needed / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free; "
            "free some space or choose another folder with --cache"
        )


def _check_seen(folder: Path, size: int) -> None:
    """Make sure that what other processes wrote is there in this one's file system too."""
    file = folder / "features.bin"
    if (file.stat().st_size if file.exists() else -1) < size:
        raise ValueError(
            f"{folder}: a process does not see the features that the others wrote; choose a folder with "
            "--cache that all machines share"
        )


def _build_rows(
    folder: Path,
    batches: Iterable[list[tuple[str, Path]]],
    encode: Callable[[list[Path]], torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> dict[str, int]:
    """Encode and store batches of (digest, image); return {digest: row}."""
    _check_seen(folder, 0)
    added = {}
    for batch in batches:
        features = _encode_checked(encode, [path for _, path in batch], shape, dtype)
        first = _append_rows(folder, [digest for digest, _ in batch], features.numpy())
        added |= {digest: first + i for i, (digest, _) in enumerate(batch)}
    return added


def _digest(path: str | os.PathLike) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _shown(batches: Sequence[list[Any]], progress: bool) -> Iterator[list[Any]]:
    with tqdm(total=sum(map(len, batches)), desc="encoding", unit="image", disable=None if progress else True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _encode_checked(
    encode: Callable[[list[Path]], torch.Tensor], paths: list[Path], shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    features = encode(paths).detach()
    if features.shape != (len(paths), *shape):
        raise ValueError(f"the encoder gave features {tuple(features.shape)}, not {(len(paths), *shape)}")
    stored = features.to(dtype).cpu()  # (b, N, D)
    finite = stored.isfinite().all(dim=2).all(dim=1)  # (b,)
    if not finite.all():
        names = [path for path, good in zip(paths, finite.tolist(), strict=True) if not good]
        raise ValueError(f"features not finite in {dtype}: {some(names)}; cache in float32, or check the encoder")
    return stored


def _append_rows(folder: Path, digests: Sequence[str], features: np.ndarray) -> int:
    """Append rows (b, N, D) to a cache that several processes build; return the number of the first one."""
    import fcntl

    stored, listing, row_bytes = folder / "features.bin", folder / "rows.sha256", features[0].nbytes
    lines = [f"{digest} {zlib.crc32(row):08x}\n" for digest, row in zip(digests, features, strict=True)]
    with stored.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        listing.touch()
        count = listing.stat().st_size // len(lines[0])
        # What a process left that died in between: rows that are not listed, half of a line.
        os.truncate(stored, count * row_bytes)
        os.truncate(listing, count * len(lines[0]))
        # Order matters: a row that is listed must be on disk, whenever the process dies.
        _append(stored, features.tobytes())
        _append(listing, "".join(lines).encode())
    return count


def _append(file: Path, content: bytes) -> None:
    with file.open("ab") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
