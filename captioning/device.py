"""Where and in which numbers models run: device, seed, autocast."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

PRECISIONS = ("auto", "fp32", "bf16")  # auto is bf16 on CUDA, fp32 elsewhere


def pick_device(name: str = "auto") -> torch.device:
    """Return the device for ``name``: ``auto`` prefers CUDA, then Apple's MPS, then CPU.

    Raises:
        ValueError: ``name`` asks for an accelerator that this machine or this torch build does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            rank = os.environ.get("LOCAL_RANK")  # which of several processes on this machine, where it was launched so
            return torch.device("cuda" if rank is None else f"cuda:{rank}")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: not a torch device; use auto, cpu, cuda, cuda:N or mps") from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name}: torch {torch.__version__} sees {count} of that kind here; use --device cpu")
    return device


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
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32
