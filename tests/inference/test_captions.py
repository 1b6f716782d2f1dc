"""captions.py: scores and several captions of an image, held against transformers' own generate and scores."""

import itertools

import pytest
import torch
from tiny import EOS, SHAPE, VOCAB, make_captioner, random_features

from captioning.imports import import_guarded
from captioning.inference.captions import caption_features
from captioning.inference.wording import Wording
from captioning.models.step_functions import CompiledStepFunction
from decoder import gpt2_state_dict

LONGEST = 9
WORDING = Wording(min_new_tokens=3, no_repeat_ngram=2, repetition_penalty=1.4)


class Numbers:
    """A tokenizer whose text is the ids."""

    vocab_size, eos_id = VOCAB, EOS

    def decode(self, tokens):
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def captioner():
    captioner = make_captioner().merge()
    with torch.no_grad():  # so that captions end at different lengths
        captioner.decoder.lm_head.weight[EOS] *= 4.0
    return captioner


@pytest.fixture(scope="module")
def theirs(captioner):
    """The decoder as transformers' GPT-2, its output layer untied."""
    transformers = import_guarded("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=SHAPE.n_positions,
        n_embd=SHAPE.n_embd,
        n_layer=SHAPE.n_layer,
        n_head=SHAPE.n_head,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    state = gpt2_state_dict(captioner.decoder, untied=True)
    model.load_state_dict({key if key == "lm_head.weight" else f"transformer.{key}": state[key] for key in state})
    return model


@torch.no_grad()
def generated(model, captioner, features, beams, count, wording):
    """``[image]`` of (text, mean log-probability) pairs, by transformers alone."""
    begin = model.transformer.wte(torch.full((len(features), 1), EOS))
    embeddings = torch.cat((captioner.prefix(features), begin), 1)
    out = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2]),
        num_beams=beams,
        num_return_sequences=count,
        do_sample=False,
        max_new_tokens=LONGEST,
        return_dict_in_generate=True,
        output_logits=True,
        **wording.for_generate(),
    )
    scores = model.compute_transition_scores(
        out.sequences, out.logits, out.get("beam_indices"), normalize_logits=True
    ).tolist()
    pairs = []
    for row, values in zip(out.sequences.tolist(), scores, strict=True):
        tokens = row[: row.index(EOS)] if EOS in row else row
        length = len(tokens) + (EOS in row)
        pairs.append((" ".join(map(str, tokens)), sum(values[:length]) / length))
    return [pairs[first : first + count] for first in range(0, len(pairs), count)]


@pytest.mark.filterwarnings("ignore:Passing .* with `inputs_embeds`")
@pytest.mark.parametrize("wording", [Wording(), WORDING], ids=["free", "ruled"])
@pytest.mark.parametrize(("beams", "count"), [(1, 1), (4, 1), (4, 3), (4, 4)])
def test_captions_and_scores_are_those_of_transformers(captioner, theirs, beams, count, wording):
    features = 2 * random_features(captioner, 12)
    found = caption_features(
        captioner, Numbers(), features, beams, LONGEST, search_rule="beam", wording=wording, n_best=count
    )
    expected = generated(theirs, captioner, features, beams, count, wording)
    assert [[text for text, _ in caption.ranked] for caption in found] == [[t for t, _ in row] for row in expected]
    for caption, row in zip(found, expected, strict=True):
        assert [score for _, score in caption.ranked] == pytest.approx([score for _, score in row], abs=1e-4)
    assert len({len(caption.split()) for caption in found}) > 1
    plain = caption_features(captioner, Numbers(), features, beams, LONGEST, search_rule="beam", wording=wording)
    assert plain == found
    assert not hasattr(plain[0], "ranked")


@pytest.mark.parametrize("rule", ["beam", "report"])
def test_a_batch_has_the_scores_of_one_by_one(captioner, rule):
    features = 2 * random_features(captioner, 6)

    def captions(part):
        return caption_features(captioner, Numbers(), part, 3, LONGEST, search_rule=rule, wording=WORDING, n_best=3)

    together, alone = captions(features), [captions(row[None])[0] for row in features]
    assert together == alone
    for a, b in zip(together, alone, strict=True):
        assert [text for text, _ in a.ranked] == [text for text, _ in b.ranked]
        assert [score for _, score in a.ranked] == pytest.approx([score for _, score in b.ranked], abs=2e-6)


@pytest.mark.parametrize("rule", ["beam", "report"])
@pytest.mark.parametrize("beams", [1, 3])
def test_compiled_steps_keep_to_the_rules(captioner, beams, rule):
    features = 2 * random_features(captioner, 3)
    steps = CompiledStepFunction(captioner.decoder, 4, captioner.n_prefix, beams, LONGEST, backend="eager")
    how = {"search_rule": rule, "wording": WORDING, "n_best": beams}
    compiled, plain = (
        caption_features(captioner, Numbers(), features, beams, LONGEST, steps=s, **how) for s in (steps, None)
    )
    assert [c.ranked for c in compiled] == [c.ranked for c in plain]


@pytest.mark.parametrize("beams", [1, 4])
def test_the_reports_rule_keeps_to_the_wording(captioner, beams):
    features = 2 * random_features(captioner, 12)
    found = caption_features(captioner, Numbers(), features, beams, LONGEST, search_rule="report", wording=WORDING)
    for caption in found:
        tokens = caption.split()
        pairs = list(itertools.pairwise(tokens))
        assert len(tokens) >= 3
        assert len(set(pairs)) == len(pairs)
