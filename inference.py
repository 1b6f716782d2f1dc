"""Caption a folder, whatever the model: read ahead, halve batches that do not fit, keep what is done, end in one JSON.

Captions go to an append-only side file as they come. A run that was interrupted finds it and goes on; the final file
appears at the end, whole, and the side file goes.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import data
import runtime
from strictjson import parse_json

log = logging.getLogger(__name__)

READ_AHEAD = 2  # batches that are read while one is captioned


class PredictionLog:
    """The captions of one run so far, kept in ``OUT.json.part.jsonl``: a line for the run, then one a caption.

    Every caption has a checksum: a line that is torn or damaged is passed over, and its image captioned again.

    Use it as a context manager: it holds a lock on the side file.

    Args:
        out: the final JSON.
        run: whatever decides the captions; a side file of another run is not gone on with.
        overwrite: replace an existing ``out``, and a side file of another run.

    Raises:
        ValueError: ``out`` exists or the side file belongs to another run, and neither may be overwritten; or another
            process is writing it.
    """

    def __init__(self, out: Path, run: dict[str, Any], overwrite: bool = False) -> None:
        self.out = out
        self.part = out.with_name(out.name + ".part.jsonl")
        if out.is_dir():
            raise ValueError(f"{out}: is a folder; name a file for the captions")
        out.parent.mkdir(parents=True, exist_ok=True)
        self.captions: dict[str, str] = {}
        self._file = self._locked()
        try:
            self._resume(json.loads(json.dumps({"run": run})), overwrite)  # as it will be read back
        except ValueError:
            self._file.close()
            raise

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

    def _resume(self, header: dict[str, Any], overwrite: bool) -> None:
        """Take over the captions of the side file, cut behind its last whole line, or begin it anew."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        theirs, captions, damaged = self._parse(whole, overwrite)
        if captions and theirs == header:
            self._file.truncate(len(whole))
            self.captions = captions
            if damaged:
                log.warning("%s: %d lines are damaged; their images are captioned again", self.part, damaged)
            log.info("%s: going on behind %d captions", self.part, len(captions))
            return
        if not overwrite and captions:
            differ = [key for key, value in header["run"].items() if theirs.get("run", {}).get(key) != value]
            raise ValueError(f"{self.part} belongs to another run (other {', '.join(differ)}); finish that one first, "
                             "or give --overwrite to drop it")  # fmt: skip
        if not overwrite and self.out.exists():
            if not text:
                self.part.unlink()
            raise ValueError(f"{self.out}: exists already; give --overwrite to replace it, or another name")
        self._file.truncate(0)
        self._write(header)

    def _parse(self, lines: bytes, overwrite: bool) -> tuple[dict[str, Any], dict[str, str], int]:
        """Return the side file's header, its captions, and how many lines are none of ours."""
        first, *others = lines.split(b"\n")[:-1] or [b"{}"]
        try:
            header = dict(parse_json(first.decode()))
        except (ValueError, TypeError) as error:
            if overwrite:
                log.warning("%s: damaged (%s); beginning anew", self.part, error)
                return {}, {}, 0
            raise ValueError(f"{self.part}: damaged ({error}); remove it, or give --overwrite") from error
        captions = dict(filter(None, map(_caption_of, others)))
        return header, captions, len(others) - len(captions)

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
        """Write the final JSON in the order of ``paths``, remove the side file, and return the captions."""
        captions = {path.stem: self.captions[path.stem] for path in paths if path.stem in self.captions}
        if not captions:
            raise ValueError(f"{self.out}: none of the {len(paths)} images could be captioned")
        runtime.write_json(self.out, captions)
        self.part.unlink()
        missing = len(paths) - len(captions)
        log.info("%d captions in %s", len(captions), self.out)
        if missing:
            log.error("%d of %d images were not captioned", missing, len(paths))
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
) -> None:
    """Caption what ``log_file`` lacks of ``paths``; an image that cannot be read is named and left out.

    Args:
        log_file: takes the captions.
        paths: images; their stems are the keys.
        prepare: makes of an image (PIL, RGB) what ``caption`` takes; runs in threads, ahead of it.
        caption: makes captions of a list of those.
        batch_size: images at once.
    """
    todo = [path for path in paths if path.stem not in log_file.captions]
    caption = Halving(caption)
    with tqdm(total=len(paths), initial=len(paths) - len(todo), desc="caption", disable=None) as bar:
        for batch in read_ahead(todo, prepare, batch_size):
            stems, prepared = _readable(batch)
            if prepared:
                log_file.add(dict(zip(stems, caption(prepared), strict=True)))
            bar.update(len(batch))


def read_ahead(paths: Sequence[Path], prepare: Callable[[Any], Any], size: int) -> Iterator[list[tuple[Path, Future]]]:
    """Yield batches of (path, future of the prepared image) while threads read the batches behind them."""

    def read(path: Path) -> Any:
        return prepare(data.load_image(path))

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
