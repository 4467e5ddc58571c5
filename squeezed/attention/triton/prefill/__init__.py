"""The user's tokens over a context on a GPU: lookup by blocks, a plan of tiles, attention."""
