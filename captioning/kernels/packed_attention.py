"""Attention of captions packed after one image prefix, by fused kernels and without a mask.

Rows are those that `packing.Packing` describes. `PackedAttention` attends: on CUDA as in `packed_cuda`, on a CPU as
below.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from captioning.kernels.packed_cuda import attend_on_cuda, attend_on_cuda_backward
from captioning.kernels.packing import Packing

_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def can_attend_packed(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether ``PackedAttention`` has a fused kernel, built and allowed, for such a device, type and size of a head."""
    if is_cpu(device):
        return hasattr(torch.ops.aten, _CPU_FLASH) and dtype in (torch.float32, torch.bfloat16, torch.float64)
    if device.type != "cuda" or torch.version.hip or not torch.backends.cuda.flash_sdp_enabled():
        return False
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    fits = dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256
    return torch.backends.cuda.is_flash_attention_available() and ampere and fits


class PackedAttention(torch.autograd.Function):
    """Attention of captions packed after one prefix, exact, without work on pairs that do not see each other.

    For a query q and a set X of keys let ``lse_X = log sum_X exp(q k_j / sqrt(hs))`` and ``out_X`` be the output of
    attending to X alone. With prefix P and caption C the forward merges two shares of one softmax:

        lse_total = logaddexp(lse_P, lse_C)
        out = exp(lse_P - lse_total) out_P + exp(lse_C - lse_total) out_C

    The backward needs no such sum. The gradient of a score s_j is

        d s_j = exp(s_j - lse_total) (d out · v_j - d out · out)

    so a fused kernel's own backward, given the total ``out`` and ``lse_total`` in place of its own, returns its share
    of the gradient (as Ring Attention does over devices, Liu et al., arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, packing: Packing, captions_only: bool = False) -> Tensor:
        """Map qkv (B, P+S, 3, nh, hs) to (B, P+S, C), or to the rows of the captions only, (B, S, C)."""
        attend = _attend if is_cpu(qkv.device) else attend_on_cuda
        with torch.autocast(qkv.device.type, enabled=False):  # it would round scores here and not in the backward
            out, lse, ctx.kernel_states = attend(qkv, packing, captions_only)
        ctx.save_for_backward(qkv, out, lse)
        ctx.packing, ctx.captions_only = packing, captions_only
        return out.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of qkv."""
        qkv, out, lse = ctx.saved_tensors
        backward = _attend_backward if is_cpu(qkv.device) else attend_on_cuda_backward
        grad = grad.unflatten(-1, qkv.shape[-2:])  # (B, P+S or S, nh, hs)
        return backward(ctx.kernel_states, grad, qkv, out, lse, ctx.packing, ctx.captions_only), None, None


# On a CPU all rows attend to the prefix in a fused kernel, and captions to themselves side by side in small products.


def _attend(qkv: Tensor, packing: Packing, captions_only: bool) -> tuple[Tensor, Tensor, list]:
    """Return output (B, n, nh, hs), log-sum-exp (B, nh, n) of all n = P+S rows or the captions', and no states."""
    n_prefix, first = packing.n_prefix, packing.n_prefix if captions_only else 0
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, P+S, hs)
    # Causal counts from the first key, so the rows after the prefix see all of it.
    kernel = getattr(torch.ops.aten, _CPU_FLASH).default
    out, lse = kernel(q[:, :, first:], k[:, :, :n_prefix], v[:, :, :n_prefix], 0.0, not captions_only)
    caption_out, caption_lse = out[:, :, n_prefix - first :], lse[:, :, n_prefix - first :]  # views, written below
    *_, values, scores = _caption_scores(qkv[:, n_prefix:], packing)
    lse_prefix = packing.grid(caption_lse.transpose(1, 2)[..., None])  # (B, k, nh, T, 1)
    lse_total = torch.logaddexp(lse_prefix, scores.logsumexp(-1, keepdim=True))
    caption_share = packing.row((scores - lse_total).exp() @ values).transpose(1, 2)  # (B, nh, S, hs)
    increase = packing.row(lse_total - lse_prefix)[..., 0].transpose(1, 2)  # (B, nh, S), 0 on padding
    prefix_share = caption_out * (-increase).exp()[..., None]
    caption_out.copy_(prefix_share + caption_share)
    caption_lse.add_(increase)
    return out.transpose(1, 2), lse, []


def _attend_backward(
    states: list, grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, packing: Packing, captions_only: bool
) -> Tensor:
    """Return the gradient of qkv from that of the output (B, n, nh, hs)."""
    n_prefix, first = packing.n_prefix, packing.n_prefix if captions_only else 0
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, P+S, hs)
    result = torch.empty_like(qkv)
    grad_q, grad_k, grad_v = result.permute(2, 0, 3, 1, 4)  # views, each (B, nh, P+S, hs)
    grad_q[:, :, :first] = 0
    kernel = getattr(torch.ops.aten, _CPU_FLASH + "_backward").default
    prefix = q[:, :, first:], k[:, :, :n_prefix], v[:, :, :n_prefix]
    grad_q[:, :, first:], grad_k[:, :, :n_prefix], grad_v[:, :, :n_prefix] = kernel(
        grad.transpose(1, 2), *prefix, out.transpose(1, 2), lse, 0.0, not captions_only
    )
    captions = slice(n_prefix - first, None)
    own_q, own_k, own_v = _attend_caption_backward(
        qkv[:, n_prefix:], grad[:, captions], out[:, captions], lse[:, :, captions], packing
    )
    result[:, n_prefix:, 0].add_(own_q)
    result[:, n_prefix:, 1], result[:, n_prefix:, 2] = own_k, own_v
    return result


def _caption_scores(qkv: Tensor, packing: Packing) -> tuple[Tensor, ...]:
    """Return q, k, v of the captions (B, S, 3, nh, hs) by caption, (B, k, nh, T, hs), and causal scores (…, T, T)."""
    q, k, v = (packing.grid(part) for part in qkv.to(_at_least_float32(qkv)).unbind(2))
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return q, k, v, (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf)


def _attend_caption_backward(
    qkv: Tensor, grad: Tensor, out: Tensor, lse: Tensor, packing: Packing
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the captions' own share of the gradients of q, k and v, each (B, S, nh, hs)."""
    q, k, v, scores = _caption_scores(qkv, packing)
    grad, out = packing.grid(grad.to(q.dtype)), packing.grid(out.to(q.dtype))
    weights = (scores - packing.grid(lse.transpose(1, 2)[..., None])).exp()  # (B, k, nh, T, T)
    weights = torch.where(packing.valid[:, :, None, :, None], weights, 0.0)
    inner = weights * (grad @ v.transpose(-2, -1) - (grad * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    return (
        packing.row(inner @ k),
        packing.row(inner.transpose(-2, -1) @ q),
        packing.row(weights.transpose(-2, -1) @ grad),
    )


def is_cpu(device: torch.device) -> bool:
    """Whether this is the CPU; a function, so that a test can play the other device."""
    return device.type == "cpu"


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
