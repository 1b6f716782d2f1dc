"""Guidance in search: equal to a loop over one image that reads everything again, and to none where its scale is 1."""

import pytest
import torch
from table_model import TableModel
from tiny import EOS, VOCAB, make_captioner, random_features

from captioning.inference.captions import caption_features
from captioning.inference.guidance import GuidedStep, check_guidance
from captioning.inference.search import beam_search
from captioning.models.step_functions import CompiledStepFunction

LONGEST = 9


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


@torch.no_grad()
def next_log_probs(captioner, features, tokens):
    """(V,) after BOS and ``tokens``, nothing shared or stored."""
    decoder = captioner.decoder
    x = torch.cat((captioner.prefix(features), decoder.embed(torch.tensor([[EOS, *tokens]]))), 1)
    return decoder.logits(decoder(x, torch.arange(x.shape[1])))[0, -1].log_softmax(-1)


def literal_greedy(captioner, features, scale):
    tokens = []
    while len(tokens) < LONGEST:
        seeing, blind = (next_log_probs(captioner, f, tokens) for f in (features, torch.zeros_like(features)))
        best = (blind + scale * (seeing - blind)).argmax().item()
        if best == EOS:
            break
        tokens.append(best)
    return Numbers().decode(tokens)


def literal_beams(captioner, features, scale, count):
    """The rule of transformers' beam search, for one image, by lists."""
    live, finished = [((), 0.0)], []
    for length in range(1, LONGEST + 1):
        grown = []
        for tokens, total in live:
            seeing, blind = (next_log_probs(captioner, f, tokens) for f in (features, torch.zeros_like(features)))
            log_probs = (blind + scale * (seeing - blind)).log_softmax(-1)
            grown += [((*tokens, token), total + value) for token, value in enumerate(log_probs.tolist())]
        grown.sort(key=lambda pair: -pair[1])
        ending = [pair for pair in grown[:count] if pair[0][-1] == EOS or length == LONGEST]
        finished = sorted(finished + [(t, s / length) for t, s in ending], key=lambda pair: -pair[1])[:count]
        live = [pair for pair in grown if pair[0][-1] != EOS][:count]
        if len(finished) == count and live[0][1] / length <= finished[-1][1]:
            break
    return Numbers().decode([token for token in finished[0][0] if token != EOS])


@pytest.mark.parametrize("scale", [0.5, 1.2, 2.0])
def test_a_guided_batch_is_a_loop_over_one_image(captioner, scale):
    features = 2 * random_features(captioner, 8)
    guided = [caption_features(captioner, Numbers(), features, k, LONGEST, guidance=scale) for k in (1, 3)]
    assert guided[0] == [literal_greedy(captioner, row[None], scale) for row in features]
    assert guided[1] == [literal_beams(captioner, row[None], scale, 3) for row in features]
    assert guided[1] != caption_features(captioner, Numbers(), features, 3, LONGEST)


@pytest.mark.parametrize("rule", ["beam", "report"])
def test_a_scale_of_1_is_none_to_the_last_digit(captioner, rule):
    features = 2 * random_features(captioner, 8)
    plain, guided = (
        caption_features(captioner, Numbers(), features, 3, LONGEST, search_rule=rule, n_best=3, **more)
        for more in ({}, {"guidance": 1.0})
    )
    assert [caption.ranked for caption in plain] == [caption.ranked for caption in guided]


@pytest.mark.parametrize("rule", ["beam", "report"])
def test_compiled_steps_are_guided_alike(captioner, rule):
    features = 2 * random_features(captioner, 3)
    steps = CompiledStepFunction(captioner.decoder, 8, captioner.n_prefix, 3, LONGEST, backend="eager")
    compiled, plain = (
        caption_features(captioner, Numbers(), features, 3, LONGEST, steps=s, search_rule=rule, guidance=1.5)
        for s in (steps, None)
    )
    assert compiled == plain


def test_images_leave_a_guided_batch_with_their_twins():
    model = TableModel(5, 24, 2, sharpness=3.0)
    step = model.step(range(24))
    guided = GuidedStep(step, step.keep, 12, 1.3)
    together = beam_search(guided, 12, 0, 0, 2, 30, keep=guided.keep)
    assert min(step.sizes) < 24
    for image, tokens in enumerate(together.tokens):
        alone = GuidedStep(model.step([image, 12 + image]), None, 1, 1.3)
        assert beam_search(alone, 1, 0, 0, 2, 30).tokens == [tokens]


def test_what_cannot_be_guided_is_refused():
    check_guidance(1.0, 0.0)
    check_guidance(1.2, 0.1)
    with pytest.raises(ValueError, match=r"--guidance 1\.2: .*--image-dropout"):
        check_guidance(1.2, 0.0)
    for scale in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--guidance"):
            check_guidance(scale, 0.1)
