"""The report's own beam search, as its code ran it: a beam that ends is not replaced.

1.  The first K beams are the K most probable tokens after BOS. EOS among them does not end a beam.
2.  In every later step the k best continuations of the k live beams go on. Those whose new token is EOS are finished,
    so k falls; what lives after ``max_new_tokens`` tokens counts as finished.
3.  Of the K finished captions the one with the best sum of log-probabilities over its number of ids, BOS and EOS
    included, wins.

Of equal sums the one that comes first wins, the beams standing best first and their continuations by id; of equal
scores the caption that was finished first. The report's code took one image at a time, without a cache; here all
images of a batch advance together over the step function of search.py, each with its own k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from captioning.inference.search import Beams, Device, Found, SearchResult, Step, check_sizes, pick, search_with
from captioning.inference.wording import Rule


@torch.no_grad()
def report_search(
    step: Step,
    batch_size: int,
    bos: int,
    eos: int,
    beam_size: int = 5,
    max_new_tokens: int = 30,
    device: Device = None,
    keep: Callable[[torch.Tensor], None] | None = None,
    check_every: int | None = None,
    rules: Sequence[Rule] = (),
) -> SearchResult:
    """Search by the report's rule. Arguments and errors are those of :func:`search.beam_search`.

    Returns:
        Captions without BOS and the EOS that ended them; one may begin with an EOS. Scores as above. ``finished`` has
        all K captions of each image, or as many as there are words.
    """
    check_sizes(batch_size, max_new_tokens, beam_size)
    beams = _DwindlingBeams(batch_size, beam_size, bos, eos, max_new_tokens, device)
    return search_with(beams, step, keep, check_every, rules)


class _DwindlingBeams(Beams):
    """K beams of each image, of which the live ones stand in front, best first; the others are finished.

    Finished beams keep their caption and sum. They are still fed to the model, which keeps the layout regular, and what
    it says of them is ignored.
    """

    def __init__(self, batch: int, k: int, *args: Any) -> None:
        super().__init__(batch, k, *args)
        self.place = torch.arange(k, device=self.device).expand(batch, k)
        self.alive = self.place == 0  # (B, K): all K are equal at the start
        self.lengths = torch.zeros_like(self.place)  # (B, K) tokens of each finished caption; 0: none

    def advance(self, log_probs: torch.Tensor, length: int) -> None:
        """Grow the live beams by one token, to ``length``; log_probs (B, K, V) are float32."""
        vocab = log_probs.shape[-1]
        sums = (self.live_sums.masked_fill(~self.alive, -math.inf).unsqueeze(-1) + log_probs).flatten(1)  # (B, K V)
        best = first_best(sums, self.k)
        grows = self.alive if length > 1 else self.place < vocab  # (B, K): as many beams go on as there were
        parents = torch.where(grows, best // vocab, self.place)
        tokens = torch.where(grows, best % vocab, self.eos)
        totals = torch.where(grows, sums.gather(1, best), self.live_sums)

        ends = tokens == self.eos if length > 1 else torch.zeros_like(grows)
        ends = grows & (ends | (length == self.max_new_tokens))
        lengths = self.lengths.masked_fill(ends, length)
        alive = grows & ~ends
        order = (~alive).long().argsort(dim=1, stable=True)  # live ones in front, both parts in their order
        self.alive, self.live_sums, self.lengths = (part.gather(1, order) for part in (alive, totals, lengths))
        parents, tokens = parents.gather(1, order), tokens.gather(1, order)
        self.live = pick(self.live, parents)
        self.live[:, :, length - 1] = tokens
        self.branch(parents, tokens)
        self.open = self.alive.any(1)

    def found(self, rows: torch.Tensor) -> list[Found]:
        """Return the captions of these rows, best first."""
        columns = (column.cpu()[rows].tolist() for column in (self.live, self.lengths, self.live_sums))
        return [self._ranked(*row) for row in zip(*columns, strict=True)]

    def _ranked(self, captions: list[list[int]], lengths: list[int], sums: list[float]) -> Found:
        """Rank the captions of one image. In Python's floats: two scores that differ must not be rounded to a tie."""
        beams = [(total / (n + 1), n, row[:n]) for row, n, total in zip(captions, lengths, sums, strict=True) if n]
        beams.sort(key=lambda beam: (-beam[0], beam[1]))
        return [row[:-1] if row[-1] == self.eos else row for _, _, row in beams], beams[0][0]


def first_best(sums: torch.Tensor, count: int) -> torch.Tensor:
    """Return the places of the ``count`` best sums of log-probabilities (B, N), float32, best first, (B, count).

    Of equal ones the first stands in front, which ``topk`` leaves open. So it is given whole numbers, all different: in
    front the bits of the sum, which order numbers of one sign by their size, as no sum is above 0, and then the place.
    """
    sizes = sums.abs().view(torch.int32).long()
    keys = sizes.bitwise_left_shift_(32).add_(torch.arange(sums.shape[1], device=sums.device))
    return keys.topk(count, largest=False).indices
