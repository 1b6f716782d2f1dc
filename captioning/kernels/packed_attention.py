"""Attention of captions packed after one image prefix, by fused kernels and without a mask.

A row of a batch is ``[prefix | caption 1 | … | caption k]``. The prefix is causal; a caption's tokens see the prefix
and, up to themselves, their own caption. `Packing` says where the captions are, `PackedAttention` attends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from captioning.kernels.attention_mask import additive_mask

_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Packing:
    """Where the captions of each row are, to gather them by caption: no mask needed.

    Args:
        n_prefix: tokens P of the prefix.
        slots: long (B, k, T), where after the prefix each caption's tokens are, in order; -1 past its end.
        length: tokens S after the prefix, padding included.
        mask: builds the same as a boolean mask (B, 1, P+S, P+S), for attention that takes one.
    """

    def __init__(self, n_prefix: int, slots: Tensor, length: int, mask: Callable[[], Tensor]) -> None:
        self.n_prefix, self._mask = n_prefix, mask
        self._additive: dict[torch.dtype, Tensor] = {}
        rows = torch.arange(len(slots), device=slots.device)[:, None]  # (B, 1)
        self.valid = slots >= 0  # (B, k, T)
        flat, size = slots.flatten(1), slots[0].numel()
        # Places without a counterpart read the one at 0, and the result is thrown away.
        self._to_grid = rows, flat.clamp_min(0)
        back = torch.full((len(slots), length + 1), -1, device=slots.device)
        back[rows, torch.where(flat < 0, length, flat)] = torch.arange(size, device=slots.device)
        self._covered = back[:, :-1] >= 0  # (B, S), False on padding
        self._from_grid = rows, back[:, :-1].clamp_min(0)

    @cached_property
    def mask(self) -> Tensor:
        """Where a query may look, bool (B, 1, P+S, P+S)."""
        return self._mask()

    def additive(self, dtype: torch.dtype) -> Tensor:
        """The mask as attention adds it to scores, made once for each type of queries."""
        if dtype not in self._additive:
            self._additive[dtype] = additive_mask(self.mask, dtype)
        return self._additive[dtype]

    def grid(self, x: Tensor) -> Tensor:
        """Gather what is after the prefix, (B, S, nh, n), by caption: (B, k, nh, T, n)."""
        return x[self._to_grid].unflatten(1, self.valid.shape[1:]).transpose(2, 3)

    def row(self, x: Tensor) -> Tensor:
        """The inverse of ``grid``, zeros on padding: (B, k, nh, T, n) to (B, S, nh, n)."""
        return x.transpose(2, 3).flatten(1, 2)[self._from_grid] * self._covered[:, :, None, None]


def can_attend_packed(qkv: Tensor) -> bool:
    """Whether ``PackedAttention`` has a fused kernel for qkv (..., hs): by device, type and size of a head."""
    size, dtype = qkv.shape[-1], qkv.dtype
    if is_cpu(qkv):
        return hasattr(torch.ops.aten, _CPU_FLASH) and dtype in (torch.float32, torch.bfloat16, torch.float64)
    if qkv.device.type != "cuda" or torch.version.hip or not torch.backends.cuda.flash_sdp_enabled():
        return False
    ampere = torch.cuda.get_device_capability(qkv.device) >= (8, 0)
    return ampere and dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256


class PackedAttention(torch.autograd.Function):
    """Attention of captions packed after one prefix, exact, without work on pairs that do not see each other.

    All rows attend to the prefix in a fused kernel; each caption attends to itself, all captions side by side, in small
    products. For a query q and a set X of keys let ``lse_X = log sum_X exp(q k_j / sqrt(hs))`` and ``out_X`` be the
    output of attending to X alone. With prefix P and caption C the forward merges two shares of one softmax:

        lse_total = logaddexp(lse_P, lse_C)
        out = exp(lse_P - lse_total) out_P + exp(lse_C - lse_total) out_C

    The backward needs no such sum. The gradient of a score s_j is

        d s_j = exp(s_j - lse_total) (d out · v_j - d out · out)

    so the fused kernel's own backward, given the total ``out`` and ``lse_total`` in place of its own, returns the
    prefix's share of the gradient (as Ring Attention does over devices, Liu et al., arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, packing: Packing, captions_only: bool = False) -> Tensor:
        """Map qkv (B, P+S, 3, nh, hs) to (B, P+S, C), or to the rows of the captions only, (B, S, C)."""
        with torch.autocast(qkv.device.type, enabled=False):  # it would round scores here and not in the backward
            out, lse, ctx.kernel_states = _attend(qkv, packing, captions_only)
        ctx.save_for_backward(qkv, out, lse)
        ctx.packing, ctx.captions_only = packing, captions_only
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of qkv."""
        qkv, out, lse = ctx.saved_tensors
        n_prefix, first = ctx.packing.n_prefix, ctx.packing.n_prefix if ctx.captions_only else 0
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, P+S, hs)
        grad = grad.unflatten(-1, qkv.shape[-2:])  # (B, P+S or S, nh, hs)
        prefix = q[:, :, first:], k[:, :, :n_prefix], v[:, :, :n_prefix]
        result = torch.empty_like(qkv)
        grad_q, grad_k, grad_v = result.permute(2, 0, 3, 1, 4)  # views, each (B, nh, P+S, hs)
        grad_q[:, :, :first] = 0
        grad_q[:, :, first:], grad_k[:, :, :n_prefix], grad_v[:, :, :n_prefix] = _attend_prefix_backward(
            ctx.kernel_states, grad.transpose(1, 2), *prefix, out, lse, ctx.captions_only
        )
        captions = slice(n_prefix - first, None)
        own_q, own_k, own_v = _attend_caption_backward(
            qkv[:, n_prefix:], grad[:, captions], out[:, :, captions], lse[:, :, captions], ctx.packing
        )
        result[:, n_prefix:, 0] += own_q
        result[:, n_prefix:, 1], result[:, n_prefix:, 2] = own_k, own_v
        return result, None, None


def _attend(qkv: Tensor, packing: Packing, captions_only: bool) -> tuple[Tensor, Tensor, list]:
    """Return output (B, nh, n, hs), log-sum-exp (B, nh, n) and kernel states of all n = P+S rows, or the captions'."""
    n_prefix, first = packing.n_prefix, packing.n_prefix if captions_only else 0
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, P+S, hs)
    out, lse, states = _attend_prefix(q[:, :, first:], k[:, :, :n_prefix], v[:, :, :n_prefix], captions_only)
    caption_out, caption_lse = out[:, :, n_prefix - first :], lse[:, :, n_prefix - first :]  # views, written below
    *_, values, scores = _caption_scores(qkv[:, n_prefix:], packing)
    lse_prefix = packing.grid(caption_lse.transpose(1, 2)[..., None])  # (B, k, nh, T, 1)
    lse_total = torch.logaddexp(lse_prefix, scores.logsumexp(-1, keepdim=True))
    caption_share = packing.row((scores - lse_total).exp() @ values).transpose(1, 2)  # (B, nh, S, hs)
    increase = packing.row(lse_total - lse_prefix)[..., 0].transpose(1, 2)  # (B, nh, S), 0 on padding
    prefix_share = caption_out * (-increase).exp()[..., None]
    caption_out.copy_(prefix_share + caption_share)
    caption_lse.add_(increase)
    return out, lse, states


