"""Where captions go by the million: a part for each shard, a manifest that counts them, and no key twice.

While a shard is worked on its captions are in a side file. When it is done they become its part (JSONL or Parquet), and
a record beside it says what the shard held. At the end the records become the manifest. All of this is by shard, so any
number of processes may have worked on a run, and any other number may go on with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from captioning import cli as runtime
from captioning.files import parse_json, read_json
from captioning.inference import append_log as sidefile
from captioning.inference.append_log import SideFile
from captioning.scale.sources import Entry, Findings, Shard

log = logging.getLogger(__name__)

FORMS = ("json", "jsonl", "parquet")
COUNTS = ("images", "captioned", "unreadable", "duplicates", "others")
PACKAGES = ("torch", "timm", "transformers", "pillow")
NAMED = 5  # a message about many keys names so many of them
ROWS = 10_000  # of a Parquet file that are in memory at once
BUCKET_KEYS = 10**6  # of a run that are compared in memory at once: 24 MB, and as much again to sort them
MOST_BUCKETS = 256  # files that are open at once; a billion keys are 94 MB a bucket
KEY = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("row", "<u4")])


def form_of(out: Path, asked: str) -> str:
    """Return the form of the results: what was ``asked`` for, or for ``auto`` what the ending of ``out`` says."""
    if asked != "auto":
        return asked
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(out.suffix.lower(), "json")


# --------------------------------------------------------------------------------------------------------- part files


def write_part(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write (key, caption) rows as JSONL or Parquet, by the ending of ``path``, atomically.

    Raises:
        OSError: naming the file and what to do.
    """
    try:
        with runtime.atomic_path(path) as temporary:
            if path.suffix == ".parquet":
                _write_parquet(temporary, rows)
            else:
                with temporary.open("w", encoding="utf-8") as file:
                    for key, caption in rows:
                        file.write(json.dumps({"key": key, "caption": caption}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error}); the captions so far are kept, so make room and run the "
            "same command again"
        ) from error


def read_part(path: Path) -> Iterator[tuple[str, str]]:
    """Yield a part's (key, caption) rows in order."""
    if path.suffix == ".parquet":
        with parquet().ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS):
                yield from zip(batch["key"].to_pylist(), batch["caption"].to_pylist(), strict=True)
        return
    with path.open("rb") as file:
        for line in file:
            row = parse_json(line.decode())
            yield row["key"], row["caption"]


