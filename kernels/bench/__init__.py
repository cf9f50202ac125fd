"""``python -m kernels.bench``: our attention against PyTorch's, and what its statistics cost."""
