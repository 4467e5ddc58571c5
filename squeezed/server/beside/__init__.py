"""The same routes inside vLLM's own server: its engine answers, its API stays as it is."""
