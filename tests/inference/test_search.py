"""search.py: equal to exhaustive search where that is possible, and to transformers' greedy and beam search."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from gpt2_pair import EOS, TINY, decoder_step, two_models
from table_model import TableModel

from captioning.inference.search import SearchResult, beam_search, greedy


def exhaustive(model: TableModel, row: int, length: int, penalty: float) -> tuple[list[int], float]:
    """The best of all captions of up to ``length`` tokens."""
    best, best_score = [], -math.inf
    words = [w for w in range(model.vocab) if w != EOS]
    for n in range(length + 1):
        for caption in itertools.product(words, repeat=n):
            tokens = (*caption, EOS)[:length]
            total = sum(model.logits(row, tokens[:i]).log_softmax(-1)[t].item() for i, t in enumerate(tokens))
            if total / len(tokens) ** penalty > best_score:
                best, best_score = list(caption), total / len(tokens) ** penalty
    return best, best_score


@torch.no_grad()
def transformers_captions(model, prefix: torch.Tensor, beams: int, penalty: float, length: int) -> list[list[int]]:
    bos = model.transformer.wte(torch.full((prefix.shape[0], 1), EOS))
    embeddings = torch.cat((prefix, bos), 1)
    out = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2]),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=length,
        length_penalty=penalty,
        early_stopping=False,
    )
    return [row[: row.index(EOS)] if EOS in row else row for row in out.tolist()]


# ---- Beam search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_captions_equal_transformers(beams, penalty):
    prefix = 3 * torch.randn(16, 4, TINY.n_embd, generator=torch.Generator().manual_seed(beams))
    lengths = set()
    for pull in (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0):  # each length penalty has its own point of balance
        theirs, ours = two_models(pull)
        expected = transformers_captions(theirs, prefix, beams, penalty, 14)
        assert beam_search(decoder_step(ours, prefix, beams, 14), 16, EOS, EOS, beams, 14, penalty).tokens == expected
        lengths |= {len(caption) for caption in expected}
    assert len(lengths) > 3, "captions must differ in length, or the length penalty goes untested"


@pytest.mark.parametrize("pull", [0.0, 3.0, 4.0])
def test_greedy_equals_transformers(pull):
    theirs, ours = two_models(pull)
    prefix = torch.randn(16, 4, TINY.n_embd, generator=torch.Generator().manual_seed(9))
    expected = transformers_captions(theirs, prefix, 1, 1.0, 14)
    assert greedy(decoder_step(ours, prefix, 1, 14), 16, EOS, EOS, 14).tokens == expected


def test_scores_are_those_of_the_captions():
    """Scored again from scratch, without cache or ancestors."""
    _, ours = two_models(pull=4.0)
    prefix = 3 * torch.randn(6, 4, TINY.n_embd, generator=torch.Generator().manual_seed(9))
    result = beam_search(decoder_step(ours, prefix, 3, 10), 6, EOS, EOS, 3, 10, 0.6)
    assert len({len(caption) for caption in result.tokens}) > 1
    for row, (caption, score) in enumerate(zip(result.tokens, result.scores, strict=True)):
        tokens = torch.tensor([EOS, *caption, EOS][:11])  # BOS, and EOS unless the caption was cut at 10
        x = torch.cat((prefix[row : row + 1], ours.embed(tokens[None, :-1])), 1)
        with torch.no_grad():
            log_probs = ours.logits(ours(x, torch.arange(x.shape[1])))[0, 4:].log_softmax(-1)
        total = log_probs.gather(1, tokens[1:, None]).sum().item()
        assert score == pytest.approx(total / (len(tokens) - 1) ** 0.6, abs=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_wide_beam_equals_exhaustive_search(penalty):
    """5 words, at most 4 tokens: 4^3 * 5 beams hold every caption there is."""
    model = TableModel(vocab=5, rows=3, depth=3, sharpness=1.5, seed=int(penalty))
    result = beam_search(model.step([0, 1, 2]), 3, EOS, EOS, 4**3 * 5, 4, penalty)
    for row in range(3):
        caption, score = exhaustive(model, row, 4, penalty)
        assert result.tokens[row] == caption
        assert result.scores[row] == pytest.approx(score, abs=1e-5)


def test_all_captions_of_a_wide_beam_are_the_best_ones_in_order():
    model = TableModel(vocab=4, rows=2, depth=3, sharpness=1.5)
    finished = beam_search(model.step([0, 1]), 2, EOS, EOS, 3**3 * 4, 4, length_penalty=1.0).finished
    for row, captions in enumerate(finished):

        def score(caption, row=row):
            tokens = (*caption, EOS)[:4]
            log_probs = (model.logits(row, tokens[:i]).log_softmax(-1)[t].item() for i, t in enumerate(tokens))
            return sum(log_probs) / len(tokens)

        every = [list(c) for n in range(5) for c in itertools.product([1, 2, 3], repeat=n)]
        assert captions[:20] == sorted(every, key=score, reverse=True)[:20]


@pytest.mark.parametrize("seed", range(5))
def test_beam_1_equals_greedy(seed):
    model = TableModel(vocab=7, rows=4, depth=2, sharpness=2.0, seed=seed)
    rows = [0, 1, 2, 3]
    beam = beam_search(model.step(rows), 4, EOS, EOS, 1, 9)
    walk = greedy(model.step(rows), 4, EOS, EOS, 9)
    assert beam.tokens == walk.tokens
    assert beam.scores == pytest.approx(walk.scores, abs=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_batch_equals_one_by_one(penalty):
    model = TableModel(vocab=9, rows=8, depth=2, sharpness=2.0, seed=1)
    together = beam_search(model.step(list(range(8))), 8, EOS, EOS, 3, 12, penalty)
    alone = [beam_search(model.step([row]), 1, EOS, EOS, 3, 12, penalty) for row in range(8)]
    assert together.tokens == [result.tokens[0] for result in alone]
    assert together.scores == pytest.approx([result.scores[0] for result in alone], abs=1e-6)
    assert len({len(tokens) for tokens in together.tokens}) > 1


def never_ends(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    logits = torch.arange(6.0).expand(*tokens.shape, 6).clone()
    logits[..., EOS] = -math.inf
    return logits


@pytest.mark.parametrize(
    "search",
    [
        lambda: greedy(never_ends, 2, EOS, EOS, 7),
        lambda: beam_search(never_ends, 2, EOS, EOS, 3, 7),
        lambda: beam_search(never_ends, 2, EOS, EOS, 10, 7),  # more beams than words
    ],
)
def test_caption_that_never_ends_is_cut(search):
    result = search()
    assert result.tokens == [[5] * 7] * 2
    per_token = torch.arange(1.0, 6.0).log_softmax(-1)[-1].item()
    assert result.scores == pytest.approx([per_token] * 2, abs=1e-5)


def always_ends(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    logits = torch.full((*tokens.shape, 6), -math.inf)
    logits[..., EOS] = 0.0
    return logits


def test_caption_that_must_end_at_once_is_empty():
    """All other beams are impossible (log-probability -inf) and must neither be returned nor break the ranking."""
    empty = SearchResult([[], []], [0.0, 0.0])
    assert beam_search(always_ends, 2, EOS, EOS, 4, 5) == replace(empty, finished=[[[]], [[]]])
    assert greedy(always_ends, 2, EOS, EOS, 5) == empty


@pytest.mark.parametrize("beams", [1, 4])
def test_search_stops_when_all_images_are_done(beams):
    calls = 0

    def step(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = torch.zeros(*tokens.shape, 6)
        logits[..., EOS] = 20.0 if calls >= 3 else -20.0
        return logits

    result = beam_search(step, 2, EOS, EOS, beams, 30) if beams > 1 else greedy(step, 2, EOS, EOS, 30)
    assert calls == 3
    assert [len(tokens) for tokens in result.tokens] == [2, 2]


def test_bos_may_be_another_token_than_eos():
    model = TableModel(vocab=6, rows=1, depth=1, sharpness=2.0)
    fed = []

    def step(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        fed.append(tokens)
        return model.table[0][tokens]

    beam_search(step, 1, 4, EOS, 3, 5)
    assert fed[0].tolist() == [[4, 4, 4]]


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "search",
    [
        lambda step: greedy(step, 3, EOS, EOS, 5),
        lambda step: beam_search(step, 3, EOS, EOS, 2, 5),
    ],
)
def test_logits_that_are_no_numbers_name_their_rows(search, value):
    def step(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        logits = never_ends(tokens, ancestors)
        if ancestors.shape[-1] == 2 * tokens.shape[1]:
            logits[1, -1, 3] = value
        return logits

    with pytest.raises(ValueError, match=r"NaN or infinite at token 2 of image rows \[1\]; .*float32"):
        search(step)


def test_logits_of_a_finished_image_are_ignored():
    """The model is still fed rows that are done; garbage from them must stop neither the others nor the search."""

    def step(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        logits = never_ends(tokens, ancestors)
        if ancestors.shape[-1] == 1:
            logits[0, :, EOS] = 99.0
        else:
            logits[0] = math.nan
        return logits

    assert greedy(step, 2, EOS, EOS, 4).tokens == [[], [5] * 4]
    assert beam_search(step, 2, EOS, EOS, 1, 4).tokens == [[], [5] * 4]


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (lambda: greedy(never_ends, 0, EOS, EOS), "at least one image"),
        (lambda: greedy(never_ends, 1, EOS, EOS, max_new_tokens=0), "--max-new-tokens"),
        (lambda: beam_search(never_ends, 1, EOS, EOS, beam_size=0), "--beam-size"),
        (lambda: beam_search(never_ends, 1, EOS, EOS, max_new_tokens=0), "--max-new-tokens"),
    ],
)
def test_bad_settings_name_their_flag(search, message):
    with pytest.raises(ValueError, match=message):
        search()


@pytest.mark.parametrize("beams", [1, 3])
def test_images_that_leave_the_batch_keep_their_captions(beams):
    """With ``keep`` the batch shrinks, and every image has the caption and score that it has in a complete batch."""
    model = TableModel(6, rows=9, depth=2, sharpness=2.0)
    model.table[..., EOS] += torch.linspace(0, 6, 9).view(-1, 1, 1)  # the last ones end at once, the first ones late
    stays = beam_search(model.step(range(9)), 9, EOS, EOS, beams, 12)
    step = model.step(range(9))
    leaves = beam_search(step, 9, EOS, EOS, beams, 12, keep=step.keep)
    assert leaves.tokens == stays.tokens
    assert leaves.finished == stays.finished
    assert leaves.scores == pytest.approx(stays.scores, abs=1e-5)
    assert len(set(map(len, stays.tokens))) > 2  # so that there is something to leave early
    assert len(set(step.sizes)) > 2
    assert all(later == earlier or later <= 0.75 * earlier for earlier, later in itertools.pairwise(step.sizes))


def test_a_broken_image_is_named_by_its_place_in_the_first_batch():
    """After images have left, the row in the batch is another one than the image."""

    def step(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 5)
        logits[..., 3] = 9.0
        if len(tokens) == 4:
            logits[:2, :, EOS] = 99.0  # the first two end at once
        if len(tokens) == 2:
            logits[1] = math.nan
        return logits

    with pytest.raises(ValueError, match=r"at token 2 of image rows \[3\]"):
        beam_search(step, 4, EOS, EOS, 1, 6, keep=lambda rows: None)


@pytest.mark.parametrize("every", [2, 3, 7, 50])
@pytest.mark.parametrize("beams", [0, 1, 3])
def test_rare_checks_find_the_same(every, beams):
    """Steps after the end of all images change nothing, and images leave the batch at the next check."""
    model = TableModel(6, rows=9, depth=2, sharpness=2.0)
    model.table[..., EOS] += torch.linspace(3, 8, 9).view(-1, 1, 1)
    calls = []

    def search(every: int) -> SearchResult:
        step = model.step(range(9))
        if beams:
            found = beam_search(step, 9, EOS, EOS, beams, 12, check_every=every)
        else:
            found = greedy(step, 9, EOS, EOS, 12, check_every=every)
        calls.append(len(step.sizes))
        return found

    always, rarely = search(1), search(every)
    assert rarely.tokens == always.tokens
    assert rarely.scores == always.scores
    assert calls[0] < 12
    assert calls[1] == min(12, -(-calls[0] // every) * every)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_broken_image_is_named_with_its_first_token_however_late_the_check(beams):
    def step(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        logits = never_ends(tokens, ancestors)
        at = ancestors.shape[-1] // tokens.shape[1]
        if at == 2:
            logits[2] = math.nan
        if at == 3:
            logits[0] = math.nan
        return logits

    with pytest.raises(ValueError, match=r"at token 2 of image rows \[2\]"):
        beam_search(step, 3, EOS, EOS, beams, 9, check_every=4)
    with pytest.raises(ValueError, match=r"at token 2 of image rows \[2\]"):
        greedy(step, 3, EOS, EOS, 9, check_every=4)
