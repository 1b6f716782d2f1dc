"""What the rehearsal itself must notice, or no case of it means anything."""

from __future__ import annotations

from collections.abc import Callable

from fake_gpu import FakeGpu  # first: it loads the hooks before torch  # isort: skip

import torch
import torch.nn.functional as F
from stage import Facts, described

from captioning.device import has_bf16, pick_device

WAITS: dict[str, Callable[[torch.Tensor, FakeGpu], object]] = {
    "item": lambda x, gpu: x.sum().item(),
    "truth": lambda x, gpu: bool((x > 0).all()),
    "list": lambda x, gpu: x.tolist(),
    "cpu": lambda x, gpu: x.cpu(),
    "copy to the CPU": lambda x, gpu: torch.empty(4, 4).copy_(x),
    "copy of pageable memory": lambda x, gpu: torch.ones(4, 4).to(x.device, non_blocking=True),
    "copy that is waited for": lambda x, gpu: torch.ones(4, 4).pin_memory().to(x.device),
    "copy into a buffer": lambda x, gpu: x.copy_(torch.ones(4, 4)),
    "a tensor made there": lambda x, gpu: torch.tensor([1, 2, 3], device=x.device),
    "boolean index": lambda x, gpu: x[x > 0],
    "list as index": lambda x, gpu: x[[0, 1]],
    "nonzero": lambda x, gpu: (x > 0).nonzero(),
    "synchronize": lambda x, gpu: torch.cuda.synchronize(),
    "event": lambda x, gpu: torch.cuda.current_stream().record_event().synchronize(),
}
NO_WAITS: dict[str, Callable[[torch.Tensor, FakeGpu], object]] = {
    "copy of pinned memory": lambda x, gpu: torch.ones(4, 4).pin_memory().to(x.device, non_blocking=True),
    "memory pinned at once": lambda x, gpu: torch.ones(4, pin_memory=True).to(x.device, non_blocking=True),
    "number beside a tensor": lambda x, gpu: x * torch.tensor(2.0) + 1.0,
    "index on the device": lambda x, gpu: x[torch.arange(2, device=x.device)],
    "work on the CPU": lambda x, gpu: torch.ones(3).nonzero().tolist(),
}
MISMATCHES: dict[str, Callable[[torch.Tensor, FakeGpu], object]] = {
    "device": lambda x, gpu: x + torch.ones(4, 4),
    "shape": lambda x, gpu: x @ torch.ones(5, 4, device=x.device),
    "type of a product": lambda x, gpu: x @ x.bfloat16(),
    "type of a mask": lambda x, gpu: F.scaled_dot_product_attention(*[x[None, None].half()] * 3, attn_mask=x),
}


def check(gpu: FakeGpu) -> Facts:
    """Return as wrong whatever goes unnoticed, or is noticed without being there."""
    wrong = []
    with gpu.rehearsed() as ledger:
        device = pick_device("cuda")
        x = torch.ones(4, 4, device=device)
        for expected, things in ((1, WAITS), (0, NO_WAITS)):
            for name, do in things.items():
                before = ledger.waits.total()
                do(x, gpu)
                if ledger.waits.total() - before != expected:
                    wrong.append(f"{name}: {ledger.waits.total() - before} waits")
        for name, do in MISMATCHES.items():
            try:
                do(x, gpu)
            except (RuntimeError, AssertionError):
                continue
            wrong.append(f"no mismatch of {name}")
        before = ledger.kernels.total()
        (x.view(16).relu() + 1).T.expand(2, 16)
        if ledger.kernels.total() - before != 2:
            wrong.append(f"{ledger.kernels.total() - before} kernels for two")
        if has_bf16(device) != (gpu.capability >= (8, 0)):
            wrong.append("bf16 does not follow from the capability")
    return described(ledger.kernels, ledger.waits, wrong)
