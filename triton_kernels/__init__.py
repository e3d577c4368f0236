"""Triton kernels, one module an op, installed as `rayfuse.triton_kernels`."""
