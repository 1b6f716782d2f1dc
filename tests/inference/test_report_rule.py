"""report_rule.py: the ids of the report's one-image search, which tests/report_code.py has word for word."""

from __future__ import annotations

import math
import random

import pytest
import report_code
import torch
from table_model import TableModel

from captioning.data.images import load_image
from captioning.data.tokenizer import Tokenizer
from captioning.inference.captions import caption_features
from captioning.inference.report_rule import first_best, report_search
from captioning.inference.search import beam_search
from captioning.inference.wording import Wording
from captioning.models.captioner import Captioner, CaptionerConfig
from captioning.profiles import PROFILES
from decoder import LoraConfig, build_decoder
from microworld.scenes import generate

EOS = 0


def literal(model: TableModel, row: int, beams: int, longest: int) -> list[int]:
    """Ids of the literal search for one row of the table, BOS and EOS included."""
    return report_code.search_like_the_report(
        lambda ids: model.logits(row, ids[1:]).log_softmax(-1), EOS, beams, longest
    )


def whole(tokens: list[int], longest: int, eos: int = EOS) -> list[int]:
    """A caption's ids with BOS, and with EOS where it was not cut."""
    return [eos, *tokens] if len(tokens) == longest else [eos, *tokens, eos]


# ---- Equal to the literal search -------------------------------------------------------------------------------------


