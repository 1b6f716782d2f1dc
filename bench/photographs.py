"""Generated JPEGs with the size and the detail of photographs: scenes of the micro world under noise of natural images.

Natural images have amplitudes that fall with one over the frequency (Field 1987); noise of that spectrum over an
enlarged drawing gives the JPEG decoder as many coefficients as a photograph of 640 x 480 pixels does (files of COCO
2017 have 0.16 MB on average), which a drawing alone does not.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.files import atomic_path
from microworld.scenes import spread

SIZE = (640, 480)
AMPLITUDE, QUALITY = 34.0, 91


@lru_cache(maxsize=1)
def _texture(size: tuple[int, int]) -> np.ndarray:
    """Noise (H, W, 3) with amplitudes of one over the frequency and a deviation of 1."""
    width, height = size
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])  # (H, W // 2 + 1)
    frequency[0, 0] = np.inf
    phases = rng.standard_normal((3, *frequency.shape)) + 1j * rng.standard_normal((3, *frequency.shape))
    noise = np.fft.irfft2(phases / frequency, (height, width)).transpose(1, 2, 0)
    return (noise / noise.std()).astype(np.float32)


def photograph(drawing: Image.Image, seed: int, size: tuple[int, int] = SIZE) -> bytes:
    """Return a JPEG of ``size`` pixels of the drawing under noise; another seed shifts the noise."""
    rng = np.random.default_rng(seed)
    shift = (int(rng.integers(size[1])), int(rng.integers(size[0])))
    resized = drawing.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, np.float32) + AMPLITUDE * np.roll(_texture(size), shift, (0, 1))
    content = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


def _convert(job: tuple[int, Path], size: tuple[int, int]) -> int:
    seed, path = job
    with Image.open(path) as drawing:
        content = photograph(drawing, seed, size)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def convert(paths: Sequence[Path], workers: int, size: tuple[int, int] = SIZE) -> float:
    """Make photographs of the drawings ``paths``, in place; return their mean size in bytes."""
    sizes = list(spread(partial(_convert, size=size), list(enumerate(paths)), workers))
    return sum(sizes) / len(sizes)
