"""Weights for inference: cast once instead of at every use, and reordered for oneDNN where that is possible."""

from __future__ import annotations

import torch
from torch import nn

from captioning.device import product_dtype, settle_precision
from captioning.kernels.onednn import ReorderedLinear, can_reorder
from captioning.models.captioner import Captioner
from decoder import Decoder


def prepare(captioner: Captioner, precision: str, reorder: bool = True) -> str:
    """Make the weights of a merged captioner ready for inference under ``autocast``, irreversibly and in place.

    Without ``reorder`` the decoder's stay what ``torch.compile`` can read. Returns the precision for ``autocast``:
    what ``auto`` is for this captioner.
    """
    precision = settle_precision(captioner.device, precision, captioner.decoder.config.n_embd)
    dtype = product_dtype(captioner.device, precision)
    prepare_linears(captioner.encoder, dtype)
    prepare_decoder(captioner.decoder, dtype, reorder)
    return precision


@torch.no_grad()
def prepare_decoder(decoder: Decoder, dtype: torch.dtype, reorder: bool = True) -> Decoder:
    """Make a decoder ready to search in ``dtype``, irreversibly and in place; return it.

    Only the linear layers are in ``dtype``, as under autocast. Embeddings, layer norms and the sum that runs through
    the blocks stay in float32, so that nothing is rounded that autocast would not round. The output layer gets a
    weight of its own, which costs that much more memory.

    Raises:
        ValueError: LoRA is not merged, and could not be any more.
    """
    if decoder.lora is not None and not decoder.merged:
        raise ValueError("prepare_decoder changes the weights irreversibly: call merge_lora first")
    weight = decoder.wte.weight
    if decoder.lm_head is None and (weight.dtype != dtype or (reorder and can_reorder(weight.device, dtype))):
        width, vocabulary = decoder.config.n_embd, decoder.config.vocab_size
        decoder.lm_head = nn.Linear(width, vocabulary, bias=False, device="meta")  # no numbers: they are replaced
        decoder.lm_head.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    prepare_linears(decoder, dtype, reorder)
    return decoder


@torch.no_grad()
def prepare_linears(module: nn.Module, dtype: torch.dtype, reorder: bool = True) -> None:
    """Cast the linear layers below ``module`` to ``dtype``, and where possible reorder their weights for oneDNN."""
    # A list of the layers themselves would keep all old weights beside the new ones until the end.
    for parent in [part for part in module.modules() if not isinstance(part, nn.Linear)]:
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear):
                continue
            if reorder and can_reorder(layer.weight.device, dtype):
                setattr(parent, name, ReorderedLinear(layer.weight, layer.bias, dtype))
            else:
                layer.to(dtype)
