"""One process's work on shards: claim a shard, caption it as a stream, seal its part.

OUT.jsonl/                            a run's folder (OUT.json.parts/ on the way to one JSON)
    0.jsonl  1.jsonl  …               parts: a finished shard's captions, one a line; or 0.parquet, …
    _manifest.json                    what all shards came to, written last (see manifest.py)
    _state/
        lock  run.json                who is writing; whatever decides the captions
        images.jsonl                  the names in a folder of images, until the run is finished
        2.part.jsonl                  an unfinished shard's captions so far (see inference/append_log.py)
        0.json  1.json  …             records: what a finished shard held, and its part's checksum
        1.whole.jsonl                 all of a shard's captions, where its part lacks those whose keys an
                                      earlier shard has
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.data.part_files import read_part, write_part
from captioning.files import HeldError, read_json, sha256_of, write_json
from captioning.inference.append_log import AppendLog, as_read_back, read_log
from captioning.inference.batches import Entry, Job, caption_entries
from captioning.scale.archives import Findings
from captioning.scale.sources import Shard
from captioning.timing import Timer

log = logging.getLogger(__name__)

COUNTS = ("images", "captioned", "unreadable", "duplicates", "others")  # of a shard's record


@dataclass(frozen=True)
class Folder:
    """The folder of a run, whose layout is drawn above. Can be sent to other processes."""

    path: Path
    suffix: str = "jsonl"  # of the parts
    ranked: bool = False  # whether captions have their scores beside them

    @property
    def state(self) -> Path:
        """Where side files and records are."""
        return self.path / "_state"

    def part(self, shard: Shard) -> Path:
        """Return the file of a shard's captions."""
        return self.path / f"{shard.name}.{self.suffix}"

    def uncut(self, shard: Shard) -> Path:
        """Return the file of all of a shard's captions where its part lacks some, whose keys another shard has."""
        return self.state / f"{shard.name}.whole.{self.suffix}"

    def side(self, shard: Shard) -> Path:
        """Return the file of an unfinished shard's captions."""
        return self.state / f"{shard.name}.part.jsonl"

    def record(self, shard: Shard) -> Path:
        """Return the file that says what a finished shard held."""
        return self.state / f"{shard.name}.json"

    def all_captions(self, shard: Shard) -> Path:
        """Return the file with all of a finished shard's captions."""
        return self.uncut(shard) if self.uncut(shard).exists() else self.part(shard)

    def done(self, shard: Shard) -> dict[str, Any] | None:
        """Return a finished shard's record; None where it is not finished, or has changed since."""
        try:
            record = read_json(self.record(shard))
            if record["shard"] == shard.identity() and self.all_captions(shard).stat().st_size == record["part_size"]:
                return record
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: damaged (%s); the shard is read again", self.record(shard), error)
        return None

    def reopen(self, shard: Shard) -> bool:
        """Make a finished shard with an unreadable image unfinished; its captions stay. Return whether it was one.

        No process may work on the shard meanwhile.
        """
        record = self.done(shard)
        if record is None or not record["unreadable"]:
            return False
        side = AppendLog(self.side(shard))
        side.clear()
        side.begin(header_of(shard))
        side.add(dict(read_part(self.all_captions(shard))))
        side.close()
        self.record(shard).unlink()
        return True

    def claim(self, shard: Shard, patience: float = 0.0) -> ShardLog | None:
        """Return the log of a shard that is not finished; None where it is, or where another process works on it.

        For such a process, which may be about to die, it waits ``patience`` seconds.
        """
        deadline = time.monotonic() + patience
        while self.done(shard) is None:
            try:
                side = AppendLog(self.side(shard))
            except HeldError:
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
    """A claimed shard: its captions so far, and what is wrong with it. Use it as a context manager.

    Attributes:
        captions: so far, ``{key: caption}``, those of an interrupted run included.
    """

    def __init__(self, folder: Folder, shard: Shard, side: AppendLog) -> None:
        self.folder, self.shard, self._side = folder, shard, side
        header = header_of(shard)
        found, self.captions = read_log(side.path, overwrite=True)
        if found != header:
            if self.captions:
                log.warning("%s: has changed; all of it is captioned again", shard.path)
            self._side.clear()
            self.captions = {}
        for stale in (folder.record(shard), folder.uncut(shard)):
            stale.unlink(missing_ok=True)
        self._side.begin(header)
        self._keys: dict[str, None] = {}  # in the order of the shard
        self._findings = Findings()
        self._count = dict.fromkeys(COUNTS, 0)
        self._problems: list[dict[str, str]] = []
        if self.captions:
            log.info("%s: resuming after %d captions", shard.path, len(self.captions))

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
        """Note an image that cannot be read."""
        self._count["unreadable"] += 1
        self._problem(entry.name, str(error))

    def _problem(self, entry: str, reason: str) -> None:
        log.error("not captioned: %s", reason if entry in reason else f"{entry}: {reason}")
        self._problems.append({"entry": entry, "reason": reason})

    def seal(self) -> None:
        """Write the captions as the shard's part, and its record, after the last of :meth:`wanted`."""
        rows = [(key, self.captions[key]) for key in self._keys if key in self.captions]
        part = self.folder.part(self.shard)
        write_part(part, rows, self.folder.ranked)
        damage, images = self._findings.damage, self._count["images"]
        if damage:
            log.error("%s: damaged; its first %d images were read: %s", self.shard.path, images, damage)
        record = {
            "shard": self.shard.identity(),
            "sha256": self._findings.sha256,
            **self._count,
            "captioned": len(rows),
            "others": self._findings.others,
            "damage": damage,
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
    return as_read_back({"shard": shard.identity()})


def caption_shards(folder: Folder, shards: Iterable[Shard], job: Job, batch_size: int, patience: float = 0.0) -> None:
    """Caption the shards that are not finished and that no other process works on, each as a stream.

    The arguments are a run's folder, its shards in any order, what to do to their images and to how many at once, and
    the seconds to wait for a shard that another process holds.
    """
    for shard in shards:
        shard_log = folder.claim(shard, patience)
        if shard_log is None:
            continue
        timer, count = Timer("caption"), 0
        with shard_log:
            for captions in caption_entries(shard_log.wanted(), job, batch_size, shard_log.unreadable):
                shard_log.add(captions)
                count += len(captions)
            shard_log.seal()
        timer.report(log, count, "%s: %d images", shard.name, level=logging.DEBUG)
