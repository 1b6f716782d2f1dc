"""Captions of images from their encoder tokens."""

from __future__ import annotations

import torch

from captioning.data.tokenizer import Tokenizer
from captioning.inference.report_rule import report_search
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
    search_rule: str | None = None,
) -> list[str]:
    """Caption B images from their encoder tokens (B, N, D); one beam is greedy search.

    Args:
        captioner: best merged.
        tokenizer: the decoder's.
        features: encoder tokens.
        beam_size: live beams.
        max_new_tokens: longest caption.
        length_penalty: of the rule ``beam``; ``report`` has none.
        steps: compiled for at least as many images, and for the same beams and tokens.
        search_rule: ``beam`` or ``report``; None takes the captioner's own.

    Raises:
        ValueError: the rule has no length penalty, or as the searches.
    """
    rule = search_rule or captioner.config.search_rule
    check_length_penalty(rule, length_penalty)
    step: Step
    if steps is None:
        shared = captioner.step_function(features, beam_size, max_new_tokens)
        step, keep = shared, shared.keep
    else:
        with torch.no_grad():
            step, keep = steps.begin(captioner.prefix(features)), None  # compiled steps have a fixed batch

    step = within_vocabulary(step, tokenizer.vocab_size)
    eos, device = tokenizer.eos_id, features.device
    if rule == "report":
        found = report_search(step, len(features), eos, eos, beam_size, max_new_tokens, device, keep)
    elif beam_size == 1:
        found = greedy(step, len(features), eos, eos, max_new_tokens, device)
    else:
        found = beam_search(step, len(features), eos, eos, beam_size, max_new_tokens, length_penalty, device, keep)
    return [tokenizer.decode(tokens) for tokens in found.tokens]


def check_length_penalty(search_rule: str, length_penalty: float) -> None:
    """Raise ValueError for a length penalty of a search rule that has none."""
    if search_rule == "report" and length_penalty != 1:
        raise ValueError(
            f"--length-penalty {length_penalty}: the search rule `report` divides by a caption's number of ids; leave "
            "it out, or give --search-rule beam"
        )


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
