"""Make hw3_data/ for hw3_download.sh: from the course's zip, or as a stand-in drawn from COCO 2017 in the same layout.

The stand-in takes its training images from COCO's train2017 and its validation images from val2017, by a fixed seed,
and keeps five captions an image. Nothing here uses the network; curl does, by what `draw` and `images` write for it:

    draw     choose images and captions from COCO's annotations, and list the images for curl
    images   take over the images that have arrived, and list those that are still missing
    unpack   unpack the course's hw3_data.zip
    check    read all annotations and decode all images
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from captioning.cli import FlagParser, add_common_flags, command, positive_int, setup_logging
from captioning.data.annotations import load_split
from captioning.data.coco import Record
from captioning.data.images import load_image
from captioning.data.listing import list_images
from captioning.files import read_json, write_json, write_text

CAPTIONS = 5  # an image; COCO has a few images with six or seven
EXPLAINED = 5  # images of p3_data, whose captions are explained by attention maps
SPLITS = ("train", "val")
DRAWN = ".download/coco_draw.json"  # what `draw` chose, for `images`
SOURCE = "SOURCE.txt"  # where the data came from, written last

# --- the stand-in from COCO -----------------------------------------------------------------------------------------


def draw(annotations: Path, out: Path, train: int, val: int, seed: int) -> None:
    """Choose images and captions from COCO's annotations and write the choice into ``out`` for :func:`fetch_list`.

    Args:
        annotations: COCO's ``annotations_trainval2017.zip``.
        out: ``hw3_data``.
        train, val: how many images of train2017 and val2017; five more of val2017 are for ``p3_data``.
        seed: of the choice. An image's rank depends only on the seed and its own id, so a smaller draw is a part of
            a larger one, on every machine and Python version.

    Raises:
        FileNotFoundError, ValueError: there is no zip of COCO's captions, or it holds too few images.
    """
    chosen = {"train": _choose(_read_captions(annotations, "train2017"), train, seed, annotations)}
    rest = _choose(_read_captions(annotations, "val2017"), val + EXPLAINED, seed, annotations)
    chosen["val"], chosen["explained"] = rest[:val], rest[val:]
    write_json(out / DRAWN, {"seed": seed, **chosen}, indent=None)


def _read_captions(annotations: Path, split: str) -> list[Record]:
    """Return the images of COCO's ``split`` that have five captions, with these in the order of their ids."""
    member = f"annotations/captions_{split}.json"
    if not annotations.is_file():
        raise FileNotFoundError(f"{annotations}: no such file; run bash hw3_download.sh data")
    try:
        with zipfile.ZipFile(annotations) as archive:
            content = json.loads(archive.read(member))
        images = {image["id"]: {**image, "split": split, "captions": []} for image in content["images"]}
        for caption in sorted(content["annotations"], key=lambda caption: caption["id"]):
            images[caption["image_id"]]["captions"].append(" ".join(caption["caption"].split()))
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{annotations}: {member} is missing or damaged ({error}); remove it and run again") from error
    wanted = ("id", "file_name", "width", "height", "split")
    return [
        {**{key: image[key] for key in wanted}, "captions": captions}
        for image in images.values()
        if len(captions := image["captions"][:CAPTIONS]) == CAPTIONS and all(captions)
    ]


def _choose(images: list[Record], count: int, seed: int, annotations: Path) -> list[Record]:
    if len(images) < count:
        raise ValueError(f"{annotations}: only {len(images)} images with {CAPTIONS} captions; {count} are needed")
    return sorted(images, key=lambda image: hashlib.sha256(f"{seed}:{image['id']}".encode()).digest())[:count]


def fetch_list(out: Path, base_url: str) -> list[tuple[str, Path]]:
    """Take over the images that have arrived and return URL and part file of those that are missing.

    A part file is taken over if it can be decoded to the size that COCO states, and removed if not. Once all images
    are there, the annotation files are written; with them the data is complete.

    Raises:
        FileNotFoundError: nothing was drawn yet.
    """
    if not (out / DRAWN).is_file():
        raise FileNotFoundError(f"{out / DRAWN}: no such file; run `python -m captioning.data.hw3_dataset draw` first")
    drawn = read_json(out / DRAWN)
    folders = {split: out / "p2_data" / "images" / split for split in SPLITS}
    folders["explained"] = out / "p3_data" / "images"
    missing: list[tuple[str, Path]] = []
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            arrived = pool.map(functools.partial(_take_over, folder), drawn[name])
        missing += [
            (f"{base_url.rstrip('/')}/{image['split']}/{image['file_name']}", _part(folder, image))
            for image, is_there in zip(drawn[name], arrived, strict=True)
            if not is_there
        ]
    if not missing:
        for split in SPLITS:
            write_json(out / "p2_data" / f"{split}.json", _annotations(drawn[split]), indent=None)
        write_text(out / SOURCE, f"stand-in from COCO 2017, seed {drawn['seed']}\n")
    return missing


def _part(folder: Path, image: Record) -> Path:
    return folder / f"{image['file_name']}.part"


def _take_over(folder: Path, image: Record) -> bool:
    """Return whether the image is there, after its part file was renamed if it is complete, or removed if not."""
    path, part = folder / image["file_name"], _part(folder, image)
    if path.is_file() or not part.is_file():
        return path.is_file()
    try:  # sorted: an image that its EXIF tag turns upright swaps its sides
        is_complete = sorted(load_image(part).size) == sorted((image["width"], image["height"]))
    except ValueError:
        is_complete = False
    if is_complete:
        part.replace(path)
    else:
        part.unlink()
    return is_complete


