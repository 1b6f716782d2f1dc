"""Which images a folder holds, by which keys, and what is passed over."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from captioning.data.images import read_suffixes
from captioning.files import composed, is_text
from captioning.messages import install, some

log = logging.getLogger(__name__)

MOST_SHOWN = 5  # names of what is passed over
HINTS = {  # by the suffix of a file that is passed over, what could be done about it
    **dict.fromkeys((".heic", ".heif", ".hif"), f"{install('heic')}, and .heic is read"),
    **dict.fromkeys((".tar", ".tgz", ".gz", ".zip"), "tars and zips are given by name, as 'DIR/*.tar'"),
}


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Return the images directly in ``folder``, as :func:`images_in` finds them."""
    return [*images_in(folder).values()]


def images_in(folder: str | os.PathLike, recursive: bool = False) -> dict[str, Path]:
    """Return ``{key: path}`` of the images in a folder, sorted by name.

    Images are told by their suffixes, in any letter case. What is passed over is counted in one line of the log, except
    for what is hidden: macOS writes ``._name.jpg`` beside ``name.jpg``, and it holds no picture.

    Args:
        folder: where.
        recursive: those in its subfolders too; their keys are like ``a/b/name``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image, two images that share a key, or a name that is not valid Unicode.
    """
    folder, others = Path(folder), PassedOver()
    names = sorted(walk(folder, recursive, others))
    others.report(folder, bool(names))
    odd = [repr(name) for name in names if not is_text(name)]
    if odd:  # results are written as UTF-8, and would fail at the end of the work
        raise ValueError(f"{folder}: names that are not valid Unicode: {some(odd)}; rename them")
    return by_key(folder, names, [folder / name for name in names])


def by_key(where: object, names: Iterable[str], paths: Iterable[Path]) -> dict[str, Path]:
    """Return ``{key: path}``, where ``names`` decide the keys.

    Raises:
        ValueError: two images share a key; ``where`` begins the message.
    """
    found: dict[str, Path] = {}
    for name, path in zip(names, paths, strict=True):
        key = key_of(name)
        other = found.setdefault(key, path)
        if other is not path:
            raise ValueError(
                f"{where}: {other.name} and {path.name} share the name {key!r} without suffix, by which "
                "predictions are keyed; rename or remove one, or choose by a glob such as '*.jpg'"
            )
    return found


def key_of(name: str) -> str:
    """Return the key of an image: its name, perhaps with folders, without the suffix and in one form of Unicode."""
    return composed(os.path.splitext(name)[0])  # noqa: PTH122 - a Path each would take most of the time


def on_disk(path: Path) -> Path:
    """Return ``path``; where there is no such file, the one whose name is the same in another form of Unicode."""
    if str(path).isascii() or path.exists():
        return path
    folder = on_disk(path.parent)
    if not folder.is_dir():
        return path
    return folder / _by_form(folder, folder.stat().st_mtime_ns).get(composed(path.name), path.name)


@functools.lru_cache(maxsize=4)
def _by_form(folder: Path, _: int) -> dict[str, str]:
    """Return a folder's names by their composed form, where that is another; remembered until the folder changes."""
    return {form: entry.name for entry in folder.iterdir() if (form := composed(entry.name)) != entry.name}


def walk(folder: Path, recursive: bool, others: PassedOver) -> Iterator[str]:
    """Yield the images in a folder, by their names in it with ``/`` between, in no order; count what else there is.

    A dangling link counts as an image, so that reading it fails by name instead of dropping it silently.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    yield from _walk(folder, "", recursive, others, ())


def _walk(folder: Path, inside: str, recursive: bool, others: PassedOver, above: tuple[Path, ...]) -> Iterator[str]:
    above = (*above, (folder / inside).resolve())
    with os.scandir(folder / inside) as listing:
        for entry in listing:
            name = inside + entry.name
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if recursive and Path(entry.path).resolve() not in above:  # a link may lead back
                    yield from _walk(folder, f"{name}/", recursive, others, above)
                else:
                    others.add(f"{name}/")
            elif is_image(name):
                yield name
            else:
                others.add(name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image: not where it is hidden."""
    return _suffix(name) in read_suffixes() and not name.rpartition("/")[2].startswith(".")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - as in key_of


@dataclass
class PassedOver:
    """What a walk leaves out."""

    files: int = 0
    folders: int = 0
    names: list[str] = field(default_factory=list)  # the first ones
    hints: set[str] = field(default_factory=set)  # what could be done about it

    def add(self, name: str) -> None:
        """Count a file, or a folder, whose name ends in a slash."""
        if name.endswith("/"):
            self.folders += 1
            self.hints.add("--recursive takes subfolders")
        else:
            self.files += 1
            self.hints.update(hint for suffix, hint in HINTS.items() if suffix == _suffix(name))
        self.names = sorted([*self.names, name])[:MOST_SHOWN]

    def report(self, folder: Path, found: bool) -> None:
        """Log what was passed over, if anything was. Raises ValueError where no image was found beside it."""
        if not found:
            raise ValueError(
                f"{folder}: no image here; expected .jpg, .png or any other suffix that Pillow reads"
                + (f"; {self}" if self.names else "")
            )
        if self.names:
            log.warning("%s: %s", folder, self)

    def __str__(self) -> str:
        counts = [f"{n} {what}{'s' * (n > 1)}" for n, what in ((self.files, "file"), (self.folders, "subfolder")) if n]
        more = self.files + self.folders - len(self.names)
        names = ", ".join(self.names) + (f" and {more} more" if more else "")
        return "; ".join([f"{' and '.join(counts)} passed over: {names}", *sorted(self.hints)])
