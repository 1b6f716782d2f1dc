"""packed_attention.py: fused attention of packed captions equals attention with a mask, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from packings import packing_of, play_cuda

from captioning.kernels.packed_attention import PackedAttention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def attend_with_mask(qkv, mask):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("device", ["cpu", "as on cuda"])
@pytest.mark.parametrize("lengths", [[[3, 1, 5], [2]], [[4] * 7, [1, 9, 2, 2]], [[1]]])
def test_equals_attention_with_a_mask_in_value_and_gradient(monkeypatch, device, lengths):
    flash = play_cuda(monkeypatch) if device != "cpu" else None
    packing, mask, padding = packing_of(lengths, prefix=70, longer=3)
    total = mask.shape[-1]
    qkv = (3 * torch.randn(len(lengths), total, 3, 2, 8, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(len(lengths), total, 16, dtype=torch.float64)
    grad[:, 70:][padding] = 0  # what is after the captions is never looked at
    results = []
    for out in (PackedAttention.apply(qkv, packing), attend_with_mask(qkv, mask)):
        results.append((out.detach().clone(), torch.autograd.grad(out, qkv, grad)[0]))
        assert torch.isfinite(results[-1][0]).all()
        results[-1][0][:, 70:][padding] = 0
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert flash is None or flash.calls == 2


def test_is_exact_where_scores_are_large_and_one_share_has_all_the_weight():
    packing, mask, _ = packing_of([[4, 2]], prefix=5)
    for part in (slice(5), slice(5, None)):
        qkv = torch.randn(1, 11, 3, 2, 8, dtype=torch.float64)
        qkv[:, :, 0] += 40  # every query points to these keys: the other part's share of the softmax is nothing
        qkv[:, part, 1] += 40
        qkv.requires_grad_()
        outs = PackedAttention.apply(qkv, packing), attend_with_mask(qkv, mask)
        grads = [torch.autograd.grad(out.square().sum(), qkv)[0] for out in outs]
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("device", ["cpu", "as on cuda"])
@pytest.mark.parametrize("captions_only", [False, True])
def test_the_gradient_is_the_derivative(monkeypatch, device, captions_only):
    if device != "cpu":
        play_cuda(monkeypatch)
    packing, _, _ = packing_of([[2, 1], [3]], prefix=4)
    qkv = torch.randn(2, 7, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: PackedAttention.apply(x, packing, captions_only), qkv)


def test_bfloat16_is_as_near_to_float32_as_with_a_mask():
    packing, mask, padding = packing_of([[9, 14, 11], [12, 8]], prefix=60)
    exact = torch.randn(2, mask.shape[-1], 3, 2, 16, requires_grad=True)
    rounded = exact.detach().bfloat16().requires_grad_()
    wanted = attend_with_mask(exact, mask)
    errors = [
        (out.float() - wanted)[:, 60:][~padding].norm()
        for out in (PackedAttention.apply(rounded, packing), attend_with_mask(rounded, mask))
    ]
    assert 0 < errors[0] < 1.2 * errors[1]


def test_autocast_does_not_change_the_gradient():
    """The forward's scores were once rounded by autocast and the backward's not: training with large ones diverged."""
    packing, mask, padding = packing_of([[9, 12, 7]], prefix=20)
    grad = torch.randn(1, 20 + padding.shape[1], 16)
    qkv = (8 * torch.randn(1, 20 + padding.shape[1], 3, 2, 8)).bfloat16()
    gradients = []
    for autocast in (False, True):
        x = qkv.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = PackedAttention.apply(x, packing)
        out.backward(grad.to(out.dtype))
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    exact = qkv.float().requires_grad_()
    attend_with_mask(exact, mask).backward(grad)
    wrong = (gradients[1].float() - exact.grad).norm() / exact.grad.norm()
    assert wrong < 0.02
