"""Fused attention in Triton: one tiled pass gives output and statistics, for CUDA devices."""
