"""Caption images, whatever the model: read ahead, halve batches that do not fit, keep what is done.

A folder that ends in one JSON: captions go to an append-only side file as they come. A run that was interrupted finds
it and goes on; the final file appears at the end, whole, and the side file goes. ``accelerate launch`` splits the
images over processes. For more images than that, and for lists and tars, see ``caption_source``: shards in, parts out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import operator
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from captioning import cli as runtime
from captioning.data import feature_cache as data
from captioning.inference import append_log as sidefile
from captioning.inference.append_log import SideFile
from captioning.scale import results as parts
from captioning.scale.results import FORMS, Results, form_of
from captioning.scale.sources import Shard, Source

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
        contents = {path: sidefile.read(path, overwrite) for path in self._parts()}
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
        return {image: caption for path in self._parts() for image, caption in sidefile.read(path)[1].items()}

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
            runtime.write_json(self.out, captions)
            for path in self._parts():
                path.unlink()
            log.info("%d captions in %s", len(captions), self.out)
            if len(captions) < len(paths):
                log.error("%d of %d images were not captioned", len(paths) - len(captions), len(paths))
        # A launcher ends all processes when one ends with an exit code, so none ends before the result is written.
        self.workers.wait()
        return captions


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
                    raise ValueError(
                        "out of memory with one image: use a smaller model, fewer beams, a lower "
                        "precision or --device cpu"
                    ) from error
            self.limit = len(chunk) // 2
            log.warning("out of memory with %d images at once; going on with %d", len(chunk), self.limit)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results


@dataclass(frozen=True)
class Job:
    """What a model does to images.

    Attributes:
        prepare: makes of an image (PIL, RGB) what ``caption`` takes; runs in threads, ahead of it.
        caption: makes captions of a list of those.
        draft: that of ``data.load_image``.
        begin: begins the work on a batch while the one before is captioned, and returns what ``caption`` takes then;
            for a device that works beside the program.
    """

    prepare: Callable[[Any], Any]
    caption: Callable[[list], list[str]]
    draft: int | None = None
    begin: Callable[[list], list] | None = None


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
    caption, load = Halving(caption), functools.partial(data.load_image, draft=draft)
    hidden = True if workers.rank else None  # one bar, of the first process's share
    started = time.perf_counter()
    with tqdm(total=len(todo), desc="caption", disable=hidden) as bar:

        def failed(path: Path, error: Exception) -> None:
            log.error("not captioned: %s", error)
            bar.update()

        batches = read_ahead(todo, prepare, batch_size, load)
        for found, begun in _begun(batches, begin, failed):
            log_file.add(dict(zip([path.stem for path in found], caption(begun), strict=True)))
            bar.update(len(found))
    work = ("caption", len(todo), time.perf_counter() - started)  # what bench/measured.py collects
    log.info("%d images in %.1f s", *work[1:], extra={"work": work})


def read_ahead(
    items: Iterable[Any], prepare: Callable[[Any], Any], size: int, load: Callable[[Any], Any] = data.load_image
) -> Iterator[list[tuple[Any, Future]]]:
    """Yield batches of (item, future of the prepared image) while threads read the batches behind them.

    Args:
        items: paths, or whatever ``load`` takes; no more of them are taken than are read ahead.
        prepare: as in :class:`Job`.
        size: items of a batch.
        load: makes an image of an item.
    """

    def read(item: Any) -> Any:
        return prepare(load(item))

    left = iter(items)
    # One image is too small a work for several threads; several here would fight with the model's for the cores.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), initializer=lambda: torch.set_num_threads(1)) as pool:
        waiting: deque[list[tuple[Any, Future]]] = deque()
        while True:
            while len(waiting) <= READ_AHEAD and (some := list(itertools.islice(left, size))):
                waiting.append([(item, pool.submit(read, item)) for item in some])
            if not waiting:
                return
            yield waiting.popleft()


def _begun(
    batches: Iterable[list[tuple[Any, Future]]],
    begin: Callable[[list], list] | None,
    failed: Callable[[Any, Exception], None],
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield the readable items of each batch with what ``begin`` made of them, once it has had the next batch too.

    Without ``begin`` they come as they were prepared, and at once; batches without a readable item are left out.
    """
    readable = (found for batch in batches if (found := _readable(batch, failed))[0])
    if begin is None:
        yield from readable
        return
    begin = Halving(begin)
    ahead: deque[tuple[list[Any], list[Any]]] = deque()
    for found, prepared in readable:
        ahead.append((found, begin(prepared)))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def _readable(batch: list[tuple[Any, Future]], failed: Callable[[Any, Exception], None]) -> tuple[list[Any], list[Any]]:
    """Return the items of a batch that could be read, and what they became; ``failed`` is told of the others."""
    found, prepared = [], []
    for item, future in batch:
        try:
            prepared.append(future.result())
            found.append(item)
        except (ValueError, OSError) as error:
            failed(item, error)
    return found, prepared


# ------------------------------------------------------------------------------------------------------ by the million


