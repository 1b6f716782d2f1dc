"""From images to captions: what training, inference and the demo share around the captioner."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from captioning.data import feature_cache as data
from captioning.distributed import ALONE, Processes
from captioning.inference import search
from captioning.models.captioner import Captioner
from captioning.models.inference_weights import prepare_decoder, prepare_linears
from captioning.models.step_functions import CompiledSteps
from decoder import Decoder


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context for ``fp32``, ``bf16``, or ``auto``, which is bf16 on CUDA and fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=product_dtype(device, precision) == torch.bfloat16)


def product_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the type that matrix products have under ``autocast(device, precision)``."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def prepare(captioner: Captioner, precision: str, pack: bool = True) -> None:
    """Make the weights of a merged captioner ready for inference under ``autocast``, in place and for good.

    Without ``pack`` the decoder's stay what ``compile_steps`` can compile.
    """
    dtype = product_dtype(captioner.device, precision)
    prepare_linears(captioner.encoder, dtype)
    prepare_decoder(captioner.decoder, dtype, pack)


def compile_steps(
    captioner: Captioner, batch_size: int, beam_size: int = 5, max_new_tokens: int = 30, backend: str = "inductor"
) -> CompiledSteps:
    """Return what ``caption_features`` takes as ``steps``; call both under the same ``autocast``.

    Raises:
        ValueError: there is no compiler, or prefix and caption do not fit into the decoder's context.
    """
    return CompiledSteps(captioner.decoder, batch_size, captioner.n_prefix, beam_size, max_new_tokens, backend)


def read_pixels(transform: Callable, paths: Sequence[Path], draft: int | None = None) -> torch.Tensor:
    """Read and preprocess images: (B, 3, H, W). Raises ValueError naming an image that cannot be read."""
    return torch.stack([transform(data.load_image(path, draft)) for path in paths])


def draft_side(transform: Any) -> int:
    """Return the ``draft`` of ``data.load_image`` for a timm transform: so many pixels its result stands well above.

    Raises:
        ValueError: the transform does not say which size it scales to.
    """
    for part in getattr(transform, "transforms", []):
        if hasattr(part, "size"):  # the first one that has is the resize
            size = part.size if isinstance(part.size, int) else max(part.size)
            return data.DRAFT_FACTOR * size
    raise ValueError(f"--jpeg-draft needs a transform with a resize, not {transform}; leave it out")


def cached_features(
    captioner: Captioner,
    paths: Sequence[Path],
    cache: Path,
    limit: float = math.inf,
    processes: Processes = ALONE,
    draft: int | None = None,
) -> data.FeatureCache:
    """Return the encoder's tokens of ``paths``, from the cache folder or computed now and kept there.

    Images for which there is no room below ``limit`` bytes are encoded whenever they are asked for. Several processes
    encode a part each. ``draft`` is that of ``data.load_image``, and its features are kept apart.
    """

    def encode(batch: list[Path]) -> torch.Tensor:
        pixels = read_pixels(captioner.transform, batch, draft).to(captioner.device)
        with torch.autocast(captioner.device.type, enabled=False):  # cached or not, features are float32's
            return captioner.encode(pixels)

    config = captioner.config
    key = {"encoder": config.encoder, "weights": config.encoder_hash, "transform": repr(captioner.transform)}
    if config.encoder_layer != -1:
        key["layer"] = str(config.encoder_layer)
    if draft:
        key["draft"] = str(draft)
    shape = captioner.feature_shape
    return data.FeatureCache.open(cache, key, list(paths), shape, encode, limit=limit, processes=processes)


@dataclass(frozen=True)
class Encoded:
    """The encoder tokens of an image, and the point in the encoder's stream from which on they are there."""

    features: torch.Tensor  # (N, D)
    ready: torch.cuda.Event | None


class Encoder:
    """Encodes batches on a stream of its own, where the device is a GPU: beside the decoding of the batch before.

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
        if self.stream is not None:
            batch = batch.pin_memory()  # or the copy would wait for the device
        with torch.cuda.stream(self.stream), autocast(self.device, self.precision):
            features = self.captioner.encode(batch.to(self.device, non_blocking=True))
        ready = None if self.stream is None else self.stream.record_event()
        return [Encoded(row, ready) for row in features]

    def gather(self, encoded: Sequence[Encoded]) -> torch.Tensor:
        """Return their features (B, N, D), for use on the present stream, which waits for them and not for others."""
        if self.stream is not None:
            present = torch.cuda.current_stream(self.device)
            for one in encoded:
                present.wait_event(one.ready)
                one.features.record_stream(present)  # their memory is the other stream's, and must not go before
        return torch.stack([one.features for one in encoded])


def caption_features(
    captioner: Captioner,
    tokenizer: data.Tokenizer,
    features: torch.Tensor,
    beam_size: int = 5,
    max_new_tokens: int = 30,
    length_penalty: float = 1.0,
    steps: CompiledSteps | None = None,
) -> list[str]:
    """Caption B images from their encoder tokens (B, N, D); one beam is greedy search.

    ``steps`` are compiled for at least as many images, and for the same beams and tokens.
    """
    keep = None
    if steps is None:
        read_on = captioner.step_function(features, beam_size, max_new_tokens)
        keep = read_on.keep
    else:
        with torch.no_grad():
            read_on = steps.begin(captioner.prefix(features))

    step = within_vocabulary(read_on, tokenizer.vocab_size)
    eos, device = tokenizer.eos_id, features.device
    if beam_size == 1:
        found = search.greedy(step, len(features), eos, eos, max_new_tokens, device)
    else:
        found = search.beam_search(
            step, len(features), eos, eos, beam_size, max_new_tokens, length_penalty, device, keep
        )
    return [tokenizer.decode(tokens) for tokens in found.tokens]


def within_vocabulary(step: search.Step, vocab_size: int) -> search.Step:
    """Make of a step function one without the ids of a padded output layer that no token has."""
    return lambda tokens, ancestors: step(tokens, ancestors)[..., :vocab_size]


def check_vocabulary(tokenizer: data.Tokenizer, decoder: Decoder) -> None:
    """Refuse a tokenizer whose ids the decoder does not have."""
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise ValueError(
            f"--tokenizer has {tokenizer.vocab_size} tokens, the decoder only {decoder.config.vocab_size}; "
            "take the tokenizer that belongs to the decoder"
        )
