"""Attention of captions packed behind one prefix, in fused kernels and without a mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any

import torch


class Packing:
    """Captions packed behind a prefix, as a mask: ``[prefix | caption 1 | … | caption k]``, padded to one length.

    The prefix is causal; a caption's tokens see the prefix and what their own caption holds up to them.

    Args:
        prefix: tokens P of the prefix.
        slots: long (B, k, T), where the tokens of each caption stand behind the prefix, in order; -1 behind its end.
        length: tokens S behind the prefix, padding included.
        mask: returns the same as a boolean mask (B, 1, P+S, P+S), for where the parts cannot be attended apart.
    """

    def __init__(self, prefix: int, slots: torch.Tensor, length: int, mask: Callable[[], torch.Tensor]) -> None:
        self.prefix, self._mask = prefix, mask
        rows = torch.arange(len(slots), device=slots.device)[:, None]  # (B, 1)
        self.valid = slots >= 0  # (B, k, T)
        flat, size = slots.flatten(1), slots[0].numel()
        # Places without a counterpart read the one at 0, which is thrown away.
        self.to_grid = rows, flat.clamp_min(0)
        back = torch.full((len(slots), length + 1), -1, device=slots.device)
        back[rows, torch.where(flat < 0, length, flat)] = torch.arange(size, device=slots.device)
        self.covered = back[:, :-1] >= 0  # (B, S), False on padding
        self.from_grid = rows, back[:, :-1].clamp_min(0)

    @cached_property
    def mask(self) -> torch.Tensor:
        """Where a query may look, bool (B, 1, P+S, P+S)."""
        return self._mask()

    def grid(self, x: torch.Tensor) -> torch.Tensor:
        """Lay out what stands behind the prefix, (B, S, nh, n), by caption: (B, k, nh, T, n)."""
        return x[self.to_grid].unflatten(1, self.valid.shape[1:]).transpose(2, 3)

    def row(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of ``grid``, zeros on padding: (B, k, nh, T, n) to (B, S, nh, n)."""
        return x.transpose(2, 3).flatten(1, 2)[self.from_grid] * self.covered[:, :, None, None]


def can_attend_packed(qkv: torch.Tensor) -> bool:
    """Whether ``PackedAttention`` has a fused kernel for qkv (..., hs): by device, type and size of a head."""
    size, dtype = qkv.shape[-1], qkv.dtype
    if is_cpu(qkv):
        return hasattr(torch.ops.aten, _CPU_FLASH) and dtype in (torch.float32, torch.bfloat16, torch.float64)
    if qkv.device.type != "cuda" or torch.version.hip or not torch.backends.cuda.flash_sdp_enabled():
        return False
    ampere = torch.cuda.get_device_capability(qkv.device) >= (8, 0)
    return ampere and dtype in (torch.float16, torch.bfloat16) and size % 8 == 0 and size <= 256