def _annotations(images: Sequence[Record]) -> Record:
    """Return COCO-style annotations of ``images``, by ascending image id, captions numbered from 1."""
    images = sorted(images, key=lambda image: image["id"])
    pairs = [(image["id"], caption) for image in images for caption in image["captions"]]
    return {
        "images": [{"id": image["id"], "file_name": image["file_name"]} for image in images],
        "annotations": [
            {"id": number, "image_id": image_id, "caption": caption}
            for number, (image_id, caption) in enumerate(pairs, start=1)
        ],
    }


def curl_config(files: Iterable[tuple[str, Path]]) -> str:
    """Return a curl configuration that fetches each URL into its file."""
    lines = []
    for url, path in files:
        quoted = str(path).replace("\\", "\\\\").replace('"', '\\"')
        lines += [f'url = "{url}"', f'output = "{quoted}"']
    return "\n".join([*lines, ""])


# --- the course's zip -----------------------------------------------------------------------------------------------


def unpack(archive: Path, out: Path, source: str) -> None:
    """Unpack the course's ``hw3_data.zip`` into ``out``, without the folders that enclose ``p2_data`` in it.

    Everything is first unpacked into a temporary folder in ``out``, which checks every member's CRC, then moved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a zip file or damaged, has links or members that would leave the folder, or no
            ``p2_data`` with annotations; or the disk is too small.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"--zip {archive}: no such file")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking.", dir=out) as folder:
        try:
            with zipfile.ZipFile(archive) as opened:
                members = _safe_members(opened, archive)
                _check_room(archive, members, out)
                opened.extractall(folder, members)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"--zip {archive}: not a complete zip file ({error}); fetch it again") from error
        _move_in(_find_data(Path(folder), archive), out)
    write_text(out / SOURCE, source + "\n")


def _safe_members(opened: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    """Return the members without what macOS adds; refuse the archive if one leaves the folder or is a link."""
    members = []
    for member in opened.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            raise ValueError(f"--zip {archive}: refused, its member {member.filename} leaves the folder")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"--zip {archive}: refused, its member {member.filename} is a link")
        if "__MACOSX" not in path.parts and path.name != ".DS_Store":
            members.append(member)
    return members


def _check_room(archive: Path, members: Iterable[zipfile.ZipInfo], out: Path) -> None:
    needed, free = sum(member.file_size for member in members), shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"--zip {archive}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {out}")


def _find_data(folder: Path, archive: Path) -> Path:
    found = sorted(path for path in folder.rglob("p2_data") if path.is_dir())
    if not found or not all((found[0] / f"{split}.json").is_file() for split in SPLITS):
        raise ValueError(f"--zip {archive}: holds no p2_data/train.json and val.json; is it the right file?")
    return found[0].parent


def _move_in(folder: Path, out: Path) -> None:
    """Move the files below ``folder`` to the same places in ``out``; annotations last: they mark it as complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.suffix == ".json"):
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


# --- check, and the command line ------------------------------------------------------------------------------------


def check(out: Path) -> str:
    """Read all annotations and decode all images in ``out``; return one line on what is there.

    Raises:
        FileNotFoundError, ValueError: something is missing or damaged, or an image is in both splits.
    """
    splits = {split: load_split(out / "p2_data", split) for split in SPLITS}
    shared = set.intersection(*({sample.path.name for sample in samples} for samples in splits.values()))
    if shared:
        raise ValueError(f"{out}: {len(shared)} images are in train and in val, such as {min(shared)}")
    explained = list_images(out / "p3_data" / "images")
    paths = [*(sample.path for samples in splits.values() for sample in samples), *explained]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(_decode, paths):
            pass
    counts = [f"{split} {len(s)} images, {sum(len(x.captions) for x in s)} captions" for split, s in splits.items()]
    return f"{out}: {'; '.join(counts)}; p3 {len(explained)} images; every image can be read"


def _decode(path: Path) -> None:
    load_image(path)  # and drop the pixels: the pool keeps its results


def build_parser() -> Any:
    """Return the command line."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("action", choices=("draw", "images", "unpack", "check"), help="see above")
    parser.add_argument("--out", type=Path, default=Path("hw3_data"), help="where the data goes")
    parser.add_argument("--annotations", type=Path, help="draw: COCO's annotations_trainval2017.zip")
    parser.add_argument("--train", type=positive_int, default=10_000, help="draw: training images")
    parser.add_argument("--val", type=positive_int, default=2_000, help="draw: validation images")
    parser.add_argument("--seed", type=int, default=0, help="draw: of the choice")
    parser.add_argument("--base-url", help="draw, images: where COCO's train2017/ and val2017/ are")
    parser.add_argument("--config", type=Path, help="draw, images: write what is left to fetch here, for curl")
    parser.add_argument("--zip", type=Path, help="unpack: the course's hw3_data.zip")
    parser.add_argument("--source", default="course zip", help="unpack: the text of SOURCE.txt")
    add_common_flags(parser, profile=False, device=False)
    return parser


NEEDED = {
    "draw": ("annotations", "base_url", "config"),
    "images": ("base_url", "config"),
    "unpack": ("zip",),
    "check": (),
}


@command
def main(argv: list[str] | None = None) -> int:
    """Run one action; `draw` and `images` print how many images are left to fetch."""
    args = build_parser().parse_args(argv)
    setup_logging(args.verbose)
    for name in NEEDED[args.action]:
        if getattr(args, name) is None:
            raise ValueError(f"{args.action} needs --{name.replace('_', '-')}")
    if args.action == "draw":
        draw(args.annotations, args.out, args.train, args.val, args.seed)
    if args.action in ("draw", "images"):
        missing = fetch_list(args.out, args.base_url)
        write_text(args.config, curl_config(missing))
        print(len(missing))
    elif args.action == "unpack":
        unpack(args.zip, args.out, args.source)
    else:
        print(check(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