def _write_parquet(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    arrow, module = runtime.import_guarded("pyarrow"), parquet()
    schema = arrow.schema([("key", arrow.string()), ("caption", arrow.string())])
    with module.ParquetWriter(path, schema) as writer:
        for some in _batched(rows, ROWS):
            keys, captions = zip(*some, strict=True)
            writer.write_table(arrow.table([keys, captions], schema=schema))


def parquet() -> Any:
    """Return the Parquet module. Raises ValueError where it is not installed."""
    try:
        return runtime.import_guarded("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f"Parquet needs pyarrow, which cannot be imported ({error}): pip install pyarrow, or choose "
            "--out-format jsonl"
        ) from error


def _batched(rows: Iterable[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    some: list[tuple[str, str]] = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


# ------------------------------------------------------------------------------------------------------ one shard's log


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
        side.begin(_header(shard))
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
            except sidefile.HeldError:
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
        header = _header(shard)
        found, self.captions = sidefile.read(side.path, overwrite=True)
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
        runtime.write_json(self.folder.record(self.shard), record)
        self._side.path.unlink()
        self.captions = {}


def _header(shard: Shard) -> dict[str, Any]:
    """Return the first line of a shard's side file, as it will be read back."""
    return json.loads(json.dumps({"shard": shard.identity()}))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- the whole run


class Results:
    """The results of one run over shards; use it as a context manager, which holds a lock on them.

    Args:
        out: the one JSON, or the folder of parts.
        form: ``json``, ``jsonl`` or ``parquet``. Parts on the way to one JSON are in ``OUT.json.parts``.
        run: whatever decides the captions; results of another run are not gone on with.
        overwrite: drop results of another run, or an existing ``out``.
        first: whether this process is the one that begins and ends the run for all.

    Raises:
        ValueError: ``out`` holds something else, or another process has the lock.
    """

    def __init__(self, out: Path, form: str, run: dict[str, Any], overwrite: bool = False, first: bool = True) -> None:
        if form == "parquet":
            parquet()  # said now rather than behind the first shard
        self.out, self.form, self.overwrite, self.first = out, form, overwrite, first
        self._run = json.loads(json.dumps({"run": run | {"form": form}}))  # as it will be read back
        one = form == "json"
        self.folder = Folder(out.with_name(f"{out.name}.parts"), "jsonl") if one else Folder(out, form)
        self.manifest = out.with_name(f"{out.stem}.manifest.json") if one else out / "_manifest.json"
        self._lock: io.FileIO | None = None

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock:
            if exception[0] and not self._begun():  # a run that fails at its start leaves no trace
                self._remove()
            self._lock.close()

    def _begun(self) -> bool:
        return any(path.name not in ("lock", "run.json", "images.jsonl") for path in self.folder.state.iterdir())

    def begin(self) -> None:
        """Make the folder ready, for the first process; the others must wait for it."""
        state = self.folder.state
        self._refuse_strange_folder()
        state.mkdir(parents=True, exist_ok=True)
        self._lock = sidefile.lock(state / "lock")
        for path in [*self.folder.path.glob(".*.tmp"), *state.glob(".*.tmp")]:  # what a killed process left half-made
            _delete(path)
        self._check_run()

    def _refuse_strange_folder(self) -> None:
        folder = self.folder.path
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file; name a folder for the parts, or another --out-format")
        if folder.is_dir() and not self.folder.state.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder}: holds other things than a run of ours; name another folder")
        if self.form == "json" and self.out.is_dir():
            raise ValueError(f"{self.out}: is a folder; name a file for the captions, or give --out-format jsonl")

    def _check_run(self) -> None:
        file = self.folder.state / "run.json"
        if file.exists():
            theirs = self._read_run(file)
            if theirs == self._run:
                return
            if not self.overwrite:
                differ = [k for k, v in self._run["run"].items() if theirs.get("run", {}).get(k) != v]
                raise ValueError(
                    f"{self.folder.path} belongs to another run (other {', '.join(differ)}); finish that "
                    "one first, or give --overwrite to drop it"
                )
            self._clear()
            self.manifest.unlink(missing_ok=True)
        elif self.form == "json" and self.out.exists() and not self.overwrite:
            raise ValueError(f"{self.out}: exists already; give --overwrite to replace it, or another name")
        runtime.write_json(file, self._run)

    def _read_run(self, file: Path) -> dict[str, Any]:
        try:
            return dict(read_json(file))
        except (ValueError, TypeError) as error:
            if self.overwrite:
                return {}
            raise ValueError(f"{file}: damaged ({error}); give --overwrite to begin anew") from error

    def _clear(self) -> None:
        """Drop parts and state, and nothing that is not ours."""
        for path in self.folder.state.iterdir():
            if path.suffix == ".json":
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    (self.folder.path / Path(read_json(path)["part"]).name).unlink(missing_ok=True)
            if path.name != "lock":
                _delete(path)

    def _remove(self) -> None:
        self._clear()
        (self.folder.state / "lock").unlink()
        for folder in (self.folder.state, self.folder.path):
            with contextlib.suppress(OSError):  # somebody else's files are in it
                folder.rmdir()

    def finish(self, shards: Sequence[Shard]) -> dict[str, int]:
        """Make the parts hold each key once, write the manifest and for ``json`` the one file; return the totals.

        Raises:
            ValueError: a shard is not finished or its part is damaged, or there is no caption at all.
        """
        records = self.folder.state / ".manifest.tmp"
        totals = dict.fromkeys((*COUNTS, "damaged"), 0)
        with records.open("w", encoding="utf-8") as file:
            for shard, rows in zip(shards, self._repeats(shards), strict=True):
                record = self._publish(shard, rows)
                for name in COUNTS:
                    totals[name] += record[name]
                totals["damaged"] += bool(record["damage"])
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if not totals["captioned"]:
            raise ValueError(f"{self.out}: none of the {totals['images']} images could be captioned")
        self._put_aside(shards)
        if self.form == "json":
            self._merge(shards)
        self._write_manifest(records, len(shards), totals)
        records.unlink()
        if self.form == "json":
            self._remove()
        log.info("%d captions in %s, what they were made of in %s", totals["captioned"], self.out, self.manifest)
        return totals

    def _repeats(self, shards: Sequence[Shard]) -> list[np.ndarray]:
        """Return for each shard the rows of its part whose keys an earlier shard has."""
        records = []
        for shard in shards:
            record = self.folder.done(shard)
            if record is None:
                raise ValueError(f"{shard.path} is not finished; run the same command again")
            records.append((record["captioned"], record["part_sha256"]))
        with KeyTable(self.folder.state, sum(count for count, _ in records)) as table:
            for number, (shard, (_, digest)) in enumerate(zip(shards, records, strict=True)):
                file = self.folder.complete(shard)
                if sha256_of(file) != digest:
                    raise ValueError(f"{file}: damaged since it was written; remove it and run the same command again")
                table.add(number, [key for key, _ in read_part(file)])
            return table.repeats(len(shards))

    def _publish(self, shard: Shard, repeats: np.ndarray) -> dict[str, Any]:
        """Make a shard's part hold all its captions but those rows; return what the manifest says of the shard."""
        record = read_json(self.folder.record(shard))
        part, whole = self.folder.part(shard), self.folder.whole(shard)
        if not len(repeats):
            if whole.exists():
                whole.replace(part)
            return record
        if not whole.exists():
            with runtime.atomic_path(whole) as copy:
                shutil.copyfile(part, copy)
        drop, dropped = set(repeats.tolist()), []

        def first() -> Iterator[tuple[str, str]]:
            for number, (key, caption) in enumerate(read_part(whole)):
                if number in drop:
                    dropped.append(key)
                else:
                    yield key, caption

        write_part(part, first())
        some = ", ".join(dropped[:NAMED]) + (" …" if len(dropped) > NAMED else "")
        log.error("%s: %d keys have a caption in an earlier shard, which stays: %s", shard.path, len(dropped), some)
        reason = "an earlier shard has a caption for this key"
        return record | {
            "captioned": record["captioned"] - len(dropped),
            "duplicates": record["duplicates"] + len(dropped),
            "problems": record["problems"] + [{"entry": f"{shard.path}: {key}", "reason": reason} for key in dropped],
            "part_size": part.stat().st_size,
            "part_sha256": sha256_of(part),
        }

    def _put_aside(self, shards: Sequence[Shard]) -> None:
        """Take parts of shards that the source no longer has out of sight; should one come back, so does its part."""
        present = {self.folder.record(shard).name for shard in shards} | {"run.json"}
        for record in self.folder.state.glob("*.json"):
            part = self.folder.path / f"{record.stem}.{self.folder.ending}"
            if record.name not in present and part.exists():
                log.warning("%s: its shard is no longer among the images; put aside in %s", part, self.folder.state)
                whole = self.folder.state / f"{record.stem}.whole.{self.folder.ending}"
                if whole.exists():
                    part.unlink()
                else:
                    part.replace(whole)

    def _merge(self, shards: Sequence[Shard]) -> None:
        """Write the one JSON, as ``runtime.write_json`` would, but a row at a time."""
        with runtime.atomic_path(self.out) as temporary, temporary.open("w", encoding="utf-8") as file:
            between = "{\n"
            for shard in shards:
                for row in read_part(self.folder.part(shard)):
                    key, caption = (json.dumps(text, ensure_ascii=False) for text in row)
                    file.write(f"{between}  {key}: {caption}")
                    between = ",\n"
            file.write("\n}\n")

    def _write_manifest(self, records: Path, count: int, totals: dict[str, int]) -> None:
        """Write the manifest from the records of all shards, a line each."""
        head = {
            "results": str(self.out),
            "exactly_one_result_for_each_key": True,  # _repeats compared all keys, or finish would have raised
            "keys": totals["captioned"],
            "totals": {"shards": count, **totals},
            **self._run,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        }
        text = json.dumps(head, ensure_ascii=False, indent=2).removesuffix("\n}")
        with runtime.atomic_path(self.manifest) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            between = ',\n  "shards": [\n    '
            with records.open(encoding="utf-8") as lines:
                for line in lines:
                    file.write(between + line.rstrip("\n"))
                    between = ",\n    "
            file.write("\n  ]\n}\n")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


class KeyTable:
    """All keys of a run on disk, 24 bytes each, in buckets by hash that are looked at one by one: memory stays flat.

    Keys are compared by 128 bits of BLAKE2b; two different ones of a billion agree with a probability below 1e-20.

    Args:
        folder: where the temporary files are made.
        keys: about how many there are to be.
    """

    def __init__(self, folder: Path, keys: int) -> None:
        buckets = min(1 + keys // BUCKET_KEYS, MOST_BUCKETS)
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp")
        self._files = [(Path(self._folder.name) / str(n)).open("w+b") for n in range(buckets)]

    def __enter__(self) -> KeyTable:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files:
            file.close()
        self._folder.cleanup()

    def add(self, shard: int, keys: Sequence[str]) -> None:
        """Take the keys of a shard in the order of its rows; shards come in order."""
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
        table = np.zeros(len(keys), KEY)
        table["high"], table["low"] = np.frombuffer(digests, "<u8").reshape(-1, 2).T
        table["shard"], table["row"] = shard, np.arange(len(keys))
        bucket = table["high"] % np.uint64(len(self._files))
        order = np.argsort(bucket, kind="stable")
        ends = np.searchsorted(bucket[order], np.arange(len(self._files) + 1, dtype=np.uint64))
        for number, file in enumerate(self._files):
            file.write(table[order[ends[number] : ends[number + 1]]].tobytes())

    def repeats(self, shards: int) -> list[np.ndarray]:
        """Return for each shard the rows whose keys stand earlier, ascending."""
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