def random_case(seed: int) -> tuple[TableModel, int, int]:
    """A model of 1 to 6 images, live beams and longest caption; certainty, ends and ties differ."""
    draw = random.Random(seed)
    vocab = draw.choice([2, 2, 3, 4, 5, 6, 7, 23])
    model = TableModel(vocab, draw.randint(1, 6), draw.choice([1, 2]), draw.choice([0.3, 1.0, 3.0]), seed)
    model.table[..., EOS] += draw.choice([-4.0, 0.0, 0.0, 1.0, 2.0, 5.0])  # from "never ends" to "ends at once"
    if draw.random() < 0.4:  # whole numbers make exact ties
        model.table.round_()
    if draw.random() < 0.15:  # impossible words
        model.table[torch.rand(model.table.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -math.inf
        model.table[..., -1] = 0.0
    return model, draw.randint(1, 6), draw.choice([1, 2, 3, 6, 9, 14])


def last_best(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of equal scores the last in front: what the rule is not."""
    values, places = scores.flip(0).sort(descending=True, stable=True)
    return values[:count], len(scores) - 1 - places[:count]


def test_the_ids_are_those_of_the_literal_search(monkeypatch):
    """200 cases, each in one batch, in one that images leave, and with rare checks."""
    seen = dict.fromkeys(("begins with EOS", "is cut", "all end early", "the first of equals", "replaced beams"), 0)
    for seed in range(200):
        model, beams, longest = random_case(seed)
        rows, shrinking = range(len(model.table)), model.step(range(len(model.table)))
        arguments = (len(rows), EOS, EOS, beams, longest)
        expected = [literal(model, row, beams, longest) for row in rows]
        found = report_search(model.step(rows), *arguments)
        assert [whole(tokens, longest) for tokens in found.tokens] == expected, f"case {seed}"
        assert report_search(shrinking, *arguments, keep=shrinking.keep) == found, f"case {seed}"
        assert report_search(model.step(rows), *arguments, check_every=4) == found, f"case {seed}"

        seen["begins with EOS"] += sum(tokens[:1] == [EOS] for tokens in found.tokens)
        seen["is cut"] += sum(len(tokens) == longest for tokens in found.tokens)
        seen["all end early"] += sum(max(map(len, captions)) < longest - 2 for captions in found.finished)
        if beams > 1:
            others = beam_search(model.step(rows), *arguments).tokens
            seen["replaced beams"] += sum(a != b for a, b in zip(found.tokens, others, strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(report_code, "best", last_best)
            others = [literal(model, row, beams, longest) for row in rows]
            seen["the first of equals"] += sum(a != b for a, b in zip(expected, others, strict=True))
    assert min(seen.values()) > 30, seen


def random_captioner() -> Captioner:
    """The micro world's encoder and decoder with a random adapter, small enough to leave sentences of a kind."""
    profile, lora = PROFILES["micro"], LoraConfig(rank=4, alpha=4.0)
    config = CaptionerConfig(
        profile.encoder, profile.encoder_kwargs, profile.encoder_weights, lora=lora, search_rule="report"
    )
    torch.manual_seed(0)
    captioner = Captioner(config, build_decoder(profile.decoder, lora))
    with torch.no_grad():
        captioner.projector.weight.mul_(0.2)
        for name, parameter in captioner.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return captioner.merge()


@torch.no_grad()
def literal_on(captioner: Captioner, features: torch.Tensor, vocab: int, eos: int) -> list[int]:
    """Ids of the literal search for one image (1, N, D). What follows the prefix is read again for every word."""
    decoder, start = captioner.decoder, captioner.n_prefix
    cache = decoder.new_cache(1, start + 31)
    decoder(captioner.prefix(features), torch.arange(start), cache=cache)

    def log_probs(ids: list[int]) -> torch.Tensor:
        cache.length = start
        hidden = decoder(decoder.embed(torch.tensor([ids])), torch.arange(start, start + len(ids)), cache=cache)
        return decoder.logits(hidden[0, -1])[:vocab].log_softmax(-1)

    return report_code.search_like_the_report(log_probs, eos)


def test_a_hundred_scenes_are_captioned_as_by_the_literal_search(tmp_path):
    tokenizer, captioner = Tokenizer(PROFILES["micro"].tokenizer), random_captioner()
    vocab, eos = tokenizer.vocab_size, tokenizer.eos_id
    generate(tmp_path, "val", 100, seed=3, workers=1)
    pixels = torch.stack([captioner.transform(load_image(path)) for path in sorted(tmp_path.rglob("*.jpg"))])
    features = captioner.encode(pixels)
    expected = [literal_on(captioner, features[row : row + 1], vocab, eos) for row in range(100)]
    step = captioner.step_function(features, 5, 30)
    found = report_search(step, 100, eos, eos, keep=step.keep)  # the decoder has no id that the tokenizer lacks
    assert [whole(tokens, 30, eos) for tokens in found.tokens] == expected
    assert len(set(map(tuple, found.tokens))) > 50

    texts = [tokenizer.decode(ids) for ids in expected[:20]]  # by the captioner's own rule
    assert caption_features(captioner, tokenizer, features[:20]) == texts
    assert caption_features(captioner, tokenizer, features[:20], search_rule="beam") != texts


# ---- By hand ---------------------------------------------------------------------------------------------------------


def fixed(probabilities: dict[tuple[int, ...], list[float]]):
    """A step function of one image that knows the next word's probabilities after each history."""
    model = TableModel(len(next(iter(probabilities.values()))), 1, 1)
    model.logits = lambda row, history: torch.tensor(probabilities[tuple(history)]).log()
    return model.step([0])


def test_a_beam_that_ends_is_not_replaced_and_bos_counts_in_its_length():
    """Two beams. [1] ends in step 2, so only the better child of [2] lives on, though both beat all others."""
    tree = {
        (): [0.1, 0.5, 0.4],
        (1,): [0.9, 0.05, 0.05],
        (2,): [0.02, 0.5, 0.48],
        (2, 1): [0.1, 0.6, 0.3],
        (1, 0): [1.0, 0.0, 0.0],  # finished: fed on, and ignored
    }
    found = report_search(fixed(tree), 1, EOS, EOS, beam_size=2, max_new_tokens=3)
    assert found.finished == [[[1], [2, 1, 1]]]
    assert found.scores == pytest.approx([math.log(0.5 * 0.9) / 3], abs=1e-6)  # BOS, 1, EOS


def test_a_beam_that_begins_with_eos_lives_on():
    tree = {(): [0.8, 0.1, 0.1], (0,): [0.2, 0.1, 0.7], (0, 2): [0.9, 0.05, 0.05]}
    found = report_search(fixed(tree | {(0, 2, 0): [1.0, 0.0, 0.0]}), 1, EOS, EOS, beam_size=1, max_new_tokens=4)
    assert found.tokens == [[EOS, 2]]
    assert found.scores == pytest.approx([math.log(0.8 * 0.7 * 0.9) / 4], abs=1e-6)


@pytest.mark.parametrize(("beams", "wanted"), [(1, [1]), (3, [1]), (9, [1])])
def test_of_equals_the_first_wins(beams, wanted):
    """Two words and EOS, all equally likely: more beams than words too; in step 2 all that follow the first tie."""
    model = TableModel(3, 2, 1, sharpness=0.0)
    model.table[..., EOS] = -1.0
    found = report_search(model.step([0, 1]), 2, EOS, EOS, beams, max_new_tokens=1)
    assert found.tokens == [wanted] * 2


def test_of_equal_scores_the_one_that_was_finished_first_wins():
    """[1] has -3 over 3 ids, [2, 1] has -4 over 4."""
    tree = {(): {1: -1.5, 2: -2.0}, (1,): {EOS: -1.5}, (2,): {1: -1.0}, (2, 1): {EOS: -1.0}, (1, EOS): {}}

    def logits(row: int, history: list[int]) -> torch.Tensor:
        planned = tree[tuple(history)]
        rest = 1 - sum(map(math.exp, planned.values()))  # the other words share it, and none of them is likely
        return torch.tensor([planned.get(word, math.log(rest / (8 - len(planned)))) for word in range(8)])

    model = TableModel(8, 1, 1)
    model.logits = logits
    assert literal(model, 0, 2, 9) == [EOS, 1, EOS]
    assert report_search(model.step([0]), 1, EOS, EOS, 2, 9).finished == [[[1], [2, 1]]]


def test_rules_of_wording_hold():
    """No token twice, and EOS not before the fourth: of equals the first that may be said, then EOS as it is first."""
    model = TableModel(8, 1, 1, sharpness=0.0)
    wording = Wording(min_new_tokens=3, no_repeat_ngram=1)
    found = report_search(model.step([0]), 1, EOS, EOS, 1, 9, rules=wording.rules(EOS))
    assert found.tokens == [[1, 2, 3]]


# ---- The first of the best -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_first_of_equal_values_comes_first(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, 3000, generator=generator).mul(10).round().clamp(max=0) / 8  # many ties, 0.0 and -0.0
    values[torch.rand(values.shape, generator=generator) < 0.2] = -math.inf
    values[0] = -math.inf
    values[1] *= 1e-42  # denormal
    values[2] *= 1e36
    expected = values.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(first_best(values, 2000), expected[:, :2000])


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 5, 30), "at least one image"), ((1, 0, 30), "--beam-size"), ((1, 5, 0), "--max-new-tokens")],
)
def test_bad_settings_name_their_flag(sizes, message):
    batch, beams, longest = sizes
    with pytest.raises(ValueError, match=message):
        report_search(lambda *_: torch.zeros(1, 5, 6), batch, EOS, EOS, beams, longest)


def test_logits_that_are_no_numbers_name_their_rows_until_the_image_is_done():
    def step(tokens: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 4)
        logits[0, :, EOS] = 99.0  # done after two steps
        logits[1, :, EOS] = -99.0
        if ancestors.shape[-1] > 2 * tokens.shape[1]:
            logits[0] = math.nan
        if ancestors.shape[-1] == 4 * tokens.shape[1]:
            logits[1] = math.nan
        return logits

    assert report_search(step, 2, EOS, EOS, 1, max_new_tokens=3).tokens == [[EOS], [1, 1, 1]]
    with pytest.raises(ValueError, match=r"NaN or infinite at token 4 of image rows \[1\]"):
        report_search(step, 2, EOS, EOS, 1, max_new_tokens=9, check_every=4)
