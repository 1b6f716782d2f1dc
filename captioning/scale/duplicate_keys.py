"""Keys that a run over shards has twice, found on disk in bounded memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BUCKET_KEYS = 10**6  # keys that are compared in memory at once: 24 MB, and as much again to sort them
MOST_BUCKETS = 256  # files that are open at once; a billion keys are 94 MB a bucket
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("row", "<u4")])


class DuplicateKeys:
    """Finds keys that an earlier row or shard has.

    Memory stays flat: hashes of all keys are on disk, 24 bytes each, in buckets of which one at a time is sorted.
    Keys are compared by 128 bits of BLAKE2b; that any two of a billion agree by chance has a probability below 1e-20.

    Args:
        folder: where the temporary files are made.
        keys: about how many there will be.
    """

    def __init__(self, folder: Path, keys: int) -> None:
        buckets = min(1 + keys // BUCKET_KEYS, MOST_BUCKETS)
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp")
        self._files = [(Path(self._folder.name) / str(n)).open("w+b") for n in range(buckets)]

    def __enter__(self) -> DuplicateKeys:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files:
            file.close()
        self._folder.cleanup()

    def add(self, shard: int, keys: Sequence[str]) -> None:
        """Take the keys of the next shard, in the order of its rows."""
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
        table = np.zeros(len(keys), KEY)
        table["high"], table["low"] = np.frombuffer(digests, "<u8").reshape(-1, 2).T
        table["shard"], table["row"] = shard, np.arange(len(keys))
        bucket = table["high"] % np.uint64(len(self._files))
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(len(self._files) + 1, dtype=np.uint64))
        for number, file in enumerate(self._files):
            file.write(table[order[ends[number] : ends[number + 1]]].tobytes())

    def rows(self, shards: int) -> list[np.ndarray]:
        """Return for each shard its rows, ascending, whose keys an earlier row or shard has."""
        found = [np.zeros(0, KEY)]
        for file in self._files:
            file.flush()
            file.seek(0)
            table = np.frombuffer(file.read(), KEY)
            table = table[np.lexsort((table["row"], table["shard"], table["low"], table["high"]))]
            same = (table["high"][1:] == table["high"][:-1]) & (table["low"][1:] == table["low"][:-1])
            found.append(table[1:][same])
        repeated = np.concatenate(found)
        repeated = repeated[np.lexsort((repeated["row"], repeated["shard"]))]
        ends = np.searchsorted(repeated["shard"], np.arange(shards + 1))
        return [repeated["row"][ends[n] : ends[n + 1]] for n in range(shards)]
