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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

from captioning.cli import FlagParser, command
from captioning.files import atomic_path, write_json
from microworld.captions import INVERSE, Caption, write_captions
from microworld.things import COLOURS, KINDS, PLACES, RGB, Kind, Pen, mix

SIZE = 224  # pixels a side
SUPERSAMPLE = 3
SPLITS = ("pretrain", "train", "val", "val_novel")
SCALES = {"small": 0.76, "medium": 1.0, "big": 1.28}
MIN_HEIGHT = 32.0  # pixels: below, a thing is hard to tell even for people
HOLDERS = ("table", "chair")  # things stand on them
HEAVENLY = ("sun", "moon")  # there is one of each, always of one size
SHELTERS = ("table", "tree", "umbrella")  # things stand under them
Box = tuple[float, float, float, float]  # x, y, width, height in pixels, as COCO has it


@dataclass(frozen=True)
class Thing:
    """One drawn thing; ``box`` is (x, y, width, height) in pixels."""

    id: int
    kind: str
    colour: str | None
    size: str
    box: Box
    flip: bool


@dataclass
class Group:
    """Things that a caption names with one noun: one thing, or several of a kind and colour."""

    kind: Kind
    colour: str | None
    size: str
    things: list[Thing] = field(default_factory=list)

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of the group's things."""
        return tuple(t.id for t in self.things)

    @property
    def in_sky(self) -> bool:
        """Whether the group is up in the air."""
        return self.kind.anchor == "sky"

    def extent(self) -> tuple[float, float]:
        """Return (width, height) in pixels of one of its things."""
        height = max(MIN_HEIGHT, self.kind.height * SCALES[self.size])
        return height * self.kind.aspect, height


@dataclass
class Scene:
    """A place with a main group, perhaps another one that stands in ``relation`` to it, and extras behind."""

    place: str
    horizon: float  # share of the height
    main: Group
    other: Group | None = None
    relation: str = ""  # of main to other
    extras: list[Group] = field(default_factory=list)

    def groups(self) -> list[Group]:
        """All groups, the farthest first."""
        return [*self.extras, *([self.other] if self.other else []), self.main]

    def things(self) -> list[Thing]:
        """All things in drawing order: extras, then what stands farther back."""
        shelter = self.relation in ("under", "on")
        near = [t for g in self.groups()[len(self.extras) :] for t in g.things]
        if not shelter:
            near.sort(key=lambda t: t.box[1] + t.box[3])
        return [t for g in self.extras for t in g.things] + near


def held_out(kind: str, colour: str | None) -> bool:
    """Say whether this pair is kept out of all training: one colour in ten, another one for each kind."""
    coloured = [k.name for k in KINDS.values() if k.coloured]
    return colour is not None and list(COLOURS).index(colour) == (coloured.index(kind) * 3 + 1) % len(COLOURS)


class NoRoom(Exception):  # noqa: N818 - control flow inside this module, not an error of the caller
    """The things drawn by lot do not fit into the picture; the caller tries another lot."""


