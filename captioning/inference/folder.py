"""A folder of images into one JSON of captions, resumable after any batch.

OUT.json                the captions, once all are there: {file name without suffix: caption}
OUT.scores.json         with --scores or --n-best: {key: [{"caption": …, "score": …}, …]}
OUT.json.part.jsonl     until then, those of the first process so far (see append_log.py)
OUT.json.part1.jsonl    those of the second process, and so on
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captioning.data.ranked import Ranked
from captioning.distributed import ALONE, Processes
from captioning.files import write_json
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
        out.parent.mkdir(parents=True, exist_ok=True)
        self.captions = processes.from_first(lambda: self._begin(overwrite))
        if not processes.first:
            self._side = AppendLog(self.part)
            self._side.begin(self._header)

    def __enter__(self) -> PredictionLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.captions:  # nothing to keep: a run that fails at its start leaves no trace
            self.part.unlink(missing_ok=True)
        self._side.close()

    def _begin(self, overwrite: bool) -> dict[str, str]:
        """Open the first process's side file; return the captions of an interrupted run. Nothing is written yet."""
        self._side = AppendLog(self.part)
        try:
            self._check_parts(overwrite)
        except ValueError:
            self._side.close()
            raise
        self._side.begin(self._header)
        captions = self._all_captions()
        if captions:
            log.info("%s: resuming after %d captions", self.part, len(captions))
        return captions

    def _parts(self) -> list[Path]:
        """Return the side files of all processes, of this run and of the one before."""
        pattern = re.compile(re.escape(self.out.name) + r"\.part\d*\.jsonl")
        return sorted(path for path in self.out.parent.iterdir() if pattern.fullmatch(path.name))

    def _check_parts(self, overwrite: bool) -> None:
        """Make sure that all side files are this run's, or drop them where that is allowed."""
        contents = {path: read_log(path, overwrite) for path in self._parts()}
        started = {path: header for path, (header, captions) in contents.items() if captions}
        if started and all(header == self._header for header in started.values()):
            self._drop(contents.keys() - started.keys())
            return
        if not overwrite and started:
            path, header = next((p, h) for p, h in started.items() if h != self._header)
            raise other_run(path, self._header, header)
        if self.keep and self.out.exists():
            self.part.unlink()
            raise ValueError(f"{self.out}: exists already; leave out --keep to replace it, or name another")
        if started:
            dropped = sum(len(captions) for _, captions in contents.values())
            log.warning("%s: %d captions of an interrupted run with other settings are dropped", self.part, dropped)
        self._drop(contents)

    def _drop(self, parts: Iterable[Path]) -> None:
        """Remove side files; this process's own is emptied."""
        for path in parts:
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
        """Keep the captions of a batch, ``{file name without suffix: caption}``."""
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
