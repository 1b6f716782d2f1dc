"""The results of a run over shards, from an empty folder to the manifest; no key has two captions in them.

worker.py draws the folder. The first of several processes begins the run and finishes it for all.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captioning.data.part_files import parquet, read_part, write_part
from captioning.data.ranked import Ranked
from captioning.files import atomic_path, check_writable, lock, read_json, sha256_of, write_json
from captioning.inference.append_log import as_read_back, other_run
from captioning.inference.folder import scores_file
from captioning.messages import some
from captioning.scale.duplicate_keys import DuplicateKeys
from captioning.scale.manifest import Manifest, write_lines
from captioning.scale.sources import Shard
from captioning.scale.worker import Folder

log = logging.getLogger(__name__)


class Results:
    """The results of one run over shards; use it as a context manager, which holds a lock on them.

    Args:
        out: the one JSON, or the folder of parts.
        form: ``json``, ``jsonl`` or ``parquet``. Parts on the way to one JSON are in ``OUT.json.parts``.
        run: whatever decides the captions; only results of the same run are resumed.
        overwrite: drop results of another run.
        keep: refuse to replace an existing ``out`` that is one JSON.

    Raises:
        ValueError: ``out`` holds something else, or another process has the lock.
    """

    def __init__(self, out: Path, form: str, run: dict[str, Any], overwrite: bool = False, keep: bool = False) -> None:
        if form == "parquet":
            parquet()  # fails now rather than after the first shard
        check_writable(out.parent, "OUT")
        self.out, self.form, self.overwrite, self.keep = out, form, overwrite, keep
        self._run = as_read_back({"run": run | {"form": form}})
        one = form == "json"
        place = (out.with_name(f"{out.name}.parts"), "jsonl") if one else (out, form)
        self.folder = Folder(*place, ranked="n_best" in run)
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
        """Make the folder ready, in the first process; the others must wait for it."""
        state = self.folder.state
        self._check_folder()
        state.mkdir(parents=True, exist_ok=True)
        self._lock = lock(state / "lock")
        for path in [*self.folder.path.glob(".*.tmp"), *state.glob(".*.tmp")]:  # left by a process that was killed
            _delete(path)
        self._check_run()

    def _check_folder(self) -> None:
        """Raise ValueError where the results' place is taken by anything but a run of this suite."""
        folder = self.folder.path
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file; name a folder for the parts, or another --out-format")
        if folder.is_dir() and not self.folder.state.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder}: holds other things than a run of ours; name another folder")
        if self.form == "json" and self.out.is_dir():
            raise ValueError(f"{self.out}: is a folder; name a file for the captions, or give --out-format jsonl")

    def _check_run(self) -> None:
        """Make sure that the folder belongs to this run, by what ``run.json`` says; drop another run's if allowed."""
        file = self.folder.state / "run.json"
        if file.exists():
            theirs = self._read_run(file)
            if theirs == self._run:
                return
            if not self.overwrite:
                raise other_run(self.folder.path, self._run, theirs)
            self._clear()
            self.manifest.unlink(missing_ok=True)
        elif self.form == "json" and self.out.exists() and self.keep:
            raise ValueError(f"{self.out}: exists already; leave out --keep to replace it, or name another")
        write_json(file, self._run)

    def _read_run(self, file: Path) -> dict[str, Any]:
        try:
            return dict(read_json(file))
        except (ValueError, TypeError) as error:
            if self.overwrite:
                return {}
            raise ValueError(f"{file}: damaged ({error}); give --overwrite to start again") from error

    def _clear(self) -> None:
        """Delete parts and state, and nothing else that is in the folder."""
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
            with contextlib.suppress(OSError):  # other files are in it
                folder.rmdir()

    def finish(self, shards: Sequence[Shard]) -> dict[str, int]:
        """Make the parts hold each key once, write the manifest and for ``json`` the one file; return the totals.

        Raises:
            ValueError: a shard is not finished or its part is damaged, or there is no caption at all.
        """
        with Manifest(self.manifest, self.folder.state / ".manifest.tmp") as manifest:
            for shard, rows in zip(shards, self._repeats(shards), strict=True):
                manifest.add(self._publish(shard, rows))
            totals = manifest.totals
            if not totals["captioned"]:
                raise ValueError(f"{self.out}: none of the {totals['images']} images could be captioned")
            self._put_aside(shards)
            if self.form == "json":
                self._publish_scores(shards)
                write_lines(self.out, "{", self._merged(shards), "}\n")
            manifest.write(self.out, self._run)
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
        with DuplicateKeys(self.folder.state, sum(count for count, _ in records)) as duplicates:
            for number, (shard, (_, digest)) in enumerate(zip(shards, records, strict=True)):
                file = self.folder.all_captions(shard)
                if sha256_of(file) != digest:
                    raise ValueError(f"{file}: damaged since it was written; remove it and run the same command again")
                duplicates.add(number, [key for key, _ in read_part(file)])
            return duplicates.rows(len(shards))

    def _publish(self, shard: Shard, repeats: np.ndarray) -> dict[str, Any]:
        """Make a shard's part hold all its captions except those rows; return the shard's record in the manifest."""
        record = read_json(self.folder.record(shard))
        part, uncut = self.folder.part(shard), self.folder.uncut(shard)
        if not len(repeats):
            if uncut.exists():
                uncut.replace(part)
            return record
        if not uncut.exists():
            with atomic_path(uncut) as copy:
                shutil.copyfile(part, copy)
        drop, dropped = set(repeats.tolist()), []

        def others() -> Iterator[tuple[str, str]]:
            for number, (key, caption) in enumerate(read_part(uncut)):
                if number in drop:
                    dropped.append(key)
                else:
                    yield key, caption

        write_part(part, others(), self.folder.ranked)
        log.error(
            "%s: %d keys have a caption in an earlier shard, which stays: %s", shard.path, len(dropped), some(dropped)
        )
        reason = "an earlier shard has a caption for this key"
        return record | {
            "captioned": record["captioned"] - len(dropped),
            "duplicates": record["duplicates"] + len(dropped),
            "problems": record["problems"] + [{"entry": f"{shard.path}: {key}", "reason": reason} for key in dropped],
            "part_size": part.stat().st_size,
            "part_sha256": sha256_of(part),
        }

    def _put_aside(self, shards: Sequence[Shard]) -> None:
        """Move parts of shards that the source no longer has into the state; should one come back, so does its part."""
        present = {self.folder.record(shard).name for shard in shards} | {"run.json"}
        for record in self.folder.state.glob("*.json"):
            part = self.folder.path / f"{record.stem}.{self.folder.suffix}"
            if record.name not in present and part.exists():
                log.warning("%s: its shard is no longer among the images; put aside in %s", part, self.folder.state)
                uncut = self.folder.state / f"{record.stem}.whole.{self.folder.suffix}"
                if uncut.exists():
                    part.unlink()
                else:
                    part.replace(uncut)

    def _publish_scores(self, shards: Sequence[Shard]) -> None:
        """Write the file of scores beside the one JSON, or remove an earlier run's."""
        file = scores_file(self.out)
        file.unlink(missing_ok=True)
        if self.folder.ranked:
            write_lines(file, "{", self._merged(shards, scores=True), "}\n")

    def _merged(self, shards: Sequence[Shard], scores: bool = False) -> Iterator[str]:
        """Yield the lines of the one JSON, as ``files.write_json`` would write them."""
        for shard in shards:
            for key, caption in read_part(self.folder.part(shard)):
                value = caption.as_json() if scores and isinstance(caption, Ranked) else caption
                yield f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
