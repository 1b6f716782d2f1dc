"""A report as data (sections of text, tables and figures) and how it is written: one HTML file, PNG, CSV, Markdown.

The HTML needs no other file and no script, and all content in it is escaped.
"""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from captioning.files import atomic_path, data_url, markdown_table, write_csv, write_text

Cell = str | int | float | None
PIXELS = 1600  # the longer side of a picture inside the page; the PNG beside the page has full size
UNKNOWN = "–"

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1c1c1a; --soft: #5c5c57; --line: #d9d9d3;
  --accent: #1f4e8c; --warn: #8a4b00; --warn-page: #fff6e5 }
@media (prefers-color-scheme: dark) {
  :root { --page: #151514; --card: #201f1e; --ink: #ebebe6; --soft: #a6a69f; --line: #3b3b38; --accent: #8fb8ee;
    --warn: #f0c070; --warn-page: #2d2412 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line) }
p { max-width: 46rem; margin: .6rem 0; overflow-wrap: anywhere } a { color: var(--accent) }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: .2rem }
.skip { position: absolute; left: -99rem }
.skip:focus { left: 1rem; top: .5rem; background: var(--card); padding: .4rem }
nav ol { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none; padding: 0; margin: 1rem 0 0 }
.world { border-left: .3rem solid var(--warn); background: var(--warn-page); padding: .5rem .8rem; max-width: none }
.missing { border: 1px dashed var(--warn); border-radius: .4rem; padding: .5rem .8rem; color: var(--warn) }
.missing code { color: var(--ink); overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: .9rem 0; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--card) }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
caption { caption-side: top; text-align: left; padding: .5rem; font-weight: 600 }
th, td { padding: .3rem .5rem; text-align: left; border-top: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600; vertical-align: bottom }
td.n, th.n { text-align: right } td.n { white-space: nowrap }
figure { margin: 1.1rem 0; background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  overflow: hidden }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff }
figcaption { padding: .5rem .8rem; font-size: .88rem; color: var(--soft); border-top: 1px solid var(--line) }
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --accent: #000;
    --warn: #6b3a00; --warn-page: #fff }
  body { max-width: none; padding: 0; font-size: 10pt } nav, .skip { display: none } .scroll { overflow: visible }
  table { font-size: 7pt } th, td { padding: .15rem .2rem } td.n, th.n { white-space: normal }
  h2, caption { break-after: avoid } figure, tr { break-inside: avoid } figure img { max-height: 22cm }
}
"""


@dataclass(frozen=True)
class Text:
    """A paragraph; ``world`` sets it off, for the one that says where the numbers come from."""

    text: str
    world: bool = False

    def html(self) -> str:
        """Return the paragraph as HTML."""
        return f"<p{' class=world' if self.world else ''}>{html.escape(self.text)}</p>\n"


@dataclass(frozen=True)
class Missing:
    """A part that is not there, and the command that makes it; one that is not ``wanted`` may be left out."""

    what: str
    remedy: str
    wanted: bool = True

    def html(self) -> str:
        """Return the note as HTML."""
        how = "Missing" if self.wanted else "Optional, and not here"
        return f'<p class="missing">{how}: {html.escape(self.what)}. <code>{html.escape(self.remedy)}</code></p>\n'


@dataclass(frozen=True)
class Table:
    """At least one row, each a dict of the same columns; floats are shown with four digits, in the CSV with all."""

    name: str
    caption: str
    rows: Sequence[Mapping[str, Cell]]

    def __post_init__(self) -> None:
        assert all(row.keys() == self.rows[0].keys() for row in self.rows), f"table {self.name}: rows differ"

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.rows[0])

    def html(self) -> str:
        """Return the table as HTML; numbers are aligned to the right."""
        numeric = {c for row in self.rows for c, cell in row.items() if isinstance(cell, int | float)}
        kind = {c: ' class="n"' if c in numeric else "" for c in self.columns}
        head = "".join(f'<th scope="col"{kind[c]}>{html.escape(c)}</th>' for c in self.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td{kind[c]}>{html.escape(shown(cell))}</td>" for c, cell in row.items()) + "</tr>\n"
            for row in self.rows
        )
        name = html.escape(self.caption)
        return (  # a wide table scrolls on its own, so it must take the keyboard's focus
            f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n"
        )

    def markdown(self) -> str:
        """Return the table as Markdown under its caption."""
        return f"{self.caption}\n\n" + markdown_table(self.columns, [map(shown, row.values()) for row in self.rows])

    def write(self, folder: Path) -> None:
        """Write CSV and Markdown into ``folder``."""
        write_csv(folder / f"{self.name}.csv", self.columns, [row.values() for row in self.rows])
        write_text(folder / f"{self.name}.md", self.markdown())


@dataclass(frozen=True)
class Figure:
    """A PNG with words for those who cannot see it."""

    name: str
    png: bytes
    alt: str
    caption: str

    def html(self) -> str:
        """Return the figure as HTML, the picture inside."""
        from PIL import Image

        with Image.open(io.BytesIO(self.png)) as image:
            url = data_url(image, PIXELS, ("png", "jpeg"))
        caption = html.escape(self.caption)
        return f'<figure><img alt="{html.escape(self.alt)}" src="{url}"><figcaption>{caption}</figcaption></figure>\n'

    def write(self, folder: Path) -> None:
        """Write the PNG into ``folder``."""
        with atomic_path(folder / f"{self.name}.png") as temporary:
            temporary.write_bytes(self.png)


Block = Text | Missing | Table | Figure


@dataclass
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """What links to the section name."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    def html(self) -> str:
        """Return the section as HTML."""
        heading = f'<h2 id="{self.anchor}">{html.escape(self.title)}</h2>\n'
        blocks = "".join(block.html() for block in self.blocks)
        return f'<section aria-labelledby="{self.anchor}">{heading}{blocks}</section>\n'


def shown(cell: Cell) -> str:
    """Return a cell as people read it."""
    if cell is None:
        return UNKNOWN
    if isinstance(cell, float):
        return f"{cell:.4f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def page(title: str, head: Sequence[Block], sections: Sequence[Section]) -> str:
    """Return the HTML file as text; ``head`` comes before the list of sections."""
    links = "".join(f'<li><a href="#{s.anchor}">{html.escape(s.title)}</a></li>' for s in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        f'<a class="skip" href="#content">Skip to the content</a><header><h1>{html.escape(title)}</h1>\n'
        + "".join(block.html() for block in head)
        + f'<nav aria-label="Sections"><ol>{links}</ol></nav></header>\n<main id="content">'
        + "".join(section.html() for section in sections)
        + "</main></body></html>\n"
    )


def write(title: str, head: Sequence[Block], sections: Sequence[Section], out: str | os.PathLike) -> Path:
    """Write the page to ``out`` and every table and figure into ``<stem>_files`` beside it; return that folder."""
    out = Path(out)
    folder = out.with_name(f"{out.stem}_files")
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Table | Figure):
            block.write(folder)
    write_text(out, page(title, head, sections))
    return folder
