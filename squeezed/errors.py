"""Errors a user can act on: one line that names the argument, what came, and the remedy."""


class SqueezedError(ValueError):
    """Bad input. The message is one line; the command line prints it and exits with status 2."""


class UnsupportedModelError(SqueezedError):
    """The model computes attention in a way that this package does not reproduce."""


class ContextFileError(SqueezedError):
    """A saved context is missing, altered, truncated, or was made by other means."""
