"""How long a piece of work took, for the log and for benchmarks."""

from __future__ import annotations

import logging
import time
from typing import Any


class Timer:
    """Times a piece of work from now on.

    Args:
        work: what is done, as ``caption`` or ``train``.
    """

    def __init__(self, work: str) -> None:
        self.work, self._started = work, time.perf_counter()

    def report(self, log: logging.Logger, count: int, message: str, *args: Any, level: int = logging.INFO) -> None:
        """Log ``message % (*args, count)`` and the seconds; bench/measured.py collects ``(work, count, seconds)``."""
        seconds = time.perf_counter() - self._started
        log.log(level, f"{message} in %.1f s", *args, count, seconds, extra={"work": (self.work, count, seconds)})
