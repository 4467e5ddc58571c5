"""The engine over Transformers: rows of one context share each step."""
