"""Accuracy of sparse-attention methods: suites, one runner, one report."""
