"""From flags to captions: whatever IMG_DIR names, into whatever form OUT asks for."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captioning.cli import PARTIAL, positive_int
from captioning.data.listing import is_image, on_disk
from captioning.data.part_files import FORMS, form_of
from captioning.distributed import ALONE, Processes
from captioning.inference.batches import Job
from captioning.scale.ray_engine import caption_with_ray
from captioning.scale.results import Results
from captioning.scale.sources import Shard, Source
from captioning.scale.worker import Folder, caption_shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRun:
    """A run over shards: which images, where their captions go, and who makes them."""

    source: Source
    out: Path  # the one JSON, or the folder of parts
    form: str  # json, jsonl or parquet
    settings: dict[str, Any]  # whatever decides the captions; results made by other settings are not resumed
    batch_size: int  # images at once
    overwrite: bool = False  # drop results of another run
    keep: bool = False  # refuse to replace an existing OUT.json
    retry_unreadable: bool = False  # go again through finished shards in which images could not be read
    engine: str = "plain"  # this process and those launched with it; or ray: the actors of a cluster
    ray_actors: int | None = None  # None: one for each GPU, or else each CPU
    device: str | None = "auto"  # --device of the actors

    @classmethod
    def from_flags(cls, args: argparse.Namespace, settings: dict[str, Any]) -> ShardRun:
        """Return the run that a command line names: flags of :func:`add_flags`, and the script's own settings."""
        names = ("out", "batch_size", "overwrite", "keep", "retry_unreadable", "engine", "ray_actors", "device")
        where = describe_images(args) | {"shard_size": args.shard_size, "entries": args.entries}
        return cls(
            source_of(args),
            form=form_of(args.out, args.out_format),
            settings=settings | where,
            **{name: getattr(args, name) for name in names},
        )


def caption_source(run: ShardRun, build: Callable[[], Job], processes: Processes = ALONE) -> int:
    """Caption all images of a run; return the exit code: 0, or 3 (``PARTIAL``) where an image was left out.

    ``build`` loads the model, in each process that captions. Of several processes each claims a shard at a time.
    """
    if run.engine == "ray" and processes.count > 1:
        raise ValueError("--engine ray: starts processes itself; run it without accelerate launch")
    run.source.check()  # fails, where it does, before anything is made
    with Results(run.out, run.form, run.settings, run.overwrite, run.keep) as results:
        processes.from_first(lambda: _begin(run, results))
        shards = run.source.shards(results.folder.state)
        if all(map(results.folder.done, shards)):
            log.info("%s: all %d shards are finished", results.folder.path, len(shards))
        else:
            _caption(run, results.folder, shards, build, processes)
        processes.wait()
        # All wait for it: a launcher ends all processes when one ends with an exit code.
        return processes.from_first(lambda: _finish(run, results, shards))


def _begin(run: ShardRun, results: Results) -> None:
    results.begin()
    run.source.spool(results.folder.state)
    if run.retry_unreadable:
        count = sum(map(results.folder.reopen, run.source.shards(results.folder.state)))
        log.info("%d finished shards had images that could not be read, and are gone through again", count)


def _caption(
    run: ShardRun, folder: Folder, shards: Sequence[Shard], build: Callable[[], Job], processes: Processes
) -> None:
    if run.engine == "ray":
        use_gpus = (run.device or "auto").startswith(("auto", "cuda"))
        return caption_with_ray(folder, shards, build, run.batch_size, run.ray_actors, use_gpus)
    first = len(shards) * processes.rank // processes.count  # so that not all processes try to claim the same ones
    order = [*shards[first:], *shards[:first]]
    bar = tqdm(order, desc="caption", unit="shard", disable=None if processes.first else True)
    return caption_shards(folder, bar, build(), run.batch_size)


def _finish(run: ShardRun, results: Results, shards: Sequence[Shard]) -> int:
    totals = results.finish(shards)
    run.source.forget(results.folder.state)
    if totals["others"]:
        log.info("%d other files than images were passed over in archives; --entries chooses others", totals["others"])
    if not any(totals[name] for name in ("unreadable", "duplicates", "damaged")):
        return 0
    log.error(
        "not all was captioned: %(unreadable)d images cannot be read, %(duplicates)d have another's key, "
        "%(damaged)d shards are damaged",
        totals,
    )
    return PARTIAL


def source_of(args: argparse.Namespace) -> Source:
    """Return what the command line names as its images."""
    return Source(tuple(map(on_disk, args.img_dir)), args.shard_size, args.list_root, args.entries, args.recursive)


def describe_images(args: argparse.Namespace) -> dict[str, Any]:
    """Return what tells these images from others, for the description of a run."""
    return {"images": source_of(args).identity} | ({"recursive": True} if args.recursive else {})


def is_plain_folder(args: argparse.Namespace) -> bool:
    """Whether a folder or pictures go into one JSON without Ray, for which no shards are needed."""
    plain = source_of(args).kind in ("folder", "pictures")
    return plain and form_of(args.out, args.out_format) == "json" and args.engine == "plain"


def results_path(text: str) -> Path:
    """Be the ``type`` of OUT.json: where it was forgotten, the last picture of a glob stands in its place."""
    if is_image(text):
        raise argparse.ArgumentTypeError("is a picture; after the images comes OUT.json, which would replace it")
    return Path(text)


def add_images_and_results(parser: argparse.ArgumentParser) -> None:
    """Add the two positional arguments that every captioning script begins with."""
    parser.add_argument(
        "img_dir",
        type=Path,
        nargs="+",
        metavar="IMG_DIR",
        help="folder of images, of any format that Pillow reads; or pictures, a list of paths (.txt, .jsonl), or tars "
        "and zips ('DIR/{000..999}.tar', 'DIR/*.tar')",
    )
    parser.add_argument(
        "out",
        type=results_path,
        metavar="OUT.json",
        help="predictions, {file name without suffix: caption}; or OUT.jsonl, OUT.parquet: a folder of parts",
    )
    parser.add_argument(
        "--recursive", action="store_true", help="take a folder's subfolders too; keys are like sub/folder/name"
    )
    parser.add_argument("--keep", action="store_true", help="stop where OUT.json exists (default: it is replaced)")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of runs over shards."""
    group = parser.add_argument_group("millions of images")
    add = group.add_argument
    add(
        "--out-format",
        choices=("auto", *FORMS),
        default="auto",
        help="jsonl and parquet: OUT is a folder with a part for each shard; auto: by the suffix of OUT",
    )
    add("--shard-size", type=int, default=Source.shard_size, help="images of a list or folder that make a shard")
    add("--list-root", type=Path, help="what a list's paths are relative to (default: the list's folder)")
    add("--entries", metavar="GLOB", help="which files of a tar or zip are images (default: by suffix)")
    add("--overwrite", action="store_true", help="drop what another run left, and its parts; with --txt: replace files")
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
    add(
        "--ray-actors", type=positive_int, help="models at once (default: one for each GPU of the cluster, or else CPU)"
    )
