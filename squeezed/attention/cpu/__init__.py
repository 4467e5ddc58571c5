"""The whole method on the CPU: Numba for few query rows, matrix products for many."""

from squeezed.attention.cpu.attention import attend

__all__ = ["attend"]
