"""CLIP's features of images, kept between runs: found again by the image file's content, the weights and the precision.

One file a model holds all of its features and their SHA-256. A file that does not fit its sum, or that cannot be read,
is named and written anew; a folder that cannot be written is named and costs the next run its time, no more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from captioning.files import atomic_path
from captioning.scoring.clipscore import ClipScorer, image_features

log = logging.getLogger(__name__)


def cached_image_features(
    scorer: ClipScorer, paths: Sequence[str | os.PathLike], batch_size: int, folder: Path
) -> torch.Tensor:
    """Return what ``clipscore.image_features`` returns, ``(n, dim)``, from ``folder`` where they are known already.

    Raises:
        FileNotFoundError, ValueError: see ``clipscore.image_features``.
    """
    file = folder / f"{_key(scorer)}.safetensors"
    digests = [_digest(path) for path in paths]
    known = _read(file)
    missing = {digest: path for digest, path in zip(digests, paths, strict=True) if digest not in known}
    log.info("image features: %d of %d images are new to %s", len(missing), len(set(digests)), file)
    if missing:
        features = image_features(scorer, list(missing.values()), batch_size)
        known.update(zip(missing, features, strict=True))
        try:
            _write(file, known)
        except OSError as error:
            log.warning("%s: not written, so the next run computes the features again (%s)", file, error)
    return torch.stack([known[digest] for digest in digests])


def _key(scorer: ClipScorer) -> str:
    """Name whatever decides the features beside the image: weights, preprocessing, precision, kind of device."""
    parts = (scorer.model_name, scorer.fingerprint, repr(scorer.preprocess), scorer.precision, scorer.device.type)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _digest(path: str | os.PathLike) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: not a readable image ({error}); fetch or convert it again") from error


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Return {digest of an image: its features (dim,)}."""
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as content:
            features, metadata = content.get_tensor("features"), content.metadata() or {}
        digests = json.loads(metadata["images"])
        if metadata["sha256"] != _checksum(features):
            raise ValueError("its numbers do not fit their sum")
        return dict(zip(digests, features, strict=True))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s); computing the features anew", file, error)
        return {}


def _write(file: Path, known: dict[str, torch.Tensor]) -> None:
    features = torch.stack(list(known.values()))
    metadata = {"images": json.dumps(list(known)), "sha256": _checksum(features)}
    with atomic_path(file) as temporary:
        save_file({"features": features}, temporary, metadata=metadata)


def _checksum(features: torch.Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()
