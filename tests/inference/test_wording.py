"""wording.py: greedy and beam search with its rules find what transformers' generate finds with the same options."""

from __future__ import annotations

import math

import pytest
import torch
from gpt2_pair import EOS, TINY, decoder_step, two_models

from captioning.imports import import_guarded
from captioning.inference.search import beam_search, greedy
from captioning.inference.wording import Wording

WORDINGS = [
    Wording(min_new_tokens=6),
    Wording(no_repeat_ngram=1),
    Wording(no_repeat_ngram=2),
    Wording(no_repeat_ngram=3),
    Wording(repetition_penalty=1.7),
    Wording(repetition_penalty=0.8),
    Wording(min_new_tokens=5, no_repeat_ngram=2, repetition_penalty=1.3),
]
LONGEST = 14


@torch.no_grad()
def generated(model, prefix, beams, wording, count=1):
    """What transformers says after the prefix, as ``[image][caption]`` tokens."""
    bos = model.transformer.wte(torch.full((len(prefix), 1), EOS))
    embeddings = torch.cat((prefix, bos), 1)
    out = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2]),
        num_beams=beams,
        num_return_sequences=count,
        do_sample=False,
        max_new_tokens=LONGEST,
        early_stopping=False,
        **wording.for_generate(),
    )
    rows = [row[: row.index(EOS)] if EOS in row else row for row in out.tolist()]
    return [rows[start : start + count] for start in range(0, len(rows), count)]


@pytest.mark.filterwarnings("ignore:Passing .* with `inputs_embeds`")
@pytest.mark.parametrize("wording", WORDINGS, ids=lambda w: str(w.changed()))
@pytest.mark.parametrize("beams", [1, 3, 5])
def test_captions_equal_transformers(beams, wording):
    prefix = 3 * torch.randn(16, 4, TINY.n_embd, generator=torch.Generator().manual_seed(beams))
    changed = 0
    for pull in (0.0, 3.0, 4.0, 5.0):
        theirs, ours = two_models(pull)
        step, free = (decoder_step(ours, prefix, beams, LONGEST) for _ in range(2))
        rules = wording.rules(EOS)
        if beams == 1:
            found = [[tokens] for tokens in greedy(step, 16, EOS, EOS, LONGEST, rules=rules).tokens]
            plain = greedy(free, 16, EOS, EOS, LONGEST).tokens
        else:
            found = beam_search(step, 16, EOS, EOS, beams, LONGEST, rules=rules).finished
            plain = beam_search(free, 16, EOS, EOS, beams, LONGEST).tokens
        assert found == generated(theirs, prefix, beams, wording, beams)
        changed += sum(captions[0] != tokens for captions, tokens in zip(found, plain, strict=True))
    assert changed > 5


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("said", [0, 1, 2, 3, 9])
def test_each_rule_is_transformers_own(n, said):
    """Few words, so that much is repeated; every beam has a history of its own."""
    transformers = import_guarded("transformers")
    generator = torch.Generator().manual_seed(10 * n + said)
    history = torch.randint(0, 4, (3, 2, said), generator=generator)
    scores = torch.randn(3, 2, 6, generator=generator)
    theirs = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor(1.0 + n / 4),
        "no_repeat_ngram": transformers.NoRepeatNGramLogitsProcessor(n),
        "min_new_tokens": transformers.MinNewTokensLengthLogitsProcessor(0, n, EOS),
    }
    for name, processor in theirs.items():
        (rule,) = Wording(**{name: 1.0 + n / 4 if name == "repetition_penalty" else n}).rules(EOS)
        expected = processor(history.flatten(0, 1), scores.flatten(0, 1).clone()).view(3, 2, 6)
        assert torch.equal(rule(scores, history), expected), name


@pytest.mark.parametrize("beams", [1, 3])
def test_images_that_leave_the_batch_keep_to_the_rules(beams):
    """Histories leave with their images."""
    _, ours = two_models(4.0)
    prefix = 3 * torch.randn(16, 4, TINY.n_embd, generator=torch.Generator().manual_seed(2))
    rules = Wording(min_new_tokens=3, no_repeat_ngram=2, repetition_penalty=1.3).rules(EOS)
    stays = beam_search(decoder_step(ours, prefix, beams, LONGEST), 16, EOS, EOS, beams, LONGEST, rules=rules)
    alone = [
        beam_search(decoder_step(ours, row[None], beams, LONGEST), 1, EOS, EOS, beams, LONGEST, rules=rules)
        for row in prefix
    ]
    assert stays.tokens == [found.tokens[0] for found in alone]
    rare = beam_search(
        decoder_step(ours, prefix, beams, LONGEST), 16, EOS, EOS, beams, LONGEST, rules=rules, check_every=4
    )
    assert rare.finished == stays.finished


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_new_tokens": -1}, "--min-new-tokens"),
        ({"no_repeat_ngram": -2}, "--no-repeat-ngram"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"repetition_penalty": math.nan}, "--repetition-penalty"),
    ],
)
def test_bad_values_name_their_flag(values, message):
    with pytest.raises(ValueError, match=message):
        Wording(**values)


def test_the_defaults_are_no_rules():
    assert Wording().rules(EOS) == []
    assert Wording().for_generate() == Wording().changed() == {}
