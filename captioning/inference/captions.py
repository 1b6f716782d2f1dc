"""Captions of images from their encoder tokens."""

from __future__ import annotations

import torch

from captioning.data.tokenizer import Tokenizer
from captioning.inference.search import Step, beam_search, greedy
from captioning.models.captioner import Captioner
from captioning.models.step_functions import CompiledStepFunction
from decoder import Decoder


def caption_features(
    captioner: Captioner,
    tokenizer: Tokenizer,
    features: torch.Tensor,
    beam_size: int = 5,
    max_new_tokens: int = 30,
    length_penalty: float = 1.0,
    steps: CompiledStepFunction | None = None,
) -> list[str]:
    """Caption B images from their encoder tokens (B, N, D); one beam is greedy search.

    ``steps`` are compiled for at least as many images, and for the same beams and tokens.
    """
    step: Step
    if steps is None:
        shared = captioner.step_function(features, beam_size, max_new_tokens)
        step, keep = shared, shared.keep
    else:
        with torch.no_grad():
            step, keep = steps.begin(captioner.prefix(features)), None  # compiled steps have a fixed batch

    step = within_vocabulary(step, tokenizer.vocab_size)
    eos, device = tokenizer.eos_id, features.device
    if beam_size == 1:
        found = greedy(step, len(features), eos, eos, max_new_tokens, device)
    else:
        found = beam_search(step, len(features), eos, eos, beam_size, max_new_tokens, length_penalty, device, keep)
    return [tokenizer.decode(tokens) for tokens in found.tokens]


def within_vocabulary(step: Step, vocab_size: int) -> Step:
    """Return ``step`` without the logits of a padded output layer's ids, which belong to no token."""
    return lambda tokens, ancestors: step(tokens, ancestors)[..., :vocab_size]


def check_vocabulary(tokenizer: Tokenizer, decoder: Decoder) -> None:
    """Raise ValueError for a tokenizer whose ids the decoder does not have."""
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise ValueError(
            f"--tokenizer has {tokenizer.vocab_size} tokens, the decoder only {decoder.config.vocab_size}; "
            "take the tokenizer that belongs to the decoder"
        )
