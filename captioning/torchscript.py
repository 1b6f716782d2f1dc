"""The named tensors of a TorchScript archive, such as OpenAI's ``ViT-B-32.pt``, with nothing in it being run.

The archive is a zip: ``code/`` holds programs, ``data/N`` the numbers of a tensor, and the pickle ``data.pkl`` says
which module has which tensor under which name. An unpickler would call what the pickle names, and torch's own reader
would compile the programs. Here the pickle's opcodes are only walked: names stay strings, calls are noted and not made.
"""

from __future__ import annotations

import pickletools
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

_TYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_GIVEN = ("GLOBAL", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")  # their own argument is pushed
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Call(NamedTuple):
    """What the pickle would call, ``module name``, and with what."""

    name: str
    arguments: tuple


def is_torchscript(path: Path) -> bool:
    """Whether ``path`` is a zip with the marks of a TorchScript archive; a pickle of ``torch.save`` lacks them."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:] == ["constants.pkl"] for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a TorchScript archive by name, as its ``state_dict()`` does.

    Raises:
        ValueError, KeyError, IndexError, TypeError, RuntimeError, zipfile.BadZipFile: the archive is damaged, or its
            pickle holds what TorchScript does not write.
    """
    with zipfile.ZipFile(path) as archive:
        (pickle,) = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        folder = pickle.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != sys.byteorder.encode():
            raise ValueError("its numbers have another byte order than this machine's")
        described = dict(_calls(_walk(archive.read(pickle)), "", set()))
        if not described:
            raise ValueError("a TorchScript archive without parameters: frozen, or no network")
        return {name: _tensor(archive, folder, call) for name, call in described.items()}


def _walk(pickle: bytes) -> Any:
    """Return what the pickle describes: a module is the dict of its attributes, and every call is a ``_Call``."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def take(count: int) -> list[Any]:
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def take_marked() -> list[Any]:
        return take(len(stack) - marks.pop())

    for opcode, argument, _ in pickletools.genops(pickle):
        name = opcode.name
        if name in _GIVEN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE" or name in _TUPLES:
            stack.append(tuple(take(_TUPLES[name]) if name in _TUPLES else take_marked()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_Call(*take(2)))
        elif name == "BUILD":
            stack[-2:] = [stack[-1]]  # the new module's attributes stand for it
        elif name == "SETITEMS":
            items = take_marked()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "APPENDS":
            items = take_marked()
            stack[-1].extend(items)
        elif name not in ("PROTO", "BINPERSID", "STOP"):  # BINPERSID: the tuple that describes numbers stays as it is
            raise ValueError(f"{name} in data.pkl, which TorchScript does not write")
    (found,) = stack
    return found


def _calls(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, _Call]]:
    """Yield the tensors of a module and of those in it, each module once: a crafted file could nest one for ever."""
    if not isinstance(module, dict) or id(module) in seen:
        return
    seen.add(id(module))
    for name, value in module.items():
        if isinstance(value, _Call) and value.name == "torch._utils _rebuild_tensor_v2":
            yield f"{prefix}{name}", value
        else:
            yield from _calls(value, f"{prefix}{name}.", seen)


def _tensor(archive: zipfile.ZipFile, folder: str, call: _Call) -> torch.Tensor:
    (_, storage, key, _, _), offset, size, stride, *_ = call.arguments
    entry = archive.getinfo(f"{folder}data/{key}")
    if entry.compress_type != zipfile.ZIP_STORED:  # torch never compresses; a bomb would
        raise ValueError(f"{entry.filename} is compressed")
    dtype = _TYPES[storage.removeprefix("torch ").removesuffix("Storage")]
    content = bytearray(archive.read(entry))
    numbers = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return numbers.as_strided(size, stride, offset)  # refuses whatever lies outside
