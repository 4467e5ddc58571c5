"""The demo: a small model, a public-domain document, three questions, dense beside squeezed."""
