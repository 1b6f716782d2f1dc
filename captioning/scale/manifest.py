"""The manifest of a run over shards: what decided the captions, what every shard held, and the totals.

{"results": "out.jsonl", "exactly_one_result_for_each_key": true, "keys": 16,
 "totals": {"shards": 3, "images": 17, "captioned": 16, "unreadable": 1, …},
 "run": {…}, "versions": {"python": …, "torch": …},
 "shards": [
   {"shard": {"path": …, "size": …}, "sha256": …, "images": 5, …, "part": "0.jsonl", "part_sha256": …},
   …
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from captioning.files import atomic_path
from captioning.scale.worker import COUNTS

PACKAGES = ("torch", "timm", "transformers", "pillow")


class Manifest:
    """Collects the records of all shards in a temporary file, since the totals precede them. A context manager."""

    def __init__(self, path: Path, spool: Path) -> None:
        self.path, self._spool = path, spool
        self.totals = dict.fromkeys(("shards", *COUNTS, "damaged"), 0)  # over the records so far
        self._records = spool.open("w+", encoding="utf-8")

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *exception: object) -> None:
        self._records.close()
        self._spool.unlink()

    def add(self, record: dict[str, Any]) -> None:
        """Take the record of the next shard."""
        for name in COUNTS:
            self.totals[name] += record[name]
        self.totals["shards"] += 1
        self.totals["damaged"] += bool(record["damage"])
        self._records.write(json.dumps(record, ensure_ascii=False) + "\n")

    def write(self, results: Path, run: dict[str, Any]) -> None:
        """Write the manifest, once no key has two results."""
        head = {
            "results": str(results),
            "exactly_one_result_for_each_key": True,
            "keys": self.totals["captioned"],
            "totals": self.totals,
            **run,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
        opening = json.dumps(head, ensure_ascii=False, indent=2).removesuffix("\n}") + ',\n  "shards": ['
        self._records.seek(0)
        write_lines(self.path, opening, ("    " + line.rstrip("\n") for line in self._records), "  ]\n}\n")


def write_lines(path: Path, opening: str, items: Iterable[str], closing: str) -> None:
    """Write JSON too long for memory, atomically: ``opening``, then each item on a line, with commas, ``closing``."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(opening)
        for number, item in enumerate(items):
            file.write((",\n" if number else "\n") + item)
        file.write("\n" + closing)
