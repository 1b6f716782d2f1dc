"""What scoring keeps between runs: CLIP's features of images, and the references' tokens and document frequencies.

Features are found by the content of the image file and by what encodes it; a set of references by all of its captions
and by what tokenizes and counts them, down to the source of the code. Files have a checksum. One that is damaged or
stale is reported and made again; a folder that cannot be written is reported and costs the next run its time, no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from captioning.files import sha256_of
from captioning.scoring.cider import DocumentFrequencies
from captioning.scoring.clipscore import ClipScorer, image_features
from captioning.scoring.tokenizers import ptb_tokenize
from captioning.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)

KEPT = 20  # sets of references in a folder; the one that was not used for the longest time goes first
LOADER = 2  # raised whenever data.images gives other pixels than before
SOURCES = {  # by tokenizer, the files beside this one that decide what is kept of references
    "ptb": ("tokenizers.py", "ptb.py", "cider.py"),
    "ptb-java": ("tokenizers.py", "java.py", "cider.py"),
}

Tensors = dict[str, torch.Tensor]
Texts = dict[str, str]
T = TypeVar("T")


# --- images ---------------------------------------------------------------------------------------------------------


def cached_image_features(
    scorer: ClipScorer, paths: Sequence[str | os.PathLike], batch_size: int, folder: Path
) -> torch.Tensor:
    """Return what ``clipscore.image_features`` returns, ``(n, dim)``, from ``folder`` where they are known already.

    Raises:
        OSError: a file is missing or must not be read.
        ValueError: see ``clipscore.image_features``.
    """
    made_by = (scorer.model_name, scorer.fingerprint, repr(scorer.preprocess), scorer.precision, scorer.device.type)
    maker = (*made_by, LOADER)
    file = folder / f"{_hash(maker)[:16]}.safetensors"
    digests = [sha256_of(Path(path)) for path in paths]
    known = _read(file, _features_by_image) or {}
    missing = {digest: path for digest, path in zip(digests, paths, strict=True) if digest not in known}
    log.info("image features: %d of %d images are new to %s", len(missing), len(set(digests)), file)
    if missing:
        features = image_features(scorer, list(missing.values()), batch_size)
        known.update(zip(missing, features, strict=True))
        _write(file, {"features": torch.stack(list(known.values()))}, {"images": json.dumps(list(known))})
    return torch.stack([known[digest] for digest in digests])


def _features_by_image(tensors: Tensors, texts: Texts) -> dict[str, torch.Tensor]:
    """Return {SHA-256 of an image file: its features (dim,)}."""
    if texts.keys() != {"images"}:
        raise ValueError("it is of another version")
    return dict(zip(json.loads(texts["images"]), tensors["features"], strict=True))


# --- references -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceSide:
    """What CIDEr needs of the references, whatever the predictions are."""

    tokens: dict[str, list[str]]  # by image, its captions, each as tokens joined by single spaces
    frequencies: DocumentFrequencies


def make_reference_side(references: Mapping[str, Sequence[str]], tokenizer: str) -> ReferenceSide:
    """Tokenize references and count their n-grams; errors are those of ``ptb_tokenize``."""
    tokens = ptb_tokenize(references, tokenizer)
    return ReferenceSide(tokens, DocumentFrequencies(_words(tokens.values())))


def cached_reference_side(references: Mapping[str, Sequence[str]], tokenizer: str, folder: Path) -> ReferenceSide:
    """Return what ``make_reference_side`` returns, from ``folder`` where these references are known already."""
    key = _hash([_maker(tokenizer), list(references.values())])  # an image's name changes nothing
    file = folder / f"{key[:16]}.safetensors"

    def restored(tensors: Tensors, texts: Texts) -> ReferenceSide:
        if texts != {"references": key}:
            raise ValueError("it is of other references")
        captions = iter(json.loads(tensors.pop("tokens").numpy().tobytes()))
        tokens = {stem: [next(captions) for _ in group] for stem, group in references.items()}
        counted = {name: tensor.numpy() for name, tensor in tensors.items()}
        return ReferenceSide(tokens, DocumentFrequencies.restore(_words(tokens.values()), counted))

    found = _read(file, restored)
    if found is not None:
        with contextlib.suppress(OSError):  # a folder that may only be read
            file.touch()  # used now, so it stays
        return found
    made = make_reference_side(references, tokenizer)
    captions = [caption for group in made.tokens.values() for caption in group]
    arrays = {"tokens": np.frombuffer(json.dumps(captions).encode(), dtype=np.uint8), **made.frequencies.arrays()}
    _write(file, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, {"references": key})
    with contextlib.suppress(OSError):  # another process may drop the same file
        for old in sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink()
    return made


def _maker(tokenizer: str) -> list[str]:
    """Return whatever decides tokens and counts beside the captions; Java's jar by the version of its package."""
    jar = "none"
    if tokenizer == "ptb-java":
        with contextlib.suppress(PackageNotFoundError):
            jar = version("pycocoevalcap")
    return [tokenizer, jar, *(sha256_of(Path(__file__).with_name(name)) for name in SOURCES[tokenizer])]


def _words(groups: Iterable[Sequence[str]]) -> list[list[list[str]]]:
    return [[caption.split() for caption in captions] for captions in groups]


# --- both -----------------------------------------------------------------------------------------------------------


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _read(file: Path, decode: Callable[[Tensors, Texts], T]) -> T | None:
    """Return what ``decode`` makes of a file; None where there is none, and where it is of no use, which is logged."""
    try:
        return decode(*read_tensors(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, StopIteration) as error:
        log.warning("%s is damaged or stale (%s); making it again", file, error)
        return None


def _write(file: Path, tensors: Tensors, texts: Texts) -> None:
    try:
        write_tensors(file, tensors, texts)
    except OSError as error:
        log.warning("%s: not written, so the next run computes it again (%s)", file, error)