def _attend_prefix(q: Tensor, k: Tensor, v: Tensor, captions_only: bool) -> tuple[Tensor, Tensor, list]:
    """Let rows q (B, nh, n, hs) attend to the prefix: the captions' rows see all of it, its own see it causally.

    Args:
        q: the prefix's rows and then the captions', or the captions' only.
        k, v: the prefix's, (B, nh, P, hs).
        captions_only: which of the two q is.

    Returns:
        Output (B, nh, n, hs), log-sum-exp (B, nh, n), and what the backward of the CUDA kernel needs.
    """
    if is_cpu(q):  # causal counts from the first key, so the rows after the prefix see all of it
        return *getattr(torch.ops.aten, _CPU_FLASH)(q, k, v, 0.0, not captions_only), []
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse, states = torch.empty(q.shape[:3], dtype=_at_least_float32(q), device=q.device), []
    for rows, causal in _cuda_calls(k.shape[2], captions_only):
        out[:, :, rows], lse[:, :, rows], *state = torch.ops.aten._scaled_dot_product_flash_attention(
            q[:, :, rows], k, v, 0.0, causal
        )
        states.append(state[:6])  # lengths of the sequences, the longest, state of the random numbers
    return out, lse, states


def _cuda_calls(n_prefix: int, captions_only: bool) -> list[tuple[slice, bool]]:
    """Rows of each kernel call, and whether it is causal: on CUDA causal counts from the last key."""
    return [(slice(None), False)] if captions_only else [(slice(n_prefix), True), (slice(n_prefix, None), False)]


def _attend_prefix_backward(
    states: list, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, captions_only: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the queries and of the prefix's keys and values."""
    if is_cpu(q):
        return getattr(torch.ops.aten, _CPU_FLASH + "_backward")(grad, q, k, v, out, lse, 0.0, not captions_only)
    queries, keys, values = [], [], []
    for state, (rows, causal) in zip(states, _cuda_calls(k.shape[2], captions_only), strict=True):
        grad_out, part_q, part_out = grad[:, :, rows], q[:, :, rows], out[:, :, rows]
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out, part_q, k, v, part_out, lse[:, :, rows].contiguous(), *state[:4], 0.0, causal, *state[4:]
        )
        queries.append(grad_q)
        keys.append(grad_k)
        values.append(grad_v)
    return torch.cat(queries, 2), reduce(torch.add, keys), reduce(torch.add, values)


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
    grad, out = packing.grid(grad.to(q.dtype)), packing.grid(out.transpose(1, 2).to(q.dtype))
    weights = (scores - packing.grid(lse.transpose(1, 2)[..., None])).exp()  # (B, k, nh, T, T)
    weights = torch.where(packing.valid[:, :, None, :, None], weights, 0.0)
    inner = weights * (grad @ v.transpose(-2, -1) - (grad * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    return (
        packing.row(inner @ k),
        packing.row(inner.transpose(-2, -1) @ q),
        packing.row(weights.transpose(-2, -1) @ grad),
    )


def is_cpu(x: Tensor) -> bool:
    """Whether ``x`` is on the CPU; a function, so that a test can play the other device."""
    return x.device.type == "cpu"


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
