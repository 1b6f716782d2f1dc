"""Named tensors: in safetensors files with a checksum, from others' files without running a pickle, and copied."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from captioning.files import atomic_path
from captioning.messages import first_line, some

DIGEST = "digest"  # name of the checksum among a file's texts


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """Return a short hash of the names, shapes, types and values of a state dict."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():  # torch cannot view an empty tensor as bytes
            digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
    """Write tensors and texts to one safetensors file, atomically, with a checksum over both.

    Raises:
        OSError: the disk is full, or the folder is read-only.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={**texts, DIGEST: _digest(tensors, texts)})
    except SafetensorError as error:  # the library's for a full disk
        raise OSError(f"{path}: cannot be written ({error})") from error


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and texts of a safetensors file; a checksum in it must be right, and may be missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from error
    wanted = texts.pop(DIGEST, None)
    if wanted is not None and wanted != _digest(tensors, texts):
        raise ValueError(f"{path}: damaged (its checksum is wrong); copy or make it again")
    return tensors, texts


def _digest(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    words = json.dumps([sorted(texts.items()), fingerprint(tensors)])
    return hashlib.sha256(words.encode()).hexdigest()


# What the readers raise for damaged files; for pickles found by cutting and flipping bytes at random.
_DAMAGE = (
    SafetensorError,
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    struct.error,
)


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read named tensors from a ``.safetensors`` file or a ``.bin``, ``.pt``, ``.pth`` pickle, onto the CPU.

    Pickles are read with ``weights_only=True``: one that wants to run code is refused and nothing of it is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a damaged file, or one that holds anything but named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; check the path, or run `bash hw3_download.sh p2`")
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; expected .safetensors, .bin, .pt or .pth")
    with path.open("rb") as file:  # outside of the try, so that a missing permission is reported as such
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path}: not a plain dict of tensors (damaged, or it holds objects whose loading could run code); "
                "download it again, or save the state dict alone, best as .safetensors"
            ) from error
        except _DAMAGE as error:
            raise ValueError(
                f"{path}: damaged or cut short ({first_line(error)}); download or save it again"
            ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: holds no plain dict of tensors; save the model's state_dict() alone")
    return state


@torch.no_grad()
def copy_exactly(
    targets: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor], what: str, remedy: str
) -> None:
    """Copy sources into targets if names and shapes agree, else change nothing and raise ValueError with what differs.

    Args:
        targets: tensors to be overwritten, by name.
        sources: their new values.
        what: begins the message: what the sources are.
        remedy: ends the message.
    """
    missing, unexpected = sorted(targets.keys() - sources.keys()), sorted(sources.keys() - targets.keys())
    if missing or unexpected:
        raise ValueError(f"{what}: missing {some(missing, 8)}; unexpected {some(unexpected, 8)}; {remedy}")
    wrong = [
        f"{name} {tuple(sources[name].shape)} for {tuple(target.shape)}"
        for name, target in targets.items()
        if sources[name].shape != target.shape
    ]
    if wrong:
        raise ValueError(f"{what}: wrong shapes: {some(wrong, 8)}; {remedy}")
    for name, target in targets.items():
        target.copy_(sources[name])
