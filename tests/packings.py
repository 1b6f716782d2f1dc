"""Packings with their masks built token by token, and CUDA's attention kernel played by the CPU's."""

import torch

from captioning.kernels import packed_attention
from captioning.kernels.packed_attention import Packing


def packing_of(lengths, prefix, longer=0):
    """Captions of these lengths after a prefix: the packing, its mask built token by token, and what is padding."""
    size = max(map(sum, lengths)) + longer
    slots = torch.full((len(lengths), max(map(len, lengths)), max(map(max, lengths))), -1)
    mask = torch.eye(prefix + size, dtype=torch.bool).repeat(len(lengths), 1, 1, 1)
    mask[..., :prefix, :prefix] = torch.ones(prefix, prefix).tril().bool()
    padding = torch.ones(len(lengths), size, dtype=torch.bool)
    for row, counts in enumerate(lengths):
        start = 0
        for number, count in enumerate(counts):
            slots[row, number, :count] = torch.arange(start, start + count)
            for i in range(count):
                mask[row, 0, prefix + start + i, :prefix] = True
                mask[row, 0, prefix + start + i, prefix + start : prefix + start + i + 1] = True
            padding[row, start : start + count] = False
            start += count
    return Packing(prefix, slots, size, lambda: mask), mask, padding


class CudaFlash:
    """CUDA's fused kernel played by the CPU's: other arguments, other results, and causal from the last key on."""

    def __init__(self):
        self.calls = 0

    def forward(self, q, k, v, dropout, causal):
        assert not causal or q.shape[2] == k.shape[2]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal)
        self.calls += 1
        return out, lse, "lengths of q", "lengths of k", q.shape[2], k.shape[2], "seed", "offset", torch.empty(0)

    def backward(self, grad, q, k, v, out, lse, lq, lk, nq, nk, dropout, causal, seed, offset):
        assert (lq, lk, nq, nk) == ("lengths of q", "lengths of k", q.shape[2], k.shape[2])
        assert (seed, offset, lse.is_contiguous()) == ("seed", "offset", True)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, dropout, causal)


def play_cuda(monkeypatch):
    """Let packed attention on the CPU take the path of CUDA; return the kernel, which counts its forward calls."""
    flash = CudaFlash()
    monkeypatch.setattr(packed_attention, "is_cpu", lambda x: False)
    monkeypatch.setattr("decoder.can_attend_packed", lambda qkv: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash.forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", flash.backward)
    return flash
