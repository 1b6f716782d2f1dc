"""CIDEr-D on lists of tokens (Vedantam et al. 2015), vectorised: the values of pycocoevalcap's ``Cider``, but faster.

A caption is a vector over its n-grams, each weighted by its count and by how rare it is among the images' references.
CIDEr-D is ten times the mean, over n = 1..4 and over the references, of a clipped cosine of two such vectors, damped
where their lengths differ. Tokens may be words or token ids. Rarity comes from ``DocumentFrequencies``, which can be
counted once (on a training set, for instance) and used in many calls, as a reward for generated captions needs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

ORDERS = 4  # n-grams of 1 to 4 tokens
SIGMA = 6.0  # of the Gaussian over the difference of lengths
SCALE = 10.0
ARRAYS = tuple(
    f"{what}_{n + 1}" for what in ("codes", "counts") for n in range(ORDERS)
)  # of DocumentFrequencies.arrays

Caption = Sequence[Hashable]


class DocumentFrequencies:
    """For each n-gram, the number of images in whose references it occurs.

    Args:
        references: for each image its captions, each a sequence of tokens.
    """

    def __init__(self, references: Sequence[Sequence[Caption]]) -> None:
        captions = self._learn_tokens(references)
        image = np.repeat(np.arange(self.images), [len(group) for group in references])
        for owner, gram in self._occurrences(captions):
            grams = len(self._codes[-1])
            pairs = np.sort(
                image[owner] * grams + gram
            )  # np.unique would hash integers, which takes three times as long
            first = np.concatenate([[True], pairs[1:] != pairs[:-1]])[: len(pairs)]
            self._counts.append(np.bincount(pairs[first] % max(grams, 1), minlength=grams))

    def _learn_tokens(self, references: Sequence[Sequence[Caption]]) -> list[Caption]:
        """Number the tokens; return the captions."""
        self.images = len(references)
        captions = [caption for group in references for caption in group]
        self._tokens = {token: place for place, token in enumerate(dict.fromkeys(chain.from_iterable(captions)))}
        self._codes: list[np.ndarray] = []  # of each order, the known n-grams as sorted integers
        self._counts: list[np.ndarray] = []  # of each order, images by n-gram
        # One table for all logarithms: a word of every image must weigh exactly log(N) - log(N) = 0.
        self._logarithms = np.log(np.maximum(np.arange(self.images + 1), 1))
        return captions

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the counts as int64 arrays by name, for ``restore``."""
        return dict(zip(ARRAYS, [*self._codes, *self._counts], strict=True))

    @classmethod
    def restore(cls, references: Sequence[Sequence[Caption]], arrays: Mapping[str, np.ndarray]) -> DocumentFrequencies:
        """Return the frequencies of the same references from ``arrays()``; ValueError where one is missing or extra."""
        made = cls.__new__(cls)
        made._learn_tokens(references)
        if set(arrays) != set(ARRAYS):
            raise ValueError(f"document frequencies are {', '.join(ARRAYS)}, not {', '.join(sorted(arrays))}")
        made._codes, made._counts = ([arrays[name] for name in part] for part in (ARRAYS[:ORDERS], ARRAYS[ORDERS:]))
        return made

    def counts(self, captions: Sequence[Caption]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
        """Yield for n = 1..4 the n-grams of ``captions``: ``(caption, n-gram, weight)`` by pair; a bound of n-grams.

        The three arrays have one entry for each different n-gram of each caption, sorted by caption, then n-gram; the
        weight is count times ``log(images) - log(max(1, document frequency))``. n-grams that no reference has are
        numbered after the known ones, for this call only.
        """
        for order, (owner, gram) in enumerate(self._occurrences(captions)):
            bound = int(gram.max(initial=0)) + 1
            pairs, count = np.unique(owner * bound + gram, return_counts=True)
            owner, gram = pairs // bound, pairs % bound
            frequency = np.zeros(bound, dtype=np.int64)
            known = min(bound, len(self._counts[order]))
            frequency[:known] = self._counts[order][:known]
            yield owner, gram, count * (self._logarithms[-1] - self._logarithms[frequency[gram]]), bound

    def _occurrences(self, captions: Sequence[Caption]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for n = 1..4 the caption and the n-gram's number of each n-gram; the first call learns the n-grams."""
        lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
        tokens = self._token_ids(captions)
        owner = np.repeat(np.arange(len(captions)), lengths)
        left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(tokens))  # tokens from here to the caption's end
        place, gram = np.arange(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
        for order in range(ORDERS):
            fits = left[place] > order
            place, gram = place[fits], gram[fits]
            gram = self._number(order, (gram << 32) | tokens[place + order])  # its first n - 1 tokens, and the last
            yield owner[place], gram

    def _token_ids(self, captions: Sequence[Caption]) -> np.ndarray:
        flat = list(chain.from_iterable(captions))
        unknown = [token for token in dict.fromkeys(flat) if token not in self._tokens]
        numbers = self._tokens | {token: len(self._tokens) + place for place, token in enumerate(unknown)}
        return np.fromiter(map(numbers.__getitem__, flat), dtype=np.int64, count=len(flat))

    def _number(self, order: int, codes: np.ndarray) -> np.ndarray:
        """Return the n-grams' numbers: places among the known ones, and further numbers for the others."""
        if order == len(self._codes):
            known, numbers = np.unique(codes, return_inverse=True)
            self._codes.append(known)
            return numbers
        known = self._codes[order]
        numbers = np.searchsorted(known, codes)
        unknown = np.ones(len(codes), dtype=bool)
        inside = numbers < len(known)
        unknown[inside] = known[numbers[inside]] != codes[inside]
        numbers[unknown] = len(known) + np.unique(codes[unknown], return_inverse=True)[1]
        return numbers


def cider_d(
    references: Sequence[Sequence[Caption]],
    candidates: Sequence[Caption],
    frequencies: DocumentFrequencies | None = None,
) -> np.ndarray:
    """Return the CIDEr-D of each candidate against the references at the same index, float64 ``(n,)``, 0 to 10.

    For several candidates of one image, repeat its references. Without ``frequencies`` those of ``references`` are
    counted, as captions are evaluated; a single image then scores 0, since every n-gram occurs in all (one) images.

    Raises:
        ValueError: the lengths differ, or an image has no reference.
    """
    if len(references) != len(candidates):
        raise ValueError(f"CIDEr-D got {len(candidates)} candidates and {len(references)} groups of references")
    bare = [number for number, group in enumerate(references) if not group]
    if bare:
        raise ValueError(f"CIDEr-D needs references of every image; number {bare[0]} has none")
    frequencies = frequencies or DocumentFrequencies(references)
    sizes = np.array([len(group) for group in references], dtype=np.int64)
    pair_of = np.repeat(np.arange(len(candidates)), sizes)  # by reference, its candidate
    captions = [*candidates, *(caption for group in references for caption in group)]
    lengths = np.array([len(caption) for caption in captions], dtype=np.float64)
    difference = lengths[pair_of] - lengths[len(candidates) :]
    damping = np.exp(-(difference**2) / (2 * SIGMA**2))
    total = np.zeros(len(pair_of))
    for owner, gram, weight, bound in frequencies.counts(captions):
        total += _clipped_cosines(owner, gram, weight, bound, pair_of, len(candidates)) * damping
    return SCALE * np.bincount(pair_of, total, minlength=len(candidates)) / (ORDERS * sizes)


def _clipped_cosines(
    owner: np.ndarray, gram: np.ndarray, weight: np.ndarray, bound: int, pair_of: np.ndarray, candidates: int
) -> np.ndarray:
    """Return by reference ``sum(min(c, r) * r) / (|c| |r|)`` with its candidate's c; 0 where a norm is 0."""
    norms = np.sqrt(np.bincount(owner, weight**2, minlength=candidates + len(pair_of)))
    split = np.searchsorted(owner, candidates)  # candidates' entries come first
    reference, reference_gram, reference_weight = owner[split:] - candidates, gram[split:], weight[split:]
    keys = owner[:split] * bound + gram[:split]  # sorted
    wanted = pair_of[reference] * bound + reference_gram
    place = np.searchsorted(keys, wanted)
    shared = np.zeros(len(wanted), dtype=bool)
    inside = place < split
    shared[inside] = keys[place[inside]] == wanted[inside]
    mine, theirs = weight[place[shared]], reference_weight[shared]
    overlap = np.bincount(reference[shared], np.minimum(mine, theirs) * theirs, minlength=len(pair_of))
    product = norms[pair_of] * norms[candidates:]
    return np.divide(overlap, product, out=np.zeros(len(pair_of)), where=product != 0)
