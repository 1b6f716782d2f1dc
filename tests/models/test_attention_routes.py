"""The captioner by either route of attention: the same training, whatever type, dropout and device."""

import pytest
import torch
from tiny import EOS, make_captioner, ragged_captions, random_features

from captioning.data.batches import pack_captions
from captioning.kernels import attention_route, packed_attention
from decoder import LoraConfig


@pytest.fixture(autouse=True)
def undecided(monkeypatch):
    monkeypatch.setattr(attention_route, "_decided", {})


def loss_and_gradients(model, route, precision=torch.float32):
    model.attention = route
    batch = pack_captions(ragged_captions((5, 1, 3)), EOS, pad_to_multiple=8)
    features = random_features(model, 3).to(next(model.parameters()).dtype)
    torch.manual_seed(4)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = model.loss(features, batch)
    return loss.detach(), torch.autograd.grad(loss, list(model.trainable().values()))


def largest_difference(ours, wanted):
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("enable", [None, (True, False, True)])
def test_both_routes_train_alike_with_and_without_dropout(dropout, enable):
    model = make_captioner(LoraConfig(rank=3, alpha=6.0, dropout=dropout, lm_head=True, enable_lora=enable)).train()
    (packed, ours), (mask, wanted) = (loss_and_gradients(model, route) for route in ("packed", "mask"))
    torch.testing.assert_close(packed, mask, atol=1e-6, rtol=1e-6)
    assert largest_difference(ours, wanted) < 1e-4
    assert dropout == 0 or not torch.allclose(mask, loss_and_gradients(model.eval(), "mask")[0])


@pytest.mark.parametrize("how", ["bf16 under autocast", "bf16", "fp16"])
def test_the_mask_trains_in_half_precision_as_in_float32(how):
    wanted, gradients = loss_and_gradients(make_captioner(), "mask")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(how)
    model = make_captioner() if dtype is None else make_captioner().to(dtype)
    loss, ours = loss_and_gradients(model, "mask", torch.bfloat16 if dtype is None else torch.float32)
    assert loss.item() == pytest.approx(wanted.item(), rel=0.02)
    for one, other in zip(ours, gradients, strict=True):
        assert torch.isfinite(one).all()
        assert torch.nn.functional.cosine_similarity(one.flatten().float(), other.flatten(), 0) > 0.98


def test_a_device_without_the_kernels_trains_by_the_mask(monkeypatch, caplog):
    """MPS, say: no CPU kernel and none of CUDA's may be called."""
    wanted = loss_and_gradients(make_captioner(), "mask")
    monkeypatch.setattr(packed_attention, "is_cpu", lambda device: False)
    monkeypatch.setattr(attention_route.PackedAttention, "apply", lambda *given: pytest.fail("packed attention"))
    for route in ("auto", "packed"):
        loss, gradients = loss_and_gradients(make_captioner(), route)
        assert torch.equal(loss, wanted[0])
        assert all(map(torch.equal, gradients, wanted[1]))
    assert not caplog.records


def test_auto_is_packed_on_a_cpu_to_the_last_bit():
    (auto, ours), (packed, wanted) = (loss_and_gradients(make_captioner(), route) for route in ("auto", "packed"))
    assert torch.equal(auto, packed)
    assert all(map(torch.equal, ours, wanted))


def test_packed_without_a_kernel_is_refused_in_words():
    with pytest.raises(ValueError, match="--attention packed: no kernel for heads of 16 in"):
        make_captioner().attention_route("packed", torch.float16)
