"""Make hw3_data/ for hw3_download.sh: from the course's zip, or drawn from COCO 2017 in the same layout.

The stand-in takes its training images from COCO's train2017 and its validation images from val2017, each by a fixed
seed, and keeps five captions an image. Nothing here touches the network: `draw` chooses, `images` looks through what
has arrived, both write what is still to fetch for curl; `unpack` opens the course's zip, `check` reads everything.
"""

from __future__ import annotations

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

from captioning.cli import FlagParser, command, setup_logging
from captioning.data.annotations import load_split
from captioning.data.images import list_images, load_image
from captioning.files import write_json, write_text

CAPTIONS = 5  # an image; COCO has a few with six or seven
EXPLAINED = 5  # images of p3_data, whose captions are explained by attention maps
SPLITS = ("train", "val")
DRAWN = ".download/coco_draw.json"  # what `draw` chose, for `images`
SOURCE = "SOURCE.txt"  # where the data came from, written last
Record = dict[str, Any]


# ------------------------------------------------------------------------------------------------ the COCO stand-in


def draw(annotations: Path, out: Path, train: int, val: int, seed: int) -> None:
    """Choose images and captions from COCO's annotations and keep the choice in ``out`` for :func:`fetch_list`.

    Args:
        annotations: COCO's ``annotations_trainval2017.zip``.
        out: ``hw3_data``.
        train, val: how many images of train2017 and val2017; five more of val2017 are for ``p3_data``.
        seed: of the choice. An image's rank depends on the seed and its own id only, so a smaller draw is a part of
            a larger one, on every machine and Python.

    Raises:
        FileNotFoundError, ValueError: no zip of COCO's captions, or one that holds too few images.
    """
    chosen = {"train": _choose(_read_captions(annotations, "train2017"), train, seed, annotations)}
    rest = _choose(_read_captions(annotations, "val2017"), val + EXPLAINED, seed, annotations)
    chosen["val"], chosen["explained"] = rest[:val], rest[val:]
    write_json(out / DRAWN, {"seed": seed, **chosen}, indent=None)


def _read_captions(annotations: Path, split: str) -> list[Record]:
    """Return the images of COCO's ``split`` with five captions each, in the order of the captions' ids."""
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
    wanted = ("id", "file_name", "width", "height", "split", "captions")
    return [
        {**{key: image[key] for key in wanted}, "captions": image["captions"][:CAPTIONS]}
        for image in images.values()
        if len(image["captions"]) >= CAPTIONS and all(image["captions"][:CAPTIONS])
    ]


def _choose(images: list[Record], count: int, seed: int, annotations: Path) -> list[Record]:
    if len(images) < count:
        raise ValueError(f"{annotations}: only {len(images)} images with {CAPTIONS} captions, {count} are wanted")
    return sorted(images, key=lambda image: hashlib.sha256(f"{seed}:{image['id']}".encode()).digest())[:count]


def fetch_list(out: Path, base_url: str) -> list[tuple[str, Path]]:
    """Take over the images that have arrived whole and return URL and part file of those that have not.

    A part file is taken when it can be decoded to the size that COCO states, and removed when not. Once all images
    are there, the annotation files are written, and with them the data is complete.

    Raises:
        FileNotFoundError: nothing was drawn yet.
    """
    if not (out / DRAWN).is_file():
        raise FileNotFoundError(f"{out / DRAWN}: no such file; run `python -m captioning.data.hw3_dataset draw` first")
    drawn = json.loads((out / DRAWN).read_text(encoding="utf-8"))
    folders = {split: out / "p2_data" / "images" / split for split in SPLITS}
    folders["explained"] = out / "p3_data" / "images"
    missing: list[tuple[str, Path]] = []
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            arrived = pool.map(lambda image, folder=folder: _accept(folder / image["file_name"], image), drawn[name])
            pairs = list(zip(drawn[name], arrived, strict=True))
        missing += [
            (f"{base_url.rstrip('/')}/{image['split']}/{image['file_name']}", _part(folder / image["file_name"]))
            for image, whole in pairs
            if not whole
        ]
    if not missing:
        for split in SPLITS:
            write_json(out / "p2_data" / f"{split}.json", _annotations(drawn[split]), indent=None)
        write_text(out / SOURCE, f"stand-in from COCO 2017, seed {drawn['seed']}\n")
    return missing


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _accept(path: Path, image: Record) -> bool:
    """Return whether the image is there, after renaming its part file if that is whole, or removing it if not."""
    if path.is_file():
        return True
    part = _part(path)
    if not part.is_file():
        return False
    try:  # sorted: an image that its EXIF turns upright swaps its sides
        whole = sorted(load_image(part).size) == sorted((image["width"], image["height"]))
    except ValueError:
        whole = False
    if whole:
        part.replace(path)
    else:
        part.unlink()
    return whole


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


