"""Which way packed captions attend: by the fused kernels of `packed_attention`, or by torch's own with a mask.

The fused kernels are called by private names, and what they do on an untested card is not known. So before
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
        log.info("captions after one image attend: %s (heads of %d in %s on %s)", _decided[key], size, dtype, device)
    return _decided[key]


def _decide(device: torch.device, dtype: torch.dtype, size: int, packing: Packing | None, heads: int) -> str:
    try:
        check(device, dtype, size)
        return PACKED if device.type != "cuda" or packing is None else _faster(Trial(packing, heads, size), dtype)
    except FAILURES as error:
        reason = str(error).partition("\n")[0]
        log.warning("packed attention is not used: %s; attention takes a mask for the rest of the run", reason)
        return MASK


class Trial:
    """Random queries, keys, values and gradients for both routes; no global random state is used or changed.

    Args:
        packing: where B rows have their captions, on the device that is tried.
        heads: how many, nh.
        size: of a head, hs.
        padding: which places are, bool (B, P+S); nothing is asked of these, and the gradient is zero there.
    """

    def __init__(self, packing: Packing, heads: int, size: int, padding: Tensor | None = None) -> None:
        self.packing, slots = packing, packing.slots
        shape = len(slots), packing.n_prefix + packing.length
        random = torch.Generator().manual_seed(0)
        self.device, self.padding = slots.device, torch.zeros(shape, dtype=torch.bool) if padding is None else padding
        self.qkv = torch.randn(*shape, 3, heads, size, generator=random, dtype=torch.float64)
        self.grad = torch.randn(*shape, heads * size, generator=random, dtype=torch.float64)
        self.grad[self.padding] = 0

    def runs(self, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """Return for each route what runs it forward and backward in ``dtype``, to output and gradient."""
        grad = self.grad.to(dtype).to(self.device)
        x = self.qkv.to(dtype).to(self.device).requires_grad_()

        def run(attend: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
                out = attend(x)
                return out.detach(), *torch.autograd.grad(out, x, grad)

        return {PACKED: lambda: run(self._packed), MASK: lambda: run(self._masked)}

    def errors(self, dtype: torch.dtype) -> dict[str, list[float]]:
        """Return how far output and gradient of each route are off, relative to float32's by the mask.

        For wider types they are held against float64's.
        """
        wanted = self.runs(torch.float32 if dtype.itemsize < 4 else torch.float64)[MASK]()
        return {
            route: [self._apart(one, exact) for one, exact in zip(run(), wanted, strict=True)]
            for route, run in self.runs(dtype).items()
        }

    def _packed(self, qkv: Tensor) -> Tensor:
        return PackedAttention.apply(qkv, self.packing)

    def _masked(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.packing.additive(q.dtype))
        return out.transpose(1, 2).flatten(2)

    def _apart(self, one: Tensor, exact: Tensor) -> float:
        one, exact = (part.cpu()[~self.padding].double() for part in (one, exact))
        return ((one - exact).norm() / exact.norm()).item()


def check(device: torch.device, dtype: torch.dtype, size: int) -> None:
    """Let both routes attend on a small random case; raise RuntimeError where packed attention is worse than the mask.

    Two rows of uneven captions follow a prefix of 21 tokens.
    """
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
    packing = Packing(n_prefix, slots.to(device), length, lambda: mask)
    errors = Trial(packing, 2, size, owner < 0).errors(dtype)
    for what, ours, theirs in zip(("output", "gradient"), errors[PACKED], errors[MASK], strict=True):
        if not ours <= max(WORSE * theirs, NEGLIGIBLE):  # NaN is not
            of_both = f"is off by {ours:.1e}, and the mask's by {theirs:.1e}"
            raise RuntimeError(f"its {what} in {dtype} on {device} {of_both}")


def _faster(trial: Trial, dtype: torch.dtype) -> str:
    """Return the route that is faster on CUDA, forward and backward."""

    def seconds(run: Callable[[], tuple[Tensor, ...]], count: int) -> float:
        torch.cuda.synchronize(trial.device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        torch.cuda.synchronize(trial.device)
        return (time.perf_counter() - start) / count

    runs = trial.runs(dtype)
    for run in runs.values():
        seconds(run, 1)  # what the first run costs only once
    taken = {route: seconds(run, RUNS) for route, run in runs.items()}
    log.info("attention of a layer: packed %.3f ms, mask %.3f ms", 1e3 * taken[PACKED], 1e3 * taken[MASK])
    return min(taken, key=taken.__getitem__)
