"""Layers, keys and checks for tests and benchmarks, ours and those of other implementations."""
