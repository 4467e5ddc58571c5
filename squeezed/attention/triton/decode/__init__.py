"""One new token over a context on a GPU, in four launches."""
