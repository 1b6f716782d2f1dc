"""Draw a scene: its place with random details, then its things, supersampled."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from microworld.pen import RGB, Pen, mix
from microworld.scene import SIZE, Scene
from microworld.things import COLOURS, KINDS

SUPERSAMPLE = 3
BIG = SIZE * SUPERSAMPLE  # pixels a side of the canvas

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


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw ``scene`` at SUPERSAMPLE times its size and return it at SIZE x SIZE, RGB."""
    image = Image.new("RGB", (BIG, BIG))
    draw = ImageDraw.Draw(image)
    _draw_place(draw, scene, rng)
    for thing in scene.things():
        x, y, width, height = (v * SUPERSAMPLE for v in thing.box)
        KINDS[thing.kind].draw(Pen(draw, (x, y, width, height), COLOURS[thing.colour or "white"], thing.flip))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _gradient(draw: ImageDraw.ImageDraw, y0: float, y1: float, a: RGB, b: RGB) -> None:
    bands = 24
    for k in range(bands):
        top = y0 + (y1 - y0) * k / bands
        draw.rectangle([0, top, BIG, y0 + (y1 - y0) * (k + 1) / bands], fill=mix(a, b, k / (bands - 1)))


def _draw_place(draw: ImageDraw.ImageDraw, scene: Scene, rng: random.Random) -> None:
    horizon = scene.horizon * BIG
    tint = rng.uniform(-0.06, 0.1)  # no two places have quite the same light
    shade = (255, 255, 255) if tint > 0 else (20, 20, 40)
    far, near = (mix(c, shade, abs(tint)) for c in GROUND[scene.place])
    if scene.place == "room":
        wall = rng.choice(WALLS)
        _gradient(draw, 0, horizon, mix(wall, (255, 255, 255), 0.2), wall)
    else:
        top, low = (mix(c, shade, abs(tint)) for c in SKY[scene.place])
        _gradient(draw, 0, horizon, top, low)
    _gradient(draw, horizon, BIG, far, near)
    _DETAILS[scene.place](draw, horizon, rng, far, near)


def _hills(draw: ImageDraw.ImageDraw, horizon: float, rng: random.Random, fill: RGB) -> None:
    for _ in range(3):
        x, w, h = rng.uniform(-0.2, 0.9) * BIG, rng.uniform(0.4, 0.8) * BIG, rng.uniform(0.04, 0.1) * BIG
        draw.pieslice([x, horizon - h, x + w, horizon + h], 180, 360, fill=fill)


def _field(draw: ImageDraw.ImageDraw, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    _hills(draw, horizon, rng, mix(far, (160, 200, 190), 0.4))
    for _ in range(26):
        x, y = rng.uniform(0, BIG), rng.uniform(horizon + 8, BIG)
        draw.line([(x, y), (x + rng.uniform(-5, 5), y - 12)], fill=mix(near, (30, 80, 30), 0.35), width=3)


def _beach(draw: ImageDraw.ImageDraw, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    shore = horizon + 0.1 * BIG
    _gradient(draw, horizon - 0.02 * BIG, shore, (64, 142, 200), (126, 200, 218))
    for k in range(14):
        x = (k + rng.random()) * BIG / 14
        y = rng.uniform(horizon, shore - 8)
        draw.line([(x, y), (x + 26, y)], fill=(220, 240, 246), width=3)
    draw.line([(0, shore), (BIG, shore)], fill=(246, 250, 250), width=8)
    for _ in range(40):
        x, y = rng.uniform(0, BIG), rng.uniform(shore + 10, BIG)
        draw.ellipse([x, y, x + 4, y + 3], fill=mix(near, (140, 110, 70), 0.4))


def _snow(draw: ImageDraw.ImageDraw, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    for _ in range(3):
        x, w, h = rng.uniform(-0.1, 0.8) * BIG, rng.uniform(0.3, 0.6) * BIG, rng.uniform(0.1, 0.24) * BIG
        peak = (x + w / 2, horizon - h)
        draw.polygon([(x, horizon), peak, (x + w, horizon)], fill=(168, 186, 210))
        cap = [(x + w * 0.36, horizon - h * 0.72), peak, (x + w * 0.64, horizon - h * 0.72)]
        draw.polygon(cap, fill=(244, 248, 252))
    for _ in range(40):
        x, y = rng.uniform(0, BIG), rng.uniform(0, BIG)
        draw.ellipse([x, y, x + 6, y + 6], fill=(252, 253, 255))


def _street(draw: ImageDraw.ImageDraw, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    x = 0.0
    while x < BIG:
        w, h = rng.uniform(0.1, 0.2) * BIG, rng.uniform(0.12, 0.34) * BIG
        wall = mix((176, 172, 178), (206, 190, 176), rng.random())
        draw.rectangle([x, horizon - h, x + w, horizon], fill=wall)
        for wx in range(int(x) + 14, int(x + w) - 20, 34):
            for wy in range(int(horizon - h) + 14, int(horizon) - 26, 40):
                draw.rectangle([wx, wy, wx + 16, wy + 22], fill=mix(wall, (110, 130, 160), 0.45))
        x += w + rng.uniform(0, 0.03) * BIG
    draw.rectangle([0, horizon, BIG, horizon + 0.05 * BIG], fill=(200, 196, 190))
    for k in range(5):
        left = (k + 0.2) * BIG / 5
        draw.rectangle([left, BIG * 0.9, left + BIG / 9, BIG * 0.915], fill=(236, 232, 214))


def _night(draw: ImageDraw.ImageDraw, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    for _ in range(30):
        x, y, r = rng.uniform(0, BIG), rng.uniform(0, horizon), rng.uniform(1.5, 3.5)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(214, 218, 240))
    _hills(draw, horizon, rng, mix(far, (20, 26, 50), 0.3))


def _room(draw: ImageDraw.ImageDraw, horizon: float, rng: random.Random, far: RGB, near: RGB) -> None:
    draw.rectangle([0, horizon - 0.02 * BIG, BIG, horizon], fill=(244, 240, 232))
    for k in range(6):
        y = horizon + (BIG - horizon) * (k / 6) ** 1.3
        draw.line([(0, y), (BIG, y)], fill=mix(near, (60, 40, 30), 0.25), width=3)


_DETAILS = {"field": _field, "beach": _beach, "snow": _snow, "street": _street, "night": _night, "room": _room}
