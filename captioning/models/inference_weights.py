"""Weights cast and packed once, for inference."""

from __future__ import annotations

import torch
from torch import nn

from captioning.device import product_dtype
from captioning.kernels.onednn import PackedLinear, can_pack
from captioning.models.captioner import Captioner
from decoder import Decoder


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


def prepare(captioner: Captioner, precision: str, pack: bool = True) -> None:
    """Make the weights of a merged captioner ready for inference under ``autocast``, in place and for good.

    Without ``pack`` the decoder's stay what ``compile_steps`` can compile.
    """
    dtype = product_dtype(captioner.device, precision)
    prepare_linears(captioner.encoder, dtype)
    prepare_decoder(captioner.decoder, dtype, pack)
