"""Compose random scenes: place, things, sizes, colours, and positions that make true what the captions will say."""

from __future__ import annotations

import random
from collections.abc import Callable

from microworld.captions import Caption, write_captions
from microworld.scene import SCALES, SIZE, Box, Group, Scene, Thing
from microworld.things import COLOURS, KINDS, PLACES, Kind

HOLDERS = ("table", "chair")  # other things are put on them
HEAVENLY = ("sun", "moon")  # there is one of each, always of one size
SHELTERS = ("table", "tree", "umbrella")  # other things are put under them


def held_out(kind: str, colour: str | None) -> bool:
    """Say whether this pair is kept out of all training: one colour in ten, another one for each kind."""
    coloured = [k.name for k in KINDS.values() if k.coloured]
    return colour is not None and list(COLOURS).index(colour) == (coloured.index(kind) * 3 + 1) % len(COLOURS)


class NoRoom(Exception):  # noqa: N818 - control flow inside this module, not an error of the caller
    """The chosen things do not fit into the picture; the caller tries again."""


class Composer:
    """Chooses the things of one scene at random and places them."""

    def __init__(self, rng: random.Random, novel: bool) -> None:
        self.rng, self.novel = rng, novel
        self.next_id = 0
        self.boxes: list[Box] = []

    def compose(self) -> Scene:
        """Return a scene with every thing placed; raises NoRoom when they do not fit."""
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

    # what is in it

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

    # where it is

    def _floor(self, scene: Scene, group: Group) -> float:
        """Return the bottom of a thing on the ground, in pixels from the top."""
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
