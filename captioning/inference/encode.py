"""From image files to encoder tokens: read, preprocessed, encoded, cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from captioning.data.feature_cache import CacheSpec, FeatureCache
from captioning.data.images import DRAFT_FACTOR, load_image
from captioning.device import autocast, sent, tf32_products
from captioning.distributed import ALONE, Processes
from captioning.models.captioner import Captioner
from captioning.models.inference_weights import prepare_linears


def read_pixels(transform: Callable, paths: Sequence[Path]) -> torch.Tensor:
    """Read and preprocess images: (B, 3, H, W). Raises ValueError naming an image that cannot be read."""
    return torch.stack([transform(load_image(path)) for path in paths])


def draft_side(transform: Any) -> int:
    """Return the ``draft`` of ``data.images.load_image`` for a timm transform: well above the size that it scales to.

    Raises:
        ValueError: the transform does not say which size it scales to.
    """
    for part in getattr(transform, "transforms", []):
        if hasattr(part, "size"):  # the first one that has is the resize
            size = part.size if isinstance(part.size, int) else max(part.size)
            return DRAFT_FACTOR * size
    raise ValueError(f"--jpeg-draft needs a transform with a resize, not {transform}; leave it out")


def prepare_encoder(captioner: Captioner) -> None:
    """Make the encoder ready to encode in float32, for ``cached_features``, irreversibly and in place.

    On a CPU its weights are reordered for oneDNN, as ``inference_weights.prepare`` does for inference; sums may then
    come in another order. Elsewhere nothing changes.
    """
    prepare_linears(captioner.encoder, torch.float32)


def cached_features(
    captioner: Captioner,
    paths: Sequence[Path],
    cache: Path,
    limit: float = math.inf,
    processes: Processes = ALONE,
) -> FeatureCache:
    """Return the encoder's tokens of ``paths``, from the cache folder or computed now and kept there.

    Images for which there is no room below ``limit`` bytes are encoded whenever they are asked for. Several processes
    encode a part each. The result's ``readable`` leaves out images that cannot be read, which the log names.
    """

    def read(path: Path) -> torch.Tensor:
        return captioner.transform(load_image(path))

    def encode(pixels: list[torch.Tensor]) -> torch.Tensor:
        batch = sent(torch.stack(pixels), captioner.device)
        # Cached or not, features are float32's; float16, in which they are kept, has no more digits than TF32.
        with torch.autocast(captioner.device.type, enabled=False), tf32_products():
            return captioner.encode(batch)

    config = captioner.config
    key = {"encoder": config.encoder, "weights": config.encoder_hash, "transform": repr(captioner.transform)}
    if config.encoder_layer != -1:
        key["layer"] = str(config.encoder_layer)
    if config.pool != 1:  # averages are kept, not what they are of: the folder is that much smaller
        key["pool"] = str(config.pool)
    spec = CacheSpec(cache, key, captioner.feature_shape, limit=limit)
    return FeatureCache.open(spec, paths, encode, processes, read)


@dataclass(frozen=True)
class Encoded:
    """The encoder tokens of an image, complete once the encoder's stream has passed ``ready``."""

    features: torch.Tensor  # (N, D)
    ready: torch.cuda.Event | None  # None on a CPU, where they are complete


class StreamEncoder:
    """Encodes batches, on a GPU in a separate stream: while the batch before is decoded.

    Args:
        captioner: its weights are prepared.
        precision: as for ``autocast``.
    """

    def __init__(self, captioner: Captioner, precision: str) -> None:
        self.captioner, self.precision, self.device = captioner, precision, captioner.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still be moving the weights

    def encode(self, pixels: Sequence[torch.Tensor]) -> list[Encoded]:
        """Begin to encode preprocessed images (3, H, W) each; on a GPU this does not wait for them."""
        batch = torch.stack(list(pixels))
        with torch.cuda.stream(self.stream), autocast(self.device, self.precision):
            features = self.captioner.encode(sent(batch, self.device))
        ready = None if self.stream is None else self.stream.record_event()
        return [Encoded(row, ready) for row in features]

    def gather(self, encoded: Sequence[Encoded]) -> torch.Tensor:
        """Return their features (B, N, D), for use on the current stream, which waits for these and for no others."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            for one in encoded:
                assert one.ready is not None  # as encode records it with a stream
                current.wait_event(one.ready)
                one.features.record_stream(current)  # or the encoder's stream might reuse their memory too early
        return torch.stack([one.features for one in encoded])
