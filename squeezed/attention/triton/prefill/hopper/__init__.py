"""Prefill attention for Hopper GPUs: warps with roles, in Gluon."""
