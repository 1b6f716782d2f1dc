"""The whole report as one HTML file.

``document`` has sections, tables and figures as data, and writes them; ``sections`` and ``study_sections`` fill them
from what is in a folder of runs.
"""

from captioning.report.document import Figure, Section, Table, write

__all__ = ["Figure", "Section", "Table", "write"]
