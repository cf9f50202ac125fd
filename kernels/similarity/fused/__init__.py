"""Similarity attention in Triton: operators, launches and kernels for any card from Ampere on."""
