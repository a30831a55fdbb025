"""Triton kernels for GPUs. `attention.py` plans the launches; docs/gpu.md explains the kernels."""
