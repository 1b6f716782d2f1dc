"""Importing torchvision, and what imports it, beside a torch without its compiled operators."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch


def import_guarded(name: str) -> ModuleType:
    """Import ``name`` (timm, open_clip, transformers, …) and survive a torchvision without its compiled operators.

    PyPI's torchvision beside a CPU-only torch finds no compiled operators, and ``import torchvision`` dies while it
    registers fake kernels for them (``operator torchvision::nms does not exist``, pytorch/vision #9077 and #9085).
    Nothing in this suite calls those operators, so while torchvision is imported for the first time a registration
    whose operator is missing is ignored; ``torch.library.register_fake`` is put back afterwards.
    """
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is not None:
        register_fake = torch.library.register_fake

        def tolerant(op: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(op, str) and op.startswith("torchvision::") and not _operator_exists(op):
                return lambda function: function
            return register_fake(op, *args, **kwargs)

        torch.library.register_fake = tolerant
        try:
            importlib.import_module("torchvision")
        finally:
            torch.library.register_fake = register_fake
    return importlib.import_module(name)


def _operator_exists(qualified_name: str) -> bool:
    namespace, operator = qualified_name.split("::")
    return hasattr(getattr(torch.ops, namespace), operator)
