"""Which image a name or a number means: in a caption file, in predictions, and in a folder."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from captioning.data.formats import ImageCaptions
from captioning.data.images import IMAGE_SUFFIXES
from captioning.files import composed
from captioning.messages import some

NAMES_ARE = ("auto", "names", "ids")  # what predictions may call images by


def without_suffix(name: str) -> str:
    """Return a name without its suffix, if that is one of images: a key may have a dot in it."""
    head, dot, suffix = name.rpartition(".")
    return head if head and dot + suffix.lower() in IMAGE_SUFFIXES else name


def number_of(name: str) -> int | None:
    """Return the number that a name ends in, as the names of COCO's images end in their ids."""
    match = re.search(r"(?:^|[^0-9])([0-9]{1,18})$", without_suffix(name))
    return int(match[1]) if match else None


def keys_of(where: object, names: Sequence[str]) -> list[str]:
    """Return each image's key: its name without folder and suffix, or without suffix alone where two would be the same.

    Raises:
        ValueError: two images share even that; ``where`` begins the message.
    """
    paths = [without_suffix(composed(name)) for name in names]
    for keys in ([path.rpartition("/")[2] for path in paths], paths):
        if len(set(keys)) == len(keys):
            return keys
    seen: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        if path in seen:
            raise ValueError(
                f"{where}: {seen[path]} and {name} share the name {path!r} without suffix, by which predictions "
                "are keyed; rename or remove one"
            )
        seen[path] = name
    raise AssertionError("some two are the same")


class Names:
    """The images of annotations, found by what predictions call them.

    Args:
        file_names: each image's name by key, perhaps with folders, perhaps without suffix.
        ids: numbers by key.
    """

    def __init__(self, file_names: Mapping[str, str], ids: Mapping[str, int]) -> None:
        self._file_names = file_names
        self._by_id = {number: key for key, number in ids.items()}
        self._whole: dict[str, str] = {}
        self._ends: defaultdict[str, list[str]] = defaultdict(list)
        for key, name in file_names.items():
            for form in dict.fromkeys((composed(name), without_suffix(composed(name)))):
                self._whole[form] = key
                for end in _ends(form):
                    self._ends[end].append(key)
        self._nameless = {int(name): key for key, name in file_names.items() if re.fullmatch("[0-9]{1,18}", name)}

    def keys(self, source: object, images: Sequence[ImageCaptions], names_are: str = "auto") -> list[str | None]:
        """Return the keys of the images that predictions are of, None where there is no such image.

        By ``auto`` all are called by name or all by id if only one of the two makes sense of every one; else each by
        whichever does. A number, as in COCO's results, is an id rather than a name.

        Raises:
            ValueError: a name could mean two images, or is the name of one and the id of another.
        """
        numbered = [None if names_are == "names" else self._by_number(image) for image in images]
        named = [[] if names_are == "ids" else self._by_name(image.name) for image in images]
        if all(numbered) and not all(len(keys) == 1 for keys in named):
            return numbered
        if all(len(keys) == 1 for keys in named) and not all(numbered):
            return [keys[0] for keys in named]
        return [self._one(source, *each) for each in zip(images, numbered, named, strict=True)]

    def _by_number(self, image: ImageCaptions) -> str | None:
        is_number = re.fullmatch("0|[1-9][0-9]{0,17}", image.name)
        return self._by_id.get(int(image.name)) if is_number else None

    def _by_name(self, name: str) -> list[str]:
        """Return the images whose name ends as ``name`` does, by the longest end that any has."""
        for end in _ends(composed(name)):
            for form in (end, without_suffix(end)):
                if form in self._whole:
                    return [self._whole[form]]
                if form in self._ends:
                    return self._ends[form]
        number = number_of(name)
        key = None if number is None else self._nameless.get(number)
        return [key] if key else []

    def _one(self, source: object, image: ImageCaptions, number: str | None, names: list[str]) -> str | None:
        if number is None and len(names) > 1:
            raise ValueError(
                f"{source}: {image.name!r} could be {some(self._file_names[key] for key in names)}; give the folder too"
            )
        if number is None or not names or image.id is not None:
            return number or (names[0] if names else None)
        if names != [number]:
            raise ValueError(
                f"{source}: {image.name!r} could be the id of {self._file_names[number]} and the name of "
                f"{self._file_names[names[0]]}; say which by --pred-keys ids or names, or write names with suffix"
            )
        return number


def _ends(name: str) -> Iterator[str]:
    """Yield a path and its ends, the longest first: ``a/b/c``, ``b/c``, ``c``."""
    parts = name.split("/")
    yield from ("/".join(parts[start:]) for start in range(len(parts)))


def find_files(where: str, names: Mapping[str, str], root: Path) -> dict[str, Path]:
    """Return the file of each image by key: ``root/name`` where that is there, or what else could be meant.

    That is, in its folder or directly in ``root``, the one file whose name is the same in another form of Unicode or
    has another suffix; for a name that is a number, the one whose name ends in it. A path that is not there stays.

    Raises:
        ValueError: there are several such files; ``where`` begins the message.
    """
    listing = functools.cache(_listing)
    paths = {}
    for key, name in names.items():
        path = paths[key] = root / name
        if path.is_file():
            continue
        found = next(filter(None, (_meant(path.name, listing(f)) for f in dict.fromkeys((path.parent, root)))), [])
        if len(found) > 1:
            choice = " and ".join(sorted(twin.name for twin in found))
            raise ValueError(f"{where}: {path.name} is not there; {choice} could be meant")
        paths[key] = found[0] if found else path
    return paths


def _listing(folder: Path) -> dict[str | int, list[Path]]:
    """Return the images in a folder by name, by name without suffix, and by the number that it ends in."""
    found: defaultdict[str | int, list[Path]] = defaultdict(list)
    for path in folder.iterdir() if folder.is_dir() else ():
        if without_suffix(path.name) != path.name:
            name, number = composed(path.name), number_of(path.name)
            forms: list[str | int] = [name, without_suffix(name), *([] if number is None else [number])]
            for form in forms:
                found[form].append(path)
    return found


def _meant(name: str, files: Mapping[str | int, list[Path]]) -> list[Path]:
    stem = without_suffix(composed(name))
    same = files.get(composed(name)) or files.get(stem) or []
    return same if same or not stem.isdecimal() else files.get(int(stem), [])
