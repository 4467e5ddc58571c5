"""Arithmetic behind one signature. This file alone validates and chooses an implementation."""
