"""Files that people upload, as text."""
