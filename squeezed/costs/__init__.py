"""What a context costs in bytes and memory, before anything runs and after."""
