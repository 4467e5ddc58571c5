"""Asking an open context: chats, the passages an answer came from, and what it read."""
