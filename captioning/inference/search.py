"""Greedy search, beam search and sampling over a step function: all the decoding of the suite, and no model.

The step function. ``step(tokens, ancestors) -> logits`` is called once a generated token, with

- ``tokens`` long (B, K): the newest token of each of the K live beams of B images,
- ``ancestors`` bool (B, K, n): True at the slots that hold the beam's own history, its newest token included,
- ``logits`` (B, K, V): of the token to come after each, in any floating-point type.

Call t = 0, 1, … puts its K tokens into slots K t … K t + K - 1, so that n = K (t + 1). A slot is written once and never
moves: when beams branch or die only ``ancestors`` changes, and the model appends keys and values and uses it as an
attention mask. No cache is ever reordered or copied. The first call feeds K equal BOS tokens, each of which sees
itself alone; only the first of these beams counts, which keeps the layout regular. Greedy search and sampling are the
case K = 1, where every slot is an ancestor.

An image that is done is fed on until all are, and what the model says of it is ignored; but a beam search leaves done
images out of its batch where it is told how (``keep``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CHECK_EVERY = 4  # steps between two looks at an accelerator: each look waits for it
LEAVING = 0.25  # share of a batch that must be done before it leaves: moving the others costs about one step's reading


@dataclass(frozen=True)
class SearchResult:
    """What a search found, one entry an image."""

    tokens: list[list[int]]  # without BOS and EOS
    scores: list[float]  # sum of log-probabilities over (number of tokens) ** length_penalty, EOS included in both
    finished: list[list[list[int]]] = field(default_factory=list)  # by beam search: up to K an image, best first


@torch.no_grad()
def greedy(
    step: Step,
    batch_size: int,
    bos: int,
    eos: int,
    max_new_tokens: int = 30,
    device: torch.device | str | None = None,
    check_every: int | None = None,
) -> SearchResult:
    """Take the most probable token at each step until EOS or ``max_new_tokens``; scores have length penalty 1.

    ``check_every`` is as in ``beam_search``.

    Raises:
        ValueError: sizes below 1, or logits that are not numbers.
    """
    watch = _Watch(check_every or _check_every(device), max_new_tokens)
    return _single_path(
        step, lambda log_probs: log_probs.argmax(-1), batch_size, bos, eos, max_new_tokens, device, watch
    )


@torch.no_grad()
def sample(
    step: Step,
    batch_size: int,
    bos: int,
    eos: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    max_new_tokens: int = 30,
    device: torch.device | str | None = None,
) -> SearchResult:
    """Draw each token from the model's distribution, sharpened by ``temperature`` and cut to its likely part.

    Args:
        step: see the module's head.
        batch_size: images B.
        bos: id of the first token fed.
        eos: id that ends a caption.
        generator: source of randomness, on the same device as the logits.
        temperature: divides the logits; below 1 is more conservative.
        top_k: keep the k most probable tokens; None keeps all.
        top_p: then keep the fewest tokens whose probabilities sum to this (Holtzman et al., arXiv 1904.09751).
        max_new_tokens: longest caption, EOS included.
        device: where the tokens lie.

    Returns:
        Tokens and their scores under the uncut model, with length penalty 1.

    Raises:
        ValueError: settings out of range, or logits that are not numbers.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature must be a positive number, not {temperature}; for 0 use greedy search")
    if top_k is not None and top_k < 1:
        raise ValueError(f"--top-k must be at least 1, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p must be in (0, 1], not {top_p}")

    def draw(log_probs: torch.Tensor) -> torch.Tensor:
        kept = _likely_part(log_probs / temperature, top_k, top_p)
        return torch.multinomial(kept.softmax(-1), 1, generator=generator).squeeze(-1)

    watch = _Watch(1, max_new_tokens)  # steps that nobody needs would draw from the generator
    return _single_path(step, draw, batch_size, bos, eos, max_new_tokens, device, watch)


