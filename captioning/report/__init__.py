"""The whole report as one HTML file.

``document`` has sections, tables and figures as data, and writes them, styled by ``page.css``; ``sections`` and
``study_sections`` fill them from what is in a folder of runs, with ``curves``; ``first_picture`` is the page's head.
"""

from captioning.report.document import Figure, Section, Table, write

__all__ = ["Figure", "Section", "Table", "write"]
