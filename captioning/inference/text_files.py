"""Captions as text files, one for each picture, as trainers of image generators read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from captioning.files import check_writable, write_text
from captioning.inference.batches import Entry
from captioning.messages import some


class TextFiles:
    """The ``.txt`` files of a run.

    Args:
        place: the folder that holds them; None puts each beside its picture.
        overwrite: replace files that are there.
    """

    def __init__(self, place: Path | None, overwrite: bool = False) -> None:
        self.place, self.overwrite = place, overwrite

    def file_of(self, image: Entry) -> Path:
        """Return where an image's caption goes; with a folder, keys with folders in them have subfolders there."""
        if self.place is not None:
            return self.place / f"{image.key}.txt"
        assert isinstance(image.source, Path)
        return image.source.with_suffix(".txt")

    def check(self, images: Sequence[Entry], captions: Mapping[str, str]) -> None:
        """Refuse, before any work, what could not be written at its end.

        Raises:
            ValueError: a file is there that is none of this run's ``captions``, or a folder cannot be written.
        """
        files = {self.file_of(image): image.key for image in images}
        if not self.overwrite:
            kept = [file for file, key in files.items() if file.exists() and not _says(file, captions.get(key))]
            if kept:
                names = some([str(file) for file in kept])
                raise ValueError(f"--txt: there already: {names}; give --overwrite to replace them, or a folder")
        for folder in {file.parent for file in files}:
            check_writable(folder, "--txt")

    def write(self, images: Sequence[Entry], captions: Mapping[str, str]) -> None:
        """Write the captions that there are."""
        for image in images:
            if image.key in captions:
                file = self.file_of(image)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, captions[image.key] + "\n")


def _says(file: Path, caption: str | None) -> bool:
    """Whether a file holds this caption, as after a run that was killed while it wrote them."""
    return caption is not None and file.is_file() and file.read_bytes() == f"{caption}\n".encode()