@torch.no_grad()
def beam_search(
    step: Step,
    batch_size: int,
    bos: int,
    eos: int,
    beam_size: int = 5,
    max_new_tokens: int = 30,
    length_penalty: float = 1.0,
    device: torch.device | str | None = None,
    keep: Callable[[torch.Tensor], None] | None = None,
    check_every: int | None = None,
) -> SearchResult:
    """Keep the ``beam_size`` best unfinished captions at each step; return the best finished one of each image.

    The rules are those of transformers' ``generate(num_beams=…, early_stopping=False)``, so that captions agree: of
    the 2K best continuations those that end within the first K are finished, the first K that do not end live on; an
    image is done when it has K finished captions and its best live one, scored at its present length, is no better
    than the worst of them.

    Args:
        step: see the module's head.
        batch_size: images B.
        bos: id of the first token fed.
        eos: id that ends a caption.
        beam_size: live beams K an image.
        max_new_tokens: longest caption, EOS included; what still lives then counts as finished.
        length_penalty: exponent of the length that divides a sum of log-probabilities; higher favours longer captions.
        device: where the tokens lie.
        keep: called with places in the batch, long (n,), when a quarter of its images are done: from then on ``step``
            gets these n images alone, in this order. Without it the batch stays whole.
        check_every: steps between two looks at what is done, each of which waits for the device; the result is the
            same. None: 1 on a CPU, where looking is free, and else ``CHECK_EVERY``.

    Raises:
        ValueError: sizes below 1, or logits that are not numbers.
    """
    _check_sizes(batch_size, max_new_tokens)
    if beam_size < 1:
        raise ValueError(f"--beam-size must be at least 1, not {beam_size}")
    beams = _Beams(batch_size, beam_size, bos, eos, max_new_tokens, device)
    watch = _Watch(check_every or _check_every(device), max_new_tokens)
    for length in range(1, max_new_tokens + 1):
        log_probs = _log_probs(step(beams.tokens, beams.ancestors))  # (B, K, V)
        broken = _broken_rows(log_probs) & beams.open  # (B,)
        beams.advance(log_probs, length, length_penalty)
        left = watch.still_open(broken, ~beams.open, length, beams.images)
        if left == 0:
            break
        if keep is not None and left is not None and left <= (1 - LEAVING) * len(beams.images):
            keep(beams.leave())
    return beams.result()


class _Beams:
    """The state of a beam search: K live and up to K finished captions an image, best first."""

    def __init__(
        self, batch: int, k: int, bos: int, eos: int, max_new_tokens: int, device: torch.device | str | None
    ) -> None:
        self.k, self.eos, self.max_new_tokens = k, eos, max_new_tokens
        self.own_slot = torch.eye(k, dtype=torch.bool, device=device).expand(batch, k, k)
        self.tokens = torch.full((batch, k), bos, device=device)  # (B, K) newest token
        self.ancestors = self.own_slot  # (B, K, n)
        self.scores = torch.full((batch, k), -math.inf, device=device)  # (B, K) sums of log-probabilities
        self.scores[:, 0] = 0.0  # the first K beams are equal; were all of them to count, all would stay equal
        self.live = torch.full((batch, k, max_new_tokens), eos, device=device)  # (B, K, L) tokens, then EOS
        self.done_tokens = self.live
        self.done_scores = torch.full((batch, k), -math.inf, device=device)  # -inf: no caption in this place yet
        self.open = torch.ones(batch, dtype=torch.bool, device=device)  # (B,) may still find a better caption
        self.images = list(range(batch))  # which images the rows of all these are
        self.found: dict[int, tuple[list[list[int]], float]] = {}  # captions, best score: of images that have left

    def advance(self, log_probs: torch.Tensor, length: int, length_penalty: float) -> None:
        """Grow all beams by one token, to ``length``; log_probs (B, K, V) are float32."""
        vocab = log_probs.shape[-1]
        # A beam has one way to end, so 2K continuations hold at least K that do not.
        sums, index = (self.scores.unsqueeze(-1) + log_probs).flatten(1).topk(2 * self.k)  # (B, 2K) best first
        parents, tokens = index // vocab, index % vocab
        captions = _pick(self.live, parents)  # (B, 2K, L)
        captions[:, :, length - 1] = tokens
        ends = tokens == self.eos if length < self.max_new_tokens else torch.ones_like(tokens, dtype=torch.bool)

        counts = ends & self.open.unsqueeze(-1)  # (B, 2K)
        counts[:, self.k :] = False
        scale = length**length_penalty
        ranked = torch.cat((self.done_scores, (sums / scale).masked_fill(~counts, -math.inf)), 1)  # (B, 3K)
        self.done_scores, kept = ranked.topk(self.k)
        self.done_tokens = _pick(torch.cat((self.done_tokens, captions), 1), kept)

        self.scores, kept = sums.masked_fill(ends, -math.inf).topk(self.k)
        self.live = _pick(captions, kept)
        self.tokens = tokens.gather(1, kept)
        history = _pick(self.ancestors, parents.gather(1, kept))  # (B, K, n)
        self.ancestors = torch.cat((history, self.own_slot), -1)  # (B, K, n + K)
        self.open = self.open & (self.scores[:, 0] / scale > self.done_scores[:, -1])

    def leave(self) -> torch.Tensor:
        """Take the images that are done out of the batch; return the places of the others, (n,)."""
        self._collect(~self.open)
        rows = self.open.nonzero().flatten()
        for name in ("own_slot", "tokens", "ancestors", "scores", "live", "done_tokens", "done_scores", "open"):
            setattr(self, name, getattr(self, name)[rows])
        self.images = [self.images[row] for row in rows.tolist()]
        return rows

    def result(self) -> SearchResult:
        """Return the captions of every image, those that have left included."""
        self._collect(torch.ones_like(self.open))
        finished, scores = zip(*(self.found[image] for image in sorted(self.found)), strict=True)
        return SearchResult([captions[0] for captions in finished], list(scores), list(finished))

    def _collect(self, chosen: torch.Tensor) -> None:
        images = [self.images[row] for row in chosen.nonzero().flatten().tolist()]
        possible = self.done_scores[chosen] > -math.inf  # where few words are, places may stay empty
        captions = [_cut(rows[ok], self.eos) for rows, ok in zip(self.done_tokens[chosen], possible, strict=True)]
        self.found.update(zip(images, zip(captions, self.done_scores[chosen, 0].tolist(), strict=True), strict=True))


