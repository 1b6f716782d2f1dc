"""Which way packed captions attend: by the fused kernels of `packed_attention`, or by torch's own with a mask.

The fused kernels are called by private names, and what they do on a card that nobody tried is not known. So before
they are used by themselves they must show, on a small case and once for each device, type and size of head, that they
are about as exact as the mask; on CUDA they must be faster too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.kernels.packed_attention import PackedAttention, can_attend_packed
from captioning.kernels.packing import Packing

log = logging.getLogger(__name__)

AUTO, PACKED, MASK = ROUTES = ("auto", "packed", "mask")
WORSE = 1.5  # the error of packed attention may be that many times the mask's
NEGLIGIBLE = 1e-5  # a relative error below this is none: in float32 both are below 1e-6
RUNS = 5  # timed of each route, after one that is not
FAILURES = (RuntimeError, NotImplementedError, AttributeError, TypeError)  # of operators that are missing or changed

Attend = Callable[[Tensor], Tensor]
_decided: dict[tuple[torch.device, torch.dtype, int], str] = {}


def takes_packed(qkv: Tensor, packing: Packing) -> bool:
    """Whether queries, keys and values (B, P+S, 3, nh, hs) take packed attention, by the route that was asked for."""
    device, dtype, (heads, size) = qkv.device, qkv.dtype, qkv.shape[-2:]
    if packing.route == AUTO:
        return attention_route(device, dtype, size, packing, heads) == PACKED
    return packing.route == PACKED and can_attend_packed(device, dtype, size)


def attention_route(
    device: torch.device, dtype: torch.dtype, size: int, packing: Packing | None = None, heads: int = 1
) -> str:
    """Return PACKED or MASK for heads of this size, found out at the first call and kept for the rest of the process.

    Packed attention is taken where there is a kernel that is as exact as a mask (``check``), and on CUDA where it is
    faster too, if ``packing`` and ``heads`` say at which shape.
    """
    if not can_attend_packed(device, dtype, size):
        return MASK
    key = device, dtype, size
    if key not in _decided:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return MASK  # nothing may be tried out while a graph is recorded
        _decided[key] = _decide(device, dtype, size, packing, heads)
        log.info("attention in training: %s (heads of %d in %s on %s)", _decided[key], size, dtype, device)
    return _decided[key]


def _decide(device: torch.device, dtype: torch.dtype, size: int, packing: Packing | None, heads: int) -> str:
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            check(device, dtype, size)
            if device.type != "cuda" or packing is None:
                return PACKED
            return _faster(device, dtype, size, packing, heads)
    except FAILURES as error:
        reason = str(error).partition("\n")[0]
        log.warning("packed attention is not used: %s; attention takes a mask for the rest of the run", reason)
        return MASK


def check(device: torch.device, dtype: torch.dtype, size: int) -> None:
    """Let both routes attend on a small random case; raise RuntimeError where packed attention is worse than the mask.

    The errors are those of output and gradient against a mask in float32 (float64 for wider types), relative to it.
    """
    packing, padding = _small_case(device)
    random = torch.Generator().manual_seed(0)  # the global one is left as it is
    shape = (2, padding.shape[1], 3, 2, size)
    exact_type = torch.float32 if dtype.itemsize < 4 else torch.float64
    qkv = torch.randn(shape, generator=random, dtype=exact_type).to(device)
    grad = torch.randn(*shape[:2], 2 * size, generator=random, dtype=exact_type).to(device)
    grad[padding] = 0

    def run(attend: Attend, dtype: torch.dtype) -> list[Tensor]:
        x = qkv.to(dtype).requires_grad_()
        out = attend(x)
        (gradient,) = torch.autograd.grad(out, x, grad.to(out.dtype))
        return [part[~padding].to(exact_type) for part in (out.detach(), gradient)]

    packed, mask = _routes(packing)
    wanted = run(mask, exact_type)
    errors = [
        [((ours - exact).norm() / exact.norm()).item() for ours, exact in zip(run(attend, dtype), wanted, strict=True)]
        for attend in (packed, mask)
    ]
    for what, ours, theirs in zip(("output", "gradient"), *errors, strict=True):
        if not ours <= max(WORSE * theirs, NEGLIGIBLE):  # NaN is not
            raise RuntimeError(
                f"its {what} in {dtype} on {device} is off by {ours:.1e}, and the mask's by {theirs:.1e}"
            )


def _small_case(device: torch.device) -> tuple[Packing, Tensor]:
    """Two rows of uneven captions after a prefix of 21 tokens, and which places are padding, bool (2, P+S)."""
    lengths, n_prefix, length = [[3, 1, 5], [2]], 21, 10
    slots = torch.full((2, 3, 5), -1)
    owner = torch.zeros(2, n_prefix + length, dtype=torch.long)  # 0 the prefix, then the captions; -1 padding
    owner[:, n_prefix:] = -1
    for row, counts in enumerate(lengths):
        start = 0
        for number, count in enumerate(counts):
            slots[row, number, :count] = torch.arange(start, start + count)
            owner[row, n_prefix + start : n_prefix + start + count] = number + 1
            start += count
    seen = (owner[:, None] == owner[..., None]) | (owner[:, None] == 0)  # (2, P+S, P+S)
    mask = (seen & torch.ones_like(seen).tril())[:, None].to(device)
    return Packing(n_prefix, slots.to(device), length, lambda: mask), (owner < 0).to(device)


def _routes(packing: Packing) -> tuple[Attend, Attend]:
    """Both ways from qkv (B, P+S, 3, nh, hs) to (B, P+S, C): packed, and by the mask."""

    def by_mask(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.additive(q.dtype))
        return out.transpose(1, 2).flatten(2)

    return lambda qkv: PackedAttention.apply(qkv, packing), by_mask


def _faster(device: torch.device, dtype: torch.dtype, size: int, packing: Packing, heads: int) -> str:
    """Return the route that is faster at the shape of a step, forward and backward."""
    rows = packing.n_prefix + packing.length
    qkv = torch.ones(len(packing.slots), rows, 3, heads, size, dtype=dtype, device=device, requires_grad=True)
    grad = torch.ones(len(packing.slots), rows, heads * size, dtype=dtype, device=device)

    def seconds(attend: Attend, runs: int) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(runs):
            torch.autograd.grad(attend(qkv), qkv, grad)
        torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / runs

    both = dict(zip((PACKED, MASK), _routes(packing), strict=True))
    for attend in both.values():
        seconds(attend, 1)  # what the first run costs only once
    taken = {route: seconds(attend, RUNS) for route, attend in both.items()}
    log.info("attention of a layer: packed %.3f ms, mask %.3f ms", *(1e3 * taken[route] for route in (PACKED, MASK)))
    return min(taken, key=taken.__getitem__)