class Composer:
    """Draws lots for one scene and places its things."""

    def __init__(self, rng: random.Random, novel: bool) -> None:
        self.rng, self.novel = rng, novel
        self.next_id = 0
        self.boxes: list[Box] = []

    def compose(self) -> Scene:
        """Return a scene with every thing placed; raises NoRoom when the lot does not fit."""
        rng = self.rng
        place = rng.choice(PLACES)
        horizon = rng.uniform(0.66, 0.72) if place == "room" else rng.uniform(0.42, 0.56)
        patterns: dict[Callable[[str, float], Scene], float] = {
            self._solo: 0.2,
            self._side: 0.34,
            self._count: 0.2,
            self._above: 0.14,
        }
        if place == "room":
            patterns[self._on] = 0.3
        if place in ("room", "field", "beach"):
            patterns[self._under] = 0.14
        pattern = rng.choices(list(patterns), list(patterns.values()))[0]
        scene = pattern(place, horizon)
        self._add_extras(scene)
        return scene

    # lots

    def _kinds(self, place: str, anchors: tuple[str, ...], narrower: float = 1e9) -> list[Kind]:
        return [
            k for k in KINDS.values() if place in k.places and k.anchor in anchors and k.height * k.aspect <= narrower
        ]

    def _group(self, kind: Kind, main: bool = False, size: str | None = None) -> Group:
        """Draw size and colour; only the main group of ``val_novel`` has a held-out pair, and it always has one."""
        colour = None
        if kind.coloured:
            wanted = self.novel and main
            colour = self.rng.choice([c for c in COLOURS if held_out(kind.name, c) == wanted])
        size = size or self.rng.choices(list(SCALES), (0.25, 0.5, 0.25))[0]
        if kind.name in HEAVENLY:
            size = "medium"
        return Group(kind, colour, size)

    def _choose_main(self, kinds: list[Kind]) -> Kind:
        return self.rng.choice([k for k in kinds if k.coloured or not self.novel] or kinds)

    def _solo(self, place: str, horizon: float) -> Scene:
        main = self._group(self._choose_main(self._kinds(place, ("ground", "small", "sky"))), True)
        scene = Scene(place, horizon, main)
        self._place_somewhere(main, scene)
        return scene

    def _side(self, place: str, horizon: float) -> Scene:
        kinds = self._kinds(place, ("ground", "small"))
        main = self._group(self._choose_main(kinds), True)
        other = self._group(self.rng.choice([k for k in kinds if k is not main.kind]))
        relation = self.rng.choice(("left", "right"))
        scene = Scene(place, horizon, main, other, relation)
        pair = (main, other) if relation == "left" else (other, main)
        widths = [g.extent()[0] for g in pair]
        slack = SIZE - 12 - sum(widths)
        if slack < 6:
            raise NoRoom
        x = 6 + self.rng.uniform(0, slack * 0.6)
        self._put(pair[0], x, self._floor(scene, pair[0]))
        gap = self.rng.uniform(4, max(5.0, SIZE - 6 - widths[1] - x - widths[0]))
        self._put(pair[1], x + widths[0] + min(gap, 60), self._floor(scene, pair[1]))
        return scene

    def _count(self, place: str, horizon: float) -> Scene:
        number = self.rng.choices((2, 3, 4, 5), (0.35, 0.3, 0.2, 0.15))[0]
        kind = self._choose_main([k for k in self._kinds(place, ("ground", "small", "sky"), 74) if k.coloured])
        main = self._group(kind, True, "medium" if number < 4 else "small")
        scene = Scene(place, horizon, main)
        for _ in range(number):
            self._place_somewhere(main, scene)
        return scene

    def _above(self, place: str, horizon: float) -> Scene:
        main = self._group(self._choose_main(self._kinds(place, ("sky",))), True)
        other = self._group(self.rng.choice(self._kinds(place, ("ground", "small"))))
        scene = Scene(place, horizon, main, other, "above")
        if self.rng.random() < 0.5 and not self.novel:
            scene = Scene(place, horizon, other, main, "below")
        width, _ = other.extent()
        x = self.rng.uniform(6, SIZE - 6 - width)
        self._put(other, x, self._floor(scene, other))
        sky_width, sky_height = main.extent()
        top = min(self.boxes[-1][1], horizon * SIZE)
        if top - 6 < sky_height:
            raise NoRoom
        centre = x + width / 2 + self.rng.uniform(-0.3, 0.3) * width
        self._put(main, centre - sky_width / 2, self.rng.uniform(5 + sky_height, top - 1))
        return scene

    def _on(self, place: str, horizon: float) -> Scene:
        holder = self._group(KINDS[self.rng.choice(HOLDERS)], size="big" if self.rng.random() < 0.4 else "medium")
        main = self._group(self._choose_main(self._kinds(place, ("small",))), True)
        if holder.kind.name == "chair" and main.extent()[1] > 60:
            raise NoRoom
        scene = Scene(place, horizon, main, holder, "on")
        width, height = holder.extent()
        x, floor = self.rng.uniform(8, SIZE - 8 - width), self._floor(scene, holder)
        self._put(holder, x, floor)
        seat = 0.1 if holder.kind.name == "table" else 0.52
        left, right = (0.06, 0.94) if holder.kind.name == "table" else (0.36, 0.98)
        if holder.things[0].flip:
            left, right = 1 - right, 1 - left
        main_width, _ = main.extent()
        if main_width > (right - left) * width * 1.3:
            raise NoRoom
        room = max(0.0, (right - left) * width - main_width)
        start = x + left * width + (self.rng.uniform(0, room) if room else ((right - left) * width - main_width) / 2)
        self._put(main, start, floor - height * (1 - seat), overlap=True)
        return scene

    def _under(self, place: str, horizon: float) -> Scene:
        shelters = [KINDS[n] for n in SHELTERS if place in KINDS[n].places]
        shelter = self._group(self.rng.choice(shelters), size="big")
        small = [k for k in self._kinds(place, ("ground", "small"), 62) if k.height <= 54 and k is not shelter.kind]
        main = self._group(self._choose_main(small), True, self.rng.choice(("small", "medium")))
        scene = Scene(place, horizon, main, shelter, "under")
        (width, _), (main_width, main_height) = shelter.extent(), main.extent()
        if main_height > 54:
            raise NoRoom
        x, floor = self.rng.uniform(8, SIZE - 8 - width), SIZE * self.rng.uniform(0.9, 0.95)
        self._put(shelter, x, floor)
        spot = 0.5 if shelter.kind.name == "table" else self.rng.choice((0.22, 0.8))
        self._put(main, x + spot * width - main_width / 2, floor + self.rng.uniform(0, 4), overlap=True)
        return scene

    def _add_extras(self, scene: Scene) -> None:
        """Put up to two more things far back or in the sky, where there is room."""
        wanted = self.rng.choices((0, 1, 2), (0.4, 0.4, 0.2))[0]
        taken = {g.kind.name for g in scene.groups()}
        sky = [k for k in self._kinds(scene.place, ("sky",)) if k.name not in taken]
        for kind in self.rng.sample(sky, min(wanted, len(sky))):
            extra = self._group(kind, size="small" if self.rng.random() < 0.5 else "medium")
            try:
                self._place_somewhere(extra, scene)
            except NoRoom:
                continue
            scene.extras.append(extra)

    # places

    def _floor(self, scene: Scene, group: Group) -> float:
        """Return where the feet of a ground thing stand, in pixels from the top."""
        lowest = max(scene.horizon * SIZE + 14, group.extent()[1] * 0.72 + 6, 0.72 * SIZE)
        return self.rng.uniform(lowest, 0.965 * SIZE)

    def _place_somewhere(self, group: Group, scene: Scene) -> None:
        width, height = group.extent()
        if width > SIZE - 12:
            raise NoRoom
        for _ in range(40):
            x = self.rng.uniform(6, SIZE - 6 - width)
            if group.in_sky:
                lowest = max(height + 6, scene.horizon * SIZE + (0 if scene.place != "room" else -20))
                y = self.rng.uniform(height + 5, lowest)
            else:
                y = self._floor(scene, group)
            if not any(_intersect((x, y - height, width, height), other) for other in self.boxes):
                self._put(group, x, y)
                return
        raise NoRoom

    def _put(self, group: Group, x: float, bottom: float, overlap: bool = False) -> None:
        width, height = group.extent()
        box = (round(x, 1), round(bottom - height, 1), round(width, 1), round(height, 1))
        outside = x < 0 or x + width > SIZE or bottom - height < 0 or bottom > SIZE
        if outside or (not overlap and any(_intersect(box, other) for other in self.boxes)):
            raise NoRoom
        flip = self.rng.random() < 0.5
        group.things.append(Thing(self.next_id, group.kind.name, group.colour, group.size, box, flip))
        self.next_id += 1
        self.boxes.append(box)


