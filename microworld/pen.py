"""Draw shapes in unit coordinates of a box, in one colour and its shades."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageDraw

RGB = tuple[int, int, int]
STEEL: RGB = (150, 156, 166)
TYRE: RGB = (48, 48, 54)


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """Return colour ``a`` moved towards ``b`` by ``share`` (0 keeps ``a``, 1 gives ``b``)."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


class Pen:
    """Draws shapes in unit coordinates of one box, mirrored when ``flip``, in ``colour`` and its shades."""

    def __init__(self, draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], colour: RGB, flip: bool):
        self.draw, self.flip = draw, flip
        self.x0, self.y0, self.w, self.h = box
        self.main = colour
        self.dark = mix(colour, (10, 10, 20), 0.38)
        self.light = mix(colour, (255, 255, 255), 0.4 if sum(colour) > 200 else 0.25)
        self.edge = max(2, round(0.018 * min(self.w, self.h)))

    def _xy(self, x: float, y: float) -> tuple[float, float]:
        return self.x0 + (1 - x if self.flip else x) * self.w, self.y0 + y * self.h

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> list[float]:
        (ax, ay), (bx, by) = self._xy(x0, y0), self._xy(x1, y1)
        return [min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)]

    def poly(self, points: Sequence[tuple[float, float]], fill: RGB | None = None, edge: bool = True) -> None:
        """Fill a polygon; with ``edge`` outline it in a darker shade."""
        fill = fill or self.main
        xy = [self._xy(*p) for p in points]
        self.draw.polygon(xy, fill=fill)
        if edge:
            self.draw.line([*xy, xy[0]], fill=mix(fill, (10, 10, 20), 0.38), width=self.edge, joint="curve")

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None = None, edge: bool = True) -> None:
        """Fill the ellipse inside the given box."""
        fill = fill or self.main
        outline = mix(fill, (10, 10, 20), 0.38) if edge else None
        self.draw.ellipse(self._box(x0, y0, x1, y1), fill=fill, outline=outline, width=self.edge)

    def rect(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        fill: RGB | None = None,
        radius: float = 0.0,
        edge: bool = True,
    ) -> None:
        """Fill a rectangle whose corners are rounded by ``radius`` of the box's shorter side."""
        fill = fill or self.main
        outline = mix(fill, (10, 10, 20), 0.38) if edge else None
        self.draw.rounded_rectangle(
            self._box(x0, y0, x1, y1), radius * min(self.w, self.h), fill=fill, outline=outline, width=self.edge
        )

    def line(self, points: Sequence[tuple[float, float]], width: float = 0.05, fill: RGB | None = None) -> None:
        """Draw an open line of ``width`` times the box's shorter side."""
        pixels = max(2, round(width * min(self.w, self.h)))
        self.draw.line([self._xy(*p) for p in points], fill=fill or self.main, width=pixels, joint="curve")

    def arc(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        start: float,
        end: float,
        width: float = 0.05,
        fill: RGB | None = None,
    ) -> None:
        """Draw the arc of an ellipse, degrees clockwise from three o'clock."""
        if self.flip:
            start, end = 180 - end, 180 - start
        pixels = max(2, round(width * min(self.w, self.h)))
        self.draw.arc(self._box(x0, y0, x1, y1), start, end, fill=fill or self.main, width=pixels)

    def wheel(self, x: float, y: float, r: float, hub: RGB = STEEL) -> None:
        """Draw a tyre with a hub; ``r`` is a share of the box's height."""
        rx = r * self.h / self.w
        self.oval(x - rx, y - r, x + rx, y + r, TYRE)
        self.oval(x - rx * 0.45, y - r * 0.45, x + rx * 0.45, y + r * 0.45, hub, edge=False)

    def eye(self, x: float, y: float, r: float = 0.025) -> None:
        """Draw a dark eye with a light ring, visible on every colour."""
        rx = r * self.h / self.w
        self.oval(x - 1.6 * rx, y - 1.6 * r, x + 1.6 * rx, y + 1.6 * r, (250, 250, 250), edge=False)
        self.oval(x - rx, y - r, x + rx, y + r, (20, 20, 24), edge=False)
