"""What the micro world is made of: how each kind of thing is drawn, named, sized and where it may be.

A drawing function gets a `Pen`, whose coordinates run from (0, 0) at the top left to (1, 1) at the bottom right of the
thing's box, and draws in the pen's colour and its shades. Drawing is supersampled by the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin

from microworld.pen import RGB, STEEL, TYRE, Pen, mix

COLOURS: dict[str, RGB] = {
    "red": (214, 48, 49),
    "orange": (240, 138, 36),
    "yellow": (247, 209, 55),
    "green": (62, 160, 75),
    "blue": (52, 116, 214),
    "purple": (134, 72, 178),
    "pink": (242, 134, 176),
    "brown": (132, 84, 48),
    "black": (42, 42, 48),
    "white": (246, 246, 242),
}
SKIN, HAIR = (243, 200, 164), (92, 60, 38)
GLASS, WOOD = (190, 226, 242), (156, 108, 64)


# --- vehicles ---------------------------------------------------------------------------------------------------------


def _bike(p: Pen) -> None:
    for x in (0.22, 0.78):
        p.draw.ellipse(p._box(x - 0.21, 0.42, x + 0.21, 0.98), outline=TYRE, width=max(3, round(0.045 * p.h)))
        for k in range(4):
            dx, dy = 0.19 * cos(k * pi / 4), 0.25 * sin(k * pi / 4)
            p.line([(x - dx, 0.7 - dy), (x + dx, 0.7 + dy)], 0.008, STEEL)
    frame = [(0.22, 0.7), (0.38, 0.34), (0.68, 0.34), (0.48, 0.72), (0.22, 0.7)]
    p.line(frame, 0.07)
    p.line([(0.38, 0.34), (0.48, 0.72)], 0.07)
    p.line([(0.78, 0.7), (0.66, 0.2), (0.76, 0.14)], 0.06)
    p.line([(0.38, 0.36), (0.36, 0.24)], 0.05, STEEL)
    p.rect(0.27, 0.17, 0.45, 0.25, TYRE, 0.04)


def _car(p: Pen) -> None:
    p.poly([(0.2, 0.45), (0.32, 0.12), (0.68, 0.12), (0.84, 0.45)])
    p.poly([(0.27, 0.43), (0.36, 0.19), (0.49, 0.19), (0.49, 0.43)], GLASS)
    p.poly([(0.53, 0.43), (0.53, 0.19), (0.65, 0.19), (0.76, 0.43)], GLASS)
    p.rect(0.02, 0.42, 0.98, 0.8, radius=0.15)
    p.rect(0.02, 0.66, 0.98, 0.74, p.dark, edge=False)
    p.oval(0.9, 0.48, 0.98, 0.6, (255, 240, 170))
    p.wheel(0.24, 0.8, 0.19)
    p.wheel(0.76, 0.8, 0.19)


def _bus(p: Pen) -> None:
    p.rect(0.01, 0.06, 0.99, 0.84, radius=0.1)
    for k in range(5):
        p.rect(0.06 + 0.155 * k, 0.16, 0.18 + 0.155 * k, 0.44, GLASS, 0.03)
    p.rect(0.85, 0.16, 0.95, 0.78, GLASS, 0.03)
    p.rect(0.01, 0.56, 0.84, 0.64, p.light, edge=False)
    p.wheel(0.22, 0.85, 0.14)
    p.wheel(0.74, 0.85, 0.14)


def _truck(p: Pen) -> None:
    p.rect(0.01, 0.1, 0.64, 0.76, mix(p.main, (255, 255, 255), 0.12), 0.03)
    for k in range(4):
        p.line([(0.1 + 0.14 * k, 0.14), (0.1 + 0.14 * k, 0.72)], 0.015, p.dark)
    p.poly([(0.66, 0.78), (0.66, 0.26), (0.84, 0.26), (0.97, 0.5), (0.99, 0.78)])
    p.poly([(0.72, 0.5), (0.72, 0.33), (0.82, 0.33), (0.91, 0.5)], GLASS)
    p.rect(0.01, 0.74, 0.99, 0.82, p.dark, edge=False)
    for x in (0.16, 0.34, 0.82):
        p.wheel(x, 0.84, 0.15)


def _train(p: Pen) -> None:
    p.rect(0.38, 0.3, 0.88, 0.72, radius=0.1)
    p.rect(0.04, 0.06, 0.42, 0.72, p.main, 0.03)
    p.rect(0.01, 0.0, 0.45, 0.09, p.dark, 0.03)
    p.rect(0.1, 0.16, 0.35, 0.4, GLASS, 0.02)
    p.poly([(0.7, 0.31), (0.67, 0.06), (0.83, 0.06), (0.8, 0.31)], p.dark)
    p.rect(0.54, 0.18, 0.62, 0.31, (235, 196, 84))
    p.oval(0.82, 0.4, 0.94, 0.6, (255, 240, 170))
    p.poly([(0.86, 0.72), (1.0, 0.92), (0.82, 0.92)], STEEL)
    for x, r in ((0.14, 0.17), (0.35, 0.17), (0.56, 0.13), (0.75, 0.13)):
        p.wheel(x, 0.97 - r, r, p.light)


def _boat(p: Pen) -> None:
    p.line([(0.47, 0.03), (0.47, 0.72)], 0.035, WOOD)
    p.poly([(0.51, 0.06), (0.51, 0.6), (0.92, 0.6)], (250, 248, 238))
    p.poly([(0.43, 0.16), (0.43, 0.6), (0.14, 0.6)], (236, 232, 220))
    p.poly([(0.02, 0.68), (0.98, 0.68), (0.82, 0.96), (0.18, 0.96)])
    p.poly([(0.05, 0.74), (0.95, 0.74), (0.92, 0.8), (0.08, 0.8)], p.light, edge=False)


def _plane(p: Pen) -> None:
    p.poly([(0.04, 0.12), (0.16, 0.12), (0.28, 0.46), (0.1, 0.46)], p.dark)
    p.oval(0.04, 0.34, 0.98, 0.68)
    p.poly([(0.44, 0.52), (0.6, 0.52), (0.42, 0.96), (0.28, 0.96)], p.dark)
    p.poly([(0.86, 0.4), (0.95, 0.47), (0.84, 0.48)], GLASS)
    for k in range(5):
        p.oval(0.32 + 0.1 * k, 0.41, 0.37 + 0.1 * k, 0.5, GLASS)


# --- animals and people -----------------------------------------------------------------------------------------------


def _cat(p: Pen) -> None:
    p.arc(0.0, 0.36, 0.4, 0.98, 40, 230, 0.1)
    p.oval(0.2, 0.42, 0.76, 0.99)
    p.oval(0.3, 0.56, 0.6, 0.98, p.light, edge=False)
    p.poly([(0.38, 0.22), (0.38, 0.0), (0.56, 0.13)])
    p.poly([(0.7, 0.13), (0.88, 0.0), (0.9, 0.22)])
    p.oval(0.34, 0.08, 0.94, 0.52)
    p.eye(0.54, 0.27, 0.035)
    p.eye(0.76, 0.27, 0.035)
    p.poly([(0.61, 0.35), (0.69, 0.35), (0.65, 0.4)], (230, 120, 140), edge=False)
    for dy in (0.0, 0.04):
        p.line([(0.52, 0.38 + dy), (0.32, 0.36 + 2 * dy)], 0.012, STEEL)
        p.line([(0.78, 0.38 + dy), (0.98, 0.36 + 2 * dy)], 0.012, STEEL)


def _dog(p: Pen) -> None:
    p.line([(0.1, 0.5), (0.02, 0.24)], 0.09)
    for x in (0.14, 0.28, 0.54, 0.67):
        p.rect(x, 0.6, x + 0.1, 0.99, p.main, 0.05)
    p.rect(0.08, 0.42, 0.78, 0.76, radius=0.17)
    p.oval(0.6, 0.12, 0.92, 0.54)
    p.oval(0.78, 0.28, 1.0, 0.5, p.light)
    p.oval(0.94, 0.3, 1.0, 0.38, (20, 20, 24), edge=False)
    p.oval(0.58, 0.14, 0.72, 0.5, p.dark)
    p.eye(0.8, 0.26, 0.03)
    p.rect(0.6, 0.5, 0.76, 0.57, (200, 40, 50) if p.main[0] < 200 else (40, 80, 200), 0.02, edge=False)


def _sheep(p: Pen) -> None:
    for x in (0.24, 0.36, 0.56, 0.68):
        p.rect(x, 0.66, x + 0.07, 0.99, (62, 54, 52), edge=False)
    puffs = ((0.05, 0.3), (0.16, 0.14), (0.34, 0.08), (0.5, 0.14), (0.1, 0.46), (0.3, 0.5), (0.48, 0.46), (0.56, 0.3))
    for x, y in puffs:
        p.oval(x, y, x + 0.28, y + 0.34)
    p.oval(0.14, 0.2, 0.74, 0.76, p.main, edge=False)
    for x, y in ((0.24, 0.3), (0.42, 0.26), (0.34, 0.5), (0.54, 0.48)):
        p.arc(x, y, x + 0.14, y + 0.16, 180, 350, 0.025, p.dark)
    p.oval(0.72, 0.2, 0.99, 0.58, (62, 54, 52))
    p.oval(0.66, 0.22, 0.78, 0.36, (62, 54, 52), edge=False)
    p.eye(0.87, 0.34, 0.03)


def _bird(p: Pen) -> None:
    p.poly([(0.0, 0.36), (0.3, 0.5), (0.1, 0.62)], p.dark)
    p.oval(0.14, 0.36, 0.76, 0.8)
    p.poly([(0.3, 0.52), (0.62, 0.5), (0.3, 0.02)], p.dark)
    p.oval(0.6, 0.2, 0.9, 0.58)
    p.poly([(0.88, 0.34), (1.0, 0.42), (0.87, 0.46)], (245, 166, 35))
    p.eye(0.78, 0.34, 0.035)
    p.line([(0.42, 0.8), (0.38, 0.98)], 0.035, (245, 166, 35))
    p.line([(0.54, 0.8), (0.52, 0.98)], 0.035, (245, 166, 35))


def _duck(p: Pen) -> None:
    p.poly([(0.0, 0.44), (0.2, 0.6), (0.2, 0.8)], p.dark)
    p.oval(0.06, 0.46, 0.78, 0.96)
    p.rect(0.54, 0.28, 0.74, 0.7, p.main, 0.08, edge=False)
    p.oval(0.48, 0.04, 0.84, 0.44)
    p.rect(0.8, 0.22, 1.0, 0.34, (245, 150, 30), 0.05)
    p.oval(0.2, 0.54, 0.58, 0.82, p.light)
    p.eye(0.7, 0.18, 0.035)


def _fish(p: Pen) -> None:
    p.poly([(0.26, 0.5), (0.0, 0.12), (0.08, 0.5), (0.0, 0.88)], p.dark)
    p.poly([(0.4, 0.22), (0.56, 0.0), (0.72, 0.22)], p.dark)
    p.oval(0.18, 0.14, 0.99, 0.86)
    p.arc(0.5, 0.2, 0.74, 0.8, 270, 450, 0.04, p.dark)
    for x, y in ((0.34, 0.38), (0.46, 0.52), (0.34, 0.62), (0.46, 0.3)):
        p.arc(x, y, x + 0.1, y + 0.16, 270, 450, 0.025, p.light)
    p.eye(0.84, 0.4, 0.05)


def _person(p: Pen, hair: RGB) -> None:
    p.oval(0.3, 0.02, 0.7, 0.3, SKIN)
    p.eye(0.43, 0.17, 0.014)
    p.eye(0.57, 0.17, 0.014)
    p.arc(0.4, 0.14, 0.6, 0.26, 20, 160, 0.03, (190, 80, 80))
    p.draw.pieslice(p._box(0.27, 0.0, 0.73, 0.28), 180, 360, fill=hair)


def _girl(p: Pen) -> None:
    p.rect(0.22, 0.08, 0.36, 0.42, HAIR, 0.06, edge=False)
    p.rect(0.64, 0.08, 0.78, 0.42, HAIR, 0.06, edge=False)
    for x in (0.36, 0.55):
        p.rect(x, 0.74, x + 0.1, 0.95, SKIN, edge=False)
        p.rect(x - 0.03, 0.93, x + 0.12, 0.99, TYRE, 0.03)
    p.line([(0.38, 0.38), (0.12, 0.6)], 0.1, SKIN)
    p.line([(0.62, 0.38), (0.88, 0.6)], 0.1, SKIN)
    p.poly([(0.4, 0.3), (0.6, 0.3), (0.86, 0.78), (0.14, 0.78)])
    p.line([(0.3, 0.56), (0.7, 0.56)], 0.04, p.light)
    _person(p, HAIR)


def _boy(p: Pen) -> None:
    for x in (0.34, 0.53):
        p.rect(x, 0.62, x + 0.14, 0.94, (70, 84, 120), 0.02)
        p.rect(x - 0.03, 0.92, x + 0.16, 0.99, TYRE, 0.03)
    p.line([(0.36, 0.37), (0.14, 0.58)], 0.11)
    p.line([(0.64, 0.37), (0.86, 0.58)], 0.11)
    for x in (0.12, 0.88):
        p.oval(x - 0.06, 0.55, x + 0.06, 0.63, SKIN, edge=False)
    p.rect(0.32, 0.3, 0.68, 0.68, radius=0.08)
    _person(p, (60, 40, 30))


def _skier(p: Pen) -> None:
    for dy in (0.0, 0.06):
        p.line([(0.04, 0.9 + dy / 2), (0.9, 0.9 + dy / 2), (0.99, 0.82 + dy / 2)], 0.035, (70, 70, 80))
    p.line([(0.44, 0.56), (0.56, 0.72), (0.46, 0.88)], 0.13, (60, 66, 92))
    p.line([(0.52, 0.34), (0.8, 0.52), (0.92, 0.86)], 0.03, STEEL)
    p.line([(0.36, 0.3), (0.46, 0.58)], 0.24)
    p.line([(0.4, 0.32), (0.66, 0.46), (0.8, 0.48)], 0.1, p.dark)
    p.oval(0.32, 0.03, 0.6, 0.28, SKIN)
    p.draw.pieslice(p._box(0.3, 0.0, 0.62, 0.26), 180, 360, fill=p.main)
    p.rect(0.44, 0.12, 0.62, 0.19, (40, 44, 60), 0.03)


# --- plants and sky ---------------------------------------------------------------------------------------------------


def _tree(p: Pen) -> None:
    p.poly([(0.43, 0.55), (0.57, 0.55), (0.62, 1.0), (0.38, 1.0)], WOOD)
    for x, y in ((0.02, 0.26), (0.46, 0.24), (0.12, 0.06), (0.4, 0.02), (0.24, 0.3)):
        p.oval(x, y, x + 0.52, y + 0.4)
    p.oval(0.16, 0.12, 0.84, 0.6, p.main, edge=False)
    p.oval(0.24, 0.12, 0.5, 0.3, p.light, edge=False)


def _flower(p: Pen) -> None:
    p.line([(0.5, 0.4), (0.5, 0.99)], 0.07, (70, 140, 60))
    p.poly([(0.5, 0.86), (0.78, 0.62), (0.86, 0.74)], (86, 160, 72))
    p.poly([(0.5, 0.92), (0.22, 0.7), (0.14, 0.82)], (86, 160, 72))
    for k in range(6):
        x, y = 0.5 + 0.27 * cos(k * pi / 3), 0.29 + 0.17 * sin(k * pi / 3)
        p.oval(x - 0.19, y - 0.12, x + 0.19, y + 0.12)
    centre = (250, 214, 70) if p.main != COLOURS["yellow"] else (150, 92, 40)
    p.oval(0.36, 0.2, 0.64, 0.38, centre)


def _mushroom(p: Pen) -> None:
    p.poly([(0.36, 0.5), (0.64, 0.5), (0.7, 0.98), (0.3, 0.98)], (240, 228, 206))
    p.draw.pieslice(p._box(0.02, 0.02, 0.98, 1.06), 180, 360, fill=p.main, outline=p.dark, width=p.edge)
    spots = (255, 255, 255) if p.main != COLOURS["white"] else (220, 120, 110)
    for x, y, r in ((0.5, 0.16, 0.09), (0.26, 0.32, 0.07), (0.74, 0.32, 0.07)):
        p.oval(x - r, y - r, x + r, y + r, spots, edge=False)


def _sun(p: Pen) -> None:
    for k in range(12):
        a = k * pi / 6
        p.line([(0.5, 0.5), (0.5 + 0.48 * cos(a), 0.5 + 0.48 * sin(a))], 0.06, (252, 190, 40))
    p.oval(0.2, 0.2, 0.8, 0.8, (255, 214, 64))


def _moon(p: Pen) -> None:
    outer = [(0.5 + 0.46 * cos(a), 0.5 + 0.46 * sin(a)) for a in (pi * (0.35 + 1.3 * k / 24) for k in range(25))]
    inner = [(0.76 + 0.42 * cos(a), 0.5 + 0.42 * sin(a)) for a in (pi * (1.42 - 0.84 * k / 24) for k in range(25))]
    p.poly(outer + inner, (248, 240, 198))


def _cloud(p: Pen) -> None:
    fill = (250, 251, 253)
    for x, y, r in ((0.2, 0.62, 0.3), (0.42, 0.42, 0.38), (0.66, 0.5, 0.34), (0.84, 0.66, 0.26)):
        p.oval(x - r * 0.5, y - r, x + r * 0.5, y + r, fill)
    p.rect(0.14, 0.5, 0.88, 0.9, fill, 0.18, edge=False)


def _star(p: Pen) -> None:
    points = []
    for k in range(10):
        r = 0.49 if k % 2 == 0 else 0.21
        points.append((0.5 + r * sin(k * pi / 5), 0.52 - r * cos(k * pi / 5)))
    p.poly(points)


# --- toys, food, household ------------------------------------------------------------------------------------------


def _kite(p: Pen) -> None:
    p.line([(0.5, 0.66), (0.42, 0.76), (0.58, 0.84), (0.46, 0.92), (0.54, 1.0)], 0.03, p.dark)
    p.poly([(0.5, 0.0), (0.94, 0.28), (0.5, 0.68), (0.06, 0.28)])
    p.poly([(0.5, 0.0), (0.94, 0.28), (0.5, 0.28)], p.light, edge=False)
    p.poly([(0.5, 0.68), (0.06, 0.28), (0.5, 0.28)], p.light, edge=False)
    for y in (0.78, 0.9):
        p.poly([(0.36, y - 0.04), (0.36, y + 0.04), (0.64, y - 0.04), (0.64, y + 0.04)], p.main, edge=False)


def _balloon(p: Pen) -> None:
    p.line([(0.5, 0.66), (0.42, 0.78), (0.56, 0.88), (0.48, 1.0)], 0.025, STEEL)
    p.poly([(0.42, 0.7), (0.58, 0.7), (0.5, 0.6)], p.dark)
    p.oval(0.06, 0.0, 0.94, 0.66)
    p.oval(0.24, 0.1, 0.42, 0.28, p.light, edge=False)


def _ball(p: Pen) -> None:
    p.oval(0.02, 0.02, 0.98, 0.98)
    p.arc(-0.5, 0.06, 0.5, 0.94, 300, 420, 0.07, p.light)
    p.arc(0.5, 0.06, 1.5, 0.94, 120, 240, 0.07, p.light)
    p.oval(0.4, 0.08, 0.6, 0.2, p.light, edge=False)


def _umbrella(p: Pen) -> None:
    p.line([(0.5, 0.0), (0.5, 0.9)], 0.04, WOOD)
    p.arc(0.5, 0.8, 0.68, 0.99, 0, 180, 0.04, WOOD)
    p.draw.pieslice(p._box(0.0, 0.06, 1.0, 0.98), 180, 360, fill=p.main, outline=p.dark, width=p.edge)
    p.draw.pieslice(p._box(0.28, 0.06, 0.72, 0.98), 180, 360, fill=p.light)


def _pizza(p: Pen) -> None:
    p.oval(0.01, 0.01, 0.99, 0.99, (205, 140, 66))
    p.oval(0.09, 0.09, 0.91, 0.91, (250, 206, 92), edge=False)
    for x, y in ((0.36, 0.28), (0.66, 0.34), (0.28, 0.58), (0.54, 0.54), (0.72, 0.66), (0.46, 0.78)):
        p.oval(x - 0.09, y - 0.09, x + 0.09, y + 0.09, (196, 56, 40))
    for x, y in ((0.5, 0.4), (0.42, 0.64), (0.66, 0.5)):
        p.rect(x - 0.04, y - 0.02, x + 0.04, y + 0.02, (70, 140, 60), edge=False)
    p.line([(0.5, 0.5), (0.97, 0.24)], 0.025, (205, 140, 66))
    p.line([(0.5, 0.5), (0.98, 0.72)], 0.025, (205, 140, 66))


def _apple(p: Pen) -> None:
    p.oval(0.04, 0.2, 0.62, 0.98)
    p.oval(0.38, 0.2, 0.96, 0.98)
    p.oval(0.2, 0.24, 0.8, 0.96, p.main, edge=False)
    p.line([(0.5, 0.28), (0.54, 0.04)], 0.07, WOOD)
    p.poly([(0.54, 0.18), (0.72, 0.02), (0.88, 0.1), (0.7, 0.2)], (86, 170, 72))
    p.oval(0.2, 0.34, 0.34, 0.54, p.light, edge=False)


def _cake(p: Pen) -> None:
    p.rect(0.06, 0.5, 0.94, 0.96, (232, 190, 130), 0.06)
    p.rect(0.06, 0.68, 0.94, 0.76, (250, 240, 220), edge=False)
    p.rect(0.03, 0.38, 0.97, 0.58, p.main, 0.08)
    for x in (0.14, 0.38, 0.64, 0.84):
        p.oval(x - 0.07, 0.5, x + 0.07, 0.7, p.main, edge=False)
    for x in (0.28, 0.5, 0.72):
        p.rect(x - 0.025, 0.16, x + 0.025, 0.4, (250, 250, 255))
        p.oval(x - 0.035, 0.02, x + 0.035, 0.17, (252, 180, 50), edge=False)


def _cup(p: Pen) -> None:
    p.arc(0.56, 0.36, 0.99, 0.78, 250, 470, 0.1, p.dark)
    p.poly([(0.06, 0.24), (0.78, 0.24), (0.7, 0.96), (0.14, 0.96)])
    p.oval(0.06, 0.14, 0.78, 0.36, p.light)
    p.oval(0.14, 0.18, 0.7, 0.33, (96, 60, 40), edge=False)


def _table(p: Pen) -> None:
    for x in (0.06, 0.84):
        p.rect(x, 0.2, x + 0.1, 1.0, p.dark)
    p.rect(0.12, 0.2, 0.88, 0.34, p.dark)
    p.poly([(0.08, 0.0), (0.92, 0.0), (1.0, 0.2), (0.0, 0.2)])


def _chair(p: Pen) -> None:
    p.rect(0.08, 0.0, 0.24, 0.99, p.main, 0.04)
    for y in (0.08, 0.26):
        p.rect(0.24, y, 0.34, y + 0.1, p.dark, edge=False)
    p.rect(0.34, 0.0, 0.44, 0.56, p.main, 0.03)
    p.rect(0.78, 0.54, 0.9, 0.99, p.dark, 0.03)
    p.rect(0.06, 0.48, 0.96, 0.62, p.light, 0.05)


def _clock(p: Pen) -> None:
    p.oval(0.01, 0.01, 0.99, 0.99)
    p.oval(0.13, 0.13, 0.87, 0.87, (252, 250, 242))
    for k in range(12):
        dx, dy = sin(k * pi / 6), -cos(k * pi / 6)
        p.line([(0.5 + 0.28 * dx, 0.5 + 0.28 * dy), (0.5 + 0.33 * dx, 0.5 + 0.33 * dy)], 0.03, (60, 60, 66))
    p.line([(0.5, 0.5), (0.5, 0.24)], 0.04, (30, 30, 36))
    p.line([(0.5, 0.5), (0.68, 0.6)], 0.05, (30, 30, 36))


def _lamp(p: Pen) -> None:
    p.line([(0.5, 0.4), (0.5, 0.92)], 0.08, STEEL)
    p.rect(0.24, 0.9, 0.76, 0.99, STEEL, 0.05)
    p.poly([(0.32, 0.04), (0.68, 0.04), (0.96, 0.48), (0.04, 0.48)])
    p.oval(0.38, 0.44, 0.62, 0.56, (255, 240, 170), edge=False)


def _house(p: Pen) -> None:
    p.rect(0.68, 0.06, 0.8, 0.4, (150, 86, 70))
    p.rect(0.1, 0.4, 0.9, 1.0)
    p.poly([(0.0, 0.44), (0.5, 0.02), (1.0, 0.44)], mix(p.main, (90, 40, 40), 0.65))
    p.rect(0.42, 0.64, 0.6, 1.0, WOOD)
    for x in (0.17, 0.68):
        p.rect(x, 0.56, x + 0.16, 0.76, GLASS)
        p.line([(x + 0.08, 0.56), (x + 0.08, 0.76)], 0.015, STEEL)


def _snowman(p: Pen) -> None:
    snow = (250, 252, 255)
    p.oval(0.1, 0.54, 0.9, 1.0, snow)
    p.oval(0.2, 0.3, 0.8, 0.64, snow)
    p.oval(0.3, 0.1, 0.7, 0.38, snow)
    p.rect(0.2, 0.33, 0.8, 0.4, p.main, 0.04)
    p.rect(0.6, 0.36, 0.74, 0.58, p.main, 0.02)
    p.rect(0.3, 0.0, 0.7, 0.13, p.main)
    p.rect(0.2, 0.11, 0.8, 0.16, p.dark)
    p.eye(0.42, 0.21, 0.015)
    p.eye(0.58, 0.21, 0.015)
    p.poly([(0.5, 0.24), (0.82, 0.28), (0.5, 0.3)], (240, 138, 36))


def _book(p: Pen) -> None:
    p.poly([(0.5, 0.22), (0.5, 0.96), (0.02, 0.84), (0.02, 0.1)])
    p.poly([(0.5, 0.22), (0.5, 0.96), (0.98, 0.84), (0.98, 0.1)])
    p.poly([(0.5, 0.2), (0.5, 0.86), (0.08, 0.74), (0.08, 0.04)], (252, 250, 240))
    p.poly([(0.5, 0.2), (0.5, 0.86), (0.92, 0.74), (0.92, 0.04)], (244, 240, 228))
    for k in range(4):
        y = 0.26 + 0.12 * k
        p.line([(0.14, y - 0.07), (0.44, y + 0.01)], 0.02, STEEL)
        p.line([(0.86, y - 0.07), (0.56, y + 0.01)], 0.02, STEEL)


OUTDOORS = ("field", "beach", "snow", "street", "night")
PLACES = (*OUTDOORS, "room")


@dataclass(frozen=True)
class Kind:
    """One kind of thing: its drawing, names, verbs, size in pixels of a 224-pixel scene, and where it may be."""

    name: str
    draw: Callable[[Pen], None]
    height: int  # of a medium one
    aspect: float  # width over height
    anchor: str  # "ground", "sky" or "small" (ground, or on top of furniture)
    places: tuple[str, ...]
    verbs: tuple[str, ...]  # third person singular
    plural: str = ""
    also: tuple[str, str] | None = None  # another (singular, plural)
    coloured: bool = True

    def names(self) -> tuple[tuple[str, str], ...]:
        """Return every (singular, plural) pair that people use for it, the usual one first."""
        usual = (self.name, self.plural or self.name + "s")
        return (usual, self.also) if self.also else (usual,)


_TOWN = ("street", "night", "field", "snow")
_GREEN = ("field", "street", "night")
_DAY = ("field", "beach", "snow", "street")
_ROOM = ("room",)
KINDS: dict[str, Kind] = {
    k.name: k
    for k in (
        Kind("bike", _bike, 60, 1.45, "ground", OUTDOORS, ("stands", "is parked"), also=("bicycle", "bicycles")),
        Kind("car", _car, 46, 1.95, "ground", _TOWN, ("is parked", "drives"), also=("automobile", "automobiles")),
        Kind("bus", _bus, 58, 2.0, "ground", ("street", "night", "snow"), ("is parked", "drives"), "buses"),
        Kind("truck", _truck, 56, 1.85, "ground", _TOWN, ("is parked", "drives"), also=("lorry", "lorries")),
        Kind("train", _train, 58, 1.75, "ground", ("field", "snow", "night"), ("stops", "rolls along")),
        Kind("boat", _boat, 70, 1.05, "ground", ("beach",), ("lies", "waits"), also=("sailboat", "sailboats")),
        Kind("plane", _plane, 44, 1.7, "sky", OUTDOORS, ("flies",), also=("airplane", "airplanes")),
        Kind("cat", _cat, 54, 0.9, "small", PLACES, ("sits", "rests"), also=("kitten", "kittens")),
        Kind("dog", _dog, 52, 1.15, "ground", PLACES, ("stands", "waits"), also=("puppy", "puppies")),
        Kind("sheep", _sheep, 54, 1.25, "ground", ("field", "snow", "night"), ("stands", "grazes"), "sheep"),
        Kind("bird", _bird, 44, 1.15, "sky", OUTDOORS, ("flies",)),
        Kind("duck", _duck, 46, 1.1, "small", ("field", "beach", "street", "night"), ("stands", "waddles")),
        Kind("fish", _fish, 38, 1.5, "small", ("beach", "room"), ("lies",), "fish"),
        Kind("girl", _girl, 78, 0.55, "ground", PLACES, ("stands", "smiles"), also=("lady", "ladies")),
        Kind("boy", _boy, 78, 0.52, "ground", PLACES, ("stands", "smiles"), also=("kid", "kids")),
        Kind("skier", _skier, 74, 0.85, "ground", ("snow",), ("skis", "glides")),
        Kind("tree", _tree, 92, 0.8, "ground", _GREEN, ("stands", "grows")),
        Kind("flower", _flower, 54, 0.62, "small", ("field", "street", "room", "night"), ("grows", "blooms")),
        Kind("mushroom", _mushroom, 44, 0.95, "ground", ("field", "night"), ("grows",)),
        Kind("sun", _sun, 46, 1.0, "sky", _DAY, ("shines",), coloured=False),
        Kind("moon", _moon, 42, 1.0, "sky", ("night",), ("shines",), coloured=False),
        Kind("cloud", _cloud, 34, 1.75, "sky", OUTDOORS, ("drifts",), coloured=False),
        Kind("star", _star, 36, 1.0, "sky", ("night",), ("shines",)),
        Kind("kite", _kite, 62, 0.72, "sky", OUTDOORS, ("flies",)),
        Kind("balloon", _balloon, 62, 0.62, "sky", PLACES, ("floats",)),
        Kind("ball", _ball, 38, 1.0, "small", PLACES, ("lies",)),
        Kind("umbrella", _umbrella, 84, 1.05, "ground", _DAY, ("stands",), also=("parasol", "parasols")),
        Kind("pizza", _pizza, 42, 1.0, "small", _ROOM, ("lies",), coloured=False),
        Kind("apple", _apple, 38, 0.95, "small", ("room", "field"), ("lies",)),
        Kind("cake", _cake, 46, 1.1, "small", _ROOM, ("stands",)),
        Kind("cup", _cup, 40, 1.05, "small", _ROOM, ("stands",), also=("mug", "mugs")),
        Kind("table", _table, 62, 1.6, "ground", _ROOM, ("stands",)),
        Kind("chair", _chair, 74, 0.65, "ground", ("room", "beach"), ("stands",)),
        Kind("clock", _clock, 46, 1.0, "small", _ROOM, ("ticks",)),
        Kind("lamp", _lamp, 60, 0.72, "small", _ROOM, ("stands", "glows")),
        Kind("house", _house, 88, 1.05, "ground", _TOWN, ("stands",), also=("home", "homes")),
        Kind("snowman", _snowman, 82, 0.62, "ground", ("snow",), ("stands", "smiles"), "snowmen"),
        Kind("book", _book, 36, 1.45, "small", _ROOM, ("lies",)),
    )
}
