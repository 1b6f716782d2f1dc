"""A folder of images into one JSON of captions, resumable after any batch.

OUT.json                the captions, once all are there: {file name without suffix: caption}
OUT.scores.json         with --scores or --n-best: {key: [{"caption": …, "score": …}, …]}
OUT.json.part.jsonl     until then, those of the first process so far (see append_log.py)
OUT.json.part1.jsonl    those of the second process, and so on
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captioning.data.ranked import Ranked
from captioning.distributed import ALONE, Processes
from captioning.files import check_writable, write_json
from captioning.inference.append_log import AppendLog, as_read_back, other_run, read_log
from captioning.inference.batches import Entry, Job, caption_entries
from captioning.inference.text_files import TextFiles
from captioning.timing import Timer

log = logging.getLogger(__name__)


class PredictionLog:
    """The captions of one run so far. Use it as a context manager: it holds a lock on this process's side file.

    Each process writes a side file, and the first one merges them all; a run may resume with another number of
    processes.

    Args:
        out: the final JSON.
        run: whatever decides the captions; only side files of the same run are resumed.
        overwrite: drop side files of another run.
        processes: share the run.
        texts: text files to write too.
        keep: refuse to replace an existing ``out``.

    Attributes:
        captions: found in side files of an interrupted run, and since then this process's.

    Raises:
        ValueError: ``out`` exists and is to be kept, a side file belongs to another run and may not be dropped, or
            another process is writing it.
    """

    def __init__(
        self,
        out: Path,
        run: dict[str, Any],
        overwrite: bool = False,
        processes: Processes = ALONE,
        texts: TextFiles | None = None,
        keep: bool = False,
    ) -> None:
        self.out, self.processes, self.texts, self.keep = out, processes, texts, keep
        self.part = out.with_name(f"{out.name}.part{processes.rank or ''}.jsonl")
        self._header = as_read_back({"run": run})
        if out.is_dir():
            raise ValueError(f"{out}: is a folder; name a file for the captions")
        check_writable(out.parent, "OUT")
        out.parent.mkdir(parents=True, exist_ok=True)
        self._side: AppendLog | None = None
        self._stale: list[Path] = []  # side files of another run, or without a caption
        self._started = False
        self.captions = processes.from_first(lambda: self._begin(overwrite))

    def __enter__(self) -> PredictionLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        """Release the side file; a run that has no captions leaves no trace, and what another one left stays."""
        if self._side is None:
            return
        if not self.captions and (self._started or not self.part.stat().st_size):
            self.part.unlink(missing_ok=True)
        self._side.close()

    def _begin(self, overwrite: bool) -> dict[str, str]:
        """Lock the first process's side file; return the captions of an interrupted run. Nothing is written yet."""
        self._side, self.captions = AppendLog(self.part), {}
        try:
            captions = self._check_parts(overwrite)
        except ValueError:
            self._close()
            raise
        if captions:
            log.info("%s: resuming after %d captions", self.part, len(captions))
        return captions

    def start(self) -> None:
        """Begin to write, in all processes at once, with the model there: only now are another run's files dropped."""
        self.processes.from_first(self._drop_stale)
        if self._side is None:
            self._side = AppendLog(self.part)
        self._side.begin(self._header)
        self._started = True

    def _parts(self) -> list[Path]:
        """Return the side files of all processes, of this run and of the one before."""
        pattern = re.compile(re.escape(self.out.name) + r"\.part\d*\.jsonl")
        return sorted(path for path in self.out.parent.iterdir() if pattern.fullmatch(path.name))

    def _check_parts(self, overwrite: bool) -> dict[str, str]:
        """Return the captions of side files if all are this run's; the others are to be dropped, if that is allowed."""
        if self.keep and self.out.exists():
            raise ValueError(f"{self.out}: exists already; leave out --keep to replace it, or name another")
        contents = {path: read_log(path, overwrite) for path in self._parts()}
        started = {path: header for path, (header, captions) in contents.items() if captions}
        if started and all(header == self._header for header in started.values()):
            self._stale = [path for path in contents if path not in started]
            return {image: caption for path in started for image, caption in contents[path][1].items()}
        if not overwrite and started:
            path, header = next((p, h) for p, h in started.items() if h != self._header)
            raise other_run(path, self._header, header)
        self._stale = list(contents)
        return {}

    def _drop_stale(self) -> None:
        """Remove side files; the first process's own, which is locked, is emptied."""
        assert self._side is not None
        dropped = sum(len(read_log(path, overwrite=True)[1]) for path in self._stale)
        if dropped:
            log.warning("%s: %d captions of an interrupted run with other settings are dropped", self.part, dropped)
        for path in self._stale:
            if path == self.part:
                self._side.clear()
            else:
                path.unlink()

    def _all_captions(self) -> dict[str, str]:
        return {image: caption for path in self._parts() for image, caption in read_log(path)[1].items()}

    def check_texts(self, images: Sequence[Entry]) -> None:
        """Refuse text files that could not be written at the end. Raises ValueError as ``TextFiles.check``."""
        if self.texts:
            self.texts.check(images, self.captions)

    def add(self, captions: dict[str, str]) -> None:
        """Keep the captions of a batch, ``{file name without suffix: caption}``, after :meth:`start`."""
        assert self._side is not None and self._started
        self._side.add(captions)
        self.captions |= captions

    def finish(self, images: Sequence[Entry]) -> dict[str, str]:
        """Return the captions of all processes in the order of ``images``; the first one writes the final JSON.

        No process returns before that is written: a launcher ends all of them when one ends with an exit code.

        Raises:
            ValueError: there is none.
        """
        self.processes.wait()
        return self.processes.from_first(lambda: self._publish(images))

    def _publish(self, images: Sequence[Entry]) -> dict[str, str]:
        found = self._all_captions()
        captions = {image.key: found[image.key] for image in images if image.key in found}
        if not captions:
            raise ValueError(f"{self.out}: none of the {len(images)} images could be captioned")
        if self.texts:
            self.texts.write(images, captions)
        publish_scores(self.out, captions)
        write_json(self.out, captions)
        for path in self._parts():
            path.unlink()
        log.info("%d captions in %s", len(captions), self.out)
        if len(captions) < len(images):
            log.error("%d of %d images were not captioned", len(images) - len(captions), len(images))
        return captions


def scores_file(out: Path) -> Path:
    """Return the file of scores that belongs to the JSON ``out``."""
    return out.with_name(f"{out.stem}.scores.json")


def publish_scores(out: Path, captions: Mapping[str, str]) -> None:
    """Write the scores of captions that have them; other captions' scores do not stay beside ``out``."""
    scores = {key: caption.as_json() for key, caption in captions.items() if isinstance(caption, Ranked)}
    if scores:
        write_json(scores_file(out), scores)
    else:
        scores_file(out).unlink(missing_ok=True)


def caption_images(predictions: PredictionLog, images: Sequence[Entry], job: Job, batch_size: int) -> None:
    """Caption this process's share of the ``images`` that ``predictions`` lacks; what fails is named in the log."""
    predictions.start()
    processes, timer = predictions.processes, Timer("caption")
    todo = processes.share([image for image in images if image.key not in predictions.captions])
    with tqdm(total=len(todo), desc="caption", disable=None if processes.first else True) as bar:

        def failed(entry: Entry, error: Exception) -> None:
            log.error("not captioned: %s", error)
            bar.update()

        for captions in caption_entries(todo, job, batch_size, failed):
            predictions.add(captions)
            bar.update(len(captions))
    timer.report(log, len(todo), "%d images")
