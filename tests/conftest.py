"""Triton decides when a kernel is defined whether to interpret it: before any test imports one."""

import interpreter  # noqa: F401
