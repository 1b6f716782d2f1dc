"""One self-contained HTML page of captions under their pictures: the best, the worst and some random ones."""

from __future__ import annotations

import html
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence

from captioning.data.images import load_image
from captioning.files import data_url

log = logging.getLogger(__name__)

SHOWN = 12  # images in a section
PIXELS = 360  # the longer side of a picture on the page, at most

STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --ink: #1d1d1b; --soft: #5f5f5a; --line: #dcdcd6 }
@media (prefers-color-scheme: dark) {
  :root { --page: #161615; --card: #21211f; --ink: #ecece8; --soft: #a3a39c; --line: #3a3a37 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem; background: var(--page); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .75rem }
p.scores { font: .95rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; margin: .15rem 0 }
p.origin { color: var(--soft); overflow-wrap: anywhere; margin: .5rem 0 }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1rem;
  list-style: none; margin: 0; padding: 0 }
ol > li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden }
img { display: block; width: 100%; height: 13rem; object-fit: contain; background: var(--line) }
div.text { padding: .75rem } div.text p { margin: 0; overflow-wrap: anywhere }
p.caption { font-weight: 600 } p.numbers, summary, p.name { color: var(--soft); font-size: .85rem }
details { margin-top: .4rem } details ul { margin: .3rem 0 0; padding-left: 1.1rem; font-size: .9rem }
"""


def page(
    ranking: Mapping[str, Mapping[str, float | str | list[str]]],
    references: Mapping[str, Sequence[str]],
    paths: Mapping[str, str | os.PathLike],
    scores: Iterable[str],
    origin: str,
    seed: int = 0,
) -> tuple[str, list[str]]:
    """Return the page as text, and the images whose pictures cannot be read: those are named on it and in the log.

    Args:
        ranking: by image, its scores, its ``caption`` and CHAIR's objects, best first (``Evaluation.ranking``).
        references: by image, its references.
        paths: by image, its file.
        scores: the lines with the results.
        origin: what made the numbers.
        seed: of the random choice.
    """
    images = list(ranking)
    best, others = images[:SHOWN], images[SHOWN:]
    worst, rest = others[::-1][:SHOWN], others[:-SHOWN]
    drawn = random.Random(seed).sample(rest, min(SHOWN, len(rest)))
    sections, unreadable = "", []
    for title, shown in [("Best", best), ("Worst, from the end", worst), ("Random, of the others", drawn)]:
        if shown:
            pictures = {image: _picture(paths[image]) for image in shown}
            unreadable += [image for image, picture in pictures.items() if not picture]
            cards = "".join(_card(image, ranking[image], references[image], pictures[image]) for image in shown)
            sections += f"<h2>{title}: {len(shown)} of {len(images)}</h2>\n<ol>\n{cards}</ol>\n"
    lines = "".join(f'<p class="scores">{html.escape(line)}</p>\n' for line in scores)
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Captions</title><style>{STYLE}</style></head>\n<body><h1>Captions</h1>\n{lines}"
        f'<p class="origin">{html.escape(origin)}</p>\n{sections}</body></html>\n'
    )
    return text, unreadable


def _picture(path: str | os.PathLike) -> str:
    """Return a picture as a ``data:`` URL; nothing where it cannot be read, which is logged."""
    try:
        return data_url(load_image(path), PIXELS)
    except (ValueError, OSError) as error:
        log.error("not shown: %s", error)
        return ""


def _card(image: str, row: Mapping[str, float | str | list[str]], references: Sequence[str], picture: str) -> str:
    caption = str(row["caption"]).strip() or "(empty)"
    numbers = " · ".join(f"{metric} {score:.3f}" for metric, score in row.items() if isinstance(score, float))
    wrong = row.get("objects not there")
    if isinstance(wrong, list) and wrong:
        numbers += f" · not there: {', '.join(wrong)}"
    listed = "".join(f"<li>{html.escape(reference)}</li>" for reference in references)
    name, caption = html.escape(image), html.escape(caption)
    shown = f'<img alt="{caption}" loading="lazy" src="{picture}">' if picture else "<p>The picture cannot be read.</p>"
    return (
        f'<li>{shown}<div class="text">'
        f'<p class="caption">{caption}</p><p class="numbers">{html.escape(numbers)}</p><p class="name">{name}</p>'
        f"<details><summary>{len(references)} references</summary><ul>{listed}</ul></details></div></li>\n"
    )