_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def _without_autocast(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a forward compute in the types that it is given."""

    @wraps(function)
    def plain(ctx: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return function(ctx, x, *args)

    return plain


class PackedAttention(torch.autograd.Function):
    """Attention of captions packed behind one prefix, without a mask: it does no work on what is not seen.

    All rows attend to the prefix in a fused kernel. A caption's rows also attend to their own caption, all captions
    side by side as small products. Both parts are shares of one softmax, and their log-sum-exp says how large: the
    sum is exact. So is the gradient, since with the whole output and the whole log-sum-exp in place of its own each
    part's backward gives its share of the whole (Liu et al., arXiv 2310.01889, split sequences over devices so).
    """

    @staticmethod
    @_without_autocast  # which would round the scores; the backward, beyond its reach, would find others
    def forward(ctx: Any, qkv: torch.Tensor, packing: Packing, first: int = 0) -> torch.Tensor:
        """Map qkv (B, P+S, 3, nh, hs) to (B, P+S, C), or to the captions' rows (B, S, C) if these are the first."""
        count = packing.prefix
        assert first in (0, count)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, P+S, hs)
        out, lse, ctx.kernel = _attend_prefix(q[:, :, first:], k[:, :, :count], v[:, :, :count], not first)
        scores, value = _own_scores(qkv[:, count:], packing)
        seen, caption = lse[:, :, count - first :], out[:, :, count - first :]  # the captions' rows, views
        before = packing.grid(seen.transpose(1, 2)[..., None])  # (B, k, nh, T, 1)
        total = torch.logaddexp(before, scores.logsumexp(-1, keepdim=True))
        part = packing.row((scores - total).exp() @ value)  # (B, S, nh, hs)
        more = packing.row(total - before)[..., 0].transpose(1, 2)  # (B, nh, S); the prefix's share is exp(-more)
        caption.copy_(caption * (-more).exp()[..., None] + part.transpose(1, 2))
        seen.add_(more)
        ctx.save_for_backward(qkv, out, lse)
        ctx.packing, ctx.first = packing, first
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of qkv."""
        qkv, out, lse = ctx.saved_tensors
        packing, count, first = ctx.packing, ctx.packing.prefix, ctx.first
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        grad = grad.unflatten(-1, qkv.shape[-2:])  # (B, P+S or S, nh, hs)
        result = torch.empty_like(qkv)
        parts = result.permute(2, 0, 3, 1, 4)  # a view, (3, B, nh, P+S, hs)
        given = grad.transpose(1, 2), q[:, :, first:], k[:, :, :count], v[:, :, :count], out, lse
        parts[0, :, :, :first] = 0
        parts[0, :, :, first:], parts[1, :, :, :count], parts[2, :, :, :count] = _attend_prefix_backward(
            ctx.kernel, *given, not first
        )
        behind = slice(count - first, None)
        own = _own_backward(qkv[:, count:], grad[:, behind], out[:, :, behind], lse[:, :, behind], packing)
        result[:, count:, 0] += own[0]
        result[:, count:, 1], result[:, count:, 2] = own[1], own[2]
        return result, None, None


def _attend_prefix(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, whole: bool
) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Let rows q (B, nh, n, hs) attend to the prefix: the captions' see all of it, its own what is not after them.

    Args:
        q: all rows, or the captions' alone.
        k, v: the prefix's, (B, nh, P, hs).
        whole: whether q has the prefix's own rows too, in front.

    Returns:
        Output (B, nh, n, hs), log-sum-exp (B, nh, n), and what the backward of the kernel wants to have back.
    """
    if is_cpu(q):  # causal counts from the first key on, so the rows behind the prefix see all of it
        return *getattr(torch.ops.aten, _CPU_FLASH)(q, k, v, 0.0, whole), []
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse, states = torch.empty(q.shape[:3], dtype=_at_least_float32(q), device=q.device), []
    for part, causal in _cuda_parts(k.shape[2], whole):
        out[:, :, part], lse[:, :, part], *state = torch.ops.aten._scaled_dot_product_flash_attention(
            q[:, :, part], k, v, 0.0, causal
        )
        states.append(state[:6])  # lengths of the sequences, the longest, state of the random numbers
    return out, lse, states


def _cuda_parts(count: int, whole: bool) -> list[tuple[slice, bool]]:
    """Rows that take one kernel, and whether it is causal: on CUDA that counts from the last key on."""
    return [(slice(count), True), (slice(count, None), False)] if whole else [(slice(None), False)]


def _attend_prefix_backward(
    kernel: list,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    whole: bool,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of queries, and of the prefix's keys and values."""
    if is_cpu(q):
        return getattr(torch.ops.aten, _CPU_FLASH + "_backward")(grad, q, k, v, out, lse, 0.0, whole)
    queries, keys, values = [], 0, 0
    for state, (part, causal) in zip(kernel, _cuda_parts(k.shape[2], whole), strict=True):
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad[:, :, part],
            q[:, :, part],
            k,
            v,
            out[:, :, part],
            lse[:, :, part].contiguous(),
            *state[:4],
            0.0,
            causal,
            *state[4:],
        )
        queries.append(grad_q)
        keys, values = keys + grad_k, values + grad_v
    return torch.cat(queries, 2), keys, values


def is_cpu(x: torch.Tensor) -> bool:
    """Whether ``x`` lies on the CPU."""
    return x.device.type == "cpu"


def _own_scores(qkv: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, ...]:
    """Return what each caption's tokens think of each other, (B, k, nh, T, T) causal, and their values."""
    q, k, v = (packing.grid(part) for part in qkv.to(_at_least_float32(qkv)).unbind(2))  # each (B, k, nh, T, hs)
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf), v


def _own_backward(
    qkv: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, packing: Packing
) -> tuple[torch.Tensor, ...]:
    """Return the captions' own share of the gradient of qkv (B, S, 3, nh, hs): three of (B, S, nh, hs)."""
    wide = _at_least_float32(qkv)
    scores, v = _own_scores(qkv, packing)
    q, k = (packing.grid(part) for part in qkv[:, :, :2].to(wide).unbind(2))
    grad, out = packing.grid(grad.to(wide)), packing.grid(out.transpose(1, 2).to(wide))
    weights = (scores - packing.grid(lse.transpose(1, 2)[..., None])).exp()  # (B, k, nh, T, T)
    weights = torch.where(packing.valid[:, :, None, :, None], weights, 0.0)
    inner = weights * (grad @ v.transpose(-2, -1) - (grad * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    return tuple(map(packing.row, (inner @ k, inner.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ grad)))


def _at_least_float32(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
