"""Weights made ready for inference: cast once, and on a CPU laid out once in the blocks that oneDNN multiplies.

A linear layer on few rows, which is what decoding is, spends a good part of its time on its weight: autocast casts it
anew in every call, and the matrix product copies it into its own block layout in every call. Both can be done once.
The numbers are those of the plain layers, but for the order in which a product is summed.
"""

from __future__ import annotations

import torch
from torch import nn

from decoder import Decoder

CPU_DTYPES = (torch.float32, torch.bfloat16)  # what oneDNN packs


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, its weight packed for oneDNN.

    torch has no public call for this outside of its compiler, whose operators these are; ``can_pack`` says whether
    this torch has them.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        dtype: float32 or bfloat16; inputs are cast to it and outputs have it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        # A module's parameter cannot be in the packed layout, and a buffer would end up in state dicts.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous())
        self._bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self._packed, self._bias, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this type can be packed on this device by this torch."""
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return device.type == "cpu" and dtype in CPU_DTYPES and torch.backends.mkldnn.is_available() and known


@torch.no_grad()
def prepare_linears(module: nn.Module, dtype: torch.dtype, pack: bool = True) -> None:
    """Cast the linear layers below ``module`` to ``dtype``, in place and for good, and pack them where that can be.

    Without ``pack`` they stay what a compiler can read.
    """
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear):
                continue
            if pack and can_pack(layer.weight.device, dtype):
                setattr(parent, name, PackedLinear(layer.weight, layer.bias, dtype))
            else:
                layer.to(dtype)


@torch.no_grad()
def prepare_decoder(decoder: Decoder, dtype: torch.dtype, pack: bool = True) -> Decoder:
    """Make a decoder ready to search in ``dtype``, in place and for good; return it.

    Under autocast only the linear layers are in ``dtype`` anyway. Embeddings, layer norms and the sum that runs
    through the blocks stay in float32, so that nothing is rounded that autocast would not round. The output layer gets
    a weight of its own, which costs that much more memory. ``pack`` is as in ``prepare_linears``.

    Raises:
        ValueError: LoRA is not merged, and could not be any more.
    """
    if decoder.lora is not None and not decoder.merged:
        raise ValueError("prepare_decoder packs the weights for good: call merge_lora first")
    weight = decoder.wte.weight
    if decoder.lm_head is None and (weight.dtype != dtype or (pack and can_pack(weight.device, dtype))):
        width, vocabulary = decoder.config.n_embd, decoder.config.vocab_size
        decoder.lm_head = nn.Linear(width, vocabulary, bias=False, device="meta")  # no numbers: they are replaced
        decoder.lm_head.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    prepare_linears(decoder, dtype, pack)
    return decoder
