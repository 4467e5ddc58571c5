"""The whole method in plain PyTorch: the mathematics, and the oracle of every faster version."""

from squeezed.attention.reference.attention import attend

__all__ = ["attend"]
