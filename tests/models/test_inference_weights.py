"""inference_weights.py: prepared weights give the logits of plain ones, and unmerged LoRA is refused."""

import copy
import weakref

import pytest
import torch
from tiny import TINY_ENCODER, TINY_ENCODER_KWARGS

from captioning.inference import search
from captioning.kernels.onednn import ReorderedLinear, can_reorder
from captioning.models.encoder import build_encoder
from captioning.models.inference_weights import prepare_decoder, prepare_linears
from captioning.models.step_functions import StepFunction
from decoder import Decoder, DecoderConfig, LoraConfig, merge_lora

CONFIG = DecoderConfig(vocab_size=53, n_positions=64, n_embd=64, n_layer=2, n_head=2)
CPU = torch.device("cpu")


@pytest.fixture
def decoder():
    torch.manual_seed(3)
    decoder = Decoder(CONFIG, LoraConfig(rank=4, alpha=4.0, lm_head=True, enable_lora=(True, False, True)))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.2)  # LoRA's B too, which starts at zero and would hide a lost update
    merge_lora(decoder)
    return decoder.eval()


def logits_and_captions(decoder, dtype):
    prefix = torch.randn(3, 7, CONFIG.n_embd, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        tokens, alone = torch.ones(3, 4, dtype=torch.long), torch.eye(4, dtype=torch.bool).repeat(3, 1, 1)
        first = StepFunction(decoder, prefix, 4, 9)(tokens, alone)
        found = search.beam_search(StepFunction(decoder, prefix, 4, 9), 3, 0, 1, 4, 9)
    return first.float(), found.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own_head", [True, False])
def test_a_prepared_decoder_gives_the_same_logits(decoder, dtype, own_head):
    if not own_head:
        decoder.lm_head = None
    embeddings = decoder.wte.weight.clone()
    logits, captions = logits_and_captions(decoder, dtype)
    prepared = prepare_decoder(copy.deepcopy(decoder), dtype)
    faster, same = logits_and_captions(prepared, dtype)
    torch.testing.assert_close(faster, logits, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0)
    if dtype == torch.float32:
        assert same == captions
    assert torch.equal(prepared.wte.weight, embeddings)  # rounded with a tied head, they would change every input
    if can_reorder(CPU, dtype):
        assert sum(isinstance(module, ReorderedLinear) for module in prepared.modules()) == 4 * CONFIG.n_layer + 1


def test_where_nothing_can_be_reordered_weights_are_cast_and_the_embeddings_stay(decoder, monkeypatch):
    monkeypatch.setattr("captioning.models.inference_weights.can_reorder", lambda device, dtype: False)
    decoder.lm_head = None
    logits, _ = logits_and_captions(decoder, torch.bfloat16)
    prepared = prepare_decoder(copy.deepcopy(decoder), torch.bfloat16)
    assert prepared.h[0].mlp.c_fc.weight.dtype == prepared.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(prepared.wte.weight, decoder.wte.weight)
    assert prepared.h[0].ln_1.weight.dtype == torch.float32
    torch.testing.assert_close(logits_and_captions(prepared, torch.bfloat16)[0], logits, atol=0, rtol=0)
    assert prepare_decoder(decoder, torch.float32).lm_head is None  # nothing to cast, so no second output layer


def test_a_prepared_encoder_gives_the_same_tokens():
    encoder = build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = encoder.forward_features(pixels)
        prepare_linears(encoder, torch.float32)
        torch.testing.assert_close(encoder.forward_features(pixels), plain, atol=1e-5, rtol=0)


def test_unmerged_lora_is_refused():
    with pytest.raises(ValueError, match="merge_lora first"):
        prepare_decoder(Decoder(CONFIG, LoraConfig(rank=2)), torch.float32)


@pytest.mark.skipif(not can_reorder(CPU, torch.float32), reason="this torch has no oneDNN")
def test_old_weights_go_while_new_ones_come(monkeypatch):
    """All of them side by side took twice an encoder's memory: 15 GB for ViT-bigG."""
    encoder, alive = build_encoder(TINY_ENCODER, "random", TINY_ENCODER_KWARGS | {"depth": 6}), []
    layers = [weakref.ref(module) for module in encoder.modules() if isinstance(module, torch.nn.Linear)]

    class Noted(ReorderedLinear):
        def __init__(self, *args):
            alive.append(sum(layer() is not None for layer in layers))
            super().__init__(*args)

    monkeypatch.setattr("captioning.models.inference_weights.ReorderedLinear", Noted)
    prepare_linears(encoder, torch.float32)
    assert len(alive) == len(layers) == 24
    assert alive[-1] <= 3  # the one at hand and its neighbours
