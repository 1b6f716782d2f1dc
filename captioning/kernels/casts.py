"""Casts for autocast, made once instead of at every use: of frozen weights for a run, of LoRA's tensors for a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


def frozen_weight(layer: nn.Linear | nn.Embedding) -> torch.Tensor:
    """The layer's weight, or where products have another type the copy of that type that ``keep_casts`` made."""
    return _copy_of(layer.weight, getattr(layer, "cast_weight", None))


def frozen_bias(layer: nn.Linear | nn.Embedding) -> torch.Tensor | None:
    """The layer's bias, likewise; None where it has none."""
    bias = getattr(layer, "bias", None)
    return None if bias is None else _copy_of(bias, getattr(layer, "cast_bias", None))


def product_dtype_of(x: torch.Tensor) -> torch.dtype:
    """The type that matrix products of ``x`` have here: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _copy_of(tensor: torch.Tensor, copy: torch.Tensor | None) -> torch.Tensor:
    if copy is None or copy.device != tensor.device or copy.dtype != product_dtype_of(tensor):
        return tensor
    return copy


def cast_frozen(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep copies of frozen linear layers and embeddings in ``dtype`` for autocast, which would cast them at every use.

    The weights themselves, and with them fingerprints, what is saved and what runs without autocast, stay as they
    are; the copies, one of tied weights, take as much memory again as the matrices have numbers times the size of
    ``dtype``. With None, or the weights' own type, there are none. For training: what changes the weights drops them.
    """
    copies: dict[torch.Tensor, torch.Tensor] = {}
    for layer in module.modules():
        for name in ("weight", "bias") if isinstance(layer, nn.Linear | nn.Embedding) else ():
            tensor = getattr(layer, name, None)
            if tensor is not None and dtype not in (None, tensor.dtype) and tensor not in copies:
                copies[tensor] = tensor.detach().to(dtype)
            setattr(layer, f"cast_{name}", copies.get(tensor) if tensor is not None else None)


def lora_tensors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's A and B, or the casts of them that ``cast_lora`` made."""
    return getattr(layer, "cast_lora", None) or (layer.lora_A, layer.lora_B)


@contextlib.contextmanager
def cast_lora(module: nn.Module) -> Iterator[None]:
    """Within, LoRA's tensors are cast to autocast's type all together, instead of each at every use.

    Gradients flow through the casts to the tensors themselves, where they arrive in the tensors' own type.
    """
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "lora_A") and not layer.merged]
    tensors = [tensor for layer in layers for tensor in (layer.lora_A, layer.lora_B)]
    if not tensors or tensors[0].dtype == (dtype := product_dtype_of(tensors[0])):
        yield
        return
    casts = CastTogether.apply(dtype, *tensors)
    for layer, *pair in zip(layers, casts[::2], casts[1::2], strict=True):
        layer.cast_lora = tuple(pair)
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_lora = None


class CastTogether(torch.autograd.Function):
    """Casts of many tensors of one type by few kernels, both ways: their gradients are cast back together too."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors in ``dtype``."""
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)  # what was not used has no gradient, not one of zeros
        return tuple(_cast(tensors, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients in the tensors' own type."""
        cast = iter(_cast([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(cast, list(tensors))
    return cast
