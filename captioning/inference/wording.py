"""What a caption may not say: transformers' rules against short captions and repeated words, under the same names.

A rule is a function ``(scores, history) -> scores`` of the scores of the next token (B, K, V) and of the tokens that
each beam has so far (B, K, t). BOS is not among these, as it is not for ``generate(inputs_embeds=…)``. The rules come
in transformers' order, and where transformers has them: greedy search gives them logits, beam search log-probabilities.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Wording:
    """What captions are kept from; the defaults keep them from nothing.

    Raises:
        ValueError: a value that makes no sense, named by its flag.
    """

    min_new_tokens: int = 0  # EOS comes after at least as many tokens
    no_repeat_ngram: int = 0  # no n-gram of so many tokens comes twice; 0: any may
    repetition_penalty: float = 1.0  # above 1, tokens that were said become less likely (Keskar et al. 2019)

    def __post_init__(self) -> None:
        for flag, value in (("--min-new-tokens", self.min_new_tokens), ("--no-repeat-ngram", self.no_repeat_ngram)):
            if value < 0:
                raise ValueError(f"{flag} must be 0 (none) or more, not {value}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"--repetition-penalty must be above 0 (1: none), not {self.repetition_penalty}")

    def rules(self, eos: int) -> list[Rule]:
        """Return the rules that are on, in their order; ``eos`` is the id that ends a caption."""
        rules: list[Rule] = []
        if self.repetition_penalty != 1.0:
            rules.append(functools.partial(penalise_repetition, self.repetition_penalty))
        if self.no_repeat_ngram:
            rules.append(functools.partial(forbid_repeated_ngrams, self.no_repeat_ngram))
        if self.min_new_tokens:
            rules.append(functools.partial(forbid_early_end, self.min_new_tokens, eos))
        return rules

    def changed(self) -> dict[str, Any]:
        """Return the fields that are not at their default."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def for_generate(self) -> dict[str, Any]:
        """Return the arguments of transformers' ``generate``."""
        names = {"no_repeat_ngram": "no_repeat_ngram_size"}
        return {names.get(name, name): value for name, value in self.changed().items()}


def apply_rules(rules: Sequence[Rule], scores: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """Return the scores (B, K, V) after all rules, given what each beam has said, (B, K, t)."""
    for rule in rules:
        scores = rule(scores, history)
    return scores


def penalise_repetition(penalty: float, scores: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """Divide the scores of tokens that were said by ``penalty``, and multiply those below 0."""
    said = scores.gather(-1, history)
    return scores.scatter(-1, history, torch.where(said < 0, said * penalty, said / penalty))


def forbid_repeated_ngrams(n: int, scores: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """Forbid every token that would end an n-gram for the second time."""
    said = history.shape[-1]
    if said < n:
        return scores
    ngrams = history.unfold(-1, n, 1)  # (B, K, t - n + 1, n)
    repeats = (ngrams[..., :-1] == history[..., None, said - n + 1 :]).all(-1)
    ends = torch.zeros_like(scores).scatter_add_(-1, ngrams[..., -1], repeats.to(scores.dtype))
    return scores.masked_fill(ends > 0, -math.inf)


def forbid_early_end(least: int, eos: int, scores: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """Forbid EOS to captions of fewer than ``least`` tokens."""
    if history.shape[-1] >= least:
        return scores
    place = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(place == eos, -math.inf)
