"""Caption a folder, whatever the model: read ahead, halve batches that do not fit, keep what is done, end in one JSON.

Captions go to an append-only side file as they come. A run that was interrupted finds it and goes on; the final file
appears at the end, whole, and the side file goes. ``accelerate launch`` splits the images over processes.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import data
import runtime
from strictjson import parse_json

log = logging.getLogger(__name__)

READ_AHEAD = 2  # batches that are read while one is captioned


@dataclass(frozen=True)
class Workers:
    """The processes that share a run, as ``accelerate launch`` starts them, and which of them this one is."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        """Return when all have come here; alone, at once."""
        if self.count > 1:
            # The slowest may need days more than the fastest; a process that dies is the launcher's business.
            state = runtime.import_guarded("accelerate").PartialState(
                cpu=not torch.cuda.is_available(), timeout=timedelta(days=30)
            )
            if state.num_processes != self.count:  # accelerate falls back to one process in silence
                raise ValueError(f"{self.count} processes were launched and accelerate joins {state.num_processes}")
            state.wait_for_everyone()


ALONE = Workers()


def find_workers() -> Workers:
    """Return what the launcher says in the environment; one process without it."""
    return Workers(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


class PredictionLog:
    """The captions of one run so far, kept in ``OUT.json.part.jsonl``: a line for the run, then one a caption.

    Every caption has a checksum: a line that is torn or damaged is passed over, and its image captioned again. Several
    processes write a side file each, ``OUT.json.part1.jsonl``, …, and the first one merges them; a run may go on with
    another number of processes. Use it as a context manager: it holds a lock on the side file.

    Args:
        out: the final JSON.
        run: whatever decides the captions; a side file of another run is not gone on with.
        overwrite: replace an existing ``out``, and side files of another run.
        workers: the processes that share the run.

    Raises:
        ValueError: ``out`` exists or a side file belongs to another run, and neither may be overwritten; or another
            process is writing it.
    """

    def __init__(self, out: Path, run: dict[str, Any], overwrite: bool = False, workers: Workers = ALONE) -> None:
        self.out, self.workers = out, workers
        self.part = out.with_name(f"{out.name}.part{workers.rank or ''}.jsonl")
        self._header = json.loads(json.dumps({"run": run}))  # as it will be read back
        if out.is_dir():
            raise ValueError(f"{out}: is a folder; name a file for the captions")
        out.parent.mkdir(parents=True, exist_ok=True)
        if workers.rank == 0:
            self._file = self._locked()
            try:
                self._check_parts(overwrite)
            except ValueError:
                self._file.close()
                raise
        workers.wait()
        if workers.rank:
            self._file = self._locked()
        self._begin()
        workers.wait()
        self.captions = self._all_captions()
        if self.captions and workers.rank == 0:
            log.info("%s: going on behind %d captions", self.part, len(self.captions))
        workers.wait()  # nobody writes before all have read, or they would not agree on what is left

    def __enter__(self) -> PredictionLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.captions:  # nothing to keep: a run that fails at its start leaves no trace
            self.part.unlink(missing_ok=True)
        self._file.close()

    def _locked(self) -> io.FileIO:
        while True:
            file = self.part.open("a+b", buffering=0)  # what a full disk refuses must not wait in a buffer
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise ValueError(f"{self.part}: another run is writing it; wait for it, or name another") from error
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # its run finished and removed it between our open and our lock

    def _parts(self) -> list[Path]:
        """Return the side files of all processes, of this run and of the one before."""
        pattern = re.compile(re.escape(self.out.name) + r"\.part\d*\.jsonl")
        return sorted(path for path in self.out.parent.iterdir() if pattern.fullmatch(path.name))

    def _check_parts(self, overwrite: bool) -> None:
        """Make sure that all side files are this run's, or drop them where that is allowed."""
        contents = {path: self._parse(path, overwrite) for path in self._parts()}
        started = {path: header for path, (header, captions) in contents.items() if captions}
        if started and all(header == self._header for header in started.values()):
            return
        if not overwrite and started:
            path, header = next((p, h) for p, h in started.items() if h != self._header)
            theirs = header.get("run", {})
            differ = [key for key, value in self._header["run"].items() if theirs.get(key) != value]
            raise ValueError(f"{path} belongs to another run (other {', '.join(differ)}); finish that one first, or "
                             "give --overwrite to drop it")  # fmt: skip
        if not overwrite and self.out.exists():
            self.part.unlink()
            raise ValueError(f"{self.out}: exists already; give --overwrite to replace it, or another name")
        for path in contents:
            if path != self.part:
                path.unlink()
        self._file.truncate(0)

    def _begin(self) -> None:
        """Cut a torn line off this process's side file, and write the first line of a new one."""
        self._file.seek(0)
        text = self._file.read()
        self._file.truncate(text.rfind(b"\n") + 1)
        if b"\n" not in text:
            self._write(self._header)

    def _parse(self, path: Path, overwrite: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
        """Return a side file's header and captions; a line that is none of ours is passed over."""
        first, *others = path.read_bytes().split(b"\n")[:-1] or [b"{}"]
        try:
            header = dict(parse_json(first.decode()))
        except (ValueError, TypeError) as error:
            if overwrite:
                log.warning("%s: damaged (%s); beginning anew", path, error)
                return {}, {}
            raise ValueError(f"{path}: damaged ({error}); remove it, or give --overwrite") from error
        captions = dict(filter(None, map(_caption_of, others)))
        if len(captions) < len(others):
            damaged = len(others) - len(captions)
            log.warning("%s: %d lines are damaged; their images are captioned again", path, damaged)
        return header, captions

    def _all_captions(self) -> dict[str, str]:
        return {image: caption for path in self._parts() for image, caption in self._parse(path)[1].items()}

    def _write(self, *records: dict[str, Any]) -> None:
        left = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(f"{self.part}: cannot be written ({error}); the captions so far are kept in it, so make room "
                          "and run the same command again") from error  # fmt: skip

    def add(self, captions: dict[str, str]) -> None:
        """Keep the captions of a batch, ``{file name without suffix: caption}``."""
        self._write(*(
            {"image": image, "caption": caption, "check": _check(image, caption)} for image, caption in captions.items()
        ))  # fmt: skip
        self.captions |= captions

    def finish(self, paths: Sequence[Path]) -> dict[str, str]:
        """Return the captions of all processes in the order of ``paths``; the first one writes the final JSON.

        Raises:
            ValueError: there is none.
        """
        self.workers.wait()
        found = self._all_captions()
        self.workers.wait()
        captions = {path.stem: found[path.stem] for path in paths if path.stem in found}
        if not captions:
            raise ValueError(f"{self.out}: none of the {len(paths)} images could be captioned")
        if self.workers.rank == 0:
            runtime.write_json(self.out, captions)
            for path in self._parts():
                path.unlink()
            log.info("%d captions in %s", len(captions), self.out)
            if len(captions) < len(paths):
                log.error("%d of %d images were not captioned", len(paths) - len(captions), len(paths))
        return captions


def _check(image: str, caption: str) -> int:
    return zlib.crc32(json.dumps([image, caption]).encode())


def _caption_of(line: bytes) -> tuple[str, str] | None:
    """Return image and caption of a line of the side file, or None where its checksum is wrong."""
    try:
        record = parse_json(line.decode())
        image, caption = record["image"], record["caption"]
        return (image, caption) if record["check"] == _check(image, caption) else None
    except (ValueError, KeyError, TypeError):
        return None


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
                    raise ValueError("out of memory with one image: use a smaller model, fewer beams, a lower "
                                     "precision or --device cpu") from error  # fmt: skip
            self.limit = len(chunk) // 2
            log.warning("out of memory with %d images at once; going on with %d", len(chunk), self.limit)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results


def caption_images(
    log_file: PredictionLog,
    paths: Sequence[Path],
    prepare: Callable[[Any], Any],
    caption: Callable[[list], list[str]],
    batch_size: int,
    load: Callable[[Path], Any] = data.load_image,
) -> None:
    """Caption what ``log_file`` lacks of ``paths``; an image that cannot be read is named and left out.

    Args:
        log_file: takes the captions.
        paths: images; their stems are the keys.
        prepare: makes of an image (PIL, RGB) what ``caption`` takes; runs in threads, ahead of it.
        caption: makes captions of a list of those.
        batch_size: images at once.
        load: reads an image.
    """
    workers = log_file.workers
    todo = [path for path in paths if path.stem not in log_file.captions][workers.rank :: workers.count]
    caption = Halving(caption)
    hidden = True if workers.rank else None  # one bar, of the first process's share
    with tqdm(total=len(todo), desc="caption", disable=hidden) as bar:
        for batch in read_ahead(todo, prepare, batch_size, load):
            stems, prepared = _readable(batch)
            if prepared:
                log_file.add(dict(zip(stems, caption(prepared), strict=True)))
            bar.update(len(batch))


def read_ahead(
    paths: Sequence[Path], prepare: Callable[[Any], Any], size: int, load: Callable[[Path], Any] = data.load_image
) -> Iterator[list[tuple[Path, Future]]]:
    """Yield batches of (path, future of the prepared image) while threads read the batches behind them."""

    def read(path: Path) -> Any:
        return prepare(load(path))

    # One image is too small a work for several threads; several here would fight with the model's for the cores.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), initializer=lambda: torch.set_num_threads(1)) as pool:
        waiting: list[list[tuple[Path, Future]]] = []
        starts = list(range(0, len(paths), size))
        for number in range(len(starts)):
            waiting += [
                [(path, pool.submit(read, path)) for path in paths[start : start + size]]
                for start in starts[number + len(waiting) : number + 1 + READ_AHEAD]
            ]
            yield waiting.pop(0)


def _readable(batch: list[tuple[Path, Future]]) -> tuple[list[str], list]:
    stems, prepared = [], []
    for path, future in batch:
        try:
            prepared.append(future.result())
            stems.append(path.stem)
        except (ValueError, OSError) as error:
            log.error("not captioned: %s", error)
    return stems, prepared
