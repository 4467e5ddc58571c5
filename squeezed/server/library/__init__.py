"""The contexts of a directory: found, named, noted, kept in memory."""