def _intersect(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def make_scene(split: str, seed: int, index: int) -> tuple[Scene, list[Caption]]:
    """Return scene number ``index`` of a split and its five captions; the same for the same arguments, always."""
    rng = random.Random(f"microworld {split} {seed} {index}")
    while True:
        try:
            scene = Composer(rng, novel=split == "val_novel").compose()
        except NoRoom:
            continue
        return scene, write_captions(scene, rng)


# --- drawing --------------------------------------------------------------------------------------------------------


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw ``scene`` at SUPERSAMPLE times its size and return it at SIZE x SIZE, RGB."""
    big = SIZE * SUPERSAMPLE
    image = Image.new("RGB", (big, big))
    draw = ImageDraw.Draw(image)
    _draw_place(draw, scene, rng)
    for thing in scene.things():
        box = tuple(v * SUPERSAMPLE for v in thing.box)
        KINDS[thing.kind].draw(Pen(draw, box, COLOURS[thing.colour or "white"], thing.flip))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


SKY: dict[str, tuple[RGB, RGB]] = {  # top, horizon
    "field": ((126, 190, 240), (214, 236, 250)),
    "beach": ((104, 186, 242), (232, 240, 236)),
    "snow": ((176, 200, 222), (226, 234, 242)),
    "street": ((160, 196, 226), (236, 232, 222)),
    "night": ((22, 28, 66), (62, 70, 120)),
}
GROUND: dict[str, tuple[RGB, RGB]] = {  # far, near
    "field": ((140, 196, 104), (104, 166, 76)),
    "beach": ((238, 218, 168), (224, 196, 140)),
    "snow": ((236, 242, 250), (214, 226, 242)),
    "street": ((150, 150, 156), (116, 118, 126)),
    "night": ((44, 66, 72), (30, 48, 56)),
    "room": ((186, 142, 100), (160, 116, 78)),
}
WALLS: tuple[RGB, ...] = ((236, 226, 206), (208, 224, 226), (232, 212, 212), (216, 226, 204), (222, 216, 232))


def _gradient(draw: ImageDraw.ImageDraw, y0: float, y1: float, a: RGB, b: RGB) -> None:
    big, bands = SIZE * SUPERSAMPLE, 24
    for k in range(bands):
        top = y0 + (y1 - y0) * k / bands
        draw.rectangle([0, top, big, y0 + (y1 - y0) * (k + 1) / bands], fill=mix(a, b, k / (bands - 1)))


def _draw_place(draw: ImageDraw.ImageDraw, scene: Scene, rng: random.Random) -> None:
    big = SIZE * SUPERSAMPLE
    horizon = scene.horizon * big
    tint = rng.uniform(-0.06, 0.1)  # no two places have quite the same light
    shade = (255, 255, 255) if tint > 0 else (20, 20, 40)
    far, near = (mix(c, shade, abs(tint)) for c in GROUND[scene.place])
    if scene.place == "room":
        wall = rng.choice(WALLS)
        _gradient(draw, 0, horizon, mix(wall, (255, 255, 255), 0.2), wall)
    else:
        top, low = (mix(c, shade, abs(tint)) for c in SKY[scene.place])
        _gradient(draw, 0, horizon, top, low)
    _gradient(draw, horizon, big, far, near)
    _DETAILS[scene.place](draw, big, horizon, rng, far, near)


def _hills(draw: ImageDraw.ImageDraw, big: int, horizon: float, rng: random.Random, fill: RGB) -> None:
    for _ in range(3):
        x, w, h = rng.uniform(-0.2, 0.9) * big, rng.uniform(0.4, 0.8) * big, rng.uniform(0.04, 0.1) * big
        draw.pieslice([x, horizon - h, x + w, horizon + h], 180, 360, fill=fill)


def _field(draw: ImageDraw.ImageDraw, big: int, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    _hills(draw, big, horizon, rng, mix(far, (160, 200, 190), 0.4))
    for _ in range(26):
        x, y = rng.uniform(0, big), rng.uniform(horizon + 8, big)
        draw.line([(x, y), (x + rng.uniform(-5, 5), y - 12)], fill=mix(near, (30, 80, 30), 0.35), width=3)


def _beach(draw: ImageDraw.ImageDraw, big: int, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    shore = horizon + 0.1 * big
    _gradient(draw, horizon - 0.02 * big, shore, (64, 142, 200), (126, 200, 218))
    for k in range(14):
        x = (k + rng.random()) * big / 14
        y = rng.uniform(horizon, shore - 8)
        draw.line([(x, y), (x + 26, y)], fill=(220, 240, 246), width=3)
    draw.line([(0, shore), (big, shore)], fill=(246, 250, 250), width=8)
    for _ in range(40):
        x, y = rng.uniform(0, big), rng.uniform(shore + 10, big)
        draw.ellipse([x, y, x + 4, y + 3], fill=mix(near, (140, 110, 70), 0.4))


def _snow(draw: ImageDraw.ImageDraw, big: int, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    for _ in range(3):
        x, w, h = rng.uniform(-0.1, 0.8) * big, rng.uniform(0.3, 0.6) * big, rng.uniform(0.1, 0.24) * big
        peak = (x + w / 2, horizon - h)
        draw.polygon([(x, horizon), peak, (x + w, horizon)], fill=(168, 186, 210))
        cap = [(x + w * 0.36, horizon - h * 0.72), peak, (x + w * 0.64, horizon - h * 0.72)]
        draw.polygon(cap, fill=(244, 248, 252))
    for _ in range(40):
        x, y = rng.uniform(0, big), rng.uniform(0, big)
        draw.ellipse([x, y, x + 6, y + 6], fill=(252, 253, 255))


def _street(draw: ImageDraw.ImageDraw, big: int, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    x = 0.0
    while x < big:
        w, h = rng.uniform(0.1, 0.2) * big, rng.uniform(0.12, 0.34) * big
        wall = mix((176, 172, 178), (206, 190, 176), rng.random())
        draw.rectangle([x, horizon - h, x + w, horizon], fill=wall)
        for wx in range(int(x) + 14, int(x + w) - 20, 34):
            for wy in range(int(horizon - h) + 14, int(horizon) - 26, 40):
                draw.rectangle([wx, wy, wx + 16, wy + 22], fill=mix(wall, (110, 130, 160), 0.45))
        x += w + rng.uniform(0, 0.03) * big
    draw.rectangle([0, horizon, big, horizon + 0.05 * big], fill=(200, 196, 190))
    for k in range(5):
        left = (k + 0.2) * big / 5
        draw.rectangle([left, big * 0.9, left + big / 9, big * 0.915], fill=(236, 232, 214))


def _night(draw: ImageDraw.ImageDraw, big: int, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    for _ in range(30):
        x, y, r = rng.uniform(0, big), rng.uniform(0, horizon), rng.uniform(1.5, 3.5)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(214, 218, 240))
    _hills(draw, big, horizon, rng, mix(far, (20, 26, 50), 0.3))


def _room(draw: ImageDraw.ImageDraw, big: int, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    draw.rectangle([0, horizon - 0.02 * big, big, horizon], fill=(244, 240, 232))
    for k in range(6):
        y = horizon + (big - horizon) * (k / 6) ** 1.3
        draw.line([(0, y), (big, y)], fill=mix(near, (60, 40, 30), 0.25), width=3)


_DETAILS = {"field": _field, "beach": _beach, "snow": _snow, "street": _street, "night": _night, "room": _room}


def make_image(split: str, seed: int, index: int) -> tuple[Image.Image, Scene, list[Caption]]:
    """Return picture, scene and captions number ``index`` of a split."""
    scene, captions = make_scene(split, seed, index)
    return render(scene, random.Random(f"microworld drawing {split} {seed} {index}")), scene, captions


# --- files ----------------------------------------------------------------------------------------------------------


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
    for rows in tqdm(_map(jobs, workers), total=count, desc=f"draw {split}", disable=not sys.stderr.isatty()):
        for key, value in rows.items():
            merged[key] += value
    info = {"description": "micro world, generated drawings", "split": split, "seed": seed, "count": count}
    categories = [{"id": n, "name": name} for n, name in enumerate(KINDS)]
    path = out / f"{split}.json"
    write_json(path, {"info": info, "categories": categories, **merged}, indent=None)
    return path


def _map(jobs: list, workers: int) -> Iterator[dict[str, Any]]:
    if workers <= 1:
        yield from map(_write_one, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_write_one, jobs, chunksize=16)


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
