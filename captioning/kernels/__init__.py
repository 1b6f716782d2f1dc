"""Operators that torch has and its modules do not use; each has a ``can_…`` that says whether it runs here.

packed_attention  captions packed after one image prefix, by fused attention kernels
onednn            linear layers by oneDNN on CPUs
"""

from captioning.kernels.onednn import ReorderedLinear, can_reorder
from captioning.kernels.packed_attention import PackedAttention, Packing, can_attend_packed

__all__ = ["PackedAttention", "Packing", "ReorderedLinear", "can_attend_packed", "can_reorder"]
