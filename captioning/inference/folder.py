"""A folder of images into one JSON of captions, resumable at any image."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captioning.data.images import load_image
from captioning.files import write_json
from captioning.inference import append_log
from captioning.inference.append_log import SideFile
from captioning.inference.batches import Halving, read_ahead, started_batches
from captioning.timing import Timer
from captioning.workers import ALONE, Workers

log = logging.getLogger(__name__)


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
            self._side = SideFile(self.part)
            try:
                self._check_parts(overwrite)
            except ValueError:
                self._side.close()
                raise
        workers.wait()
        if workers.rank:
            self._side = SideFile(self.part)
        self._side.begin(self._header)
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
        self._side.close()

    def _parts(self) -> list[Path]:
        """Return the side files of all processes, of this run and of the one before."""
        pattern = re.compile(re.escape(self.out.name) + r"\.part\d*\.jsonl")
        return sorted(path for path in self.out.parent.iterdir() if pattern.fullmatch(path.name))

    def _check_parts(self, overwrite: bool) -> None:
        """Make sure that all side files are this run's, or drop them where that is allowed."""
        contents = {path: append_log.read(path, overwrite) for path in self._parts()}
        started = {path: header for path, (header, captions) in contents.items() if captions}
        if started and all(header == self._header for header in started.values()):
            self._drop(contents.keys() - started.keys())
            return
        if not overwrite and started:
            path, header = next((p, h) for p, h in started.items() if h != self._header)
            theirs = header.get("run", {})
            differ = [key for key, value in self._header["run"].items() if theirs.get(key) != value]
            raise ValueError(
                f"{path} belongs to another run (other {', '.join(differ)}); finish that one first, or "
                "give --overwrite to drop it"
            )
        if not overwrite and self.out.exists():
            self.part.unlink()
            raise ValueError(f"{self.out}: exists already; give --overwrite to replace it, or another name")
        self._drop(contents)

    def _drop(self, parts: Iterable[Path]) -> None:
        """Do away with side files; this process's own stays, empty."""
        for path in parts:
            if path == self.part:
                self._side.clear()
            else:
                path.unlink()

    def _all_captions(self) -> dict[str, str]:
        return {image: caption for path in self._parts() for image, caption in append_log.read(path)[1].items()}

    def add(self, captions: dict[str, str]) -> None:
        """Keep the captions of a batch, ``{file name without suffix: caption}``."""
        self._side.add(captions)
        self.captions |= captions

    def finish(self, paths: Sequence[Path]) -> dict[str, str]:
        """Return the captions of all processes in the order of ``paths``; the first one writes the final JSON.

        Raises:
            ValueError: there is none.
        """
        self.workers.wait()
        found = self._all_captions()
        self.workers.wait()  # nobody removes before all have read
        captions = {path.stem: found[path.stem] for path in paths if path.stem in found}
        if not captions:
            raise ValueError(f"{self.out}: none of the {len(paths)} images could be captioned")
        if self.workers.rank == 0:
            write_json(self.out, captions)
            for path in self._parts():
                path.unlink()
            log.info("%d captions in %s", len(captions), self.out)
            if len(captions) < len(paths):
                log.error("%d of %d images were not captioned", len(paths) - len(captions), len(paths))
        # A launcher ends all processes when one ends with an exit code, so none ends before the result is written.
        self.workers.wait()
        return captions


def caption_images(
    log_file: PredictionLog,
    paths: Sequence[Path],
    prepare: Callable[[Any], Any],
    caption: Callable[[list], list[str]],
    batch_size: int,
    draft: int | None = None,
    begin: Callable[[list], list] | None = None,
) -> None:
    """Caption what ``log_file`` lacks of ``paths``; an image that cannot be read is named and left out.

    Args:
        log_file: takes the captions.
        paths: images; their stems are the keys.
        prepare, caption, draft, begin: as in :class:`Job`.
        batch_size: images at once.
    """
    workers = log_file.workers
    todo = [path for path in paths if path.stem not in log_file.captions][workers.rank :: workers.count]
    caption, load = Halving(caption), functools.partial(load_image, draft=draft)
    hidden = True if workers.rank else None  # one bar, of the first process's share
    timer = Timer("caption")
    with tqdm(total=len(todo), desc="caption", disable=hidden) as bar:

        def failed(path: Path, error: Exception) -> None:
            log.error("not captioned: %s", error)
            bar.update()

        batches = read_ahead(todo, prepare, batch_size, load)
        for found, begun in started_batches(batches, begin, failed):
            log_file.add(dict(zip([path.stem for path in found], caption(begun), strict=True)))
            bar.update(len(found))
    timer.report(log, len(todo), "%d images")
