"""Benchmarks that the command line runs; each prints its distance from the hardware's limit."""
