"""From flags to captions: whatever IMG_DIR names, into whatever form OUT asks for."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captioning.cli import PARTIAL
from captioning.inference.batches import Job
from captioning.scale.part_files import FORMS, form_of
from captioning.scale.results import Results
from captioning.scale.sources import Shard, Source
from captioning.scale.worker import caption_shards
from captioning.workers import Workers, find_workers

log = logging.getLogger(__name__)


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
    return PARTIAL if left_out else 0


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
