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
SHORT, WIDE = 12, 12  # rows of a table that is printed on one page; columns of one that is printed small
UNKNOWN = "–"
MISSING = ("not-here-yet", "Not here yet")  # anchor and title of the last chapter
MISSING_TEXT = "What the folder of runs lacks, each part with the command that makes it:"

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no network and no script


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
        """Return the item of the list of missing parts as HTML."""
        what = html.escape(self.what if self.wanted else f"{self.what} (optional)")
        return f"<li>{what}<br><code>{html.escape(self.remedy)}</code></li>\n"


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
        cells = {c: [row[c] for row in self.rows if row[c] is not None] for c in self.columns}
        kind = {c: ' class="n"' if all(map(_is_number, found)) else "" for c, found in cells.items()}
        head = "".join(f'<th scope="col"{kind[c]}>{html.escape(c)}</th>' for c in self.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td{kind[c]}>{html.escape(shown(cell))}</td>" for c, cell in row.items()) + "</tr>\n"
            for row in self.rows
        )
        name = html.escape(self.caption)
        size = " short" * (len(self.rows) <= SHORT) + " wide" * (len(self.columns) > WIDE)
        return (  # a wide table scrolls on its own, so it must take the keyboard's focus
            f'<div class="scroll{size}" tabindex="0" role="region" aria-label="{name}"><table>'
            f"<caption><span>{name}</span></caption><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n"
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
    """A PNG with words for those who cannot see it; in a row it needs no caption of its own."""

    name: str
    png: bytes
    alt: str
    caption: str = ""

    def html(self) -> str:
        """Return the figure as HTML, the picture inside."""
        from PIL import Image

        with Image.open(io.BytesIO(self.png)) as image:
            url = data_url(image, PIXELS, ("png", "jpeg"))
        caption = f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure><img alt="{html.escape(self.alt)}" src="{url}">{caption}</figure>\n'

    def write(self, folder: Path) -> None:
        """Write the PNG into ``folder``."""
        with atomic_path(folder / f"{self.name}.png") as temporary:
            temporary.write_bytes(self.png)


@dataclass(frozen=True)
class Row:
    """Figures beside each other where the window is wide enough, and words on all of them."""

    figures: Sequence[Figure]
    caption: str

    def html(self) -> str:
        """Return the figures as one."""
        pictures = "".join(figure.html() for figure in self.figures)
        caption = html.escape(self.caption)
        return f'<figure class="row"><div>\n{pictures}</div><figcaption>{caption}</figcaption></figure>\n'

    def write(self, folder: Path) -> None:
        """Write each PNG into ``folder``."""
        for figure in self.figures:
            figure.write(folder)


Block = Text | Missing | Table | Figure | Row


@dataclass
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """What links to the section name."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def shown(self) -> list[Block]:
        """The blocks that are there; what is missing stands at the end of the page, of all sections together."""
        return [block for block in self.blocks if not isinstance(block, Missing)]

    @property
    def missing(self) -> list[Missing]:
        """The parts that are not there."""
        return [block for block in self.blocks if isinstance(block, Missing)]

    def html(self) -> str:
        """Return the section as HTML."""
        return _chapter(self.anchor, self.title, "".join(block.html() for block in self.shown))


def _chapter(anchor: str, title: str, content: str) -> str:
    heading = f'<h2 id="{anchor}">{html.escape(title)}</h2>\n'
    return f'<section aria-labelledby="{anchor}">{heading}{content}</section>\n'


def _missing(sections: Sequence[Section]) -> str:
    """Return what ``sections`` lack as one list, by section."""
    parts = [f"<h3>{html.escape(s.title)}</h3>\n<ul>{''.join(b.html() for b in s.missing)}</ul>\n" for s in sections]
    return f'<p>{MISSING_TEXT}</p>\n<div class="missing">{"".join(parts)}</div>\n'


def _is_number(cell: Cell) -> bool:
    """Whether a cell is a number, or a mean of some."""
    return not isinstance(cell, str) or re.fullmatch(r"-?\d+\.\d+( ± \d+\.\d+)?", cell) is not None


def shown(cell: Cell) -> str:
    """Return a cell as people read it."""
    if cell is None:
        return UNKNOWN
    if isinstance(cell, float):
        return f"{cell:.4f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def page(title: str, head: Sequence[Block], sections: Sequence[Section]) -> str:
    """Return the HTML file as text; ``head`` comes first, and a section that has nothing to show is left out."""
    there, lacking = [s for s in sections if s.shown], [s for s in sections if s.missing]
    entries = [(s.anchor, s.title) for s in there] + ([MISSING] if lacking else [])
    links = "".join(f'<li><a href="#{anchor}">{html.escape(name)}</a></li>' for anchor, name in entries)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n<body>\n"
        f'<a class="skip" href="#content">Skip to the content</a><header><h1>{html.escape(title)}</h1>\n'
        + "".join(block.html() for block in head)
        + f'</header>\n<nav aria-label="Contents"><ol>{links}</ol></nav>\n<main id="content">'
        + "".join(section.html() for section in there)
        + (_chapter(*MISSING, _missing(lacking)) if lacking else "")
        + "</main></body></html>\n"
    )


def write(title: str, head: Sequence[Block], sections: Sequence[Section], out: str | os.PathLike) -> Path:
    """Write the page to ``out`` and every table and figure into ``<stem>_files`` beside it; return that folder."""
    out = Path(out)
    folder = out.with_name(f"{out.stem}_files")
    for block in (*head, *(block for section in sections for block in section.blocks)):
        if isinstance(block, Table | Figure | Row):
            block.write(folder)
    write_text(out, page(title, head, sections))
    return folder
