"""Where and in which numbers models run: device, seed, autocast."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)

# Auto is bf16 where a GPU has it and where accelerate asks for it; in inference as ``settle_precision`` says.
PRECISIONS = ("auto", "fp32", "bf16")
FULL_WIDTH = 768  # of GPT-2 small: from here on bf16 was measured to be faster on processors (docs/full_size.md)

# What torch.OutOfMemoryError does not cover: cuBLAS, cuDNN and their like, allocations beside torch's pool, MPS, CPUs.
OUT_OF_MEMORY = ("ALLOC_FAILED", "ALLOCATION_FAILED", "out of memory", "DefaultCPUAllocator")


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


# torch and oneDNN each keep the last 1,024 CPU kernels with their memory, one for every shape; batches of captions have
# many. With 64 a training takes half the memory in the same time (docs/micro_world.md).
PRIMITIVE_CACHES, PRIMITIVES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "64"


def pick_device(name: str | None = "auto", announce: bool = True) -> torch.device:
    """Return the device for ``name``: ``auto`` prefers CUDA, then Apple's MPS, then CPU.

    Under a launcher ``auto`` and ``cuda`` are this process's own GPU; where there are fewer GPUs than processes, the
    processes share them in turn. None, where no device was asked for, is ``auto``, but never the CPU beside a GPU.
    The device is logged, unless ``announce`` is False.

    Raises:
        ValueError: ``name`` asks for an accelerator that this machine or this torch build does not have, or for one
            GPU for all of several processes; or torch has no kernels for the GPU, or, with None, does not see it.
    """
    device = _find_device(name or "auto")
    if name is None and device.type == "cpu" and (unseen := _unseen_gpus()):
        raise ValueError(f"{unseen}, or use --device cpu")
    if device.type == "cuda":
        _check_kernels(device)
        # It builds a graph for every new shape, and each step of a search is one: seconds to minutes in all.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        for cache in PRIMITIVE_CACHES:
            os.environ.setdefault(cache, PRIMITIVES)  # read when the first product is computed
    if announce:
        _announce(device)
    return device


@functools.cache  # once for a device, however often it is picked
def _announce(device: torch.device) -> None:
    if device.type != "cuda":
        own = "; it has bf16, which p2_infer.py's auto takes at full size; others if asked" if has_bf16(device) else ""
        log.info("device: %s%s", device, own)
        return
    card = torch.cuda.get_device_properties(device)
    notes = "".join(f"; {note}" for note in _notes(device))
    log.info("device: %s, %s, %.0f GB%s", device, card.name, card.total_memory / 1e9, notes)


def _notes(device: torch.device) -> list[str]:
    """Return what is unusual about a GPU or the choice of it."""
    count, rank = torch.cuda.device_count(), launched("LOCAL_RANK", -1)
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    notes = [] if has_bf16(device) else ["without bf16: --precision auto is fp32"]
    if named and len(named) != count:  # CUDA stops at a name that it does not know, and takes one part (MIG) only
        notes.append(f"CUDA_VISIBLE_DEVICES={','.join(named)} names {len(named)}, and torch sees {count}")
    if rank >= count:
        notes.append(f"process {rank} of this machine sees {count} GPU(s), which others may share")
    return notes


def _unseen_gpus() -> str:
    """Say which GPUs nvidia-smi lists, if torch sees none and was not told to leave them alone; and the remedy."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if (hidden is not None and hidden.strip() in ("", "-1")) or not (count := listed_gpus()):
        return ""
    if hidden is not None:
        remedy = f"CUDA_VISIBLE_DEVICES={hidden} names none of them: correct it"
    elif torch.version.cuda is None:
        remedy = "it is built without CUDA: install another (https://pytorch.org/get-started/locally)"
    else:
        remedy = f"it needs a driver for CUDA {torch.version.cuda}: update the driver, or install an older CUDA's torch"
    return f"nvidia-smi lists {count} GPU(s) and torch {torch.__version__} sees none; {remedy}"


