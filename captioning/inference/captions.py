"""Captions of images from their encoder tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from captioning.data.batches import pack_captions
from captioning.data.ranked import Ranked
from captioning.data.tokenizer import Tokenizer
from captioning.device import sent
from captioning.inference.report_rule import report_search
from captioning.inference.search import Step, beam_search, greedy
from captioning.inference.wording import Wording
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
    wording: Wording | None = None,
    n_best: int = 0,
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
        wording: what captions may not say.
        n_best: return each caption as ``Ranked``, with its score and the others of this many best; 0: as text.

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
    images, eos, device = len(features), tokenizer.eos_id, features.device
    rules = wording.rules(eos) if wording else []
    if rule == "report":
        found = report_search(step, images, eos, eos, beam_size, max_new_tokens, device, keep, rules=rules)
    elif beam_size == 1:
        found = greedy(step, images, eos, eos, max_new_tokens, device, rules=rules)
    else:
        sizes = (beam_size, max_new_tokens, length_penalty)
        found = beam_search(step, images, eos, eos, *sizes, device, keep, rules=rules)
    if not n_best:
        return [tokenizer.decode(tokens) for tokens in found.tokens]
    groups = [captions[:n_best] for captions in found.finished or [[tokens] for tokens in found.tokens]]
    scores = mean_log_probs(captioner, features, groups, eos, max_new_tokens, tokenizer.vocab_size)
    return [
        Ranked((tokenizer.decode(tokens), score) for tokens, score in zip(*pairs, strict=True))
        for pairs in zip(groups, scores, strict=True)
    ]


@torch.no_grad()
def mean_log_probs(
    captioner: Captioner,
    features: torch.Tensor,
    captions: Sequence[Sequence[Sequence[int]]],
    eos: int,
    longest: int,
    vocab_size: int | None = None,
) -> list[list[float]]:
    """Return the mean log-probability of each caption's tokens, read once more without any rule, ``[image][caption]``.

    Args:
        captioner: in eval mode.
        features: encoder tokens (B, N, D).
        captions: ``[image][caption]`` token ids without EOS.
        eos: id of EOS, which counts as a token of captions shorter than ``longest``; the others were cut.
        longest: most tokens.
        vocab_size: ids that belong to tokens; None: all of the output layer.
    """
    batch = pack_captions(captions, eos, pad_to_multiple=8).each(lambda tensor: sent(tensor, features.device))
    left = iter(captioner.log_probs(features, batch, vocab_size).tolist())

    def mean(length: int) -> float:
        values = list(itertools.islice(left, length + 1))[:longest]  # packing gives an EOS to all
        return sum(values) / len(values)

    return [[mean(len(caption)) for caption in group] for group in captions]


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
