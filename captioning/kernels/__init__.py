"""Operators that torch has and its modules do not use; each has a ``can_…`` that says whether it runs here.

packed_attention  captions packed after one image prefix, by fused attention kernels; packed_cuda: on CUDA
attention_route   whether these are used, or a mask (attention_mask)
onednn            linear layers by oneDNN on CPUs
"""

from captioning.kernels.onednn import ReorderedLinear, can_reorder
from captioning.kernels.packed_attention import PackedAttention, can_attend_packed
from captioning.kernels.packing import Packing

__all__ = ["PackedAttention", "Packing", "ReorderedLinear", "can_attend_packed", "can_reorder"]
