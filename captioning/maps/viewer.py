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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from captioning.files import data_url, write_text
from captioning.maps import figures
from captioning.maps.attention import METHODS, Explanation, WordMaps

TEMPLATE = Path(__file__).with_name("viewer.html")
PHOTO_SIDE = 800  # pixels of the longer side, at most
IN_SCRIPT = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "<>&"})  # so that no text can end its <script>


Offer = Mapping[str, Mapping[str, Sequence[str]]]  # by method its ``layers`` and ``heads``


def page(items: Sequence[Explanation], title: str, offer: Offer | None = None) -> str:
    """Return the page of ``items`` as HTML.

    It has the maps that they have. ``offer`` are those that it asks for when they are chosen, of the function
    ``supply`` that whoever shows the page has set in it: of a method, layers and heads it returns what :func:`view`
    does.

    A set of maps takes one byte (in base64 four thirds) per word and cell, a photograph 50 to 150 kB.
    ``page.html#item=1&word=3`` opens the page at a word; both count from 0.

    Raises:
        OSError: an image is missing or must not be read.
        ValueError: no item is given, an image is damaged, or maps, masses or window do not fit.
    """
    if not items:
        raise ValueError(f"{title}: no explained image to show; give at least one")
    template = TEMPLATE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    content = {
        "palette": _base64(figures.palette().tobytes()),
        "methods": {name: {"about": method.about, "slow": method.slow} for name, method in METHODS.items()},
        "offer": [{"method": method, **choices} for method, choices in (offer or {}).items()],
        "items": [_item(item) for item in items],
    }
    parts = {
        "title": html.escape(figures.line(title)),
        "policy": _policy(script),
        "data": json.dumps(content, allow_nan=False, separators=(",", ":")).translate(IN_SCRIPT),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)  # in one pass: a title may hold {{data}}


def write(items: Sequence[Explanation], out: str | os.PathLike, title: str) -> None:
    """Write the page of ``items`` to ``out``, atomically. Raises what `page` raises."""
    write_text(out, page(items, title))


def _policy(script: str) -> str:
    """Return a content security policy that lets the page run its own ``script`` and load nothing."""
    digest = _base64(hashlib.sha256(script.encode("utf-8")).digest())
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _item(explanation: Explanation) -> dict[str, Any]:
    """Return what the page needs of one image; the window as shares of the image's width and height."""
    photo = figures.checked_photo(explanation)
    mass, notes = explanation.image_mass, [f"{name} {value}" for name, value in explanation.notes.items()]
    return {
        "file": explanation.path.name,
        "caption": explanation.caption,
        "words": list(explanation.words),
        "notes": "  ·  ".join([figures.MODELS[explanation.model], *notes]),
        "aspect": photo.width / photo.height,
        "window": np.divide(explanation.window, photo.size * 2).clip(0, 1).tolist(),
        "mass": None if mass is None else np.asarray(mass).round(4).tolist(),
        "views": [view(word_maps) for word_maps in explanation.word_maps],
        "photo": data_url(photo, PHOTO_SIDE),
    }


def view(word_maps: WordMaps) -> dict[str, Any]:
    """Return the maps by one spec as bytes: 255 is ``peak``, the largest value; the colours end at ``end``.

    Layers and heads are empty where the method has none to choose.
    """
    spec, maps = word_maps.spec, word_maps.maps
    choices = {"layers": "", "heads": "", **spec.choices()}
    peak = float(maps.max()) or 1.0
    return {
        "method": spec.method,
        **choices,
        "grid": list(maps.shape[1:]),
        "peak": peak,
        "end": figures.scale_end(maps),
        "maps": _base64((maps / peak * 255).round().astype(np.uint8).tobytes()),
    }


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
