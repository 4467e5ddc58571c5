"""Squeezed Attention: cheap questions over long fixed documents (arXiv 2411.09688)."""
