"""A tiny GPT-2 of transformers and ours with its weights, which must find the same captions."""

import functools

import torch

from captioning.imports import import_guarded
from captioning.inference.search import Step
from decoder import Decoder, DecoderConfig, build_decoder

EOS = 0
TINY = DecoderConfig(vocab_size=37, n_positions=48, n_embd=32, n_layer=2, n_head=4)


def decoder_step(decoder: Decoder, prefix: torch.Tensor, beams: int, max_new_tokens: int) -> Step:
    """What the captioner does: one prefix (B, P, C) an image in the cache, shared by all of its beams."""
    batch, length = prefix.shape[:2]
    cache = decoder.new_cache(batch, length + beams * max_new_tokens)
    with torch.no_grad():
        decoder(prefix, torch.arange(length), cache=cache)

    def step(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(*tokens.shape, length, dtype=torch.bool)
        mask = torch.cat((seen, ancestors), -1).unsqueeze(1)  # (B, 1, K, P + n)
        position = torch.tensor([length + ancestors.shape[-1] // tokens.shape[1] - 1])
        return decoder.logits(decoder(decoder.embed(tokens), position, mask, cache))

    return step


@functools.cache
def two_models(pull: float):
    """A random GPT-2 of transformers and ours with its weights; ``pull`` is what every logit of EOS gains."""
    transformers = import_guarded("transformers")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=TINY.vocab_size,
        n_positions=TINY.n_positions,
        n_embd=TINY.n_embd,
        n_layer=TINY.n_layer,
        n_head=TINY.n_head,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # far from its own initialisation, which repeats one word for ever
        for parameter in theirs.parameters():
            parameter.normal_(std=0.6)
        theirs.transformer.wte.weight.normal_(std=0.3)
        theirs.transformer.ln_f.weight.fill_(1.0)
        end = theirs.transformer.wte.weight[EOS]
        theirs.transformer.ln_f.bias.copy_(pull * end / end.square().sum())
    return theirs, build_decoder(theirs.state_dict(), n_head=TINY.n_head).eval()
