"""Kernels for NVIDIA GPUs, written in Triton; one launcher per operation."""
