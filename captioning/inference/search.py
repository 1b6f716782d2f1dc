"""Greedy search and beam search over a step function: all the decoding of the suite, and no model.

The report's own rule for beams, which builds on this, is in report_rule.py.

``step(tokens, ancestors) -> logits`` is called once for each generated token, for K live beams of each of B images:

- ``tokens`` long (B, K): the newest token of each beam,
- ``ancestors`` bool (B, K, n): the slots that hold the beam's own history, its newest token included,
- ``logits`` (B, K, V): of the token to come after each, in any floating-point type.

Call t = 0, 1, … puts its K tokens into the slots K t … K t + K - 1, so that n = K (t + 1). A slot is written once and
never moves. When beams branch or die only ``ancestors`` changes: the model appends keys and values to its cache, which
is never reordered or copied, and takes ``ancestors`` as its attention mask. Here are K = 2 beams of an image in the
third call, after "a" has branched and "the" has died:

    slot              0    1    2    3    4    5
    token             BOS  BOS  a    the  red  dog
    ancestors[b, 0]   1    0    1    0    1    0        BOS a red
    ancestors[b, 1]   1    0    1    0    0    1        BOS a dog

The first call feeds K equal BOS tokens, each of which sees only itself. Only the first of these beams counts; the
others keep the layout regular. Greedy search is the case K = 1, where every slot is an ancestor.

Images that are done stay in the batch until all are, and what the model says of them is ignored; but a beam search
takes them out where it is given a ``keep`` function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from captioning.inference.wording import Rule, apply_rules

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Device = torch.device | str | None
CHECK_EVERY = 4  # steps between two checks on an accelerator: each check waits for it
LEAVING = 0.25  # share of a batch that must be done before it leaves: moving the others costs about one step's reading


@dataclass(frozen=True)
class SearchResult:
    """What a search found, one entry for each image."""

    tokens: list[list[int]]  # without BOS and EOS
    scores: list[float]  # sum of log-probabilities over (number of tokens) ** length_penalty, EOS included in both
    finished: list[list[list[int]]] = field(default_factory=list)  # by beam search: up to K per image, best first


Found = tuple[list[list[int]], float]  # of one image: its captions, best first, and the score of the best


@torch.no_grad()
def greedy(
    step: Step,
    batch_size: int,
    bos: int,
    eos: int,
    max_new_tokens: int = 30,
    device: Device = None,
    check_every: int | None = None,
    rules: Sequence[Rule] = (),
) -> SearchResult:
    """Take the most probable token at each step until EOS or ``max_new_tokens``; scores have length penalty 1.

    The arguments are those of :func:`beam_search`.

    Raises:
        ValueError: sizes below 1, or logits that are not numbers.
    """
    check_sizes(batch_size, max_new_tokens)
    newest = torch.full((batch_size,), bos, device=device)
    done = torch.zeros(batch_size, dtype=torch.bool, device=device)
    sums, lengths = torch.zeros(2, batch_size, device=device)
    check = _StopCheck(check_every or _check_every(device), max_new_tokens)
    history = torch.empty(batch_size, 1, 0, dtype=torch.long, device=device)  # (B, 1, t)
    for length in range(1, max_new_tokens + 1):
        ancestors = torch.ones(batch_size, 1, length, dtype=torch.bool, device=device)
        logits = step(newest.unsqueeze(1), ancestors)  # (B, 1, V)
        log_probs = _log_probs(logits)
        check.note(_broken_images(log_probs) & ~done, length)
        newest = (apply_rules(rules, logits.float(), history) if rules else log_probs).argmax(-1)  # (B, 1)
        history = torch.cat((history, newest.unsqueeze(1)), -1)
        sums += log_probs.squeeze(1).gather(1, newest).squeeze(1).masked_fill(done, 0.0)
        newest = newest.squeeze(1)
        lengths += ~done
        done = done | (newest == eos)
        if check.is_due(length) and check.count_open(~done, range(batch_size)) == 0:
            break
    captions = [_before_eos(tokens, eos) for tokens in history.squeeze(1).tolist()]
    return SearchResult(captions, (sums / lengths).tolist())


@torch.no_grad()
def beam_search(
    step: Step,
    batch_size: int,
    bos: int,
    eos: int,
    beam_size: int = 5,
    max_new_tokens: int = 30,
    length_penalty: float = 1.0,
    device: Device = None,
    keep: Callable[[torch.Tensor], None] | None = None,
    check_every: int | None = None,
    rules: Sequence[Rule] = (),
) -> SearchResult:
    """Keep the ``beam_size`` best unfinished captions at each step; return the best finished one of each image.

    The rules are those of transformers' ``generate(num_beams=…, early_stopping=False)``, so that captions agree. Of
    the 2K best continuations, those that end within the first K are finished, and the first K that do not end live on.
    An image is done when it has K finished captions and its best live one, scored at its present length, is no better
    than the worst of them.

    Args:
        step: see the top of this module.
        batch_size: images B.
        bos: id of the first token fed.
        eos: id that ends a caption.
        beam_size: live beams K of each image.
        max_new_tokens: longest caption L, EOS included; what is still live then counts as finished.
        length_penalty: exponent of the length that divides a sum of log-probabilities; higher favours longer captions.
        device: where the tokens are.
        keep: called with places in the batch, long (n,), once a quarter of its images are done: from then on ``step``
            gets only these n images, in this order. Without it the batch stays complete.
        check_every: steps between two checks of what is done, each of which waits for the device; the result is the
            same. None: 1 on a CPU, where checks are free, and else ``CHECK_EVERY``.
        rules: what captions may not say (see wording.py); the scores that are searched by follow them.

    Raises:
        ValueError: sizes below 1, or logits that are not numbers.
    """
    check_sizes(batch_size, max_new_tokens, beam_size)
    beams = _RefilledBeams(batch_size, beam_size, bos, eos, max_new_tokens, length_penalty, device)
    return search_with(beams, step, keep, check_every, rules)


class Beams:
    """The K live beams of each image, as a rule grows them; subclasses are the rules.

    Captions are rows of L tokens, filled up with EOS. In every tensor the images come first.
    """

    def __init__(self, batch: int, k: int, bos: int, eos: int, max_new_tokens: int, device: Device) -> None:
        self.k, self.eos, self.max_new_tokens, self.device = k, eos, max_new_tokens, device
        self.own_slot = torch.eye(k, dtype=torch.bool, device=device).expand(batch, k, k)
        self.tokens = torch.full((batch, k), bos, device=device)  # (B, K) the newest
        self.ancestors = self.own_slot  # (B, K, n)
        self.live = torch.full((batch, k, max_new_tokens), eos, device=device)  # (B, K, L)
        self.live_sums = torch.full((batch, k), -math.inf, device=device)  # (B, K) of log-probabilities
        self.live_sums[:, 0] = 0.0  # the first K beams are equal; if all of them counted, all would stay equal
        self.open = torch.ones(batch, dtype=torch.bool, device=device)  # (B,) may still find a better caption
        self.images = list(range(batch))  # which image each row is
        self.results: dict[int, Found] = {}  # of the images that have left

    def advance(self, log_probs: torch.Tensor, length: int) -> None:
        """Grow all beams by one token, to ``length``; log_probs (B, K, V) are float32."""
        raise NotImplementedError

    def found(self, rows: torch.Tensor) -> list[Found]:
        """Return what was found for these rows of the batch, (n,) on the CPU, where the state is read."""
        raise NotImplementedError

    def branch(self, parents: torch.Tensor, tokens: torch.Tensor) -> None:
        """Make ``tokens`` (B, K) the newest of the live beams, after the history of the beams ``parents`` (B, K)."""
        self.tokens = tokens
        self.ancestors = torch.cat((pick(self.ancestors, parents), self.own_slot), -1)  # (B, K, n + K)

    def drop_done(self) -> torch.Tensor:
        """Take the images that are done out of the batch; return the places of the others, (n,)."""
        still_open = self.open.cpu()
        self._store(~still_open)
        self.images = [image for image, stays in zip(self.images, still_open.tolist(), strict=True) if stays]
        rows = still_open.nonzero().flatten().to(self.open.device)
        for name, value in list(vars(self).items()):
            if isinstance(value, torch.Tensor):
                setattr(self, name, value[rows])
        return rows

    def result(self) -> SearchResult:
        """Return the captions of every image, those that have left included."""
        self._store(torch.ones(len(self.images), dtype=torch.bool))
        finished, scores = zip(*(self.results[image] for image in sorted(self.results)), strict=True)
        return SearchResult([captions[0] for captions in finished], list(scores), list(finished))

    def _store(self, chosen: torch.Tensor) -> None:
        """Put what was found for the chosen rows, bool (B,) on the CPU, into the results."""
        rows = chosen.nonzero().flatten()
        self.results |= zip([self.images[row] for row in rows.tolist()], self.found(rows), strict=True)


def search_with(
    beams: Beams,
    step: Step,
    keep: Callable[[torch.Tensor], None] | None,
    check_every: int | None,
    rules: Sequence[Rule],
) -> SearchResult:
    """Advance ``beams`` until no image is open; the other arguments are those of :func:`beam_search`."""
    check = _StopCheck(check_every or _check_every(beams.device), beams.max_new_tokens)
    for length in range(1, beams.max_new_tokens + 1):
        log_probs = _log_probs(step(beams.tokens, beams.ancestors))  # (B, K, V)
        check.note(_broken_images(log_probs) & beams.open, length)
        beams.advance(apply_rules(rules, log_probs, beams.live[:, :, : length - 1]), length)
        if not check.is_due(length):
            continue
        n_open = check.count_open(beams.open, beams.images)
        if n_open == 0:
            break
        if keep is not None and n_open <= (1 - LEAVING) * len(beams.images):
            keep(beams.drop_done())
    return beams.result()


class _RefilledBeams(Beams):
    """Where one of the K best continuations ends, the next best one takes its place: K beams live at every step.

    Up to K finished captions of each image are kept, best first, as the live ones are.
    """

    def __init__(
        self, batch: int, k: int, bos: int, eos: int, max_new_tokens: int, length_penalty: float, device: Device
    ) -> None:
        super().__init__(batch, k, bos, eos, max_new_tokens, device)
        self.length_penalty = length_penalty
        self.finished = self.live  # (B, K, L)
        self.finished_scores = torch.full((batch, k), -math.inf, device=device)  # (B, K); -inf: no caption yet

    def advance(self, log_probs: torch.Tensor, length: int) -> None:
        """Grow all beams by one token, to ``length``; log_probs (B, K, V) are float32."""
        vocab = log_probs.shape[-1]
        # A beam has one way to end, so 2K continuations hold at least K that do not.
        sums, index = (self.live_sums.unsqueeze(-1) + log_probs).flatten(1).topk(2 * self.k)  # (B, 2K) best first
        parents, tokens = index // vocab, index % vocab
        captions = pick(self.live, parents)  # (B, 2K, L)
        captions[:, :, length - 1] = tokens
        ends = tokens == self.eos if length < self.max_new_tokens else torch.ones_like(tokens, dtype=torch.bool)

        scale = length**self.length_penalty
        self._finish(captions, sums / scale, ends)
        self._continue(captions, sums, ends, parents, tokens)
        self.open = self.open & (self.live_sums[:, 0] / scale > self.finished_scores[:, -1])

    def _finish(self, captions: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor) -> None:
        """Of the first K continuations (B, 2K, L) take those that end; keep the K best finished captions."""
        counts = ends & self.open.unsqueeze(-1)  # (B, 2K)
        counts[:, self.k :] = False
        ranked = torch.cat((self.finished_scores, scores.masked_fill(~counts, -math.inf)), 1)  # (B, 3K)
        self.finished_scores, kept = ranked.topk(self.k)
        self.finished = pick(torch.cat((self.finished, captions), 1), kept)

    def _continue(
        self,
        captions: torch.Tensor,
        sums: torch.Tensor,
        ends: torch.Tensor,
        parents: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        """Make the K best continuations (B, 2K, L) that do not end the live beams."""
        self.live_sums, kept = sums.masked_fill(ends, -math.inf).topk(self.k)
        self.live = pick(captions, kept)
        self.branch(parents.gather(1, kept), tokens.gather(1, kept))

    def found(self, rows: torch.Tensor) -> list[Found]:
        """Return the finished captions of these rows: of few words fewer than K are possible."""
        counts = (self.finished_scores > -math.inf).sum(1)  # (B,)
        columns = (column.cpu()[rows].tolist() for column in (self.finished, counts, self.finished_scores[:, 0]))
        return [
            ([_before_eos(tokens, self.eos) for tokens in captions[:count]], score)
            for captions, count, score in zip(*columns, strict=True)
        ]


class _StopCheck:
    """Finds out every few steps whether images are done or broken; nothing else waits for the device.

    An image that is done does not change any more, so a late check costs steps and changes no result.
    """

    def __init__(self, every: int, last: int) -> None:
        self.every, self.last = every, last
        self.broken_at: torch.Tensor | None = None  # (B,) since the last check: first broken token, or last + 1

    def note(self, broken: torch.Tensor, length: int) -> None:
        """Take note of the images, bool (B,), whose logits for token ``length`` are not numbers."""
        now = torch.full_like(broken, self.last + 1, dtype=torch.long).masked_fill(broken, length)
        self.broken_at = now if self.broken_at is None else torch.minimum(self.broken_at, now)

    def is_due(self, length: int) -> bool:
        """Whether this step is one to check after."""
        return length % self.every == 0 or length == self.last

    def count_open(self, still_open: torch.Tensor, images: Sequence[int]) -> int:
        """Return how many of the rows, bool (B,), are open. Raises ValueError naming the images that are broken."""
        assert self.broken_at is not None  # a check comes after a step
        first, count = torch.stack((self.broken_at.min(), still_open.sum())).tolist()
        if first <= self.last:
            rows = [images[row] for row in (self.broken_at == first).nonzero().flatten().tolist()]
            raise ValueError(
                f"the model's logits are NaN or infinite at token {first} of image rows {rows}; "
                "check the weights and the image features, or decode in float32"
            )
        self.broken_at = None
        return count


def _check_every(device: Device) -> int:
    return 1 if torch.empty(0, device=device).device.type == "cpu" else CHECK_EVERY


def check_sizes(batch_size: int, max_new_tokens: int, beam_size: int = 1) -> None:
    """Raise ValueError for sizes below 1."""
    if batch_size < 1:
        raise ValueError(f"a search needs at least one image, not {batch_size}")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if beam_size < 1:
        raise ValueError(f"--beam-size must be at least 1, not {beam_size}")


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1)  # float32: sums of bfloat16 would tie


def _broken_images(log_probs: torch.Tensor) -> torch.Tensor:
    """Images (B,) with a NaN in their log-probabilities (B, K, V); infinite logits become NaN in the softmax."""
    return log_probs.amax((1, 2)).isnan()


def pick(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select rows (B, M, N) by index (B, K), image by image, to (B, K, N)."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _before_eos(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos)] if eos in tokens else tokens
