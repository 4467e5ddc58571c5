"""A saved context: a directory written whole or not at all, and checked before it is used."""
