"""Named tensors: fingerprints, safetensors files with a checksum, and copies that must fit exactly."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from captioning.files import atomic_path
from captioning.messages import some

DIGEST = "digest"  # name of the checksum among a file's texts


class LinkedAttentions(list[torch.Tensor]):
    """A list for attention weights with which gradients also flow from row to row, through keys and values."""


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """Return a short hash of the names, shapes, types and values of a state dict."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():  # torch cannot view an empty tensor as bytes
            digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def difference(wanted: str, found: str, state: Mapping[str, torch.Tensor]) -> str:
    """Say that ``state`` has another fingerprint than ``wanted``, and whether rounding may be the reason."""
    note = ""
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        rounded = {key: t.to(dtype).to(t.dtype) if t.is_floating_point() else t for key, t in state.items()}
        if fingerprint(rounded) == wanted:
            note = f"; rounded to {name} it is the wanted one, so only the precision differs"
        elif fingerprint(rounded) == found:
            note = f"; all of its numbers are {name}'s, so the precision may be the reason"
    return f"(hash {wanted}, this one is {found}{note})"


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
