"""The reference side of CIDEr, kept between runs: the references' tokens and their n-grams' document frequencies.

Found again by the content of all references and by what tokenizes and counts them: its name, its version and the
source of the code. One file holds one set of references, with a checksum. A file that is damaged, or that is another
set's, is named and made anew; a folder that cannot be written is named and costs the next run its time, no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from captioning.scoring.cider import DocumentFrequencies
from captioning.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)

KEPT = 20  # sets of references in a folder; those not used for the longest time go
SOURCES = {"ptb": ("ptb", "cider"), "ptb-java": ("ptb", "coco_metrics", "cider")}  # modules that decide what is kept


@dataclass(frozen=True)
class ReferenceSide:
    """What CIDEr needs of the references, whatever the predictions are."""

    tokens: dict[str, list[str]]  # by image; each caption's tokens with single spaces between
    frequencies: DocumentFrequencies


Tokenize = Callable[[Mapping[str, Sequence[str]]], dict[str, list[str]]]


def make_reference_side(references: Mapping[str, Sequence[str]], tokenize: Tokenize) -> ReferenceSide:
    """Tokenize references and count their n-grams; errors are those of ``tokenize``."""
    tokens = tokenize(references)
    return ReferenceSide(tokens, DocumentFrequencies(_words(tokens.values())))


def cached_reference_side(
    references: Mapping[str, Sequence[str]], tokenizer: str, tokenize: Tokenize, folder: Path
) -> ReferenceSide:
    """Return what ``make_reference_side`` returns, from ``folder`` where these references are known already."""
    key = _key(references, tokenizer)
    file = folder / f"{key[:16]}.safetensors"
    found = _read(file, key, references)
    if found is not None:
        log.debug("references: tokens and document frequencies from %s", file)
        return found
    made = make_reference_side(references, tokenize)
    try:
        _write(file, key, made)
        _drop_oldest(folder)
    except OSError as error:
        log.warning("%s: not written, so the next run tokenizes the references again (%s)", file, error)
    return made


def _key(references: Mapping[str, Sequence[str]], tokenizer: str) -> str:
    """Name whatever decides the tokens and counts; an image's name is not among it."""
    maker = [tokenizer]
    if tokenizer == "ptb-java":
        try:
            maker.append(version("pycocoevalcap"))  # whose jar it is
        except PackageNotFoundError:
            maker.append("none")
    for name in SOURCES[tokenizer]:
        source = Path(importlib.import_module(f"captioning.scoring.{name}").__file__).read_bytes()
        maker.append(hashlib.sha256(source).hexdigest())
    return hashlib.sha256(json.dumps([maker, [list(group) for group in references.values()]]).encode()).hexdigest()


def _read(file: Path, key: str, references: Mapping[str, Sequence[str]]) -> ReferenceSide | None:
    try:
        tensors, texts = read_tensors(file)
        if texts != {"references": key}:  # also where the checksum's name is damaged: it is then left among the texts
            raise ValueError("it is of other references")
        flat = iter(json.loads(tensors.pop("tokens").numpy().tobytes()))
        tokens = {stem: [next(flat) for _ in group] for stem, group in references.items()}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        side = ReferenceSide(tokens, DocumentFrequencies.restore(_words(tokens.values()), arrays))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, StopIteration) as error:
        log.warning("%s is damaged or stale (%s); tokenizing the references anew", file, error)
        return None
    with contextlib.suppress(OSError):  # a folder that may only be read
        file.touch()  # used now, so it stays
    return side


def _write(file: Path, key: str, side: ReferenceSide) -> None:
    captions = [caption for group in side.tokens.values() for caption in group]
    text = np.frombuffer(json.dumps(captions).encode(), dtype=np.uint8)
    tensors = {"tokens": text, **side.frequencies.arrays()}
    write_tensors(file, {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, {"references": key})


def _drop_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[KEPT:]:
        file.unlink(missing_ok=True)


def _words(groups: Iterable[Sequence[str]]) -> list[list[list[str]]]:
    return [[caption.split() for caption in captions] for captions in groups]
