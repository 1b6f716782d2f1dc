"""Weights in the forms that people have: files, shards, folders, archives. What wraps the tensors is peeled off.

Nothing in a file is ever run: pickles are read as plain data, and a TorchScript archive's programs are not read at all.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from captioning.files import read_json
from captioning.messages import first_line, some
from captioning.torchscript import is_torchscript, read_torchscript

State = dict[str, torch.Tensor]

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # in any case
INDEX = ".index.json"
IN_FOLDER = (  # the first of these that is there: transformers' own order, then open_clip's
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
WANTED = f"wanted is {', '.join(SUFFIXES)}, an index of shards ({INDEX}), or a folder with model.safetensors"

_DAMAGE = (  # what the readers raise for damaged files; for pickles found by cutting and flipping bytes at random
    safetensors.SafetensorError,
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)
_NOT_WEIGHTS = {  # how files begin that are often found under the name of weights
    b"version https://git-lfs": "a pointer of Git LFS and not the file it points to; run `git lfs pull`",
    b"<": "a web page and not weights; the link asked for a log-in, or is another page's",
    b"GGUF": "a GGUF file; convert it to .safetensors",
    b"\x89HDF": "an HDF5 file of TensorFlow; convert it to .safetensors",
}
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch's own, anywhere
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")


def read_state_dict(path: str | os.PathLike) -> State:
    """Read named tensors onto the CPU.

    What training scripts put around a state dict is taken off where its meaning is certain: a dict with one state dict
    in it (``{"model": …, "epoch": 3}``), and whatever all names begin with (``module.``, ``_orig_mod.``, ``gpt.``, …).

    Args:
        path: a ``.safetensors`` file, a pickle or a TorchScript archive (``.bin``, ``.pt``, ``.pth``, ``.ckpt``); an
            index of shards that lie beside it; or a folder that ``save_pretrained`` wrote.

    Raises:
        FileNotFoundError: no such file, a folder without weights, or a missing shard.
        ValueError: another kind of file, a damaged one, or one in which the state dict is not certain.
    """
    path = _find(Path(path))
    if path.name.endswith(INDEX):
        return peel(_read_shards(path))
    return peel(_read_file(path))


def names_in_safetensors(path: str | os.PathLike) -> set[str]:
    """Return the names of the tensors in a safetensors file; none for other files."""
    with contextlib.suppress(safetensors.SafetensorError, OSError), safetensors.safe_open(path, "pt") as file:
        return set(file.keys())
    return set()


def transformers_config(path: str | os.PathLike) -> dict[str, Any]:
    """Return transformers' ``config.json`` in the folder ``path``, or beside the file ``path``; {} where there is none.

    Other programs' files of that name lack ``model_type``.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    content = read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) and isinstance(content.get("model_type"), str) else {}


def _find(path: Path) -> Path:
    """Return the file to read: ``path``, or the weights in it where it is a folder."""
    if path.is_dir():
        candidates = [path / name for name in IN_FOLDER if (path / name).is_file()]
        candidates = candidates[:1] or sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise ValueError(f"{path}: holds {some(file.name for file in candidates)}; name one of them")
        held = some(sorted(file.name for file in path.iterdir()), 8)
        raise FileNotFoundError(f"no weights file in {path}, which holds {held}; {WANTED}")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; check the path, or run `bash hw3_download.sh p2`")
    if not path.name.endswith(INDEX) and path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; {WANTED}")
    if _SHARD.search(path.name):
        raise ValueError(f"{path}: one of several shards; name their {INDEX}, or the folder")
    return path


def _read_shards(index: Path) -> State:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(p, str) and p == Path(p).name for p in places.values()):
        raise ValueError(f"{index}: no index of shards; wanted is an object weight_map of names and files beside it")
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: {len(missing)} of its {len(shards)} shards are missing: {some(missing)}")
    state: State = {}
    for shard in shards:
        state |= _read_file(index.parent / shard)
    if state.keys() != places.keys():
        raise ValueError(f"{index}: its shards hold other tensors: {some(sorted(state.keys() ^ places.keys()))}")
    return state


def _read_file(path: Path) -> State:
    """Read one file by its content, whatever its suffix says."""
    with path.open("rb") as file:  # outside of the try, so that a missing permission is reported as such
        head = file.read(64)
        for begin, what in _NOT_WEIGHTS.items():
            if head.lstrip().startswith(begin):
                raise ValueError(f"{path}: {what}")
        try:
            if head[8:9] == b"{" or (
                path.suffix.lower() == ".safetensors" and not head.startswith((b"PK", b"\x80\x02"))
            ):
                return safetensors.torch.load_file(path)
            if is_torchscript(path):
                return read_torchscript(path)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: {_refused(error)}") from error
        except _DAMAGE as error:
            raise ValueError(
                f"{path}: damaged or cut short ({first_line(error)}); download or save it again"
            ) from error
    return _unwrap(content, path)


def _is_safetensors(head: bytes, suffix: str) -> bool:
    """Whether a file is in safetensors, by how it begins; the suffix decides where that is damaged."""
    return head[8:9] == b"{" or (suffix == ".safetensors" and not head.startswith((b"PK", b"\x80\x02")))


def _refused(error: pickle.UnpicklingError) -> str:
    """Say what a pickle holds beside plain data, without torch's advice to run it all the same."""
    strange = re.search(r"GLOBAL ([\w.]+)", str(error))
    held = f"it holds {strange[1]}" if strange else "it holds objects"
    return (
        f"not a plain dict of tensors (damaged, or {held}, whose loading could run code); download it again, or save "
        "the state dict alone, best as .safetensors"
    )


def _unwrap(content: Any, path: Path) -> State:
    """Return the one state dict in what a pickle holds, itself or within dicts around it."""
    found = content
    while not _is_state(found):
        inner = {k: v for k, v in found.items() if isinstance(v, Mapping) and v} if isinstance(found, Mapping) else {}
        states = {key: value for key, value in inner.items() if _is_state(value)} or inner
        if len(states) != 1:
            what = f"several ({some(states)})" if states else _outline(found)
            raise ValueError(f"{path}: holds no plain dict of tensors but {what}; save the model's state_dict() alone")
        (found,) = states.values()
    return dict(found)


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    )


def _outline(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return "a dict of " + some(f"{key} ({type(value).__name__})" for key, value in content.items())


def peel(state: Mapping[str, torch.Tensor]) -> State:
    """Take off what wrappers add to names: torch's own words anywhere, and whatever all names begin with."""
    names = [_WRAPPERS.sub("", name) for name in state]
    while len(names) > 1 and all("." in name for name in names) and len({name.split(".")[0] for name in names}) == 1:
        names = [name.partition(".")[2] for name in names]
    return dict(zip(names if len(set(names)) == len(names) else state, state.values(), strict=True))
