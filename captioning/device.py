"""Where and in which numbers models run: device, seed, autocast."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

PRECISIONS = ("auto", "fp32", "bf16")  # auto is bf16 on CUDA and where accelerate asks for it, fp32 elsewhere


def launched(variable: str, default: int) -> int:
    """Return what a launcher says in an environment variable, RANK or LOCAL_RANK say; empty counts as unset.

    Raises:
        ValueError: it is no whole number.
    """
    text = os.environ.get(variable, "").strip()
    try:
        return int(text or default)
    except ValueError as error:
        raise ValueError(f"{variable}={text}: must be a whole number, as launchers set it; unset {variable}") from error


def pick_device(name: str = "auto") -> torch.device:
    """Return the device for ``name``: ``auto`` prefers CUDA, then Apple's MPS, then CPU.

    Under a launcher ``auto`` and ``cuda`` are this process's own GPU; where there are fewer GPUs than processes, the
    processes share them in turn.

    Raises:
        ValueError: ``name`` asks for an accelerator that this machine or this torch build does not have, or for one
            GPU for all of several processes.
    """
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        return _own_gpu() if torch.cuda.is_available() else torch.device(mps)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: not a torch device; use auto, cpu, cuda, cuda:N or mps") from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name}: torch {torch.__version__} sees {count} of that kind here; use --device cpu")
    if device.type == "cuda" and device.index is not None and launched("WORLD_SIZE", 1) > 1:
        raise ValueError(f"--device {name}: every process would take it; leave it out and each takes its own")
    return _own_gpu() if name == "cuda" else device


def _own_gpu() -> torch.device:
    rank = launched("LOCAL_RANK", -1)  # which of several processes on this machine, where it was launched so
    return torch.device("cuda" if rank < 0 else f"cuda:{rank % torch.cuda.device_count()}")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) with ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below draw from the legacy global generator
    torch.manual_seed(seed)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of one of PRECISIONS."""
    return torch.autocast(device.type, torch.bfloat16, enabled=product_dtype(device, precision) == torch.bfloat16)


def product_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the type that matrix products have under ``autocast(device, precision)``."""
    bf16 = precision == "bf16" or (precision == "auto" and (device.type == "cuda" or launched_precision() == "bf16"))
    return torch.bfloat16 if bf16 else torch.float32


def launched_precision() -> str | None:
    """Return accelerate's ``mixed_precision`` (bf16, fp16, fp8); None for "no", its word where nothing was said."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower()
    return None if asked in ("", "no") else asked
