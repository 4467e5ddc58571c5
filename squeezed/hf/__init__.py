"""Squeezed attention as Transformers sees it: an attention function, a mask and a cache."""
