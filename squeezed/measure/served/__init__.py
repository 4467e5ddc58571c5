"""What a server under vLLM does with many requests at once, seen from outside."""
