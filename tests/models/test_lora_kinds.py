"""LoRA by kind of token: equal to plain LoRA where both kinds have the same tensors, else to two decoders."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from tiny import EOS, LORA, make_captioner, ragged_captions, random_features

from captioning.data.batches import pack_captions
from captioning.inference.search import beam_search
from captioning.models.captioner import CaptionerConfig
from captioning.models.inference_weights import prepare, prepare_decoder
from captioning.models.step_functions import CompiledStepFunction
from decoder import LoraConfig, gpt2_state_dict, load_gpt2, load_lora_state_dict, lora_state_dict, merged_copies

KINDS = replace(LORA, rank=6, alpha=12.0, kinds=True)  # the scale of LORA
LONGEST = 8


def halves(captioner, of_image, of_text):
    """Give a captioner with kinds the LoRA of two plain ones; the output layer has one kind, and zeros beside."""
    image, text = (lora_state_dict(plain.decoder) for plain in (of_image, of_text))
    state = {}
    for name in image:
        one = torch.zeros_like(image[name]) if "lm_head" in name else image[name]
        state[name] = torch.cat((one, text[name]), 0 if name.endswith("lora_A") else 1)
    load_gpt2(captioner.decoder, gpt2_state_dict(of_text.decoder))
    load_lora_state_dict(captioner.decoder, state)
    return captioner


def plain(seed):
    captioner = make_captioner()
    torch.manual_seed(seed)
    for name, tensor in lora_state_dict(captioner.decoder).items():
        tensor.copy_(torch.randn_like(tensor) * (0.25 if "lm_head" not in name or seed == 2 else 0.1))
    return captioner.eval()


@pytest.fixture
def two():
    return plain(2), plain(3)


def searched(step, count):
    return beam_search(step, count, EOS, EOS, 3, LONGEST, keep=getattr(step, "keep", None))


@pytest.mark.parametrize("route", ["mask", "packed"])
@pytest.mark.parametrize("bos", [False, True])
def test_equal_halves_are_plain_lora(two, route, bos):
    whole = halves(make_captioner(KINDS), two[0], two[0]).eval()
    features, batch = random_features(whole, 3).double(), pack_captions(ragged_captions(), EOS)
    found = []
    for captioner in (two[0], whole):
        captioner.double().attention = route
        loss = captioner.loss(features, batch, predict_bos=bos)
        loss.backward()
        found.append((loss, captioner.projector.weight.grad))
    for expected, actual in zip(*found, strict=True):
        assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("route", ["mask", "packed"])
def test_losses_are_those_of_an_image_read_by_one_decoder_and_a_caption_by_another(two, route):
    whole = halves(make_captioner(KINDS), *two).eval()
    whole.attention = route
    features, captions = random_features(whole, 3), ragged_captions()
    log_probs = iter(whole.log_probs(features, pack_captions(captions, EOS)).tolist())
    count = whole.n_prefix
    with torch.no_grad():
        for row, group in zip(features, captions, strict=True):
            for caption in group:
                ids = torch.tensor([[EOS, *caption]])
                cache = two[0].decoder.new_cache(1, count + ids.shape[1])
                two[0].decoder(two[0].prefix(row[None]), torch.arange(count), cache=cache)
                hidden = two[1].decoder(
                    two[1].decoder.embed(ids), torch.arange(count, count + ids.shape[1]), cache=cache
                )
                expected = two[1].decoder.logits(hidden)[0].log_softmax(-1)
                for position, target in enumerate([*caption, EOS]):
                    assert next(log_probs) == pytest.approx(expected[position, target].item(), abs=1e-5)
    assert next(log_probs, None) is None


@torch.no_grad()
def test_searches_are_the_same_unmerged_merged_prepared_and_compiled(two):
    captioner = halves(make_captioner(KINDS), *two).eval()
    features = 2 * random_features(captioner, 6)
    expected = searched(captioner.step_function(features, 3, LONGEST), 6)
    weights, logits = captioner.attend(features[:1], [EOS, *expected.tokens[0]])
    whole = captioner.attend(features[:1], [EOS, *expected.tokens[0]], all_rows=True)

    def check(found):
        assert found.tokens == expected.tokens
        assert found.scores == pytest.approx(expected.scores, abs=1e-5)

    with merged_copies(captioner.decoder):
        check(searched(captioner.step_function(features, 3, LONGEST), 6))
    captioner.merge()
    check(searched(captioner.step_function(features, 3, LONGEST), 6))
    torch.testing.assert_close(whole[1], logits)
    after = captioner.attend(features[:1], [EOS, *expected.tokens[0]])
    torch.testing.assert_close(after[1], logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[0][-1], weights[-1], atol=1e-5, rtol=1e-4)
    compiled = CompiledStepFunction(captioner.decoder, 6, captioner.n_prefix, 3, LONGEST, backend="eager")
    check(searched(compiled.begin(captioner.prefix(features)), 6))
    prepare_decoder(captioner.decoder, torch.float32)
    check(searched(captioner.step_function(features, 3, LONGEST), 6))


def test_bf16_is_close(two):
    captioner = halves(make_captioner(KINDS), *two).merge()
    features = random_features(captioner, 2)
    with torch.no_grad():
        exact = captioner.attend(features[:1], [EOS, 1, 2, 3])[1]
        prepare(captioner, "bf16")
        with torch.autocast("cpu", torch.bfloat16):
            rounded = captioner.attend(features[:1], [EOS, 1, 2, 3])[1]
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_parameters_are_those_of_plain_lora_of_the_same_rank():
    kinds, same = (make_captioner(replace(LORA, rank=6, kinds=k)) for k in (True, False))
    shapes = [{name: p.shape for name, p in c.trainable().items()} for c in (kinds, same)]
    assert shapes[0] == shapes[1]


def test_old_adapters_have_one_kind():
    config = make_captioner(KINDS).config
    values = json.loads(json.dumps(asdict(config)))
    assert CaptionerConfig.from_dict(values).lora.kinds
    del values["lora"]["kinds"], values["image_dropout"]
    assert not CaptionerConfig.from_dict(values).lora.kinds


@pytest.mark.parametrize("more", [{"rank": 5}, {"rank": 4, "enable_lora": (True, False, True)}])
def test_what_has_no_halves_is_refused(more):
    with pytest.raises(ValueError, match="--lora-kinds"):
        LoraConfig(**more, kinds=True)
