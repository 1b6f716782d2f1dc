"""One-coloured pictures and a captioner that says their grey level."""

import io

from PIL import Image


def picture(level):
    """A one-coloured PNG; its grey level is its caption."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def grey(image):
    return image.getpixel((0, 0))[0]


def say(levels):
    return [f"level {level}" for level in levels]


class Interrupted(Exception):  # noqa: N818 - stands for KeyboardInterrupt
    """Stands for a kill."""


def breaking_after(calls, seen=None):
    """Return a captioner that stops the run at the batch after ``calls``, and adds to ``seen`` what it captioned."""
    seen = [] if seen is None else seen
    left = iter(range(calls))

    def caption(levels):
        if next(left, None) is None:
            raise Interrupted
        seen.extend(levels)
        return say(levels)

    return caption
