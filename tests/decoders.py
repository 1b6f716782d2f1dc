"""Small decoders for the tests of decoder.py: random ones of transformers, and ones with LoRA as if trained."""

from __future__ import annotations

import torch

from captioning.imports import import_guarded
from decoder import (
    Decoder,
    DecoderConfig,
    LoraConfig,
)

TINY = DecoderConfig(vocab_size=61, n_positions=48, n_embd=32, n_layer=3, n_head=4)
LAYOUTS = {
    "all linears": LoraConfig(rank=4, alpha=8),
    "some linears": LoraConfig(rank=3, alpha=2, targets=("attn.c_proj", "mlp.c_fc")),
    "query and value": LoraConfig(rank=4, alpha=8, enable_lora=(True, False, True)),
    "key only": LoraConfig(rank=2, alpha=8, targets=("attn.c_attn",), enable_lora=(False, True, False)),
    "report's setting 4": LoraConfig(rank=4, dropout=0.2, enable_lora=(True, False, True), lm_head=True),
    "lm_head alone": LoraConfig(rank=4, alpha=8, targets=(), lm_head=True),
}


def huggingface_gpt2(config: DecoderConfig, scale: float = 1.0):
    """A random GPT2LMHeadModel of this shape, biases included; ``scale`` sharpens its predictions."""
    transformers = import_guarded("transformers")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.n_positions,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05).mul_(scale)
    return model


def lora_decoder(lora: LoraConfig | None, config: DecoderConfig = TINY) -> Decoder:
    """A decoder in eval mode whose lora_B are random, as if trained."""
    decoder = Decoder(config, lora).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    return decoder


@torch.no_grad()
def full_logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return decoder.logits(decoder(decoder.embed(ids), torch.arange(ids.shape[1])))


@torch.no_grad()
def greedy_ids(decoder: Decoder, ids: torch.Tensor, count: int) -> torch.Tensor:
    cache = decoder.new_cache(ids.shape[0], ids.shape[1] + count)
    x, positions, out = ids, torch.arange(ids.shape[1]), [ids]
    for _ in range(count):
        x = decoder.logits(decoder(decoder.embed(x), positions, cache=cache)[:, -1:]).argmax(-1)
        out.append(x)
        positions = positions[-1:] + 1
    return torch.cat(out, 1)
