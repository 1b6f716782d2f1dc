"""A datastore: captions with CLIP's embedding of each, of which an image is given the nearest (SmallCap, Ramos et al.,
arXiv 2209.15323). It is a file of its own: another one is another domain, without training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from captioning.tensors import fingerprint, read_tensors, write_tensors

COMMAND = "python -m captioning.scoring.make_datastore"
REMEDY = f"make one with {COMMAND}"


@dataclass(frozen=True)
class Datastore:
    """Captions, and what finds them.

    Attributes:
        captions: M texts.
        embeddings: of each by CLIP, of unit length, float16 (M, d).
        owners: long (M,), which image of ``images`` each caption is of.
        images: SHA-256 of the images' files.
        clip: what made the embeddings, as ``ClipScorer`` names it: ``clip_model``, ``clip_weights``, ``clip_sha256``.
    """

    captions: list[str]
    embeddings: torch.Tensor
    owners: torch.Tensor
    images: list[str]
    clip: dict[str, str | None]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of all that decides what is found."""
        tensors = fingerprint({"embeddings": self.embeddings, "owners": self.owners})
        words = json.dumps([self.captions, self.images, self.clip["clip_sha256"], tensors])
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a safetensors file, atomically."""
        texts = {"captions": self.captions, "images": self.images, "clip": self.clip}
        tensors = {"embeddings": self.embeddings, "owners": self.owners}
        write_tensors(path, tensors, {"datastore": json.dumps(texts)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Datastore:
        """Read a file that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no datastore, or empty.
        """
        try:
            tensors, texts = read_tensors(path)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"--datastore {error}; {REMEDY}") from error
        try:
            content = json.loads(texts["datastore"])
            found = cls(
                content["captions"], tensors["embeddings"], tensors["owners"], content["images"], content["clip"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"--datastore {path}: not a datastore; {REMEDY}") from error
        if not found.captions or len(found.captions) != len(found.embeddings):
            raise ValueError(f"--datastore {path}: holds no captions; {REMEDY}")
        return found

    def nearest(self, queries: torch.Tensor, count: int, images: Sequence[str] | None = None) -> list[list[str]]:
        """Return the ``count`` nearest captions of B images, no text twice, the nearest first.

        Args:
            queries: CLIP's embeddings of the images, float32 (B, d).
            count: fewer are returned only where there are no more.
            images: SHA-256 of the images' files, whose own captions are left out; those of other images stay, also
                where the words are the same.
        """
        similarities = queries.float().cpu() @ self.embeddings.float().T  # (B, M)
        found = []
        for row, image in zip(similarities, images or [""] * len(queries), strict=True):
            row[self._places.get(image, [])] = -torch.inf
            left = len(row) - len(self._places.get(image, []))
            texts = self._distinct(row, min(left, 8 * count), count)
            found.append(texts if len(texts) == count else self._distinct(row, left, count))
        return found

    def _distinct(self, similarities: torch.Tensor, size: int, count: int) -> list[str]:
        order = similarities.topk(size).indices.tolist()
        return list(dict.fromkeys(self.captions[place] for place in order))[:count]

    @functools.cached_property
    def _places(self) -> dict[str, list[int]]:
        """Where the captions of each image are."""
        places: dict[str, list[int]] = {image: [] for image in self.images}
        for place, owner in enumerate(self.owners.tolist()):
            places[self.images[owner]].append(place)
        return places


def retrieved_row(captions: Sequence[Sequence[int]], length: int, eos: int) -> list[int]:
    """Return the token ids that stand for retrieved captions before an image's caption, always ``length`` of them.

    Each caption follows an EOS, as documents do where GPT-2 learned, and the nearest is next to the caption to come.
    EOS fills the rest at the beginning, so that all images have a prefix of one length and no mask is needed; those
    that do not fit as a whole are left out, the farthest first.

    Args:
        captions: token ids, the nearest first.
        length: of the row.
        eos: id of EOS.
    """
    row: list[int] = []
    for caption in captions:
        if len(row) + len(caption) + 1 > length:
            break
        row = [eos, *caption, *row]
    return [eos] * (length - len(row)) + row
