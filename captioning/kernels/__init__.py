"""Fused kernels that torch has and its modules do not use."""
