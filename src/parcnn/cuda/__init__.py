"""The CUDA executor: our own kernels, compiled by NVRTC, run through PyCUDA. Importing this package imports no CUDA."""
