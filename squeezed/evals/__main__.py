"""`python -m squeezed.evals`, the same as `squeezed eval`."""

from squeezed.evals.cli import app

app()