def caption_shards(
    folder: parts.Folder, shards: Iterable[Shard], job: Job, batch_size: int, patience: float = 0.0
) -> None:
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
        started, count = time.perf_counter(), 0
        with shard_log:
            load = operator.methodcaller("load", job.draft)
            batches = read_ahead(shard_log.wanted(), job.prepare, batch_size, load)
            for found, begun in _begun(batches, job.begin, shard_log.unreadable):
                shard_log.add(dict(zip([entry.key for entry in found], caption(begun), strict=True)))
                count += len(found)
            shard_log.seal()
        work = ("caption", count, time.perf_counter() - started)
        log.debug("%s: %d images in %.1f s", shard.name, *work[1:], extra={"work": work})


def caption_source(
    args: argparse.Namespace, run: dict[str, Any], build: Callable[[], Job], overwrite: bool = False
) -> int:
    """Caption whatever ``args.img_dir`` names into ``args.out``, as the flags of :func:`add_flags` say.

    Args:
        args: the command line.
        run: whatever decides the captions.
        build: loads the model; is called in the processes that need it.
        overwrite: drop results of another run.

    Returns:
        The exit code: 0, or 3 (``PARTIAL``) where an image was left out.
    """
    workers, source = find_workers(), source_of(args)
    if not args.img_dir.is_dir():
        source.shards(Path())  # said before anything is made
    run = run | {"images": str(args.img_dir.resolve()), "shard_size": args.shard_size, "entries": args.entries}
    with Results(args.out, form_of(args.out, args.out_format), run, overwrite) as results:
        if workers.rank == 0:
            results.begin()
            source.spool(results.folder.state)
            if args.retry_unreadable:
                again = sum(map(results.folder.reopen, source.shards(results.folder.state)))
                log.info("%d finished shards had images that could not be read, and are gone through again", again)
        workers.wait()
        shards = source.shards(results.folder.state)
        if all(map(results.folder.done, shards)):
            log.info("%s: all %d shards are finished", results.folder.path, len(shards))
        elif args.engine == "ray":
            from captioning.scale import ray_engine as engine_ray  # which imports this module

            engine_ray.caption_shards(results.folder, shards, build, args)
        else:
            begin = len(shards) * workers.rank // workers.count  # so that not all processes ask for the same ones
            mine = _with_bar(shards[begin:] + shards[:begin], workers)
            caption_shards(results.folder, mine, build(), args.batch_size)
        workers.wait()
        totals = {}
        if workers.rank == 0:
            totals = results.finish(shards)
            source.forget(results.folder.state)
        workers.wait()  # a launcher ends all processes when one ends with an exit code
    left_out = sum(totals.get(name, 0) for name in ("unreadable", "duplicates", "damaged"))
    if left_out:
        log.error(
            "not all was captioned: %(unreadable)d images cannot be read, %(duplicates)d have another's key, "
            "%(damaged)d shards are damaged",
            totals,
        )
    return runtime.PARTIAL if left_out else 0


def _with_bar(shards: list[Shard], workers: Workers) -> Iterable[Shard]:
    return tqdm(shards, desc="caption", unit="shard", disable=True if workers.rank else None)


def source_of(args: argparse.Namespace) -> Source:
    """Return what the command line names as its images."""
    return Source(args.img_dir, args.shard_size, args.list_root, args.entries)


def is_small(args: argparse.Namespace) -> bool:
    """Return whether the command line asks for a folder in one JSON, by the launcher's processes: no shards then."""
    kind = source_of(args).kind
    return kind == "folder" and form_of(args.out, args.out_format) == "json" and args.engine == "plain"


def add_images_and_results(parser: argparse.ArgumentParser) -> None:
    """Add the two positional arguments that every captioning script begins with."""
    parser.add_argument(
        "img_dir",
        type=Path,
        metavar="IMG_DIR",
        help="folder of jpg, jpeg, png or webp images; or a list of paths "
        "(.txt, .jsonl), or tar shards ('DIR/{000..999}.tar', 'DIR/*.tar')",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT.json",
        help="predictions, {file name without suffix: caption}; or OUT.jsonl, OUT.parquet: a folder of parts",
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of runs over shards."""
    group = parser.add_argument_group("millions of images")
    add = group.add_argument
    add(
        "--out-format",
        choices=("auto", *FORMS),
        default="auto",
        help="jsonl and parquet: OUT is a folder with a part for each shard; auto: by the ending of OUT",
    )
    add("--shard-size", type=int, default=Source.shard_size, help="images of a list or folder that make a shard")
    add("--list-root", type=Path, help="what a list's paths are relative to (default: the list's folder)")
    add("--entries", metavar="GLOB", help="which files of a tar are images (default: by their ending)")
    add(
        "--retry-unreadable",
        action="store_true",
        help="go again through finished shards in which images could not be read; their captions stay",
    )
    add(
        "--engine",
        choices=("plain", "ray"),
        default="plain",
        help="plain: this process, or accelerate's; ray: actors of a Ray cluster",
    )
    add("--ray-actors", type=int, help="models at once (default: one for each GPU of the cluster, or else CPU)")
