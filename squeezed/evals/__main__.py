"""`python -m squeezed.evals`, the same as `squeezed eval`."""

import sys

from squeezed.cli import main

sys.exit(main(["eval", *sys.argv[1:]]))
