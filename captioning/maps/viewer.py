"""The viewer: one self-contained HTML page on which a word of a caption shows what it looked at.

The page needs no network and allows itself none (its content security policy names its own script by hash). Whatever
comes from captions, notes and file names reaches it as JSON and is shown as text, never as markup. The markup, the
style and the script are in viewer.html beside this file; colours are those of `figures`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captioning.data.images import load_image
from captioning.files import data_url, write_text
from captioning.maps import figures
from captioning.maps.attention import Explained, View

TEMPLATE = Path(__file__).with_name("viewer.html")
PHOTO_SIDE = 800  # pixels of the longer side, at most
IN_SCRIPT = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "<>&"})  # so that no text can end its <script>


def page(items: Sequence[Explained], title: str) -> str:
    """Return the page of ``items`` as HTML.

    A view costs a byte (in base64 four thirds) a word and cell, a photograph 50 to 150 kB. ``page.html#item=1&word=3``
    opens it at a word; both count from 0.

    Raises:
        OSError: an image is missing or must not be read.
        ValueError: no item is given, an image is damaged, or maps, masses or window do not fit (`figures.check`).
    """
    if not items:
        raise ValueError(f"{title}: no explained image to show; give at least one")
    template = TEMPLATE.read_text(encoding="utf-8")
    content = {"palette": _base64(figures.palette().tobytes()), "items": [_item(item) for item in items]}
    parts = {
        "title": html.escape(figures.line(title)),
        "policy": _policy(re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]),
        "data": json.dumps(content, allow_nan=False, separators=(",", ":")).translate(IN_SCRIPT),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)  # in one pass: a title may hold {{data}}


def write(items: Sequence[Explained], out: str | os.PathLike, title: str) -> None:
    """Write the page of ``items`` to ``out``, atomically. Raises what `page` raises."""
    write_text(out, page(items, title))


def _policy(script: str) -> str:
    """A content security policy that lets the page run its own ``script`` and load nothing."""
    digest = _base64(hashlib.sha256(script.encode("utf-8")).digest())
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _item(explained: Explained) -> dict[str, Any]:
    """What the page needs of one image; the window as shares of the image's width and height."""
    figures.check(explained)
    photo = load_image(explained.path)
    figures.check_window(explained, photo.size)
    mass = explained.image_mass
    return {
        "file": explained.path.name,
        "caption": explained.caption,
        "words": list(explained.words),
        "notes": "  ·  ".join([explained.model, *(f"{name} {value}" for name, value in explained.notes.items())]),
        "aspect": photo.width / photo.height,
        "window": np.divide(explained.window, photo.size * 2).clip(0, 1).tolist(),
        "mass": None if mass is None else np.asarray(mass).round(4).tolist(),
        "views": [_view(view) for view in explained.views],
        "photo": data_url(photo, PHOTO_SIDE),
    }


def _view(view: View) -> dict[str, Any]:
    """A view with its maps as bytes: 255 is ``peak``, the largest value; the colours end at ``end``."""
    peak = float(view.maps.max()) or 1.0
    levels = (view.maps / peak * 255).round().astype(np.uint8)
    return {
        "method": view.method,
        "layers": view.layers,
        "heads": view.heads,
        "grid": list(view.maps.shape[1:]),
        "peak": peak,
        "end": figures.scale_end(view.maps),
        "maps": _base64(levels.tobytes()),
    }


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
