"""Clustering on an NVIDIA GPU, written in Triton."""
