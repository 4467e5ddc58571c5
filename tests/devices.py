"""Marks what needs a GPU among the values of a parametrised test; conftest skips it elsewhere."""

import pytest


def gpu(*values, **needs):
    """A parameter whose test runs on a GPU alone; `needs` as in the marker of that name."""
    return pytest.param(*values, marks=pytest.mark.gpu(**needs))
