"""Generate the micro world: drawings with five captions each and the boxes of what they show.

``python -m microworld.scenes --out DIR --split val --count N --seed S`` writes ``DIR/images/<split>/*.jpg`` and
``DIR/<split>.json`` in COCO's layout, with three additions: ``scenes`` (place and relation an image), ``objects``
(kind, colour, size and box of every thing) and ``mentions`` in every annotation (which word names which object).

Every image is drawn from a generator seeded by (split, seed, index) alone: the result does not depend on the number of
processes, and splits never share a scene. Colour-thing pairs in `held_out` occur in the split ``val_novel`` only.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from captioning.cli import FlagParser, command
from captioning.files import atomic_path, write_json
from microworld.captions import INVERSE, Caption
from microworld.composer import make_scene
from microworld.drawing import render
from microworld.scene import SIZE, Scene
from microworld.things import KINDS

J = TypeVar("J")
R = TypeVar("R")
SPLITS = ("pretrain", "train", "val", "val_novel")


def make_image(split: str, seed: int, index: int) -> tuple[Image.Image, Scene, list[Caption]]:
    """Return picture, scene and captions number ``index`` of a split."""
    scene, captions = make_scene(split, seed, index)
    return render(scene, random.Random(f"microworld drawing {split} {seed} {index}")), scene, captions


def _write_one(job: tuple[str, int, int, Path]) -> dict[str, Any]:
    split, seed, index, folder = job
    image, scene, captions = make_image(split, seed, index)
    name = f"{index:012d}.jpg"
    with atomic_path(folder / name) as temporary:
        image.save(temporary, format="JPEG", quality=92)
    return describe(index, name, scene, captions)


def describe(index: int, name: str, scene: Scene, captions: list[Caption]) -> dict[str, Any]:
    """Return the rows that one scene adds to each list of the COCO-style file."""
    categories = list(KINDS)
    things = sorted(scene.things(), key=lambda t: t.id)
    return {
        "images": [{"id": index, "file_name": name, "width": SIZE, "height": SIZE}],
        "annotations": [
            {
                "id": index * 5 + n,
                "image_id": index,
                "caption": caption.text,
                "mentions": [
                    {"word": m.word, "objects": [index * 100 + t for t in m.things], "role": m.role}
                    for m in caption.mentions
                ],
            }
            for n, caption in enumerate(captions)
        ],
        "objects": [
            {
                "id": index * 100 + t.id,
                "image_id": index,
                "category_id": categories.index(t.kind),
                "bbox": list(t.box),
                "colour": t.colour,
                "size": t.size,
            }
            for t in things
        ],
        "scenes": [{"image_id": index, "place": scene.place, **_relation_row(index, scene)}],
    }


def _relation_row(index: int, scene: Scene) -> dict[str, Any]:
    ids = {"main": scene.main.ids, "other": scene.other.ids if scene.other else ()}
    row: dict[str, Any] = {key: [index * 100 + i for i in value] for key, value in ids.items()}
    row["relation"], row["inverse"] = scene.relation, INVERSE.get(scene.relation, "")
    return row


def generate(out: Path, split: str, count: int, seed: int, workers: int = 2) -> Path:
    """Write ``count`` scenes of ``split`` below ``out`` and return the annotation file."""
    folder = out / "images" / split
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(split, seed, index, folder) for index in range(count)]
    merged: dict[str, list] = {"images": [], "annotations": [], "objects": [], "scenes": []}
    for rows in spread(_write_one, jobs, workers, f"draw {split}"):
        for key, value in rows.items():
            merged[key] += value
    info = {"description": "micro world, generated drawings", "split": split, "seed": seed, "count": count}
    categories = [{"id": n, "name": name} for n, name in enumerate(KINDS)]
    path = out / f"{split}.json"
    write_json(path, {"info": info, "categories": categories, **merged}, indent=None)
    return path


def spread(function: Callable[[J], R], jobs: Sequence[J], workers: int, title: str | None = None) -> Iterator[R]:
    """Yield ``function`` of every job in order, computed by ``workers`` processes, under a progress bar."""
    bar = partial(tqdm, total=len(jobs), desc=title, disable=not (title and sys.stderr.isatty()))
    if workers <= 1:
        yield from bar(map(function, jobs))
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from bar(pool.map(function, jobs, chunksize=16))


@command
def main(argv: list[str] | None = None) -> int:
    """Command line of the scene generator."""
    parser = FlagParser(prog="python -m microworld.scenes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for images/<split>/ and <split>.json")
    parser.add_argument("--split", choices=SPLITS, required=True, help="which split; val_novel has held-out pairs")
    parser.add_argument("--count", type=int, default=300, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes")
    parser.add_argument("--workers", type=int, default=2, help="processes; the result does not depend on it")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise ValueError(f"--count {args.count}: give a number of scenes of at least 1")
    print(generate(args.out, args.split, args.count, args.seed, args.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