def listed_gpus() -> int:
    """Return how many GPUs nvidia-smi lists: 0 where there is none of it, or no driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())  # parts of one (MIG) are indented


def _find_device(name: str) -> torch.device:
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
        unseen = _unseen_gpus() if device.type == "cuda" and not count else ""
        seen = f"torch {torch.__version__} sees {count} of that kind here; use --device cpu"
        raise ValueError(f"--device {name}: {f'{unseen}, or use --device cpu' if unseen else seen}")
    if device.type == "cuda" and device.index is not None and launched("WORLD_SIZE", 1) > 1:
        raise ValueError(f"--device {name}: every process would take it; leave it out and each takes its own")
    return _own_gpu() if name == "cuda" else device


def _own_gpu() -> torch.device:
    rank = launched("LOCAL_RANK", -1)  # which of several processes on this machine, where it was launched so
    return torch.device("cuda" if rank < 0 else f"cuda:{rank % torch.cuda.device_count()}")


def _check_kernels(device: torch.device) -> None:
    """Raise ValueError where this build of torch has no kernels for the GPU, and say which build has."""
    archs, card = torch.cuda.get_arch_list(), torch.cuda.get_device_properties(device)
    has = (card.major, card.minor)
    kernels = [found.groups() for arch in archs if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch))]
    if not kernels or any(_runs_on(has, *kernel) for kernel in kernels):  # AMD's names say nothing of this
        return
    old = has < min((int(major), int(minor)) for _, major, minor, _ in kernels)
    remedy = "torch from https://download.pytorch.org/whl/cu126, for old cards," if old else "a newer torch"
    raise ValueError(
        f"--device {device}: {card.name} has compute capability {card.major}.{card.minor}, and torch "
        f"{torch.__version__} is built for {', '.join(archs)}: install {remedy} or use --device cpu"
    )


def _runs_on(card: tuple[int, int], kind: str, major: str, minor: str, suffix: str) -> bool:
    """Whether kernels named ``<kind>_<major><minor><suffix>`` run on a card of such a capability.

    Those of sm_86 run on 8.6 and the later ones of 8; of sm_90a on 9.0 alone; of compute_120, which the driver
    translates, on all later ones.
    """
    built = (int(major), int(minor))
    if suffix == "a":
        return card == built
    return built <= card and (kind == "compute" or built[0] == card[0])


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, or a library that it calls, says that memory ran out: less work at once may fit."""
    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error) for mark in OUT_OF_MEMORY)


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) with ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries below draw from the legacy global generator
    torch.manual_seed(seed)


def page_locked(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor from which ``moved`` copies to a GPU without waiting for it; elsewhere the tensor itself."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to ``device``; the host waits unless the tensor is ``page_locked``.

    Only such memory is kept until the copy is done; other memory may be freed too early (on MPS).
    """
    return tensor.to(device, non_blocking=tensor.is_pinned())


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of main memory to ``device``; the host does not wait for a GPU."""
    return moved(page_locked(tensor, device), device)


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Let NVIDIA's GPUs multiply float32 matrices in TF32, with factors of 10 bits, several times as fast."""
    settings = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, True
    try:
        yield
    finally:
        settings.allow_tf32 = before


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of one of PRECISIONS."""
    return torch.autocast(device.type, torch.bfloat16, enabled=product_dtype(device, precision) == torch.bfloat16)


def product_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the type that matrix products have under ``autocast(device, precision)``; on a CPU auto is float32."""
    asked = precision == "bf16" or (precision == "auto" and launched_precision() == "bf16")
    if asked:
        warn_of_emulation(device)
    own = precision == "auto" and device.type != "cpu" and has_bf16(device)
    return torch.bfloat16 if asked or own else torch.float32


def settle_precision(device: torch.device, precision: str, width: int) -> str:
    """Return what one of PRECISIONS means for captions by a decoder of ``width`` on a device: fp32 or bf16.

    Processors that have bf16 are faster in it at full size, at equal CIDEr; small models stay in float32, whose
    results do not depend on what else is in a batch. Training and LLaVA are in float32 there unless bf16 is asked for.
    """
    on_cpu = device.type == "cpu" and width >= FULL_WIDTH and has_bf16(device)
    if precision == "auto" and on_cpu and launched_precision() is None:
        return "bf16"
    return "bf16" if product_dtype(device, precision) == torch.bfloat16 else "fp32"


@functools.cache  # once for a device
def warn_of_emulation(device: torch.device) -> None:
    """Log a warning, once, where a GPU is to compute in bf16 and has no such products."""
    if device.type == "cuda" and not has_bf16(device):
        name = torch.cuda.get_device_properties(device).name
        log.warning("bf16: %s has no such products and emulates them; leave out bf16 and none is needed", name)


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 itself: a GPU from compute capability 8.0 on, a CPU with AMX or AVX512-bf16.

    Emulated it is slower than fp32. Of GPUs it is what ``torch.cuda.is_bf16_supported(including_emulation=False)``
    says, for any and not the current one only.
    """
    if device.type == "cpu":
        query: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # older torch has none
        known = query()
        return torch.backends.mkldnn.is_available() and any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def launched_precision() -> str | None:
    """Return accelerate's ``mixed_precision`` (bf16, fp16, fp8); None for "no", its word where nothing was said."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower()
    return None if asked in ("", "no") else asked
