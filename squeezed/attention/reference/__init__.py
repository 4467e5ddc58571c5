"""The whole method in plain PyTorch: the mathematics, and the oracle of every faster version."""

from squeezed.attention.reference.attention import attend, attend_suffix

__all__ = ["attend", "attend_suffix"]
