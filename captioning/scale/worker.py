"""One process's work: claim a shard, caption it as a stream, seal its part."""

from __future__ import annotations

import json
import logging
import operator
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning import files
from captioning.files import read_json, sha256_of, write_json
from captioning.inference import append_log
from captioning.inference.append_log import SideFile
from captioning.inference.batches import Halving, Job, read_ahead, started_batches
from captioning.scale.part_files import read_part, write_part
from captioning.scale.sources import Entry, Findings, Shard
from captioning.timing import Timer

log = logging.getLogger(__name__)

COUNTS = ("images", "captioned", "unreadable", "duplicates", "others")


@dataclass(frozen=True)
class Folder:
    """The folder of a run: parts in it, what is between start and end in ``_state``. Can be sent to other processes.

    Attributes:
        path: the folder.
        ending: of the parts.
    """

    path: Path
    ending: str = "jsonl"

    @property
    def state(self) -> Path:
        """Where side files and records are."""
        return self.path / "_state"

    def part(self, shard: Shard) -> Path:
        """Return the file of a shard's captions."""
        return self.path / f"{shard.name}.{self.ending}"

    def whole(self, shard: Shard) -> Path:
        """Return the file of all of a shard's captions, where the part lacks those whose keys another shard has."""
        return self.state / f"{shard.name}.whole.{self.ending}"

    def side(self, shard: Shard) -> Path:
        """Return the file of an unfinished shard's captions."""
        return self.state / f"{shard.name}.part.jsonl"

    def record(self, shard: Shard) -> Path:
        """Return the file that says what a finished shard held."""
        return self.state / f"{shard.name}.json"

    def complete(self, shard: Shard) -> Path:
        """Return the file with all of a finished shard's captions."""
        return self.whole(shard) if self.whole(shard).exists() else self.part(shard)

    def done(self, shard: Shard) -> dict[str, Any] | None:
        """Return a finished shard's record; None where it is not finished, or was another file then."""
        try:
            record = read_json(self.record(shard))
            if record["shard"] == shard.identity() and self.complete(shard).stat().st_size == record["part_size"]:
                return record
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: damaged (%s); the shard is read again", self.record(shard), error)
        return None

    def reopen(self, shard: Shard) -> bool:
        """Make a finished shard in which an image could not be read unfinished; its captions stay. Says whether it was.

        Nobody may work on the shard meanwhile.
        """
        record = self.done(shard)
        if record is None or not record["unreadable"]:
            return False
        side = SideFile(self.side(shard))
        side.clear()
        side.begin(header_of(shard))
        side.add(dict(read_part(self.complete(shard))))
        side.close()
        self.record(shard).unlink()
        return True

    def claim(self, shard: Shard, patience: float = 0.0) -> ShardLog | None:
        """Return the log of a shard that is not finished; None where it is, or where another process works on it.

        Args:
            shard: which.
            patience: seconds to wait for another process that holds it, in case that one is about to die.
        """
        deadline = time.monotonic() + patience
        while self.done(shard) is None:
            try:
                side = SideFile(self.side(shard))
            except files.HeldError:
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.2)
                continue
            if self.done(shard) is None:
                return ShardLog(self, shard, side)
            self.side(shard).unlink()  # it was finished between our look and our lock
            side.close()
        return None


class ShardLog:
    """A shard that is worked on: its captions so far, and what is wrong with it. Use it as a context manager.

    Attributes:
        captions: so far, ``{key: caption}``, those of an interrupted run included.
    """

    def __init__(self, folder: Folder, shard: Shard, side: SideFile) -> None:
        self.folder, self.shard, self._side = folder, shard, side
        header = header_of(shard)
        found, self.captions = append_log.read(side.path, overwrite=True)
        if found != header:
            if self.captions:
                log.warning("%s: has changed; all of it is captioned again", shard.path)
            self._side.clear()
            self.captions = {}
        for stale in (folder.record(shard), folder.whole(shard)):
            stale.unlink(missing_ok=True)
        self._side.begin(header)
        self._keys: dict[str, None] = {}  # in the order of the shard
        self._findings = Findings()
        self._count = dict.fromkeys(COUNTS, 0)
        self._problems: list[dict[str, str]] = []
        if self.captions:
            log.info("%s: going on behind %d captions", shard.path, len(self.captions))

    def __enter__(self) -> ShardLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.captions:  # nothing to keep
            self._side.path.unlink(missing_ok=True)
        self._side.close()

    def wanted(self) -> Iterator[Entry]:
        """Yield the shard's images that have no caption yet. Of entries with one key the first counts."""
        for entry in self.shard.entries(self._findings):
            self._count["images"] += 1
            if entry.key in self._keys:
                self._count["duplicates"] += 1
                self._problem(entry.name, f"another entry before it has the key {entry.key}")
                continue
            self._keys[entry.key] = None
            if entry.key not in self.captions:
                yield entry

    def add(self, captions: dict[str, str]) -> None:
        """Keep the captions of a batch."""
        self._side.add(captions)
        self.captions |= captions

    def unreadable(self, entry: Entry, error: Exception) -> None:
        """Take note of an image that cannot be read."""
        self._count["unreadable"] += 1
        self._problem(entry.name, str(error))

    def _problem(self, entry: str, reason: str) -> None:
        log.error("not captioned: %s", reason if entry in reason else f"{entry}: {reason}")
        self._problems.append({"entry": entry, "reason": reason})

    def seal(self) -> None:
        """Make the captions the shard's part and write its record, behind the last of :meth:`wanted`."""
        rows = [(key, self.captions[key]) for key in self._keys if key in self.captions]
        part = self.folder.part(self.shard)
        write_part(part, rows)
        if self._findings.damage:
            log.error(
                "%s: damaged; its first %d images were read: %s",
                self.shard.path,
                self._count["images"],
                self._findings.damage,
            )
        record = {
            "shard": self.shard.identity(),
            "sha256": self._findings.sha256,
            **self._count,
            "captioned": len(rows),
            "others": self._findings.others,
            "damage": self._findings.damage,
            "problems": self._problems,
            "part": part.name,
            "part_size": part.stat().st_size,
            "part_sha256": sha256_of(part),
        }
        write_json(self.folder.record(self.shard), record)
        self._side.path.unlink()
        self.captions = {}


def header_of(shard: Shard) -> dict[str, Any]:
    """Return the first line of a shard's side file, as it will be read back."""
    return json.loads(json.dumps({"shard": shard.identity()}))


def caption_shards(folder: Folder, shards: Iterable[Shard], job: Job, batch_size: int, patience: float = 0.0) -> None:
    """Caption the shards that are not finished and that no other process works on, each as a stream.

    Args:
        folder: takes the captions.
        shards: in any order.
        job: what makes captions.
        batch_size: images at once.
        patience: seconds to wait for a shard that another process holds.
    """
    caption = Halving(job.caption)
    for shard in shards:
        shard_log = folder.claim(shard, patience)
        if shard_log is None:
            continue
        timer, count = Timer("caption"), 0
        with shard_log:
            load = operator.methodcaller("load", job.draft)
            batches = read_ahead(shard_log.wanted(), job.prepare, batch_size, load)
            for found, begun in started_batches(batches, job.begin, shard_log.unreadable):
                shard_log.add(dict(zip([entry.key for entry in found], caption(begun), strict=True)))
                count += len(found)
            shard_log.seal()
        timer.report(log, count, "%s: %d images", shard.name, level=logging.DEBUG)
