"""Convolutional networks defined in Python and trained by CUDA kernels."""

__version__ = "0.1.0"
