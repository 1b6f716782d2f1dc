"""captioner.py with retrieved captions: they belong to the prefix, and sharing it changes no number."""

import pytest
import torch
import torch.nn.functional as F
from tiny import EOS, make_captioner, ragged_captions, random_features

from captioning.data.batches import pack_captions
from captioning.data.datastore import retrieved_row
from captioning.inference import search
from captioning.inference.captions import mean_log_probs
from captioning.models.captioner import CaptionerConfig, Retrieval

RETRIEVAL = Retrieval(2, 12, "store.safetensors", "hash")
FOUND = [[[3, 4, 5], [6, 7]], [[8] * 9, [9]], [[10, 11, 12, 13, 14], [15, 16, 17, 18]]]  # of unequal lengths


def text_of(found):
    return torch.tensor([retrieved_row(captions, RETRIEVAL.tokens, EOS) for captions in found])


def model_of(**more):
    return make_captioner(retrieval=RETRIEVAL, **more).double()


def single_losses(model, features, text, captions):
    """The definition: image, retrieved text and one caption in a plain causal sequence; (n,) token by token."""
    losses = []
    for image, row, texts in zip(features, text, captions, strict=True):
        for tokens in texts:
            embedded = model.decoder.embed(torch.tensor([[*row.tolist(), EOS, *tokens]]))
            x = torch.cat([model.projector(image[None, model.n_dropped_tokens :]), embedded], 1)
            logits = model.decoder.logits(model.decoder(x, torch.arange(x.shape[1]))[0, -len(tokens) - 1 :])
            losses.append(F.cross_entropy(logits, torch.tensor([*tokens, EOS]), reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("route", ["packed", "mask"])
@pytest.mark.parametrize("use_cls", [True, False])
def test_packed_captions_after_retrieved_ones_give_loss_and_gradients_of_single_sequences(route, use_cls):
    model, captions = model_of(use_cls=use_cls), ragged_captions((1, 5, 3))
    model.attention = route
    features, text, parameters = random_features(model, 3).double(), text_of(FOUND), list(model.trainable().values())
    batch = pack_captions(captions, EOS, pad_to_multiple=8)
    batch.text = text
    packed, single = model.loss(features, batch), single_losses(model, features, text, captions).mean()
    assert packed.item() == pytest.approx(single.item(), abs=1e-6)
    for ours, wanted in zip(*(torch.autograd.grad(loss, parameters) for loss in (packed, single)), strict=True):
        assert torch.allclose(ours, wanted, rtol=0, atol=1e-6)
    batch.text = text_of(FOUND[::-1])
    assert abs(model.loss(features, batch).item() - packed.item()) > 1e-3  # the text is read


@pytest.mark.parametrize("beams", [1, 4])
def test_a_batch_is_captioned_like_its_images_one_by_one(beams):
    model = model_of().eval()
    features, text = random_features(model, 3, seed=2).double(), text_of(FOUND)

    def found(part, rows):
        step = model.step_function(part, beams, 9, rows)
        if beams == 1:
            return search.greedy(step, len(part), EOS, EOS, 9)
        return search.beam_search(step, len(part), EOS, EOS, beams, 9)

    together = found(features, text)
    alone = [found(image[None], row[None]) for image, row in zip(features, text, strict=True)]
    assert together.tokens == [one.tokens[0] for one in alone]
    assert together.scores == pytest.approx([one.scores[0] for one in alone], abs=1e-6)
    assert found(features, text_of(FOUND[::-1])).tokens != together.tokens


def test_scores_of_captions_are_those_of_single_sequences():
    model, captions = model_of().eval(), [[[1, 2, 3]], [[4]], [[5, 6]]]
    features, text = random_features(model, 3).double(), text_of(FOUND)
    scores = mean_log_probs(model, features, captions, EOS, 9, text=text)
    losses = single_losses(model, features, text, captions).split([4, 2, 3])
    assert [score for (score,) in scores] == pytest.approx([-loss.mean().item() for loss in losses], abs=1e-6)


def test_the_config_keeps_it_and_a_captioner_without_text_says_what_is_missing():
    model = model_of()
    assert CaptionerConfig.from_dict({"encoder": "x", "lora": {}, "retrieval": vars(RETRIEVAL)}).retrieval == RETRIEVAL
    assert model.n_prefix == model.n_image + 12
    assert model.patch_columns.tolist() == list(range(1, 10))  # after CLS, as without
    with pytest.raises(ValueError, match="the adapter reads retrieved captions"):
        model.prefix(random_features(model, 1).double())