# -------------------------------------------------------------------------------------------------- the course's zip


def unpack(archive: Path, out: Path, source: str) -> None:
    """Unpack the course's ``hw3_data.zip`` into ``out``; whatever folder encloses ``p2_data`` in it is left out.

    Everything is unpacked beside ``out``'s content first (every member's CRC is checked on the way), then moved in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no zip or a damaged one, members that would leave the folder, links, no ``p2_data`` with
            annotations inside, or a disk too small.
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
            raise ValueError(f"--zip {archive}: not a whole zip file ({error}); fetch it again") from error
        _move_in(_find_data(Path(folder), archive), out)
    write_text(out / SOURCE, source + "\n")


def _safe_members(opened: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    """Return the members without macOS's shadows; refuse the archive if one points out of it or is a link."""
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
    """Move the files below ``folder`` to the same places in ``out``; annotations last, since they say "complete"."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.suffix == ".json"):
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


# ----------------------------------------------------------------------------------------------------------- check


def check(out: Path) -> str:
    """Read all annotations and decode all images in ``out`` and return one line on what is there.

    Raises:
        FileNotFoundError, ValueError: something is missing, damaged, or in both splits.
    """
    splits = {split: load_split(out / "p2_data", split) for split in SPLITS}
    shared = {s.path.name for s in splits["train"]} & {s.path.name for s in splits["val"]}
    if shared:
        raise ValueError(f"{out}: {len(shared)} images are in train and in val, such as {min(shared)}")
    explained = list_images(out / "p3_data" / "images")
    paths = [*(sample.path for samples in splits.values() for sample in samples), *explained]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(_decode, paths):
            pass
    parts = [f"{split} {len(s)} images, {sum(len(x.captions) for x in s)} captions" for split, s in splits.items()]
    return f"{out}: {'; '.join(parts)}; p3 {len(explained)} images; every image can be read"


def _decode(path: Path) -> None:
    load_image(path)


def build_parser() -> Any:
    """Return the command line."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("action", choices=("draw", "images", "unpack", "check"), help="see above")
    parser.add_argument("--out", type=Path, default=Path("hw3_data"), help="where the data goes")
    parser.add_argument("--annotations", type=Path, help="draw: COCO's annotations_trainval2017.zip")
    parser.add_argument("--train", type=int, default=10_000, help="draw: training images")
    parser.add_argument("--val", type=int, default=2_000, help="draw: validation images")
    parser.add_argument("--seed", type=int, default=0, help="draw: of the choice")
    parser.add_argument("--base-url", help="draw, images: where COCO's train2017/ and val2017/ are")
    parser.add_argument("--config", type=Path, help="draw, images: write what is left to fetch here, for curl")
    parser.add_argument("--zip", type=Path, help="unpack: the course's hw3_data.zip")
    parser.add_argument("--source", default="course zip", help="unpack: what SOURCE.txt is to say")
    parser.add_argument("--verbose", action="store_true", help="more log lines")
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
    if min(args.train, args.val) < 1:
        raise ValueError(f"--train {args.train}, --val {args.val}: must be at least 1")
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