class _Watch:
    """Looks for images that are done or broken, and so waits for the device, every few steps; the only one that does.

    An image that is done does not change any more, so looking late costs steps and changes no result.
    """

    def __init__(self, every: int, last: int) -> None:
        self.every, self.last = every, last
        self.broken_at: torch.Tensor | None = None  # (B,) since the last look: at which token first; last + 1: nowhere

    def still_open(self, broken: torch.Tensor, done: torch.Tensor, length: int, images: Sequence[int]) -> int | None:
        """How many images are not done, or None where this step does not look; ValueError where one is broken."""
        now = torch.full_like(broken, self.last + 1, dtype=torch.long).masked_fill(broken, length)
        self.broken_at = now if self.broken_at is None else torch.minimum(self.broken_at, now)
        if length % self.every and length < self.last:
            return None
        first, left = torch.stack((self.broken_at.min(), (~done).sum())).tolist()
        if first <= self.last:
            rows = [images[row] for row in (self.broken_at == first).nonzero().flatten().tolist()]
            raise ValueError(
                f"the model's logits are NaN or infinite at token {first} of image rows {rows}; "
                "check the weights and the image features, or decode in float32"
            )
        self.broken_at = None
        return left


def _check_every(device: torch.device | str | None) -> int:
    return 1 if torch.empty(0, device=device).device.type == "cpu" else CHECK_EVERY


def _single_path(
    step: Step,
    choose: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    bos: int,
    eos: int,
    max_new_tokens: int,
    device: torch.device | str | None,
    watch: _Watch,
) -> SearchResult:
    """One caption an image, each token chosen by ``choose``: log-probabilities (B, V) -> ids (B,)."""
    _check_sizes(batch_size, max_new_tokens)
    newest = torch.full((batch_size,), bos, device=device)
    done = torch.zeros(batch_size, dtype=torch.bool, device=device)
    sums, lengths = torch.zeros(2, batch_size, device=device)
    history = []
    for length in range(1, max_new_tokens + 1):
        ancestors = torch.ones(batch_size, 1, length, dtype=torch.bool, device=device)
        log_probs = _log_probs(step(newest.unsqueeze(1), ancestors))  # (B, 1, V)
        broken = _broken_rows(log_probs)
        log_probs = log_probs.squeeze(1).masked_fill(broken.unsqueeze(-1), 0.0)  # multinomial dies of NaN on a GPU
        newest = choose(log_probs)
        sums += log_probs.gather(1, newest.unsqueeze(1)).squeeze(1).masked_fill(done, 0.0)
        lengths += ~done
        history.append(newest)
        broken = broken & ~done
        done = done | (newest == eos)
        if watch.still_open(broken, done, length, range(batch_size)) == 0:
            break
    return SearchResult(_cut(torch.stack(history, 1), eos), (sums / lengths).tolist())


def _likely_part(logits: torch.Tensor, top_k: int | None, top_p: float) -> torch.Tensor:
    """Set all but the likely tokens of logits (B, V) to -inf; the most probable one always stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        kept, index = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(1, index, kept)
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        mass = ordered.softmax(-1)
        unlikely = mass.cumsum(-1) - mass >= top_p  # what the more probable tokens hold; 0 for the first, which stays
        logits = logits.masked_fill(unlikely.scatter(1, index, unlikely), -math.inf)
    return logits


def _check_sizes(batch_size: int, max_new_tokens: int) -> None:
    if batch_size < 1:
        raise ValueError(f"a search needs at least one image, not {batch_size}")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1)  # float32: sums of bfloat16 would tie


def _broken_rows(log_probs: torch.Tensor) -> torch.Tensor:
    """Images (B,) with a NaN in their log-probabilities (B, K, V); infinite logits become NaN in the softmax."""
    return log_probs.amax((1, 2)).isnan()


def _pick(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select rows (B, M, N) by index (B, K), image by image, to (B, K, N)."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def _cut(tokens: torch.Tensor, eos: int) -> list[list[int]]:
    """Lists of the ids of tokens (B, L) before the first EOS."""
    return [row[: row.index(eos)] if eos in row else row for row in tokens.tolist()]
