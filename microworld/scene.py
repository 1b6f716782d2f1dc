"""What a scene is: things with their boxes, groups that a caption names with one noun, and how two groups relate."""

from __future__ import annotations

from dataclasses import dataclass, field

from microworld.things import Kind

SIZE = 224  # pixels a side
SCALES = {"small": 0.76, "medium": 1.0, "big": 1.28}
MIN_HEIGHT = 32.0  # pixels: anything smaller is hard to recognise even for people
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
    """A place with a main group, perhaps another one in ``relation`` to it, and extras in the background."""

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
        """All things in drawing order: extras, then the others, the farthest first."""
        shelter = self.relation in ("under", "on")
        near = [t for g in self.groups()[len(self.extras) :] for t in g.things]
        if not shelter:
            near.sort(key=lambda t: t.box[1] + t.box[3])
        return [t for g in self.extras for t in g.things] + near
