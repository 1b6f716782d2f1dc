"""Packings with their masks built token by token, and CUDA's attention kernel played by the CPU's."""

import itertools
from types import SimpleNamespace

import torch

from captioning.kernels import packed_attention
from captioning.kernels.packing import Packing


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
    """CUDA's fused kernels played by the CPU's: other arguments, other results, and causal from the last key on."""

    def __init__(self):
        self.calls = 0

    def forward(self, q, k, v, dropout, causal):
        assert not causal
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal)
        self.calls += 1
        return out, lse, "lengths of q", "lengths of k", q.shape[2], k.shape[2], "seed", "offset", torch.empty(0)

    def backward(self, grad, q, k, v, out, lse, lq, lk, nq, nk, dropout, causal, seed, offset):
        assert (lq, lk, nq, nk) == ("lengths of q", "lengths of k", q.shape[2], k.shape[2])
        assert (seed, offset, lse.is_contiguous()) == ("seed", "offset", True)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, q, k, v, out, lse, dropout, causal)

    def forward_sequences(self, q, k, v, begins, same, longest, again, dropout, causal, debug):
        """One sequence after another; q, k, v (rows, nh, hs) to out and lse (nh, rows)."""
        assert (begins is same, longest == again, dropout, causal, debug) == (True, True, 0.0, True, False)
        self.calls += 1
        lse = torch.empty(q.shape[1], len(q), dtype=torch.promote_types(q.dtype, torch.float32))
        out = torch.empty_like(v)
        for rows in sequences(begins, longest, len(q)):
            parts = (x[None, rows].transpose(1, 2) for x in (q, k, v))
            one, one_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, dropout, causal)
            out[rows], lse[:, rows] = one[0].transpose(0, 1), one_lse[0]
        return out, lse, "random", "unused", torch.empty(0)

    def backward_sequences(
        self, grad, q, k, v, out, lse, begins, same, longest, again, dropout, causal, random, unused
    ):
        assert (begins is same, longest == again, dropout, causal) == (True, True, 0.0, True)
        assert (random, unused, lse.is_contiguous()) == ("random", "unused", True)
        grads = [torch.empty_like(v) for _ in range(3)]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for rows in sequences(begins, longest, len(q)):
            parts = (x[None, rows].transpose(1, 2) for x in (grad, q, k, v, out))
            for whole, part in zip(grads, kernel(*parts, lse[None, :, rows], dropout, causal), strict=True):
                whole[rows] = part[0].transpose(0, 1)
        return grads


def sequences(begins, longest, total):
    """The rows of each sequence that is not empty; they cover all rows, and none is longer than ``longest``."""
    assert (begins.dtype, begins[0], begins[-1]) == (torch.int32, 0, total)
    bounds = begins.tolist()
    for start, end in itertools.pairwise(bounds):
        assert 0 <= end - start <= longest
        if start < end:
            yield slice(start, end)


def play_cuda(monkeypatch):
    """Let packed attention on the CPU take the path of CUDA; return the kernel, which counts its forward calls."""
    flash = CudaFlash()
    monkeypatch.setattr(packed_attention, "is_cpu", lambda device: False)
    monkeypatch.setattr("decoder.takes_packed", lambda qkv, packing: True)
    played = {
        "_scaled_dot_product_flash_attention": flash.forward,
        "_scaled_dot_product_flash_attention_backward": flash.backward,
        "_flash_attention_forward": flash.forward_sequences,
        "_flash_attention_backward": flash.backward_sequences,
    }
    for name, kernel in played.items():
        monkeypatch.setattr(torch.ops.aten, name, SimpleNamespace(default=kernel))
    return flash
