"""The whole method in plain PyTorch: the mathematics, and the oracle of every faster version."""

from squeezed.ops.reference.attention import attend

__all__ = ["attend"]
