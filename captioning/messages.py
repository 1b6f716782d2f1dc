"""Lists and errors on one line, for messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def some(items: Iterable[object], most: int = 5) -> str:
    """Return the first ``most`` items with commas between and how many more there are; "none" for no items."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return (", ".join(texts[:most]) or "none") + more


def listed(items: Sequence[object]) -> str:
    """Return `` (a, b and 3 more)``, or nothing for no items."""
    return f" ({some(items)})" if items else ""


def install(extra: str) -> str:
    """Return how to install an optional part of pyproject.toml, in the version that is tested."""
    return f"`pip install -e '.[{extra}]'` in the scripts' folder"


def one_line(text: str, limit: int = 300) -> str:
    """Return ``text`` on one line, cut at ``limit`` characters: another program's message within ours."""
    return " ".join(text.split())[:limit]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error's message, or its type where it has none."""
    return one_line(str(error)).split(". ")[0].rstrip(".") or type(error).__name__


def naming(subject: object, error: BaseException) -> str:
    """Return an error's message, or where that does not name ``subject`` its first line after the name."""
    return str(error) if str(subject) in str(error) else f"{subject}: {first_line(error)}"
