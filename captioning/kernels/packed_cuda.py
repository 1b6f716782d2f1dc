"""Packed attention by CUDA's flash kernels: two calls forward and two backward, and nothing is gathered.

The prefix and each caption lie in a row one after another, and all are causal. So one call of the kernel for sequences
of various lengths lets all of them attend to themselves, and a second one lets the captions' rows attend to the
prefix. The formulas that merge the two are those of `packed_attention.PackedAttention`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.kernels.packing import Packing


def attend_on_cuda(qkv: Tensor, packing: Packing, captions_only: bool) -> tuple[Tensor, Tensor, list]:
    """Return output (B, n, nh, hs), log-sum-exp (nh, B n) of all n = P+S rows or the captions', and kernel states."""
    q, k, v, *lengths = _sequences(qkv, packing, captions_only)
    kernel = torch.ops.aten._flash_attention_forward.default
    out, lse, *own_state = kernel(q, k, v, *lengths, 0.0, True, False)
    seen, seen_lse, *seen_state = torch.ops.aten._scaled_dot_product_flash_attention.default(
        *_captions_and_prefix(qkv, packing), 0.0, False
    )
    out = out.unflatten(0, (len(qkv), -1))  # (B, n, nh, hs)
    own = out[:, -packing.length :]  # (B, S, nh, hs), a view that is written below, as is own_lse
    own_lse = _of_captions(lse, packing)
    share = (seen_lse - own_lse).sigmoid().transpose(1, 2)[..., None]  # (B, S, nh, 1), the prefix's of the softmax
    own.copy_(seen.transpose(1, 2) * share + own * (1 - share))
    torch.logaddexp(own_lse, seen_lse, out=own_lse)
    return out, lse, [own_state[:2], seen_state[:6]]  # random numbers of dropout; lengths, and the same


def attend_on_cuda_backward(
    states: list, grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, packing: Packing, captions_only: bool
) -> Tensor:
    """Return the gradient of qkv from that of the output (B, n, nh, hs)."""
    n_prefix, (own_state, (*lengths, seed, offset)) = packing.n_prefix, states
    q, k, v, *own_lengths = _sequences(qkv, packing, captions_only)
    own = torch.ops.aten._flash_attention_backward.default(
        grad.flatten(0, 1), q, k, v, out.flatten(0, 1), lse, *own_lengths, 0.0, True, *own_state
    )
    grad, out = (x[:, -packing.length :].transpose(1, 2) for x in (grad, out))
    prefix, seen_lse = _captions_and_prefix(qkv, packing), _of_captions(lse, packing).contiguous()
    seen = torch.ops.aten._scaled_dot_product_flash_attention_backward.default(
        grad, *prefix, out, seen_lse, *lengths, 0.0, False, seed, offset
    )
    result = torch.stack(own, 1).unflatten(0, (len(qkv), -1))  # (B, n, 3, nh, hs)
    if captions_only:
        result = F.pad(result, (0, 0) * 3 + (n_prefix, 0))
    grad_q, grad_k, grad_v = (part.transpose(1, 2) for part in seen)
    result[:, n_prefix:, 0].add_(grad_q)
    result[:, :n_prefix, 1].add_(grad_k)
    result[:, :n_prefix, 2].add_(grad_v)
    return result


def _sequences(qkv: Tensor, packing: Packing, captions_only: bool) -> tuple:
    """Return q, k, v (B n, nh, hs), where each sequence begins (count + 1,), twice, and the longest there may be."""
    rows = qkv[:, packing.n_prefix :] if captions_only else qkv
    begins, longest = packing.begins(captions_only), max(packing.n_prefix, packing.length)
    return *rows.flatten(0, 1).unbind(1), begins, begins, longest, longest


def _captions_and_prefix(qkv: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Return the captions' q (B, nh, S, hs), and the prefix's k and v (B, nh, P, hs)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q[:, :, packing.n_prefix :], k[:, :, : packing.n_prefix], v[:, :, : packing.n_prefix]


def _of_captions(lse: Tensor, packing: Packing) -> Tensor:
    """The captions' part of a log-sum-exp (nh, B n), a view of it: (B, nh, S)."""
    return lse.unflatten(1, (len(packing.slots), -1)).transpose(0, 1)[..., -packing.length :]
